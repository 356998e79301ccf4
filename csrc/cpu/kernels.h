// The loops on CPU: what they get besides the arguments of the primitives, and the table of them.
//
// Nothing here or in the loops instantiates a template of the standard library. The loops are compiled for processors
// newer than the one at hand may be, and the linker keeps one copy of an inline function for all files.
#pragma once

#include "../primitives.h"

namespace gam::cpu {

// Elements [begin, begin + length) of a leaf.
struct Piece {
  int64_t leaf, begin, length;
};

// Pieces [begin, end) of a plan.
struct Range {
  int64_t begin, end;
};

struct Work {
  static constexpr int kMaxLists = 9;

  Dtype dtype;
  const Leaf* leaves;
  const Piece* pieces;
  List lists[kMaxLists];  // those that are read or written, as far as they are not null
};

// The loops, compiled for one instruction set. Sums are one double a piece of the plan, or kSums for inner products.
struct Kernels {
  const char* isa;
  void (*square_norm)(const Work&, const SquareNorm&, Range, double* sums);
  void (*inner_products)(const Work&, const InnerProducts&, Range, double* sums);
  void (*perturb)(const Work&, const Perturbation&, Range);
  void (*copy)(const Work&, const Copy&, Range);
  void (*materialise)(const Work&, const Materialise&, Range);
  void (*update)(const Work&, const Update&, Range);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace gam::cpu
