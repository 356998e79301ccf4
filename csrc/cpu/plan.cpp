#include "plan.h"

#include <algorithm>
#include <utility>

namespace gam::cpu {

Plan::Plan(std::vector<Shape> shapes) : shapes_(std::move(shapes)) {
  int64_t room = 0;  // bytes left in the chunk being filled
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const Shape& shape = shapes_[i];
    int64_t numel = 1;
    for (const int64_t size : shape.sizes) numel *= size;
    leaves_.push_back({shape.dtype, shape.group, static_cast<int>(shape.sizes.size()), numel, shape.sizes.data()});
    const int64_t element = size_of(shape.dtype);
    groups_ = std::max(groups_, shape.group + 1);
    bytes_ += numel * element;
    for (int64_t begin = 0; begin < numel;) {
      if (room <= 0) {
        starts_.push_back(static_cast<int64_t>(pieces_.size()));
        room = kChunkBytes;
      }
      const int64_t fitting = std::max(room / element / kCut * kCut, kCut);
      const int64_t length = std::min(numel - begin, fitting);
      pieces_.push_back({static_cast<int64_t>(i), begin, length});
      begin += length;
      room -= length * element;
    }
  }
  starts_.push_back(static_cast<int64_t>(pieces_.size()));
}

}  // namespace gam::cpu
