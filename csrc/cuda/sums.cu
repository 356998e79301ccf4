// The read-only primitives: one block sums each chunk, then one block sums all chunks.
//
// A thread adds up its elements of a chunk, at most 32, in the working precision: each of its kPack accumulators takes
// kChunk / kBlock / kPack of them (8 in fp32, 4 in 16 bits), by one fused operation each. All further additions are in
// fp64. So the relative error of a sum of squares of fp32 numbers is at most (8 + 1) 2⁻²⁴ = 5.4e-7, however many there
// are: 10⁹ elements make 122,000 chunks, each thread of the last block adds up 120 of them, and fp64 contributes
// another 160 · 2⁻⁵³ = 1.8e-14.

#include "combine.cuh"
#include "launch.cuh"

namespace gam::cuda {

// Unroll factor of the loops over packs. The compiler reads four packs of one list before it uses the first, mostly two
// packs each of two lists, and one pack each of the terms of products. With eight blocks per multiprocessor, four packs
// are 128 KiB of outstanding reads. Two or three packs still exceed the 20 KiB or so that keep the memory of an H100
// busy (3.35 TB/s for about 0.7 µs, by 132 multiprocessors).
inline constexpr int kReadsAhead = 4;

// sum[slot] += x y. The slot of a single element is known only at run time, and registers cannot be indexed.
template <class O, int V>
__device__ __forceinline__ void add_product(O (&sum)[V], int slot, O x, O y) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k == slot) sum[k] = multiply_add(x, y, sum[k]);
  }
}

template <class T, bool Difference, bool Weighted>
__global__ void __launch_bounds__(kBlock) square_norm_kernel(GAM_PARAM(SumsArguments) arguments) {
  using O = opmath_t<T>;
  constexpr int V = kPack<T>;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const View<T> a(row, Sums::kTerms), b(row, Sums::kTerms + 1), theta(row, Sums::kTheta);
  const Weigh<O> weigh{Weighted ? static_cast<O>(number(arguments.table, arguments.eta, row.group)) : O(0)};
  O sum[V] = {};
  each_pack<V, kReadsAhead>(piece, row.packed, [&](auto pack, int64_t i, int slot) {
    constexpr int W = decltype(pack)::value;
    Pack<O, W> x = a.template values<W>(i);
    if constexpr (Difference) {
      const Pack<O, W> y = b.template values<W>(i);
#pragma unroll
      for (int k = 0; k < W; ++k) x.v[k] = x.v[k] - y.v[k];
    }
    if constexpr (Weighted) {
      const Pack<O, W> t = theta.template values<W>(i);
#pragma unroll
      for (int k = 0; k < W; ++k) x.v[k] = weigh(x.v[k], t.v[k]);
    }
#pragma unroll
    for (int k = 0; k < W; ++k) add_product(sum, slot + k, x.v[k], x.v[k]);
  });
  double total[1] = {0.0};
#pragma unroll
  for (int k = 0; k < V; ++k) total[0] += static_cast<double>(sum[k]);
  block_sum(total);
  if (threadIdx.x == 0) arguments.parts[blockIdx.x] = total[0];
}

template <class T, bool WithM>
__global__ void __launch_bounds__(kBlock) inner_products_kernel(GAM_PARAM(SumsArguments) arguments) {
  using O = opmath_t<T>;
  constexpr int V = kPack<T>;
  const Piece piece = arguments.table.pieces[blockIdx.x];
  const Row& row = row_of(arguments.table, piece.leaf);
  const GroupTerms& u = number(arguments.table, arguments.u, row.group);
  const Combined<T> combined(row, Sums::kTerms, u);
  const Combine<O> of_u(u.p), of_m(WithM ? number(arguments.table, arguments.m, row.group).p : u.p);
  O uu[V] = {}, um[V] = {}, mm[V] = {};
  each_pack<V, kReadsAhead>(piece, row.packed, [&](auto pack, int64_t i, int slot) {
    constexpr int W = decltype(pack)::value;
    combined.template each<W>(i, [&](int k, auto... x) {
      const O a = of_u(x...);
      add_product(uu, slot + k, a, a);
      if constexpr (WithM) {
        const O b = of_m(x...);
        add_product(um, slot + k, b, a);
        add_product(mm, slot + k, b, b);
      }
    });
  });
  double total[kSums] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    total[0] += static_cast<double>(uu[k]);
    total[1] += static_cast<double>(um[k]);
    total[2] += static_cast<double>(mm[k]);
  }
  block_sum(total);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) arguments.parts[static_cast<int64_t>(kSums) * blockIdx.x + s] = total[s];
  }
}

// One block per group.
template <int Sums>
__global__ void __launch_bounds__(kTotalsBlock) totals_kernel(GAM_PARAM(TotalsArguments) arguments) {
  const int group = static_cast<int>(blockIdx.x);
  int64_t first = 0, last = arguments.chunks;
  if (arguments.starts) {
    const bool any = group < arguments.groups;
    first = any ? arguments.starts[group] : 0;
    last = any ? arguments.starts[group + 1] : 0;
  }
  double total[Sums] = {};
#pragma unroll 4
  for (int64_t chunk = first + threadIdx.x; chunk < last; chunk += kTotalsBlock) {
#pragma unroll
    for (int s = 0; s < Sums; ++s) total[s] += arguments.parts[Sums * chunk + s];
  }
  block_sum(total);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < Sums; ++s) arguments.totals[static_cast<int64_t>(Sums) * group + s] = total[s];
  }
}

void square_norm(const Grid& grid, Dtype dtype, bool difference, bool weighted, const SumsArguments& arguments) {
  const auto launch = [&](auto element, auto difference_, auto weighted_) {
    GAM_LAUNCH((square_norm_kernel<decltype(element), difference_.value, weighted_.value>), grid, kBlock, arguments);
  };
  with_dtype(dtype, [&](auto element) {
    with_flag(difference, [&](auto d) { with_flag(weighted, [&](auto w) { launch(element, d, w); }); });
  });
}

void inner_products(const Grid& grid, Dtype dtype, bool with_m, const SumsArguments& arguments) {
  const auto launch = [&](auto element, auto with_m_) {
    GAM_LAUNCH((inner_products_kernel<decltype(element), with_m_.value>), grid, kBlock, arguments);
  };
  with_dtype(dtype, [&](auto element) { with_flag(with_m, [&](auto m) { launch(element, m); }); });
}

void totals(const Grid& grid, int columns, const TotalsArguments& arguments) {
  if (columns == kSums) {
    GAM_LAUNCH((totals_kernel<kSums>), grid, kTotalsBlock, arguments);
  } else {
    GAM_LAUNCH((totals_kernel<1>), grid, kTotalsBlock, arguments);
  }
}

int64_t launches() { return launch_count.load(std::memory_order_relaxed); }

}  // namespace gam::cuda
