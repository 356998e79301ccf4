// The launch metadata of tensor lists: one table in device memory.
#pragma once

#include "../primitives.h"

namespace gam::cuda {

// Threads per block: few enough that two blocks of the kernel with the most registers (128 per thread) fit on a
// multiprocessor, and enough that eight blocks fill its 2,048 threads.
inline constexpr int kBlock = 256;

// Elements of a chunk, the work of one block. The 25.6 M elements of a ResNet-50 make 3,222 chunks, three rounds of the
// 1,056 blocks that an H100 holds. Chunks of 64 K, torch's size, would make 508, half a round. Each thread handles 32
// elements, so that the start of a block (a few dependent reads) is a small part of its work. Blocks are not
// persistent: the hardware schedules a new one when another ends, which balances tensors of all sizes. The sum of a
// chunk does not depend on the number of multiprocessors.
inline constexpr int kChunk = 8192;

// Threads of the block that adds up the sums of the chunks. 10⁹ elements have 122,000 chunks.
inline constexpr int kTotalsBlock = 1024;

// Numbers of up to this many groups are kernel arguments; those of more groups are in the table.
inline constexpr int kFew = 16;

// Elements [begin, begin + length) of a leaf.
struct Piece {
  int64_t begin;
  int32_t leaf, length;
};

// Header of a leaf's row. The addresses of its arrays follow, in the order of the lists.
struct alignas(8) Row {
  int32_t group;
  int32_t option;  // in an update, the index of the leaf's numbers among the options
  bool packed;     // all arrays are aligned to 16 bytes
};

struct Table {
  const Piece* pieces = nullptr;
  const unsigned char* rows = nullptr;
  int32_t row_bytes = 0;
};

inline constexpr int64_t row_bytes(int lists) { return static_cast<int64_t>(sizeof(Row)) + 8 * lists; }

// Numbers by group, or by another index.
template <class N>
struct Numbers {
  int64_t many = 0;  // their offset in the table, if there are more than kFew
  N few[kFew] = {};
};

}  // namespace gam::cuda
