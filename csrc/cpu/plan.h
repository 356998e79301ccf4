// Divides the elements of all parameters into chunks of equal size, whatever the sizes of the tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "../shapes.h"
#include "kernels.h"

namespace gam::cpu {

// Bytes of a chunk of parameters. A chunk must cost much more than its start, and a small model must still give work to
// all threads. A sum reads a quarter of a chunk at each of four places.
inline constexpr int64_t kChunkBytes = 1 << 18;

// Tensors are cut at multiples of this many elements, so that the parts start on cache lines if the tensor does.
inline constexpr int64_t kCut = 64;

class Plan {
 public:
  explicit Plan(const Shapes& shapes) {
    const int64_t element = size_of(shapes.dtype());
    int64_t room = 0;  // bytes left in the chunk being filled
    for (size_t i = 0; i < shapes.size(); ++i) {
      const Leaf& leaf = shapes.leaves()[i];
      for (int64_t begin = 0; begin < leaf.numel;) {
        if (room <= 0) {
          starts_.push_back(static_cast<int64_t>(pieces_.size()));
          room = kChunkBytes;
        }
        const int64_t fitting = std::max(room / element / kCut * kCut, kCut);
        const int64_t length = std::min(leaf.numel - begin, fitting);
        pieces_.push_back({static_cast<int64_t>(i), begin, length});
        begin += length;
        room -= length * element;
      }
    }
    starts_.push_back(static_cast<int64_t>(pieces_.size()));
  }

  const std::vector<Piece>& pieces() const { return pieces_; }
  int64_t chunks() const { return static_cast<int64_t>(starts_.size()) - 1; }
  Range pieces_of(int64_t first_chunk, int64_t last_chunk) const {
    return {starts_[static_cast<size_t>(first_chunk)], starts_[static_cast<size_t>(last_chunk)]};
  }

 private:
  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_;  // first piece of each chunk, and the end
};

}  // namespace gam::cpu
