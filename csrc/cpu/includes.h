// Includes of the loops, before a file changes the compiler's target (see kernels.h).
#pragma once

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define GAM_X86
#include <immintrin.h>
#endif
