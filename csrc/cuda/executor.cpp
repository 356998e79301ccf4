#include "executor.h"

#include <algorithm>
#include <vector>

namespace gam::cuda {
namespace {

template <class N>
Numbers<N> numbers_of(const std::vector<N>& values, const N* many) {
  Numbers<N> numbers;
  numbers.many = many;
  if (!many) std::copy(values.begin(), values.end(), numbers.few);
  return numbers;
}

std::vector<double> by_group(PerGroup values, int groups) {
  return values ? std::vector<double>(values, values + groups) : std::vector<double>();
}

std::vector<GroupTerms> group_terms(const Combination& d, int groups) {
  return d.groups ? std::vector<GroupTerms>(d.groups, d.groups + groups) : std::vector<GroupTerms>();
}

std::vector<double> gamma_of(const Combination& d) { return by_group(d.gamma, d.rows); }

Sums sums_of(const Combination& d, const std::vector<double>& gamma, const double* many) {
  return {d.products, d.rows, d.project, d.clip, d.limit, numbers_of(gamma, many)};
}

}  // namespace

void Executor::record_use(const at::Tensor& tensor) { cuda::record_use(tensor); }

at::Tensor Executor::add_up(const double* parts, const int64_t* starts, int columns, int64_t groups,
                            at::IntArrayRef sizes) {
  const std::vector<int64_t> strides =
      sizes.empty() ? std::vector<int64_t>() : std::vector<int64_t>{static_cast<int64_t>(columns), 1};
  at::Tensor result = empty(device_, sizes, strides, at::kDouble);
  totals(grid(groups), columns,
         {parts, starts, shapes_->groups(), tables_.chunks(), result.mutable_data_ptr<double>()});
  return result;
}

at::Tensor Executor::square_norm(const SquareNorm& arguments) {
  const Guard guard(device_);
  if (is_empty()) return add_up(nullptr, nullptr, 1, 1, {});
  const auto eta = by_group(arguments.eta, shapes_->groups());
  const auto prepared = tables_.prepare({{arguments.a, arguments.b, arguments.theta}}, {Tables::span(eta)});
  const c10::DataPtr parts = allocate(tables_.chunks() * static_cast<int64_t>(sizeof(double)));
  auto* values = static_cast<double*>(parts.get());
  cuda::square_norm(grid(tables_.chunks()), shapes_->dtype(), arguments.b != nullptr, arguments.theta != nullptr,
                    {prepared.table, values, numbers_of(eta, prepared.many<double>(0))});
  return add_up(values, nullptr, 1, 1, {});
}

at::Tensor Executor::inner_products(const InnerProducts& arguments, int64_t groups) {
  const Guard guard(device_);
  if (is_empty()) return add_up(nullptr, nullptr, kSums, groups, {groups, kSums});
  const auto u = group_terms(arguments.u, shapes_->groups()), m = group_terms(arguments.m, shapes_->groups());
  const List* terms = arguments.u.lists;
  const auto prepared = tables_.prepare({{terms, terms + kMaxTerms}}, {Tables::span(u), Tables::span(m)});
  const c10::DataPtr parts = allocate(tables_.chunks() * static_cast<int64_t>(kSums * sizeof(double)));
  auto* values = static_cast<double*>(parts.get());
  cuda::inner_products(grid(tables_.chunks()), shapes_->dtype(), !m.empty(),
                       {prepared.table, values, numbers_of(u, prepared.many<GroupTerms>(0)),
                        numbers_of(m, prepared.many<GroupTerms>(1))});
  return add_up(values, prepared.starts, kSums, groups, {groups, kSums});
}

void Executor::perturb(const Perturbation& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  std::vector<PerturbGroup> groups(static_cast<size_t>(shapes_->groups()));
  const Folding& fold = arguments.fold;
  for (size_t g = 0; g < groups.size(); ++g) {
    groups[g] = {arguments.radius[g], arguments.eta ? arguments.eta[g] : 0.0, fold.into ? fold.k[g] : 0.0,
                 fold.into ? fold.l[g] : 0.0};
  }
  const Lists lists{{arguments.params, arguments.backup, arguments.a, arguments.b, fold.into, fold.other}};
  const auto prepared = tables_.prepare(lists, {Tables::span(groups)});
  cuda::perturb(grid(tables_.chunks()), shapes_->dtype(), arguments.b != nullptr, arguments.eta != nullptr,
                {prepared.table, arguments.square, arguments.save, arguments.from_start, fold.into != nullptr,
                 numbers_of(groups, prepared.many<PerturbGroup>(0))});
}

void Executor::copy(const Copy& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  const auto prepared = tables_.prepare({{arguments.from, arguments.to}});
  cuda::copy(grid(tables_.chunks()), shapes_->dtype(), {prepared.table});
}

void Executor::materialise(const Materialise& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  const auto d = group_terms(arguments.d, shapes_->groups());
  const auto gamma = gamma_of(arguments.d);
  Lists lists{{arguments.out, arguments.restore.from, arguments.restore.to}};
  lists.lists.insert(lists.lists.end(), arguments.d.lists, arguments.d.lists + kMaxTerms);
  const auto prepared = tables_.prepare(lists, {Tables::span(d), Tables::span(gamma)});
  cuda::materialise(grid(tables_.chunks()), shapes_->dtype(),
                    {prepared.table, sums_of(arguments.d, gamma, prepared.many<double>(1)),
                     arguments.restore.from != nullptr, numbers_of(d, prepared.many<GroupTerms>(0))});
}

void Executor::update(const Update& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  std::vector<UpdateGroup> groups;
  for (int g = 0; g < shapes_->groups(); ++g) groups.push_back({arguments.d.groups[g], arguments.groups[g]});
  const std::vector<OfLeaf> options(arguments.options, arguments.options + arguments.count);
  const auto gamma = gamma_of(arguments.d);
  Lists lists{{arguments.params, arguments.theta}, arguments.option};
  lists.lists.insert(lists.lists.end(), arguments.state, arguments.state + kMaxState);
  lists.lists.insert(lists.lists.end(), arguments.d.lists, arguments.d.lists + kMaxTerms);
  const auto prepared = tables_.prepare(lists, {Tables::span(groups), Tables::span(options), Tables::span(gamma)});
  cuda::update(grid(tables_.chunks()), shapes_->dtype(),
               {prepared.table, arguments.formula, sums_of(arguments.d, gamma, prepared.many<double>(2)),
                numbers_of(groups, prepared.many<UpdateGroup>(0)), numbers_of(options, prepared.many<OfLeaf>(1))});
}

}  // namespace gam::cuda
