// The steps of the base optimizers. Of a pack everything is read before anything is written.
#pragma once

#include "combine.cuh"

namespace gam::cuda {

template <class Types>
__global__ void __launch_bounds__(kBlock, kResident<Types>) sgd_kernel(GAM_PARAM(SgdArguments) arguments) {
  using Lists = SgdArguments;
  const Table& table = arguments.table;
  const Piece piece = table.pieces[blockIdx.x];
  const Row& row = row_of(table, piece.leaf);
  const SgdNumbers& numbers = number(arguments.groups, row.group);
  const SgdGroup& group = numbers.group;
  GAM_SHARED(double, factor, kMaxTerms);
  find_factors(arguments.sums, numbers.d, factor);
  const bool first = row.option != 0, has_buffer = data_of(row, Lists::kBuffer) != nullptr;
  with_type(Types(), row, [&](auto type) {
    using T = decltype(type);
    using O = opmath_t<T>;
    constexpr int V = kPack<T>;
    GAM_SHARED(Sgd<O>, formula, 1);
    if (threadIdx.x == kWarp) {  // the first warp is at work on the factors
      formula[0] = Sgd<O>(group.lr, group.momentum, group.dampening, group.weight_decay, group.maximize, first);
    }
    __syncthreads();
    const Sgd<O>& sgd = formula[0];
    const bool decays = sgd.weight_decay != O(0);
    const View<Types, T> params(table, row, Lists::kParams), theta(table, row, Lists::kTheta);
    const View<Types, T> buffer(table, row, Lists::kBuffer);
    const Combined<Types, T> combined(table, row, Lists::kTerms, numbers.d);
    const Combine<O> combine = combine_of<O>(factor);
    each_pack<V>(piece, row.packed, [&](auto pack, int64_t i, int) {
      constexpr int W = decltype(pack)::value;
      const Pack<O, W> d = combined.template values<W>(i, combine);
      Pack<O, W> x = theta.template values<W>(i);
      if (has_buffer) {
        Pack<O, W> b = {};
        if (!first) b = buffer.template values<W>(i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const O decayed = decays ? x.v[k] : O(0);
          x.v[k] = group.nesterov ? sgd.template with_momentum<true>(d.v[k], x.v[k], decayed, b.v[k])
                                  : sgd.template with_momentum<false>(d.v[k], x.v[k], decayed, b.v[k]);
        }
        buffer.template put_values<W>(i, b);
      } else {
#pragma unroll
        for (int k = 0; k < W; ++k) x.v[k] = sgd(d.v[k], x.v[k], decays ? x.v[k] : O(0));
      }
      params.template put_values<W>(i, x);
    });
  });
}

template <class Types>
__global__ void __launch_bounds__(kBlock, kResident<Types, 1>) adam_kernel(GAM_PARAM(AdamArguments) arguments) {
  using Lists = AdamArguments;
  const Table& table = arguments.table;
  const Piece piece = table.pieces[blockIdx.x];
  const Row& row = row_of(table, piece.leaf);
  const AdamNumbers& numbers = number(arguments.groups, row.group);
  GAM_SHARED(double, factor, kMaxTerms);
  find_factors(arguments.sums, numbers.d, factor);
  with_type(Types(), row, [&](auto type) {
    using T = decltype(type);
    using O = opmath_t<T>;
    constexpr int V = kPack<T>;
    const AdamGroup& group = numbers.group;
    const AdamCorrections& corrections = number(arguments.corrections, row.option);
    GAM_SHARED(Adam<O>, formula, 1);
    if (threadIdx.x == kWarp) {  // the first warp is at work on the factors
      formula[0] = Adam<O>(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, group.decoupled,
                           group.maximize, corrections.step_size, corrections.root_correction);
    }
    __syncthreads();
    const Adam<O>& adam = formula[0];
    const bool decays = adam.weight_decay != O(0);
    const View<Types, T> params(table, row, Lists::kParams), theta(table, row, Lists::kTheta);
    const View<Types, T> average(table, row, Lists::kAverage), square(table, row, Lists::kSquare);
    const View<Types, T> largest(table, row, Lists::kLargest);
    const Combined<Types, T> combined(table, row, Lists::kTerms, numbers.d);
    const Combine<O> combine = combine_of<O>(factor);
    each_pack<V>(piece, row.packed, [&](auto pack, int64_t i, int) {
      constexpr int W = decltype(pack)::value;
      const Pack<O, W> d = combined.template values<W>(i, combine);
      Pack<O, W> x = theta.template values<W>(i);
      Pack<O, W> m = average.template values<W>(i);
      Pack<O, W> v = square.template values<W>(i);
      if (group.amsgrad) {
        Pack<O, W> top = largest.template values<W>(i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          x.v[k] = adam(d.v[k], x.v[k], decays ? x.v[k] : O(0), m.v[k], v.v[k], top.v[k]);
        }
        largest.template put_values<W>(i, top);
      } else {
#pragma unroll
        for (int k = 0; k < W; ++k) x.v[k] = adam(d.v[k], x.v[k], decays ? x.v[k] : O(0), m.v[k], v.v[k]);
      }
      average.template put_values<W>(i, m);
      square.template put_values<W>(i, v);
      params.template put_values<W>(i, x);
    });
  });
}

}  // namespace gam::cuda
