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

// One parameter. All of a call have one dtype, and are dense in memory: each of the lists has, for a leaf, an array of
// as many elements in the same order.
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

enum class Formula : uint8_t;  // of math.h

inline constexpr int kMaxState = 3, kMaxOfGroup = 6, kMaxOfLeaf = 2;  // of all formulas

struct OfGroup {
  double numbers[kMaxOfGroup] = {};
};
struct OfLeaf {
  double numbers[kMaxOfLeaf] = {};
};

// A step of a base optimizer along d. A leaf has its array in each list of its state, or null, which stands for zeros
// that are not kept.
struct Update {
  Formula formula = {};
  Combination d;
  List theta = nullptr, params = nullptr;  // theta may be params
  List state[kMaxState] = {};              // as many as the formula has; the others null
  const OfGroup* groups = nullptr;
  const OfLeaf* options = nullptr;  // the few that differ
  size_t count = 0;                 // of the options
  const int32_t* option = nullptr;  // by leaf, its place among them
  bool stream = false;
};

}  // namespace gam
