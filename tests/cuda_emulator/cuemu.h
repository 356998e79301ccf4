// CUDA's names for a plain C++17 compiler: kernels of csrc/cuda run on the CPU, block by block, thread by thread.
//
// What is found, and how:
//   a barrier that some threads do not reach, or reach elsewhere            error with the places in the source
//   a lane that is missing from the mask of a shuffle                       error; its value is NaN to the others
//   a missing barrier                                                       another result in the orders fwd and rand:N
//   shared memory that is read before it was written (GAM_SHARED)           NaN
//   memory out of bounds, a misaligned vector                               -fsanitize=address,undefined
// Not to be had: textures, cooperative groups, inline assembly, atomics between running threads, and two barriers on
// one line of the source, which cannot be told apart.
#pragma once

#include <cmath>

#include "fibers.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define CUEMU_SHARED(T, name, n) \
  static char name##_key;        \
  auto& name = *reinterpret_cast<T(*)[n]>(cuemu::block().shared(&name##_key, sizeof(T) * (n)))

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace cuemu {

// Runs a grid of one dimension.
template <class Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  if (threads < 1 || threads > kMaxThreads || blocks < 1) throw std::invalid_argument("an impossible grid");
  gridDim.x = blocks, blockDim.x = threads;
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  block().permute(order);
  const std::function<void()> body = kernel;
  const std::function<void(int)> enter = [](int thread) { threadIdx.x = static_cast<unsigned>(thread); };
  for (const unsigned b : order) {
    blockIdx.x = b;
    try {
      block().run(static_cast<int>(threads), body, enter);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("block " + std::to_string(b) + ": " + error.what());
    }
  }
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int argument, const Site& site) {
  static_assert(sizeof(T) <= 8, "one register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = block().warp_operation(operation, mask, bits, argument, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The place of the call, by a default argument.
struct Here : Site {
  Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : Site{file, line} {}
};

}  // namespace cuemu

inline void __syncthreads(cuemu::Here here = {}) { cuemu::block().barrier(here); }
inline void __syncwarp(unsigned mask = 0xffffffffu, cuemu::Here here = {}) {
  cuemu::block().warp_operation(cuemu::Operation::kSync, mask, 0, 0, here);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, cuemu::Here here = {}) {
  return cuemu::shuffle(cuemu::Operation::kShuffle, mask, value, lane, here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, cuemu::Here here = {}) {
  return cuemu::shuffle(cuemu::Operation::kShuffleUp, mask, value, static_cast<int>(distance), here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, cuemu::Here here = {}) {
  return cuemu::shuffle(cuemu::Operation::kShuffleDown, mask, value, static_cast<int>(distance), here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, cuemu::Here here = {}) {
  return cuemu::shuffle(cuemu::Operation::kShuffleXor, mask, value, lanes, here);
}
