#include "executor.h"

#include <vector>

namespace gam::cuda {

at::Tensor Executor::sums(const Sums& arguments, int64_t groups) {
  const Guard guard(device_);
  const bool is_norm = groups == 0;
  const int columns = is_norm ? 1 : kSums;
  at::Tensor result =
      is_norm ? empty(device_, {}, {}, at::kDouble) : empty(device_, {groups, kSums}, {kSums, 1}, at::kDouble);
  TotalsArguments of_groups{nullptr, nullptr, shapes_->groups(), tables_.chunks(), result.mutable_data_ptr<double>()};
  c10::DataPtr parts;
  if (!is_empty()) {
    parts = allocate(tables_.chunks() * static_cast<int64_t>(columns * sizeof(double)));
    SumsArguments of_chunks;
    of_chunks.parts = static_cast<double*>(parts.get());
    tables_.begin(arguments.lists, Sums::kLists);
    of_chunks.eta = tables_.by_group(arguments.eta);
    of_chunks.u = tables_.by_group(is_norm ? nullptr : arguments.u);
    of_chunks.m = tables_.by_group(arguments.m);
    of_chunks.table = tables_.finish();
    of_groups.parts = of_chunks.parts;
    if (is_norm) {
      const bool difference = arguments.lists[Sums::kTerms + 1] != nullptr;
      square_norm(grid(tables_.chunks()), shapes_->dtype(), difference, arguments.eta != nullptr, of_chunks);
    } else {
      of_groups.starts = tables_.starts();
      inner_products(grid(tables_.chunks()), shapes_->dtype(), arguments.m != nullptr, of_chunks);
    }
  }
  totals(grid(is_norm ? 1 : groups), columns, of_groups);
  return result;
}

void Executor::perturb(const Perturbation& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  PerturbArguments launched;
  launched.square = arguments.square;
  launched.by_group = arguments.by_group;
  launched.save = arguments.save;
  launched.from_start = arguments.from_start;
  tables_.begin(arguments.lists, Perturbation::kLists);
  launched.radius = tables_.by_group(arguments.radius);
  launched.eta = tables_.by_group(arguments.eta);
  launched.k = tables_.by_group(arguments.k);
  launched.l = tables_.by_group(arguments.l);
  launched.multiplied = arguments.multiple != nullptr;
  launched.multiple = tables_.by_group(arguments.multiple);
  launched.table = tables_.finish();
  const bool difference = arguments.lists[Perturbation::kB] != nullptr;
  cuda::perturb(grid(tables_.chunks()), shapes_->dtype(), difference, arguments.eta != nullptr, arguments.k != nullptr,
                launched);
}

void Executor::copy(const Copy& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  tables_.begin(arguments.lists, Copy::kLists);
  cuda::copy(grid(tables_.chunks()), shapes_->dtype(), {tables_.finish()});
}

void Executor::update(const Update& arguments) {
  if (is_empty()) return;
  const Guard guard(device_);
  UpdateArguments launched;
  launched.formula = arguments.formula;
  launched.scaling = arguments.scaling;
  tables_.begin(arguments.lists, Update::kLists, arguments.option);
  launched.gamma = tables_.numbers(arguments.gamma, static_cast<size_t>(arguments.scaling.rows));
  launched.d = tables_.by_group(arguments.d);
  launched.groups = tables_.by_group(arguments.groups);
  launched.options = tables_.numbers(arguments.options, arguments.count);
  launched.table = tables_.finish();
  cuda::update(grid(tables_.chunks()), shapes_->dtype(), launched);
}

}  // namespace gam::cuda
