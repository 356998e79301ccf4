// The loops on CPU: their arguments besides those of the primitives, and the table of functions.
//
// The loops must not instantiate a template of the standard library. They are compiled for processors that may be newer
// than the present one, and the linker keeps one copy of an inline function for all files.
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
  Dtype dtype;
  const Leaf* leaves;
  const Piece* pieces;
  const List* lists;  // the lists of the arguments
  int count;
};

// The loops, compiled for one instruction set. Sums are kSums doubles per piece of the plan; without m only the first
// is written.
struct Kernels {
  const char* isa;
  void (*sums)(const Work&, const Sums&, Range, double* sums);
  void (*perturb)(const Work&, const Perturbation&, Range);
  void (*copy)(const Work&, const Copy&, Range);
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
