// The loops, compiled for the instruction set that the including file chooses and names GAM_ISA.

#include "../elements.h"
#include "../math.h"

namespace gam::cpu::GAM_ISA {
namespace {

// clang-format off: each needs the files before it
#include "tiles.inl"
#include "pieces.inl"
#include "sums.inl"
#include "moves.inl"
#include "updates.inl"
// clang-format on

}  // namespace

#define GAM_QUOTE(text) #text
#define GAM_NAME(isa) GAM_QUOTE(isa)
const Kernels kKernels = {GAM_NAME(GAM_ISA), sums, perturb, copy, update};

}  // namespace gam::cpu::GAM_ISA
