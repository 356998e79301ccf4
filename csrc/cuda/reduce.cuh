// Sums over the threads of a warp and of a block, in a fixed order.
#pragma once

#include "compat.cuh"

namespace gam::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Returns the sum over the warp in every lane: each step adds the same two numbers in both lanes of a pair.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Returns the sums over the block in its first thread. Call it once per kernel, by all threads of whole warps.
template <int Sums>
__device__ __forceinline__ void block_sum(double (&values)[Sums]) {
  GAM_SHARED(double, of_warp, kWarp* Sums);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int s = 0; s < Sums; ++s) {
    values[s] = warp_sum(values[s]);
    if (lane == 0) of_warp[Sums * warp + s] = values[s];
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int s = 0; s < Sums; ++s) values[s] = warp_sum(lane < warps ? of_warp[Sums * lane + s] : 0.0);
}

}  // namespace gam::cuda
