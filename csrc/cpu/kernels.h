// The primitives on CPU as the loops see them: plain structures of numbers and pointers.
//
// Nothing here or in the loops instantiates a template of the standard library. The loops are compiled for processors
// newer than the one at hand may be, and the linker keeps one copy of an inline function for all files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gam::cpu {

enum class Dtype : uint8_t { kDouble, kFloat, kBFloat16, kHalf };

inline constexpr int kMaxDims = 64;  // torch's own limit
inline constexpr int kMaxTerms = 3;
inline constexpr int kMaxFolds = 2;
inline constexpr int kSums = 3;  // ‖u‖², ⟨m,u⟩, ‖m‖²

// One parameter.
struct Leaf {
  Dtype dtype;
  int group, dims;
  int64_t numel;
  const int64_t* sizes;
};

// Elements [begin, begin + length) of a leaf.
struct Piece {
  int64_t leaf, begin, length;
};

// Pieces [begin, end) of a plan.
struct Range {
  int64_t begin, end;
};

struct Work {
  const Leaf* leaves;
  const Piece* pieces;
};

// One tensor of a list. Dense arrays of a leaf are walked in the order of memory, which is then the same for all of the
// leaf's arrays; with strides, elements are found one by one in logical order.
struct Array {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

using List = const Array*;       // by leaf; null where the primitive has no such argument
using PerGroup = const double*;  // by parameter group

// Σ_t factor_t x_t; for each group the terms that take part, in order.
struct Combination {
  struct Group {
    int terms = 0;
    int index[kMaxTerms] = {};
    double factor[kMaxTerms] = {};
  };
  List lists[kMaxTerms] = {};
  const Group* groups = nullptr;
};

struct SquareNorm {
  List a = nullptr, b = nullptr, theta = nullptr;  // b, theta: may be null
  PerGroup eta = nullptr;                          // with theta
};

struct Folding {
  List into = nullptr, other = nullptr;
  PerGroup k = nullptr, l = nullptr;
};

struct Perturbation {
  List params = nullptr, backup = nullptr, a = nullptr, b = nullptr;  // b may be null
  PerGroup factor = nullptr, eta = nullptr;                           // eta: null if not adaptive
  bool save = false;                                                  // copy the parameters to the backup first
  bool from_start = false;                                            // the origin is the backup
  bool stream = false;
  Folding folds[kMaxFolds];
  int fold_count = 0;
};

struct InnerProducts {
  Combination u, m;  // the same terms of the same lists; m without groups: only ‖u‖²
};

struct Copy {
  List from = nullptr, to = nullptr;
  bool stream = false;
};

struct Materialise {
  Combination d;
  List out = nullptr;
  Copy restore;  // its lists may be null
};

struct SgdGroup {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct SgdStep {
  Combination d;
  List theta = nullptr, params = nullptr, buffer = nullptr;  // theta may be params; an empty buffer: no momentum
  const unsigned char* first = nullptr;                      // by leaf
  const SgdGroup* groups = nullptr;
  bool stream = false;
};

struct AdamGroup {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, amsgrad, maximize;
};

struct AdamStep {
  Combination d;
  List theta = nullptr, params = nullptr, average = nullptr, square = nullptr, largest = nullptr;
  const double *step_size = nullptr, *root_correction = nullptr;  // by leaf
  const AdamGroup* groups = nullptr;
  bool stream = false;
};

// The loops, compiled for one instruction set. Sums are one double a piece of the plan, or kSums for inner products.
struct Kernels {
  const char* isa;
  void (*square_norm)(const Work&, const SquareNorm&, Range, double* sums);
  void (*inner_products)(const Work&, const InnerProducts&, Range, double* sums);
  void (*perturb)(const Work&, const Perturbation&, Range);
  void (*copy)(const Work&, const Copy&, Range);
  void (*materialise)(const Work&, const Materialise&, Range);
  void (*sgd)(const Work&, const SgdStep&, Range);
  void (*adam)(const Work&, const AdamStep&, Range);
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
