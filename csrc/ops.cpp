#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "call.h"
#include "checks.h"
#include "cpu/dispatch.h"

namespace gam {
namespace {

// Numbers and combinations

size_t group_of(const Plan& plan, size_t leaf) { return static_cast<size_t>(plan.cpu().shapes()[leaf].group); }

void check_count(const Plan& plan, size_t count, const char* name) {
  if (static_cast<int>(count) < plan.cpu().groups()) {
    refuse_value(
        c10::str(name, " must have one entry a parameter group, that is ", plan.cpu().groups(), ", got ", count));
  }
}

cpu::PerGroup by_group(const Plan& plan, const Numbers& numbers, const char* name) {
  check_count(plan, numbers.size(), name);
  return numbers.data();
}

void check_terms(const Plan& plan, const std::vector<TensorList>& terms, const std::vector<Numbers>& factors,
                 const char* name) {
  if (terms.empty() || terms.size() > cpu::kMaxTerms) {
    refuse_value(c10::str("terms must be 1 to ", cpu::kMaxTerms, " lists of tensors, got ", terms.size()));
  }
  if (factors.size() != terms.size()) {
    refuse_value(
        c10::str(name, " must have one list of numbers a term, that is ", terms.size(), ", got ", factors.size()));
  }
  for (const Numbers& numbers : factors) by_group(plan, numbers, name);
}

// A combination as the loops take it. Terms whose factors are zero are left out, as their elements may be anything;
// `also` keeps terms for another reason.
class Combination {
 public:
  Combination(Call& call, const Plan& plan, const Direction& d, const std::vector<Numbers>* also = nullptr) {
    check_terms(plan, d.terms, d.factors, "factors");
    for (size_t t = 0; t < d.terms.size(); ++t) view_.lists[t] = call.read(d.terms[t]);
    groups_.resize(static_cast<size_t>(plan.cpu().groups()));
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (size_t t = 0; t < d.terms.size(); ++t) {
        if (d.factors[t][g] != 0.0 || (also && (*also)[t][g] != 0.0)) take(d, t, g);
      }
      if (groups_[g].terms == 0) take(d, 0, g);
    }
    view_.groups = groups_.data();
  }
  Combination(const Combination&) = delete;

  const cpu::Combination& view() const { return view_; }

  // The same terms with other factors.
  std::vector<cpu::Combination::Group> groups_with(const std::vector<Numbers>& factors) const {
    auto groups = groups_;
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int k = 0; k < groups[g].terms; ++k) {
        groups[g].factor[k] = factors[static_cast<size_t>(groups[g].index[k])][g];
      }
    }
    return groups;
  }

 private:
  void take(const Direction& d, size_t t, size_t g) {
    auto& group = groups_[g];
    group.index[group.terms] = static_cast<int>(t);
    group.factor[group.terms++] = d.factors[t][g];
  }

  cpu::Combination view_;
  std::vector<cpu::Combination::Group> groups_;
};

// Results

at::Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef sizes) {
  at::Tensor result = at::detail::empty_cpu(sizes, at::TensorOptions().dtype(at::kDouble));
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return result;
}

// Adds `width` numbers a piece by group, in the order of the pieces.
std::vector<double> add_by_group(const cpu::Plan& plan, const std::vector<double>& sums, size_t width, size_t groups) {
  std::vector<double> total(groups * width);
  for (size_t p = 0; p < plan.pieces().size(); ++p) {
    const auto group = static_cast<size_t>(plan.shapes()[static_cast<size_t>(plan.pieces()[p].leaf)].group);
    for (size_t k = 0; k < width; ++k) total[group * width + k] += sums[p * width + k];
  }
  return total;
}

}  // namespace

at::Tensor square_norm(Plan& plan, const Leaves& leaves, const TensorList& a, const std::optional<TensorList>& b,
                       const std::optional<Numbers>& eta) {
  Call call(plan);
  cpu::SquareNorm arguments;
  arguments.a = call.read(a);
  if (b) arguments.b = call.read(*b);
  if (eta) {
    arguments.theta = call.read(leaves.theta());
    arguments.eta = by_group(plan, *eta, "eta");
  }
  call.ready();
  std::vector<double> sums(plan.cpu().pieces().size());
  call.run([&](cpu::Range range) {
    cpu::kernels().square_norm(plan.cpu().work(), arguments, range, sums.data() + range.begin);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return tensor_of({total}, {});
}

void perturb(Plan& plan, const Leaves& leaves, const TensorList& a, const std::optional<TensorList>& b,
             const Numbers& factor, bool from_start, const std::optional<Numbers>& eta,
             const std::vector<Fold>& folds) {
  Call call(plan);
  cpu::Perturbation arguments;
  arguments.save = !leaves.saved;
  arguments.from_start = from_start;
  arguments.params = call.write(leaves.params);
  if (arguments.save) {
    arguments.backup = call.write(leaves.backup);
  } else if (from_start || eta) {
    arguments.backup = call.read(leaves.backup);
  }
  arguments.a = call.read(a);
  if (b) arguments.b = call.read(*b);
  arguments.factor = by_group(plan, factor, "factor");
  if (eta) arguments.eta = by_group(plan, *eta, "eta");
  if (folds.size() > cpu::kMaxFolds) {
    refuse_value(c10::str("folds must be at most ", cpu::kMaxFolds, ", got ", folds.size()));
  }
  for (const Fold& fold : folds) {
    arguments.folds[arguments.fold_count++] = {call.write(fold.into), call.read(fold.other),
                                               by_group(plan, fold.k, "k"), by_group(plan, fold.l, "l")};
  }
  arguments.stream = call.exceeds_caches();
  call.ready();
  call.run([&](cpu::Range range) { cpu::kernels().perturb(plan.cpu().work(), arguments, range); });
}

at::Tensor inner_products(Plan& plan, const Direction& u, const std::optional<std::vector<Numbers>>& m,
                          int64_t groups) {
  if (groups < plan.cpu().groups() || groups > kMaxGroups) {
    refuse_value(c10::str("groups must be ", plan.cpu().groups(), " to ", kMaxGroups, ", got ", groups));
  }
  Call call(plan);
  cpu::InnerProducts arguments;
  if (m) check_terms(plan, u.terms, *m, "m_factors");
  const Combination combination(call, plan, u, m ? &*m : nullptr);
  arguments.u = arguments.m = combination.view();
  const auto groups_of_m = m ? combination.groups_with(*m) : std::vector<cpu::Combination::Group>();
  arguments.m.groups = m ? groups_of_m.data() : nullptr;
  call.ready();
  std::vector<double> sums(plan.cpu().pieces().size() * cpu::kSums);
  call.run([&](cpu::Range range) {
    cpu::kernels().inner_products(plan.cpu().work(), arguments, range, sums.data() + cpu::kSums * range.begin);
  });
  return tensor_of(add_by_group(plan.cpu(), sums, cpu::kSums, static_cast<size_t>(groups)), {groups, cpu::kSums});
}

void restore(Plan& plan, const Leaves& leaves) {
  if (!leaves.saved) return;
  Call call(plan);
  cpu::Copy arguments{call.read(leaves.backup), call.write(leaves.params), call.exceeds_caches()};
  call.ready();
  call.run([&](cpu::Range range) { cpu::kernels().copy(plan.cpu().work(), arguments, range); });
}

void direction(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& out) {
  Call call(plan);
  cpu::Materialise arguments;
  const Combination combination(call, plan, d);
  arguments.d = combination.view();
  arguments.out = call.write(out);
  if (leaves.saved) {
    arguments.restore.from = call.read(leaves.backup);
    arguments.restore.to = call.write(leaves.params);
    arguments.restore.stream = call.exceeds_caches();
  }
  call.ready();
  call.run([&](cpu::Range range) { cpu::kernels().materialise(plan.cpu().work(), arguments, range); });
}

void sgd(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& buffers,
         const std::vector<unsigned char>& first, const std::vector<cpu::SgdGroup>& groups) {
  check_count(plan, groups.size(), "groups");
  if (first.size() != plan.cpu().shapes().size()) {
    refuse_value(
        c10::str("first must have one bool a parameter, that is ", plan.cpu().shapes().size(), ", got ", first.size()));
  }
  Call call(plan);
  cpu::SgdStep arguments;
  const Combination combination(call, plan, d);
  arguments.d = combination.view();
  arguments.theta = call.read(leaves.theta());
  arguments.params = call.write(leaves.params);
  arguments.buffer = call.write_if(buffers, [&](size_t i) { return groups[group_of(plan, i)].momentum != 0.0; });
  arguments.first = first.data();
  arguments.groups = groups.data();
  arguments.stream = leaves.saved && call.exceeds_caches();
  call.ready();
  call.run([&](cpu::Range range) { cpu::kernels().sgd(plan.cpu().work(), arguments, range); });
}

void adam(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& average, const TensorList& square,
          const TensorList& largest, const Numbers& step, const std::vector<cpu::AdamGroup>& groups) {
  check_count(plan, groups.size(), "groups");
  if (step.size() != plan.cpu().shapes().size()) {
    refuse_value(
        c10::str("step must have one number a parameter, that is ", plan.cpu().shapes().size(), ", got ", step.size()));
  }
  Call call(plan);
  cpu::AdamStep arguments;
  const Combination combination(call, plan, d);
  arguments.d = combination.view();
  arguments.theta = call.read(leaves.theta());
  arguments.params = call.write(leaves.params);
  arguments.average = call.write(average);
  arguments.square = call.write(square);
  arguments.largest = call.write_if(largest, [&](size_t i) { return groups[group_of(plan, i)].amsgrad; });
  Numbers step_size, root_correction;
  for (size_t i = 0; i < step.size(); ++i) {
    const cpu::AdamGroup& group = groups[group_of(plan, i)];
    step_size.push_back(group.lr / (1.0 - std::pow(group.beta1, step[i])));
    root_correction.push_back(std::sqrt(1.0 - std::pow(group.beta2, step[i])));
  }
  arguments.step_size = step_size.data();
  arguments.root_correction = root_correction.data();
  arguments.groups = groups.data();
  arguments.stream = leaves.saved && call.exceeds_caches();
  call.ready();
  call.run([&](cpu::Range range) { cpu::kernels().adam(plan.cpu().work(), arguments, range); });
}

std::vector<at::Tensor> empty_like(const TensorList& tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_plain(tensors, i);
    const at::Tensor& tensor = *tensors[i];
    const bool dense = tensor.is_non_overlapping_and_dense();
    const auto strides = dense ? tensor.strides().vec() : at::infer_dense_strides(tensor.sizes(), tensor.strides());
    result.push_back(at::detail::empty_strided_cpu(tensor.sizes(), strides, tensor.options()));
  }
  return result;
}

}  // namespace gam
