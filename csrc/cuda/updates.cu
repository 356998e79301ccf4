// The step of a base optimizer. All inputs of a pack are read before anything is written.

#include "combine.cuh"
#include "launch.cuh"

namespace gam::cuda {

template <class T, template <class> class Functor>
__global__ void __launch_bounds__(kBlock) update_kernel(GAM_PARAM(UpdateArguments) arguments) {
  using Lists = Update;
  using O = opmath_t<T>;
  constexpr int S = Functor<O>::kState;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const GroupTerms& terms = number(arguments.table, arguments.d, row.group);
  GAM_SHARED(double, factor, kMaxTerms);
  GAM_SHARED(Functor<O>, functor, 1);
  find_factors(arguments, terms, factor);
  if (threadIdx.x == kWarp) {  // the first warp computes the factors
    functor[0] = Functor<O>(number(arguments.table, arguments.groups, row.group).numbers,
                            number(arguments.table, arguments.options, row.option).numbers);
  }
  __syncthreads();
  const Functor<O> step = functor[0];
  const View<T> params(row, Lists::kParams), theta(row, Lists::kTheta);
  const Combined<T> combined(row, Lists::kTerms, terms);
  const Combine<O> combine(factor);
  View<T> kept[S];
#pragma unroll
  for (int s = 0; s < S; ++s) kept[s] = View<T>(row, Lists::kState + s);
  each_pack<kPack<T>>(piece, row.packed, [&](auto pack, int64_t i, int) {
    constexpr int W = decltype(pack)::value;
    const Pack<O, W> d = combined.template values<W>(i, combine);
    Pack<T, W> x = theta.template load<W>(i), state[S] = {};
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (kept[s].exists()) state[s] = kept[s].template load<W>(i);
    }
#pragma unroll
    for (int k = 0; k < W; ++k) {
      O of_element[S];
#pragma unroll
      for (int s = 0; s < S; ++s) of_element[s] = value_of(state[s].v[k]);
      put(step(d.v[k], value_of(x.v[k]), of_element), x.v[k]);
#pragma unroll
      for (int s = 0; s < S; ++s) put(of_element[s], state[s].v[k]);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (kept[s].exists()) kept[s].template store<W>(i, state[s]);
    }
    params.template store<W>(i, x);
  });
}

void update(const Grid& grid, Dtype dtype, const UpdateArguments& arguments) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    switch (arguments.formula) {
#define GAM_CASE(functor, name)                                       \
  case Formula::k##functor:                                           \
    GAM_LAUNCH((update_kernel<T, functor>), grid, kBlock, arguments); \
    break;
      GAM_UPDATES(GAM_CASE)
#undef GAM_CASE
    }
  });
}

}  // namespace gam::cuda
