#include "executor.h"

#include <ATen/Parallel.h>

#include <vector>

#include "dispatch.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gam::cpu {
namespace {

// True in a process forked from one that had loaded the core. The threads of libgomp do not survive a fork, and a
// parallel region would wait for them forever. Such a process (a worker of a DataLoader) works with one thread.
bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

template <class Arguments, class Loop>
void Executor::run(const Arguments& arguments, const Loop& loop) const {
  const Work work{shapes_->dtype(), shapes_->leaves().data(), plan_.pieces().data(), arguments.lists,
                  Arguments::kLists};
  const auto run_chunks = [&](int64_t first, int64_t last) { loop(work, arguments, plan_.pieces_of(first, last)); };
  if (forked) {
    run_chunks(0, plan_.chunks());
  } else {
    at::parallel_for(0, plan_.chunks(), 1, run_chunks);
  }
}

at::Tensor Executor::sums(const Sums& arguments, int64_t groups) {
  const std::vector<Piece>& pieces = plan_.pieces();
  std::vector<double> of_pieces(pieces.size() * kSums);
  run(arguments, [&](const Work& work, const Sums& sums, Range range) {
    kernels().sums(work, sums, range, of_pieces.data() + kSums * range.begin);
  });
  std::vector<double> total(static_cast<size_t>(std::max<int64_t>(groups, 1)) * kSums);
  for (size_t p = 0; p < pieces.size(); ++p) {
    const int group = groups > 0 ? shapes_->leaves()[static_cast<size_t>(pieces[p].leaf)].group : 0;
    for (size_t k = 0; k < kSums; ++k) total[static_cast<size_t>(group) * kSums + k] += of_pieces[p * kSums + k];
  }
  return groups > 0 ? tensor_of(total, {groups, kSums}) : tensor_of({total[0]}, {});
}

void Executor::perturb(const Perturbation& arguments) { run(arguments, kernels().perturb); }
void Executor::copy(const Copy& arguments) { run(arguments, kernels().copy); }
void Executor::update(const Update& arguments) { run(arguments, kernels().update); }

}  // namespace gam::cpu
