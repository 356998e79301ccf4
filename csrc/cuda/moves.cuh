// The primitives that move parameters, or write a combination. Of a pack everything is read before anything is written,
// so an argument may be the very array that is written; it may not overlap it otherwise.
#pragma once

#include "combine.cuh"

namespace gam::cuda {

// Left to itself the compiler keeps some registers of the fp64 kernels in memory (`make sass` shows it); with four
// blocks on a multiprocessor to aim at, it does not.
template <class T, bool Difference, bool Weighted, bool Folding>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 4 : 0)
    perturb_kernel(GAM_PARAM(PerturbArguments) arguments) {
  using Lists = PerturbArguments;
  using O = opmath_t<T>;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const PerturbGroup& group = number(arguments.groups, row.group);
  GAM_SHARED(double, factor, 1);
  if (threadIdx.x == 0) {
    factor[0] = arguments.square ? inverse_norm(*arguments.square) * group.radius : group.radius;
  }
  __syncthreads();
  const View<T> params(row, Lists::kParams), backup(row, Lists::kBackup), a(row, Lists::kA), b(row, Lists::kB);
  const Perturb<O> perturb{static_cast<O>(factor[0])};
  const Weigh<O> weigh{static_cast<O>(group.eta)};
  const bool from_backup = arguments.from_start && !arguments.save;
  each_pack<kPack<T>>(piece, row.packed, [&](auto pack, int64_t i, int) {
    constexpr int W = decltype(pack)::value;
    const Pack<T, W> stored = from_backup ? backup.template load<W>(i) : params.template load<W>(i);
    Pack<O, W> v = a.template values<W>(i);
    if constexpr (Difference) {
      const Pack<O, W> y = b.template values<W>(i);
#pragma unroll
      for (int k = 0; k < W; ++k) v.v[k] = v.v[k] - y.v[k];
    }
    if constexpr (Weighted) {
      const bool other = !arguments.save && !arguments.from_start;  // the origin is not θ
      const Pack<T, W> theta = other ? backup.template load<W>(i) : stored;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const O weight = value_of(theta.v[k]);
        v.v[k] = weigh(weigh(v.v[k], weight), weight);
      }
    }
    if (arguments.save) backup.template store<W>(i, stored);
#pragma unroll
    for (int k = 0; k < W; ++k) v.v[k] = perturb(value_of(stored.v[k]), v.v[k]);
    params.template put_values<W>(i, v);
    if constexpr (Folding) {
      const View<T> into(row, Lists::kInto), other(row, Lists::kOther);
      const Fold<O> fold{static_cast<O>(group.k), static_cast<O>(group.l)};
      Pack<O, W> x = into.template values<W>(i);
      const Pack<O, W> y = other.template values<W>(i);
#pragma unroll
      for (int k = 0; k < W; ++k) x.v[k] = fold(x.v[k], y.v[k]);
      into.template put_values<W>(i, x);
    }
  });
}

template <class T>
__device__ __forceinline__ void copy_piece(const Row& row, const Piece& piece, int from, int to) {
  const View<T> source(row, from), target(row, to);
  each_pack<kPack<T>>(piece, row.packed, [&](auto pack, int64_t i, int) {
    constexpr int W = decltype(pack)::value;
    target.template store<W>(i, source.template load<W>(i));
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock) copy_kernel(GAM_PARAM(CopyArguments) arguments) {
  using Lists = CopyArguments;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  copy_piece<T>(row_of(arguments.table, piece.leaf), piece, Lists::kFrom, Lists::kTo);
}

template <class T>
__global__ void __launch_bounds__(kBlock) materialise_kernel(GAM_PARAM(MaterialiseArguments) arguments) {
  using Lists = MaterialiseArguments;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const GroupTerms& terms_of_group = number(arguments.d, row.group);
  GAM_SHARED(double, factor, kMaxTerms);
  find_factors(arguments.sums, terms_of_group, factor);
  __syncthreads();
  const Combined<T> combined(row, Lists::kTerms, terms_of_group);
  const Combine<opmath_t<T>> combine = combine_of<opmath_t<T>>(factor);
  const View<T> out(row, Lists::kOut);
  each_pack<kPack<T>>(piece, row.packed, [&](auto pack, int64_t i, int) {
    constexpr int W = decltype(pack)::value;
    out.template put_values<W>(i, combined.template values<W>(i, combine));
  });
  if (arguments.restore) copy_piece<T>(row, piece, Lists::kFrom, Lists::kTo);
}

}  // namespace gam::cuda
