// How the elements of all parameters are shared out: chunks of equal size, whatever the sizes of the tensors.
#pragma once

#include <vector>

#include "kernels.h"

namespace gam::cpu {

// Bytes of a chunk of parameters: long enough that a chunk costs much more than its start, short enough that a small
// model still gives work to all threads; a quarter of it is what a sum reads at each of four places.
inline constexpr int64_t kChunkBytes = 1 << 18;

// A tensor is cut at multiples of this many elements, so that the parts start on cache lines if the tensor does.
inline constexpr int64_t kCut = 64;

// Streaming stores save the read of the line that is overwritten, and take it out of the caches. They pay when a call
// touches more than the last-level cache holds. What the system reports of that is no guide (a virtual machine shows
// the whole socket's, of which it has a share), so this is the share of a few cores on today's servers.
inline constexpr int64_t kStreamBytes = 32 << 20;

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

class Plan {
 public:
  struct Shape {
    Dtype dtype;
    int group;
    std::vector<int64_t> sizes;
  };

  explicit Plan(std::vector<Shape> shapes);
  Plan(const Plan&) = delete;  // leaves point into shapes
  Plan(Plan&&) = default;

  const std::vector<Shape>& shapes() const { return shapes_; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  Work work() const { return {leaves_.data(), pieces_.data()}; }

  int64_t chunks() const { return static_cast<int64_t>(starts_.size()) - 1; }
  Range pieces_of(int64_t first_chunk, int64_t last_chunk) const {
    return {starts_[static_cast<size_t>(first_chunk)], starts_[static_cast<size_t>(last_chunk)]};
  }
  int groups() const { return groups_; }
  int64_t bytes() const { return bytes_; }  // of one list of tensors

 private:
  std::vector<Shape> shapes_;
  std::vector<Leaf> leaves_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_;  // of each chunk in pieces_, and the end
  int groups_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace gam::cpu
