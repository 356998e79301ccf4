#include "plan.h"

#include <algorithm>

namespace gam::cpu {

Plan::Plan(const Shapes& shapes) {
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

}  // namespace gam::cpu
