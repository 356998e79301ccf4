#include "ops.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "call.h"
#include "checks.h"
#include "devices.h"
#include "math.h"

namespace gam {
namespace {

// Below this many bytes tensors that are allocated together share their memory: one allocation of ten thousand.
constexpr size_t kSmallBytes = 1 << 16;
constexpr int64_t kAlignment = 64;  // a cache line

bool is_small(const at::Tensor& tensor) { return tensor.numel() > 0 && tensor.nbytes() < kSmallBytes; }

// Numbers and combinations

void check_count(const Plan& plan, size_t count, const char* name) {
  if (static_cast<int>(count) < plan.groups()) {
    refuse_value(c10::str(name, " must have one entry a parameter group, that is ", plan.groups(), ", got ", count));
  }
}

PerGroup by_group(const Plan& plan, const Numbers& numbers, const char* name) {
  check_count(plan, numbers.size(), name);
  return numbers.data();
}

// What norms and products leave on the device: `columns` numbers in each of one or more rows.
const double* sums_of(const Plan& plan, const at::Tensor& tensor, int64_t columns, const char* name) {
  if (tensor.device() != plan.device() || tensor.scalar_type() != at::kDouble || !tensor.is_contiguous() ||
      tensor.numel() < columns || tensor.numel() % columns != 0 || (columns == 1 && tensor.numel() != 1)) {
    refuse_value(c10::str(name, " must be a contiguous float64 tensor on ", plan.device(), " of ",
                          columns == 1 ? "one number" : "three numbers a parameter group", ", got ", tensor.dtype(),
                          " of shape ", tensor.sizes(), " on ", tensor.device()));
  }
  return tensor.const_data_ptr<double>();
}

void check_coefficients(const Plan& plan, const Direction& d, const std::vector<Numbers>& lists, const char* name) {
  if (lists.size() != d.terms.size()) {
    refuse_value(
        c10::str(name, " must have one list of numbers a term, that is ", d.terms.size(), ", got ", lists.size()));
  }
  for (const Numbers& numbers : lists) by_group(plan, numbers, name);
}

// How many numbers and lists of state a formula has.
struct Counts {
  Formula formula;
  int state, of_group, of_leaf;
};

Counts counts_of(const std::string& name) {
  std::string known;
#define GAM_COUNTS(functor, called)                                                                            \
  if (name == called) {                                                                                        \
    using F = functor<float>;                                                                                  \
    static_assert(F::kState <= kMaxState && int(F::kOfGroup) <= kMaxOfGroup && int(F::kOfLeaf) <= kMaxOfLeaf); \
    return {Formula::k##functor, F::kState, F::kOfGroup, F::kOfLeaf};                                          \
  }                                                                                                            \
  known += std::string(known.empty() ? "" : ", ") + called;
  GAM_UPDATES(GAM_COUNTS)
#undef GAM_COUNTS
  refuse_value(c10::str("formula must be one of ", known, ", got ", name));
}

// Lists of `count` numbers each, as rows of a table.
template <class Row>
std::vector<Row> rows_of(const std::vector<Numbers>& lists, int count, const char* name) {
  std::vector<Row> rows(lists.size());
  for (size_t i = 0; i < lists.size(); ++i) {
    if (static_cast<int>(lists[i].size()) != count) {
      refuse_value(c10::str(name, "[", i, "] must have ", count, " numbers, got ", lists[i].size()));
    }
    std::copy(lists[i].begin(), lists[i].end(), rows[i].numbers);
  }
  return rows;
}

// A combination as the loops take it. Terms whose coefficients are zero are left out, as their elements may be
// anything; `also` keeps terms for another reason.
class Terms {
 public:
  Terms(Call& call, const Plan& plan, const Direction& d, const std::vector<Numbers>* also = nullptr) {
    if (d.terms.empty() || d.terms.size() > kMaxTerms) {
      refuse_value(c10::str("terms must be 1 to ", kMaxTerms, " lists of tensors, got ", d.terms.size()));
    }
    check_coefficients(plan, d, d.p, "p");
    if (d.q) check_coefficients(plan, d, *d.q, "q");
    if (also) check_coefficients(plan, d, *also, "m");
    for (size_t t = 0; t < d.terms.size(); ++t) view_.lists[t] = call.read_last(d.terms[t]);
    const bool on_host = !plan.executor().takes_sums();
    if ((d.q || d.limit) && on_host) find_factors(d);
    groups_.resize(static_cast<size_t>(plan.groups()));
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (size_t t = 0; t < d.terms.size(); ++t) {
        const double p = factors_.empty() ? d.p[t][g] : factors_[t][g];
        const double q = d.q && factors_.empty() ? (*d.q)[t][g] : 0.0;
        if (p != 0.0 || q != 0.0 || (also && (*also)[t][g] != 0.0)) take(t, g, p, q);
      }
      if (groups_[g].terms == 0) take(0, g, 0.0, 0.0);
    }
    view_.groups = groups_.data();
    if ((d.q || d.limit) && !on_host) take_sums(plan, d);
  }
  Terms(const Terms&) = delete;

  const Combination& view() const { return view_; }

  // The same terms with other coefficients.
  std::vector<Combination::Group> groups_with(const std::vector<Numbers>& p) const {
    auto groups = groups_;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int k = 0; k < groups[g].terms; ++k) groups[g].p[k] = p[static_cast<size_t>(groups[g].index[k])][g];
    }
    return groups;
  }

 private:
  void take(size_t t, size_t g, double p, double q) {
    Combination::Group& group = groups_[g];
    group.index[group.terms] = static_cast<int>(t);
    group.p[group.terms] = p;
    group.q[group.terms++] = q;
  }

  // What a device finds out by itself, from the same formulas.
  void find_factors(const Direction& d) {
    if (d.products) refuse_type("products must be numbers on the CPU, got a tensor");
    check_rows(d, d.rows.size());
    double uu = 0.0, um = 0.0, square = 0.0;
    for (const Numbers& row : d.rows) {
      if (row.size() != kSums) refuse_value("products must be three numbers a parameter group");
      uu += row[0], um += row[1];
    }
    const double kappa = d.q ? ratio(um, uu) : 0.0;
    for (size_t r = 0; d.limit && r < d.rows.size(); ++r) {
      const Numbers& row = d.rows[r];
      square += d.q ? square_of_direction(row[0], row[1], row[2], d.gamma[r], kappa) : row[0];
    }
    const double scale = d.limit ? clip_factor(square, *d.limit) : 1.0;
    factors_ = d.p;
    for (size_t t = 0; t < d.p.size(); ++t) {
      for (size_t g = 0; g < d.p[t].size(); ++g) {
        factors_[t][g] = factor_of(d.p[t][g], d.q ? (*d.q)[t][g] : 0.0, kappa, scale);
      }
    }
  }

  static void check_rows(const Direction& d, size_t rows) {
    if (rows == 0) refuse_type("products must be given where q or limit is, got None");
    if (d.limit && d.gamma.size() != rows) {
      refuse_value(c10::str("gamma must have one number a row of products, that is ", rows, ", got ", d.gamma.size()));
    }
  }

  void take_sums(const Plan& plan, const Direction& d) {
    check_rows(d, d.products ? static_cast<size_t>(d.products->numel() / kSums) : 0);
    view_.products = sums_of(plan, *d.products, kSums, "products");
    view_.rows = static_cast<int>(d.products->numel() / kSums);
    view_.project = d.q.has_value();
    view_.clip = d.limit.has_value();
    view_.limit = d.limit.value_or(0.0);
    view_.gamma = view_.clip ? d.gamma.data() : nullptr;
  }

  Combination view_;
  std::vector<Combination::Group> groups_;
  std::vector<Numbers> factors_;  // by term and group, where the sums are numbers
};

}  // namespace

at::Tensor square_norm(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
                       const std::optional<Numbers>& eta) {
  Call call(plan);
  SquareNorm arguments;
  arguments.a = call.read(a);
  if (b) arguments.b = call.read(*b);
  if (eta) {
    arguments.theta = call.read(leaves.theta());
    arguments.eta = by_group(plan, *eta, "eta");
  }
  at::Tensor total;
  call.run([&](Executor& executor) { total = executor.square_norm(arguments); });
  return total;
}

void perturb(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
             const Numbers& radius, const Square& square, bool from_start, const std::optional<Numbers>& eta,
             const std::optional<FoldInto>& fold) {
  Call call(plan);
  Perturbation arguments;
  arguments.save = !leaves.saved;
  arguments.from_start = from_start;
  arguments.params = call.write(leaves.params);
  if (arguments.save) {
    arguments.backup = call.write(leaves.backup);
  } else if (from_start || eta) {
    arguments.backup = call.read(leaves.backup);
  }
  arguments.a = call.read_last(a);
  if (b) arguments.b = call.read_last(*b);
  arguments.radius = by_group(plan, radius, "radius");
  Numbers factors = radius;
  if (plan.executor().takes_sums()) {
    if (!square.tensor) refuse_type("square must be a tensor on a device");
    arguments.square = sums_of(plan, *square.tensor, 1, "square");
  } else {
    if (square.tensor) refuse_type("square must be a number on the CPU");
    const double scale = inverse_norm(square.number);
    for (double& factor : factors) factor = scale * factor;
    arguments.radius = factors.data();
  }
  if (eta) arguments.eta = by_group(plan, *eta, "eta");
  if (fold) {
    arguments.fold = {call.write(fold->into), call.read(fold->other), by_group(plan, fold->k, "k"),
                      by_group(plan, fold->l, "l")};
  }
  arguments.stream = call.exceeds_caches();
  call.run([&](Executor& executor) { executor.perturb(arguments); });
}

at::Tensor inner_products(Plan& plan, const Direction& u, const std::optional<std::vector<Numbers>>& m,
                          int64_t groups) {
  if (groups < plan.groups() || groups > kMaxGroups) {
    refuse_value(c10::str("groups must be ", plan.groups(), " to ", kMaxGroups, ", got ", groups));
  }
  Call call(plan);
  InnerProducts arguments;
  const Terms terms(call, plan, u, m ? &*m : nullptr);
  arguments.u = arguments.m = terms.view();
  const auto groups_of_m = m ? terms.groups_with(*m) : std::vector<Combination::Group>();
  arguments.m.groups = m ? groups_of_m.data() : nullptr;
  at::Tensor products;
  call.run([&](Executor& executor) { products = executor.inner_products(arguments, groups); });
  return products;
}

void restore(Plan& plan, const Block& leaves) {
  if (!leaves.saved) return;
  Call call(plan);
  Copy arguments{call.read_last(leaves.backup), call.write(leaves.params), call.exceeds_caches()};
  call.run([&](Executor& executor) { executor.copy(arguments); });
}

void direction(Plan& plan, const Block& leaves, const Direction& d, const TensorList& out) {
  Call call(plan);
  Materialise arguments;
  const Terms terms(call, plan, d);
  arguments.d = terms.view();
  arguments.out = call.write(out);
  if (leaves.saved) {
    arguments.restore.from = call.read_last(leaves.backup);
    arguments.restore.to = call.write(leaves.params);
    arguments.restore.stream = call.exceeds_caches();
  }
  call.run([&](Executor& executor) { executor.materialise(arguments); });
}

void update(Plan& plan, const Block& leaves, const Direction& d, const std::string& formula,
            const std::vector<TensorList>& state, const std::vector<Numbers>& groups,
            const std::vector<Numbers>& options, const std::vector<int64_t>& option) {
  const Counts counts = counts_of(formula);
  check_count(plan, groups.size(), "groups");
  const auto of_groups = rows_of<OfGroup>(groups, counts.of_group, "groups");
  const auto of_leaves = rows_of<OfLeaf>(options, counts.of_leaf, "options");
  if (option.size() != plan.shapes().size()) {
    refuse_value(
        c10::str("option must have one index a parameter, that is ", plan.shapes().size(), ", got ", option.size()));
  }
  for (const int64_t index : option) {
    if (index < 0 || index >= static_cast<int64_t>(options.size())) {
      refuse_value(c10::str("option must be indices of the ", options.size(), " options, got ", index));
    }
  }
  if (static_cast<int>(state.size()) != counts.state) {
    refuse_value(c10::str("state must be ", counts.state, " lists of tensors, got ", state.size()));
  }
  Call call(plan);
  Update arguments;
  const Terms terms(call, plan, d);
  const std::vector<int32_t> places(option.begin(), option.end());
  arguments.formula = counts.formula;
  arguments.d = terms.view();
  arguments.theta = call.read_last(leaves.theta());
  arguments.params = call.write(leaves.params);
  for (size_t k = 0; k < state.size(); ++k) arguments.state[k] = call.write(state[k]);
  arguments.groups = of_groups.data();
  arguments.options = of_leaves.data();
  arguments.count = of_leaves.size();
  arguments.option = places.data();
  arguments.stream = leaves.saved && call.exceeds_caches();
  call.run([&](Executor& executor) { executor.update(arguments); });
}

std::shared_ptr<Tensors> empty_like(const TensorList& tensors) {
  const at::Device device = device_of(tensors);
  std::vector<int64_t> places;  // of small tensors in the memory that they share, in bytes
  int64_t shared = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_plain(tensors, i, device);
    places.push_back(shared);
    if (is_small(*tensors[i]))
      shared += (static_cast<int64_t>(tensors[i]->nbytes()) + kAlignment - 1) / kAlignment * kAlignment;
  }
  const at::Tensor memory = shared > 0 ? empty(device, {shared}, {1}, at::kByte) : at::Tensor();
  auto found = std::make_shared<Found>();
  found->writable = true;
  std::vector<at::Tensor> result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = *tensors[i];
    dtype_of(tensors, i);
    if (is_small(tensor)) {
      found->arrays.push_back(static_cast<char*>(memory.mutable_data_ptr()) + places[i]);
    } else {
      result[i] = empty(device, tensor.sizes(), tensor.strides(), tensor.scalar_type());
      found->arrays.push_back(result[i].mutable_data_ptr());
    }
  }
  auto made = std::make_shared<Tensors>(std::move(result), true);
  std::shared_ptr<Tensors> others = tensors.held();
  if (!others) {
    std::vector<at::Tensor> values;
    for (size_t i = 0; i < tensors.size(); ++i) values.push_back(*tensors[i]);
    others = std::make_shared<Tensors>(std::move(values), false);
  }
  made->share(memory);
  made->resemble(std::move(others), std::move(found));
  return made;
}

}  // namespace gam
