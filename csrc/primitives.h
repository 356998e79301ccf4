// The primitives as the loops and kernels see them: plain structures of numbers and pointers. All are in host memory,
// except the targets of `data`, `square` and `products`.
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

// One parameter. All parameters of a call have one dtype and are dense in memory. For a leaf, each list has an array of
// as many elements in the same order.
struct Leaf {
  int group;
  int64_t numel;
};

using List = void* const*;       // the array of each leaf; null if the argument is missing
using PerGroup = const double*;  // by parameter group

// The terms of Σ_t factor_t x_t that a group uses, in order, with factor_t = s (p_t + κ q_t). On a CPU the factors are
// already computed, and q is 0.
struct GroupTerms {
  int terms = 0;
  int index[kMaxTerms] = {};
  double p[kMaxTerms] = {}, q[kMaxTerms] = {};
};

// Inputs of κ and s on a device (formulas: math.h).
struct Scaling {
  const double* products = nullptr;  // `rows` times ‖u‖², ⟨m,u⟩, ‖m‖², in memory of the device
  int rows = 0;
  bool project = false, clip = false;
  double limit = 0;
};

// Each primitive names its lists by an enumeration, whose last entry is their number.

struct Sums {
  enum { kTheta, kTerms, kLists = kTerms + kMaxTerms };
  List lists[kLists] = {};                      // theta: may be null
  const GroupTerms *u = nullptr, *m = nullptr;  // by group, with the same terms; without m only ‖u‖²
  PerGroup eta = nullptr;                       // given with theta; weighs u
};

struct Perturbation {
  enum { kParams, kBackup, kA, kB, kInto, kOther, kLists };
  List lists[kLists] = {};                                             // b and the lists of the fold may be null
  PerGroup radius = nullptr, eta = nullptr, k = nullptr, l = nullptr;  // eta: null if not adaptive; k, l: with a fold
  PerGroup multiple = nullptr;     // device only, may be null; the factor is radius / (√square + ξ) + multiple
  const double* square = nullptr;  // device only; without it the radius is the factor
  bool by_group = false;           // one square per group
  bool save = false;               // copy the parameters to the backup first
  bool from_start = false;         // the origin is the backup
  bool stream = false;
};

struct Copy {
  enum { kFrom, kTo, kLists };
  List lists[kLists] = {};
  bool stream = false;
};

enum class Formula : uint8_t;  // of math.h

inline constexpr int kMaxState = 3, kMaxOfGroup = 6, kMaxOfLeaf = 2;  // maxima over all formulas

struct OfGroup {
  double numbers[kMaxOfGroup] = {};
};
struct OfLeaf {
  double numbers[kMaxOfLeaf] = {};
};

// A step of a base optimizer along d. In each state list a leaf has its array, or null, which means zeros that are not
// stored.
struct Update {
  enum { kParams, kTheta, kState, kTerms = kState + kMaxState, kLists = kTerms + kMaxTerms };
  List lists[kLists] = {};  // theta may be params; the state lists are those of the formula
  Formula formula = {};
  const GroupTerms* d = nullptr;  // by group
  Scaling scaling;
  PerGroup gamma = nullptr;  // by row of products
  const OfGroup* groups = nullptr;
  const OfLeaf* options = nullptr;  // the distinct ones
  size_t count = 0;                 // number of options
  const int32_t* option = nullptr;  // for each leaf, its index among them
  bool stream = false;
};

}  // namespace gam
