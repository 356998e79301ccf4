#include "ops.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <deque>
#include <utility>

#include "math.h"

namespace gam {
namespace {

// On a CPU, streaming stores save the read of the overwritten line, and bypass the caches. They pay if a call touches
// more than the last-level cache holds. The system's report is no guide: a virtual machine shows the whole socket's
// cache but gets only a share. So this is the share of a few cores on today's servers.
constexpr int64_t kStreamBytes = 32 << 20;

// Tensors below this size that are allocated together share one allocation, instead of ten thousand.
constexpr size_t kSmallBytes = 1 << 16;
constexpr int64_t kAlignment = 64;  // a cache line

bool is_small(const at::Tensor& tensor) { return tensor.numel() > 0 && tensor.nbytes() < kSmallBytes; }

// The lists of one call, checked as they are added. A leaf for which a list has None has no array in it.
class Call {
 public:
  explicit Call(Plan& plan) : plan_(plan) {}

  List read(const TensorList& list) { return add(list, false); }
  List write(const TensorList& list) { return add(list, true); }

  // Reads tensors that other code allocated, perhaps for another stream, and may free soon: gradients and the backup.
  List read_last(const TensorList& list) {
    const List result = read(list);
    slots_.back().last = true;
    return result;
  }

  // True if the arrays of the call exceed the caches.
  bool exceeds_caches() const { return plan_.shapes().bytes() * static_cast<int64_t>(slots_.size()) > kStreamBytes; }

  // Calls f(executor) without the GIL, and tells autograd which tensors were written.
  template <class F>
  void run(F&& f) {
    Executor& executor = plan_.executor();
    std::vector<const at::Tensor*> used;
    const int64_t stream = executor.stream();
    for (const Slot& slot : slots_) {
      if (!slot.last || !executor.on_device()) continue;
      if (const auto& held = slot.list->held()) {
        held->add_unrecorded(stream, used);
      } else {
        for (size_t i = 0; i < slot.list->size(); ++i) used.push_back((*slot.list)[i]);
      }
    }
    {
      const pybind11::gil_scoped_release no_gil;
      f(executor);
      for (const at::Tensor* tensor : used) executor.record_use(*tensor);
    }
    for (const Slot& slot : slots_) {
      if (slot.last && slot.list->held()) slot.list->held()->set_recorded(stream);
    }
    bump_versions();
  }

 private:
  struct Slot {
    const TensorList* list;
    bool written;
    std::shared_ptr<Found> found;
    bool last = false;
  };

  List add(const TensorList& list, bool written) {
    const auto& held = list.held();
    std::shared_ptr<Found> found = held ? held->known(plan_.shared_shapes(), written) : nullptr;
    if (!found) {
      found = look(list, written);
      if (held) held->remember(plan_.shared_shapes(), found);
    }
    slots_.push_back({&list, written, std::move(found)});
    return slots_.back().found->arrays.data();
  }

  // Checks a list against the leaves. Raises ValueError or RuntimeError unless each tensor fits its leaf.
  std::shared_ptr<Found> look(const TensorList& list, bool written) const {
    const Shapes& shapes = plan_.shapes();
    if (list.size() != shapes.size()) {
      refuse_value(
          c10::str(list.name(), " must have one tensor per parameter, that is ", shapes.size(), ", got ", list.size()));
    }
    auto found = std::make_shared<Found>();
    found->arrays.resize(shapes.size());
    found->writable = written;
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (!list[i]) continue;
      const at::Tensor& tensor = *list[i];
      check_plain(list, i, plan_.device());
      if (!plan_.is_like(tensor, i)) {
        refuse_value(c10::str(list.name_of(i), " must have the dtype, shape and strides of its parameter, ",
                              at::IntArrayRef(shapes[i].sizes), " by ", at::IntArrayRef(shapes[i].strides), ", got ",
                              tensor.dtype(), " ", tensor.sizes(), " by ", tensor.strides()));
      }
      if (written && tensor.requires_grad() && at::GradMode::is_enabled()) {
        throw std::runtime_error(list.name_of(i) + " requires grad and would be written: call under torch.no_grad()");
      }
      found->arrays[i] = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    }
    return found;
  }

  // Tells autograd which tensors were written, if other code can see them.
  void bump_versions() {
    for (const Slot& slot : slots_) {
      const TensorList& list = *slot.list;
      if (!slot.written || (list.held() && list.held()->owned())) continue;
      for (size_t i = 0; i < list.size(); ++i) {
        const at::Tensor* later = i + 2 * kAhead < list.size() ? list[i + 2 * kAhead] : nullptr;
        const at::Tensor* soon = i + kAhead < list.size() ? list[i + kAhead] : nullptr;
        if (later) prefetch(later->unsafeGetTensorImpl(), 3);
        if (soon) prefetch_version(soon->unsafeGetTensorImpl());
        if (slot.found->arrays[i] && !list[i]->is_inference()) list[i]->unsafeGetTensorImpl()->bump_version();
      }
    }
  }

  Plan& plan_;
  std::deque<Slot> slots_;  // a deque does not move its entries
};

// Numbers and combinations

void check_count(const Plan& plan, size_t count, const char* name) {
  if (static_cast<int>(count) < plan.groups()) {
    refuse_value(c10::str(name, " must have one entry per parameter group, that is ", plan.groups(), ", got ", count));
  }
}

PerGroup by_group(const Plan& plan, const Numbers& numbers, const char* name) {
  check_count(plan, numbers.size(), name);
  return numbers.data();
}

// Norms or products in device memory: `columns` numbers in each of one or more rows.
const double* sums_of(const Plan& plan, const at::Tensor& tensor, int64_t columns, const char* name) {
  if (!tensor.defined()) refuse_type(c10::str(name, " must be given, got None"));
  if (tensor.device() != plan.device() || tensor.scalar_type() != at::kDouble || !tensor.is_contiguous() ||
      tensor.numel() < columns || tensor.numel() % columns != 0 ||
      (columns == 1 && tensor.numel() != 1 && tensor.numel() < plan.groups())) {
    refuse_value(c10::str(name, " must be a contiguous float64 tensor on ", plan.device(), " of ",
                          columns == 1 ? "one number, or one" : "three numbers", " per parameter group, got ",
                          tensor.dtype(), " of shape ", tensor.sizes(), " on ", tensor.device()));
  }
  return tensor.const_data_ptr<double>();
}

void check_coefficients(const Plan& plan, const Direction& d, const std::vector<Numbers>& lists, const char* name) {
  if (lists.size() != d.terms.size()) {
    refuse_value(
        c10::str(name, " must have one list of numbers per term, that is ", d.terms.size(), ", got ", lists.size()));
  }
  for (const Numbers& numbers : lists) by_group(plan, numbers, name);
}

// The number of numbers and of state lists of a formula.
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

// A combination as the loops take it.
class Terms {
 public:
  // Adds its lists to those of a primitive. Terms with zero coefficients are left out, because their elements are
  // arbitrary; `also` keeps terms with other non-zero coefficients.
  Terms(Call& call, const Plan& plan, const Direction& d, List* lists, const std::vector<Numbers>* also = nullptr) {
    if (d.terms.empty() || d.terms.size() > kMaxTerms) {
      refuse_value(c10::str("terms must be 1 to ", kMaxTerms, " lists of tensors, got ", d.terms.size()));
    }
    check_coefficients(plan, d, d.p, "p");
    if (d.q) check_coefficients(plan, d, *d.q, "q");
    if (also) check_coefficients(plan, d, *also, "m");
    for (size_t t = 0; t < d.terms.size(); ++t) lists[t] = call.read_last(d.terms[t]);
    if (d.q || d.limit) take_sums(plan, d);
    groups_.resize(static_cast<size_t>(plan.groups()));
    const bool on_device = plan.executor().on_device();
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (size_t t = 0; t < d.terms.size(); ++t) {
        const double plain = d.p[t][g], projected = d.q ? (*d.q)[t][g] : 0.0;
        const double p = on_device ? plain : factor_of(plain, projected, kappa_, scale_);
        const double q = on_device ? projected : 0.0;
        if (p != 0.0 || q != 0.0 || (also && (*also)[t][g] != 0.0)) take(t, g, p, q);
      }
      if (groups_[g].terms == 0) take(0, g, 0.0, 0.0);
    }
  }
  Terms(const Terms&) = delete;

  const GroupTerms* groups() const { return groups_.data(); }
  const Scaling& scaling() const { return scaling_; }

  // The same terms with other coefficients.
  std::vector<GroupTerms> groups_with(const std::vector<Numbers>& p) const {
    auto groups = groups_;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int k = 0; k < groups[g].terms; ++k) groups[g].p[k] = p[static_cast<size_t>(groups[g].index[k])][g];
    }
    return groups;
  }

 private:
  void take(size_t t, size_t g, double p, double q) {
    GroupTerms& group = groups_[g];
    group.index[group.terms] = static_cast<int>(t);
    group.p[group.terms] = p;
    group.q[group.terms++] = q;
  }

  // A device computes κ and s itself, by the same formulas.
  void take_sums(const Plan& plan, const Direction& d) {
    const double* products = sums_of(plan, d.products, kSums, "products");
    const auto rows = static_cast<size_t>(d.products.numel() / kSums);
    if (d.limit && d.gamma.size() != rows) {
      refuse_value(
          c10::str("gamma must have one number per row of products, that is ", rows, ", got ", d.gamma.size()));
    }
    scaling_ = {products, static_cast<int>(rows), d.q.has_value(), d.limit.has_value(), d.limit.value_or(0.0)};
    if (plan.executor().on_device()) return;
    double uu = 0.0, um = 0.0, square = 0.0;
    for (size_t r = 0; r < rows; ++r) uu += products[kSums * r], um += products[kSums * r + 1];
    if (d.q) kappa_ = ratio(um, uu);
    for (size_t r = 0; d.limit && r < rows; ++r) {
      const double* row = products + kSums * r;
      square += d.q ? square_of_direction(row[0], row[1], row[2], d.gamma[r], kappa_) : row[0];
    }
    if (d.limit) scale_ = clip_factor(square, *d.limit);
  }

  std::vector<GroupTerms> groups_;
  Scaling scaling_;
  double kappa_ = 0.0, scale_ = 1.0;
};

}  // namespace

at::Tensor square_norm(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
                       const std::optional<Numbers>& eta) {
  Call call(plan);
  Sums arguments;
  arguments.lists[Sums::kTerms] = call.read(a);
  if (b) arguments.lists[Sums::kTerms + 1] = call.read(*b);
  const GroupTerms difference{b ? 2 : 1, {0, 1}, {1.0, -1.0}, {}};
  const std::vector<GroupTerms> groups(static_cast<size_t>(plan.groups()), difference);
  arguments.u = groups.data();
  if (eta) {
    arguments.lists[Sums::kTheta] = call.read(leaves.theta());
    arguments.eta = by_group(plan, *eta, "eta");
  }
  at::Tensor total;
  call.run([&](Executor& executor) { total = executor.sums(arguments, 0); });
  return total;
}

void perturb(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
             const Numbers& radius, const at::Tensor& square, bool from_start, const std::optional<Numbers>& eta,
             const std::optional<FoldInto>& fold, const std::optional<Numbers>& multiple) {
  Call call(plan);
  Perturbation arguments;
  List* lists = arguments.lists;
  arguments.save = !leaves.saved;
  arguments.from_start = from_start;
  lists[Perturbation::kParams] = call.write(leaves.params);
  if (arguments.save) {
    lists[Perturbation::kBackup] = call.write(leaves.backup);
  } else if (from_start || eta) {
    lists[Perturbation::kBackup] = call.read(leaves.backup);
  }
  lists[Perturbation::kA] = call.read_last(a);
  if (b) lists[Perturbation::kB] = call.read_last(*b);
  arguments.radius = by_group(plan, radius, "radius");
  arguments.square = sums_of(plan, square, 1, "square");
  arguments.by_group = square.numel() > 1;
  if (multiple) arguments.multiple = by_group(plan, *multiple, "multiple");
  Numbers factors = radius;
  if (!plan.executor().on_device()) {
    for (size_t g = 0; g < factors.size(); ++g) {
      factors[g] = inverse_norm(arguments.square[arguments.by_group ? g : 0]) * factors[g];
    }
    for (int g = 0; multiple && g < plan.groups(); ++g) factors[static_cast<size_t>(g)] += arguments.multiple[g];
    arguments.radius = factors.data();
  }
  if (eta) arguments.eta = by_group(plan, *eta, "eta");
  if (fold) {
    lists[Perturbation::kInto] = call.write(fold->into);
    lists[Perturbation::kOther] = call.read(fold->other);
    arguments.k = by_group(plan, fold->k, "k");
    arguments.l = by_group(plan, fold->l, "l");
  }
  arguments.stream = call.exceeds_caches();
  call.run([&](Executor& executor) { executor.perturb(arguments); });
}

at::Tensor inner_products(Plan& plan, const Direction& u, const std::optional<std::vector<Numbers>>& m,
                          int64_t groups) {
  if (groups < std::max(plan.groups(), 1) || groups > kMaxGroups) {
    refuse_value(c10::str("groups must be ", std::max(plan.groups(), 1), " to ", kMaxGroups, ", got ", groups));
  }
  Call call(plan);
  Sums arguments;
  const Terms terms(call, plan, u, arguments.lists + Sums::kTerms, m ? &*m : nullptr);
  arguments.u = terms.groups();
  const auto groups_of_m = m ? terms.groups_with(*m) : std::vector<GroupTerms>();
  arguments.m = m ? groups_of_m.data() : nullptr;
  at::Tensor products;
  call.run([&](Executor& executor) { products = executor.sums(arguments, groups); });
  return products;
}

void restore(Plan& plan, const Block& leaves) {
  if (!leaves.saved) return;
  Call call(plan);
  Copy arguments;
  arguments.lists[Copy::kFrom] = call.read_last(leaves.backup);
  arguments.lists[Copy::kTo] = call.write(leaves.params);
  arguments.stream = call.exceeds_caches();
  call.run([&](Executor& executor) { executor.copy(arguments); });
}

void direction(Plan& plan, const Block& leaves, const Direction& d, const TensorList& out) {
  Block target;
  target.params = out;
  const std::vector<Numbers> groups(static_cast<size_t>(plan.groups())), options(1);
  update(plan, target, d, "assign", {}, groups, options, std::vector<int64_t>(plan.shapes().size()));
  restore(plan, leaves);
}

void update(Plan& plan, const Block& leaves, const Direction& d, const std::string& formula,
            const std::vector<TensorList>& state, const std::vector<Numbers>& groups,
            const std::vector<Numbers>& options, const std::vector<int64_t>& option) {
  const Counts counts = counts_of(formula);
  check_count(plan, groups.size(), "groups");
  const auto of_groups = rows_of<OfGroup>(groups, counts.of_group, "groups");
  const auto of_leaves = rows_of<OfLeaf>(options, counts.of_leaf, "options");
  const auto is_place = [&](int64_t index) { return index >= 0 && index < static_cast<int64_t>(options.size()); };
  if (option.size() != plan.shapes().size() || !std::all_of(option.begin(), option.end(), is_place)) {
    refuse_value(c10::str("option must have for each of the ", plan.shapes().size(), " parameters the index of one of ",
                          options.size(), " options, got ", at::IntArrayRef(option)));
  }
  if (static_cast<int>(state.size()) > counts.state) {
    refuse_value(c10::str("state must be at most ", counts.state, " lists of tensors, got ", state.size()));
  }
  Call call(plan);
  Update arguments;
  const Terms terms(call, plan, d, arguments.lists + Update::kTerms);
  const std::vector<int32_t> places(option.begin(), option.end());
  arguments.formula = counts.formula;
  arguments.d = terms.groups();
  arguments.scaling = terms.scaling();
  arguments.gamma = d.limit ? d.gamma.data() : nullptr;
  arguments.lists[Update::kTheta] = call.read_last(leaves.theta());
  arguments.lists[Update::kParams] = call.write(leaves.params);
  for (size_t k = 0; k < state.size(); ++k) arguments.lists[Update::kState + k] = call.write(state[k]);
  arguments.groups = of_groups.data();
  arguments.options = of_leaves.data();
  arguments.count = of_leaves.size();
  arguments.option = places.data();
  arguments.stream = leaves.saved && call.exceeds_caches();
  call.run([&](Executor& executor) { executor.update(arguments); });
}

std::shared_ptr<Tensors> empty_like(const TensorList& tensors) {
  const at::Device device = device_of(tensors);
  std::vector<int64_t> places;  // offsets, in bytes, of small tensors in their shared memory
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
