// What kernels get of the lists of tensors: one table in the memory of the device.
#pragma once

#include "../primitives.h"

namespace gam::cuda {

// Threads of a block: enough that eight blocks fill a multiprocessor of 2,048 threads, few enough that two blocks of
// the kernel with the most registers, 128 for a thread, fit beside each other.
inline constexpr int kBlock = 256;

// Elements of a chunk, the work of one block. The 25.6 M elements of a ResNet-50 make 3,222 of them, three rounds of
// the 1,056 blocks that an H100 holds; chunks of 64 K, as torch's own, would make 508, half a round. Each thread then
// handles 32 elements: enough that the start of a block (a few reads that depend on each other) is a small part of it.
// The blocks are not persistent: the hardware hands them out as others end, which balances tensors of all sizes, and a
// sum of a chunk does not depend on how many multiprocessors there are.
inline constexpr int kChunk = 8192;

// Threads of the one block that adds up the sums of the chunks: 10⁹ elements have 122,000 of them.
inline constexpr int kTotalsBlock = 1024;

// Numbers of so many groups travel in the arguments of a kernel; of more, in the table.
inline constexpr int kFew = 16;

// Elements [begin, begin + length) of a leaf.
struct Piece {
  int64_t begin;
  int32_t leaf, length;
};

// The arrays of one leaf: their addresses, in the order of the lists, follow.
struct alignas(8) Row {
  int32_t group;
  int32_t option;  // of an update, the place of the leaf's numbers among its options
  bool packed;     // all arrays are aligned to 16 bytes
};

struct Table {
  const Piece* pieces = nullptr;
  const unsigned char* rows = nullptr;
  int32_t row_bytes = 0;
};

inline constexpr int64_t row_bytes(int lists) { return static_cast<int64_t>(sizeof(Row)) + 8 * lists; }

// By group, or another index.
template <class N>
struct Numbers {
  int64_t many = 0;  // where they lie in the table, if there are more than a few
  N few[kFew] = {};
};

}  // namespace gam::cuda
