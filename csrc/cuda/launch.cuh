// One launch: selects the instance of a kernel, counts the launch and checks it.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "arrays.cuh"
#include "kernels.h"

namespace gam::cuda {

inline std::atomic<int64_t> launch_count{0};

// Raises RuntimeError in Python if the kernel could not be started. Errors of a running kernel appear where torch next
// waits for the device; with CUDA_LAUNCH_BLOCKING=1 they appear here.
inline void check_launch([[maybe_unused]] const char* kernel) {
  launch_count.fetch_add(1, std::memory_order_relaxed);
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA could not launch ") + kernel + ": " + cudaGetErrorString(error));
  }
#endif
}

#define GAM_LAUNCH(kernel, grid, threads, arguments)                         \
  do {                                                                       \
    static_assert(sizeof(arguments) <= 4096, "arguments of a kernel");       \
    GAM_START((kernel), (grid).blocks, threads, (grid).stream, (arguments)); \
    check_launch(#kernel);                                                   \
  } while (false)

template <class F>
void with_flag(bool value, F f) {
  if (value) {
    f(Constant<true>());
  } else {
    f(Constant<false>());
  }
}

}  // namespace gam::cuda
