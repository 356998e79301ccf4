#include "includes.h"

#define GAM_ISA baseline
#if defined(GAM_X86)
#define GAM_NO_FMA  // any x86-64; arm64 has it
#endif
#include "isa.inl"
