#include "executor.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace gam::cpu {
namespace {

at::Tensor tensor_of(const std::vector<double>& values, at::IntArrayRef sizes) {
  at::Tensor result = at::detail::empty_cpu(sizes, at::TensorOptions().dtype(at::kDouble));
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return result;
}

}  // namespace

Work Executor::work(std::initializer_list<List> lists) const {
  Work work{shapes_->dtype(), shapes_->leaves().data(), plan_.pieces().data(), {}};
  std::copy_n(lists.begin(), std::min<size_t>(lists.size(), Work::kMaxLists), work.lists);
  return work;
}

at::Tensor Executor::square_norm(const SquareNorm& arguments) {
  std::vector<double> sums(plan_.pieces().size());
  const Work work = this->work({arguments.a, arguments.b, arguments.theta});
  parallel_over_chunks(plan_,
                       [&](Range range) { kernels().square_norm(work, arguments, range, sums.data() + range.begin); });
  double total = 0;
  for (const double sum : sums) total += sum;
  return tensor_of({total}, {});
}

at::Tensor Executor::inner_products(const InnerProducts& arguments, int64_t groups) {
  const std::vector<Piece>& pieces = plan_.pieces();
  std::vector<double> sums(pieces.size() * kSums);
  const List* terms = arguments.u.lists;
  const Work work = this->work({terms[0], terms[1], terms[2]});
  parallel_over_chunks(
      plan_, [&](Range range) { kernels().inner_products(work, arguments, range, sums.data() + kSums * range.begin); });
  std::vector<double> total(static_cast<size_t>(groups) * kSums);
  for (size_t p = 0; p < pieces.size(); ++p) {
    const auto group = static_cast<size_t>(shapes_->leaves()[static_cast<size_t>(pieces[p].leaf)].group);
    for (size_t k = 0; k < kSums; ++k) total[group * kSums + k] += sums[p * kSums + k];
  }
  return tensor_of(total, {groups, kSums});
}

void Executor::perturb(const Perturbation& arguments) {
  const Work work = this->work(
      {arguments.params, arguments.backup, arguments.a, arguments.b, arguments.fold.into, arguments.fold.other});
  parallel_over_chunks(plan_, [&](Range range) { kernels().perturb(work, arguments, range); });
}

void Executor::copy(const Copy& arguments) {
  const Work work = this->work({arguments.from, arguments.to});
  parallel_over_chunks(plan_, [&](Range range) { kernels().copy(work, arguments, range); });
}

void Executor::materialise(const Materialise& arguments) {
  const List* terms = arguments.d.lists;
  const Copy& restore = arguments.restore;
  const Work work = this->work({terms[0], terms[1], terms[2], arguments.out, restore.from, restore.to});
  parallel_over_chunks(plan_, [&](Range range) { kernels().materialise(work, arguments, range); });
}

void Executor::update(const Update& arguments) {
  const List *terms = arguments.d.lists, *state = arguments.state;
  const Work work =
      this->work({terms[0], terms[1], terms[2], arguments.theta, arguments.params, state[0], state[1], state[2]});
  parallel_over_chunks(plan_, [&](Range range) { kernels().update(work, arguments, range); });
}

}  // namespace gam::cpu
