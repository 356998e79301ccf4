// The primitives that move parameters. All inputs of a pack are read before anything is written. So an input may be the
// same array as an output, but must not overlap it otherwise.

#include "combine.cuh"
#include "launch.cuh"

namespace gam::cuda {

// By default the compiler spills registers of the fp64 kernels to memory (`make sass` shows it). With a target of four
// blocks per multiprocessor it does not.
template <class T, bool Difference, bool Weighted, bool Folding>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 4 : 0)
    perturb_kernel(GAM_PARAM(PerturbArguments) arguments) {
  using Lists = Perturbation;
  using O = opmath_t<T>;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const auto of_group = [&](const Numbers<double>& numbers) { return number(arguments.table, numbers, row.group); };
  GAM_SHARED(double, factor, 1);
  if (threadIdx.x == 0) {
    factor[0] = inverse_norm(arguments.square[arguments.by_group ? row.group : 0]) * of_group(arguments.radius);
    if (arguments.multiplied) factor[0] += of_group(arguments.multiple);
  }
  __syncthreads();
  const View<T> params(row, Lists::kParams), backup(row, Lists::kBackup), a(row, Lists::kA), b(row, Lists::kB);
  const Perturb<O> perturb{static_cast<O>(factor[0])};
  const Weigh<O> weigh{static_cast<O>(of_group(arguments.eta))};
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
      const bool other = !arguments.save && !arguments.from_start;  // θ is not the origin, so it must be read
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
      const Fold<O> fold{static_cast<O>(of_group(arguments.k)), static_cast<O>(of_group(arguments.l))};
      Pack<O, W> x = into.template values<W>(i);
      const Pack<O, W> y = other.template values<W>(i);
#pragma unroll
      for (int k = 0; k < W; ++k) x.v[k] = fold(x.v[k], y.v[k]);
      into.template put_values<W>(i, x);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock) copy_kernel(GAM_PARAM(CopyArguments) arguments) {
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const View<T> from(row, Copy::kFrom), to(row, Copy::kTo);
  each_pack<kPack<T>>(piece, row.packed, [&](auto pack, int64_t i, int) {
    constexpr int W = decltype(pack)::value;
    to.template store<W>(i, from.template load<W>(i));
  });
}

void perturb(const Grid& grid, Dtype dtype, bool difference, bool weighted, bool folded,
             const PerturbArguments& arguments) {
  const auto launch = [&](auto element, auto difference_, auto weighted_, auto folding) {
    GAM_LAUNCH((perturb_kernel<decltype(element), difference_.value, weighted_.value, folding.value>), grid, kBlock,
               arguments);
  };
  with_dtype(dtype, [&](auto element) {
    with_flag(difference, [&](auto d) {
      with_flag(weighted, [&](auto w) { with_flag(folded, [&](auto f) { launch(element, d, w, f); }); });
    });
  });
}

void copy(const Grid& grid, Dtype dtype, const CopyArguments& arguments) {
  with_dtype(dtype, [&](auto element) { GAM_LAUNCH((copy_kernel<decltype(element)>), grid, kBlock, arguments); });
}

}  // namespace gam::cuda
