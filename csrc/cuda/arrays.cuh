// Elements of the arrays of a leaf: packs of 16 bytes where they allow it, one by one elsewhere.
#pragma once

#include "../elements.h"
#include "compat.cuh"
#include "table.h"

namespace gam::cuda {

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// The elements of one thread's share: those of 16 bytes of the parameter's type.
template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
struct Pack {
  T v[V];
};

template <class N>
__device__ __forceinline__ const N& number(const Numbers<N>& numbers, int group) {
  return numbers.many ? numbers.many[group] : numbers.few[group];
}

__device__ __forceinline__ const Row& row_of(const Table& table, int leaf) {
  return *reinterpret_cast<const Row*>(table.rows + static_cast<int64_t>(leaf) * table.row_bytes);
}

// Whether the leaf has an array in a list.
__device__ __forceinline__ void* data_of(const Row& row, int list) {
  return reinterpret_cast<void* const*>(&row + 1)[list];
}

// The types of a launch: that of all its leaves, where all can be walked in the order of memory; or Any, where each
// leaf has the one that its row says, and any layout.
template <class T>
struct Only {};
struct Any {};

template <class Types>
inline constexpr bool kIsAny = false;
template <>
inline constexpr bool kIsAny<Any> = true;

// The least number of blocks on a multiprocessor that the compiler is to aim at, 0 for no aim. Left to itself it keeps
// some registers of the widest kernels in memory (`make sass` shows it).
template <class Types, int OfAny = 2, int OfDouble = 0>
inline constexpr int kResident = 0;
template <int OfAny, int OfDouble>
inline constexpr int kResident<Any, OfAny, OfDouble> = OfAny;
template <int OfAny, int OfDouble>
inline constexpr int kResident<Only<double>, OfAny, OfDouble> = OfDouble;

// Where the i-th element in logical order lies in the array of a list.
static __device__ __noinline__ int64_t offset_of(const int64_t* layout, int list, int64_t i) {
  const int dims = static_cast<int>(layout[0]);
  const int64_t* sizes = layout + 1;
  const int64_t* own = sizes + dims + list * (1 + dims);
  if (own[0] == 0) return i;
  const int64_t* strides = own + 1;
  int64_t result = 0;
#pragma unroll 1
  for (int d = dims - 1; d > 0; --d) {
    const int64_t rest = i / sizes[d];
    result += (i - rest * sizes[d]) * strides[d];
    i = rest;
  }
  return result + i * strides[0];
}

// How the elements of an array are found.
template <bool AnyLayout>
class Place {
 public:
  __device__ __forceinline__ Place(const Table&, const Row&, int) {}
  __device__ __forceinline__ int64_t operator()(int64_t i) const { return i; }
};

template <>
class Place<true> {
 public:
  __device__ __forceinline__ Place(const Table& table, const Row& row, int list)
      : layout_(row.layout < 0 ? nullptr : table.layouts + row.layout), list_(list) {}
  __device__ __forceinline__ int64_t operator()(int64_t i) const { return layout_ ? offset_of(layout_, list_, i) : i; }

 private:
  const int64_t* layout_;
  int list_;
};

template <class Types, class T>
class View {
 public:
  __device__ __forceinline__ View(const Table& table, const Row& row, int list)
      : data_(static_cast<T*>(data_of(row, list))), place_(table, row, list) {
    GAM_ASSUME_GLOBAL(data_);
  }

  // V elements from the i-th on: a whole number of aligned vectors, or one element wherever it lies.
  template <int V>
  __device__ __forceinline__ Pack<T, V> load(int64_t i) const {
    Pack<T, V> pack;
    if constexpr (V == 1) {
      pack.v[0] = data_[place_(i)];
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
      data_[place_(i)] = pack.v[0];
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

  // The same as numbers in the working precision.
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
  Place<kIsAny<Types>> place_;
};

// Calls f(Constant<V>, i, 0) for the packs of a piece that are this thread's, and f(Constant<1>, i, k) for single
// elements, the k-th of their pack. Which elements share a pack, and which thread has it, depends neither on alignment
// nor on layout; nor, then, does any sum. With `Unroll` the reads of several packs are under way at once; where f also
// writes, they would have to wait for each other anyway.
template <int V, int Unroll = 1, class F>
__device__ __forceinline__ void each_pack(const Piece& piece, bool packed, F f) {
  const int thread = static_cast<int>(threadIdx.x);
  const int whole = packed ? piece.length / V : 0;  // packs that are read as such
#pragma unroll Unroll
  for (int p = thread; p < whole; p += kBlock) f(Constant<V>(), piece.begin + p * V, 0);
  const int next = whole + (thread - whole % kBlock + kBlock) % kBlock;  // the thread's first of the others
#pragma unroll 1
  for (int p = next; p * V < piece.length; p += kBlock) {
#pragma unroll 1
    for (int k = 0; k < V && p * V + k < piece.length; ++k) f(Constant<1>(), piece.begin + p * V + k, k);
  }
}

template <class T, class F>
__device__ __forceinline__ void with_type(Only<T>, const Row&, F f) {
  f(T());
}
template <class F>
__device__ __forceinline__ void with_type(Any, const Row& row, F f) {
  switch (row.dtype) {
    case Dtype::kDouble:
      return f(double());
    case Dtype::kFloat:
      return f(float());
    case Dtype::kBFloat16:
      return f(BFloat16());
    case Dtype::kHalf:
      return f(Half());
  }
}

}  // namespace gam::cuda
