#include "includes.h"

#if defined(GAM_X86)
#define GAM_ISA avx2
#define GAM_AVX2
#define GAM_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif
#include "isa.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif  // GCC instantiates templates at the end of the file, and takes the target from there
#endif
