// The primitives as the loops and kernels see them: plain structures of numbers and pointers, all of them host memory
// but what `data`, `square` and `products` point to.
//
// Nothing here instantiates a template of the standard library (see cpu/kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace gam {

enum class Dtype : uint8_t { kDouble, kFloat, kBFloat16, kHalf };

inline constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

inline constexpr int kMaxTerms = 3;
inline constexpr int kSums = 3;  // ‖u‖², ⟨m,u⟩, ‖m‖²

// One parameter. All of a call have one dtype, and are dense in memory: each of the lists has, for a leaf, an array of as
// many elements in the same order.
struct Leaf {
  int group;
  int64_t numel;
};

using List = void* const*;       // by leaf, the array; the list is null where the primitive has no such argument
using PerGroup = const double*;  // by parameter group

// Σ_t factor_t x_t with factor_t = s (p_t + κ q_t); for each group the terms that take part, in order.
struct Combination {
  struct Group {
    int terms = 0;
    int index[kMaxTerms] = {};
    double p[kMaxTerms] = {}, q[kMaxTerms] = {};
  };
  List lists[kMaxTerms] = {};
  const Group* groups = nullptr;

  // What κ and s follow from (formulas: math.h). On a CPU the factors have been computed: q is 0, and this is empty.
  const double* products = nullptr;  // `rows` times ‖u‖², ⟨m,u⟩, ‖m‖², in memory of the device
  int rows = 0;
  PerGroup gamma = nullptr;  // by row
  bool project = false, clip = false;
  double limit = 0;
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
  PerGroup radius = nullptr, eta = nullptr;                           // eta: null if not adaptive
  const double* square = nullptr;  // on a device; without it the radius is the factor
  bool save = false;               // copy the parameters to the backup first
  bool from_start = false;         // the origin is the backup
  bool stream = false;
  Folding fold;  // without lists: none
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
  unsigned char unused[6] = {};  // no padding: tables of these are compared byte by byte
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
  unsigned char unused[5] = {};
};

struct AdamStep {
  Combination d;
  List theta = nullptr, params = nullptr, average = nullptr, square = nullptr, largest = nullptr;
  const double *step_size = nullptr, *root_correction = nullptr;  // by leaf
  const AdamGroup* groups = nullptr;
  bool stream = false;
};

}  // namespace gam
