// The combination Σ factor x of terms, whose factors may depend on sums in device memory.
#pragma once

#include "arguments.h"
#include "arrays.cuh"
#include "reduce.cuh"

namespace gam::cuda {

// Writes the factors of a group's terms. All threads of the block call it, and the first warp does the work. Read the
// result only after a barrier.
__device__ __forceinline__ void find_factors(const UpdateArguments& arguments, const GroupTerms& terms_of_group,
                                             double* factor) {
  if (threadIdx.x >= kWarp) return;
  const Scaling& scaling = arguments.scaling;
  const int lane = static_cast<int>(threadIdx.x);
  double kappa = 0.0, scale = 1.0;
  if (scaling.project || scaling.clip) {
    double uu = 0.0, um = 0.0;
    for (int row = lane; row < scaling.rows; row += kWarp) {
      uu += scaling.products[kSums * row];
      um += scaling.products[kSums * row + 1];
    }
    uu = warp_sum(uu), um = warp_sum(um);
    if (scaling.project) kappa = ratio(um, uu);
    if (scaling.clip) {
      double square = 0.0;
      for (int row = lane; row < scaling.rows; row += kWarp) {
        const double* sums = scaling.products + kSums * row;
        const double gamma = number(arguments.table, arguments.gamma, row);
        square += scaling.project ? square_of_direction(sums[0], sums[1], sums[2], gamma, kappa) : sums[0];
      }
      scale = clip_factor(warp_sum(square), scaling.limit);
    }
  }
  if (lane < terms_of_group.terms)
    factor[lane] = factor_of(terms_of_group.p[lane], terms_of_group.q[lane], kappa, scale);
}

// The terms of one leaf; their lists start at index `first` of the table. All threads of a block have the same number
// of terms, so branches on it cost next to nothing. Everything is read before the first element is used.
template <class T>
class Combined {
  using O = opmath_t<T>;

 public:
  __device__ __forceinline__ Combined(const Row& row, int first, const GroupTerms& terms_of_group)
      : terms_(terms_of_group.terms),
        x_(row, first + terms_of_group.index[0]),
        y_(row, first + terms_of_group.index[1]),
        z_(row, first + terms_of_group.index[2]) {}

  // Calls use(k, terms...) for the k-th of V elements.
  template <int V, class Use>
  __device__ __forceinline__ void each(int64_t i, Use use) const {
    const Pack<O, V> x = x_.template values<V>(i);
    Pack<O, V> y, z;
    if (terms_ > 1) y = y_.template values<V>(i);
    if (terms_ > 2) z = z_.template values<V>(i);
    if (terms_ == 1) {
#pragma unroll
      for (int k = 0; k < V; ++k) use(k, x.v[k]);
    } else if (terms_ == 2) {
#pragma unroll
      for (int k = 0; k < V; ++k) use(k, x.v[k], y.v[k]);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) use(k, x.v[k], y.v[k], z.v[k]);
    }
  }

  // Σ factor x
  template <int V>
  __device__ __forceinline__ Pack<O, V> values(int64_t i, const Combine<O>& combine) const {
    Pack<O, V> result;
    each<V>(i, [&](int k, auto... terms) { result.v[k] = combine(terms...); });
    return result;
  }

 private:
  int terms_;
  View<T> x_, y_, z_;
};

}  // namespace gam::cuda
