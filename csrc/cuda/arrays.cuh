// Elements of the arrays of a leaf: packs of 16 bytes if all arrays are aligned, single elements otherwise.
#pragma once

#include "../elements.h"
#include "compat.cuh"
#include "table.h"

namespace gam::cuda {

// Elements of a pack: 16 bytes of the parameter's type, the share of one thread.
template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
struct Pack {
  T v[V];
};

template <class N>
__device__ __forceinline__ const N& number(const Table& table, const Numbers<N>& numbers, int index) {
  return numbers.many ? reinterpret_cast<const N*>(table.rows + numbers.many)[index] : numbers.few[index];
}

__device__ __forceinline__ const Row& row_of(const Table& table, int leaf) {
  return *reinterpret_cast<const Row*>(table.rows + static_cast<int64_t>(leaf) * table.row_bytes);
}

// The array of a leaf in a list, or null.
template <class T>
class View {
 public:
  View() = default;
  __device__ __forceinline__ View(const Row& row, int list)
      : data_(static_cast<T*>(reinterpret_cast<void* const*>(&row + 1)[list])) {
    GAM_ASSUME_GLOBAL(data_);
  }

  __device__ __forceinline__ bool exists() const { return data_ != nullptr; }

  // V elements from the i-th on: whole aligned vectors, or one element.
  template <int V>
  __device__ __forceinline__ Pack<T, V> load(int64_t i) const {
    Pack<T, V> pack;
    if constexpr (V == 1) {
      pack.v[0] = data_[i];
    } else {
      static_assert(sizeof(pack) % 16 == 0, "whole vectors");
      const uint4* from = reinterpret_cast<const uint4*>(data_ + i);
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof(pack) / 16); ++k) {
        const uint4 part = from[k];
        memcpy(reinterpret_cast<char*>(&pack) + 16 * k, &part, 16);
      }
    }
    return pack;
  }

  template <int V>
  __device__ __forceinline__ void store(int64_t i, const Pack<T, V>& pack) const {
    if constexpr (V == 1) {
      data_[i] = pack.v[0];
    } else {
      uint4* to = reinterpret_cast<uint4*>(data_ + i);
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof(pack) / 16); ++k) {
        uint4 part;
        memcpy(&part, reinterpret_cast<const char*>(&pack) + 16 * k, 16);
        to[k] = part;
      }
    }
  }

  // The same elements in the working precision.
  template <int V>
  __device__ __forceinline__ Pack<opmath_t<T>, V> values(int64_t i) const {
    const Pack<T, V> pack = load<V>(i);
    Pack<opmath_t<T>, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.v[k] = value_of(pack.v[k]);
    return result;
  }

  template <int V>
  __device__ __forceinline__ void put_values(int64_t i, const Pack<opmath_t<T>, V>& values) const {
    Pack<T, V> pack;
#pragma unroll
    for (int k = 0; k < V; ++k) put(values.v[k], pack.v[k]);
    store<V>(i, pack);
  }

 private:
  T* data_;
};

// Calls f(Constant<V>, i, 0) for this thread's packs of a piece, and f(Constant<1>, i, k) for its single elements, the
// k-th of their pack. The assignment of elements to packs and threads does not depend on alignment, so sums do not
// either. With `Unroll` several packs are read ahead. If f also writes, that gains nothing, because reads would have to
// wait for the writes.
template <int V, int Unroll = 1, class F>
__device__ __forceinline__ void each_pack(const Piece& piece, bool packed, F f) {
  const int thread = static_cast<int>(threadIdx.x);
  const int whole = packed ? piece.length / V : 0;  // packs that are read whole
#pragma unroll Unroll
  for (int p = thread; p < whole; p += kBlock) f(Constant<V>(), piece.begin + p * V, 0);
  const int next = whole + (thread - whole % kBlock + kBlock) % kBlock;  // this thread's first remaining pack
#pragma unroll 1
  for (int p = next; p * V < piece.length; p += kBlock) {
#pragma unroll 1
    for (int k = 0; k < V && p * V + k < piece.length; ++k) f(Constant<1>(), piece.begin + p * V + k, k);
  }
}

}  // namespace gam::cuda
