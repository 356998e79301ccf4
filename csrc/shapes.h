// The dtype, shapes and groups of one block of parameters.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "primitives.h"

namespace gam {

class Shapes {
 public:
  // The memory layout of a tensor, which has no gaps and does not overlap itself.
  struct Shape {
    std::vector<int64_t> sizes, strides;
  };

  Shapes(Dtype dtype, std::vector<Shape> shapes, const std::vector<int64_t>& group)
      : dtype_(dtype), shapes_(std::move(shapes)) {
    for (size_t i = 0; i < shapes_.size(); ++i) {
      int64_t numel = 1;
      for (const int64_t size : shapes_[i].sizes) numel *= size;
      leaves_.push_back({static_cast<int>(group[i]), numel});
      groups_ = std::max(groups_, leaves_[i].group + 1);
      bytes_ += numel * size_of(dtype);
    }
  }

  size_t size() const { return shapes_.size(); }
  const Shape& operator[](size_t i) const { return shapes_[i]; }
  const std::vector<Leaf>& leaves() const { return leaves_; }
  Dtype dtype() const { return dtype_; }
  int groups() const { return groups_; }
  int64_t bytes() const { return bytes_; }  // size of one list of tensors

 private:
  Dtype dtype_;
  std::vector<Shape> shapes_;
  std::vector<Leaf> leaves_;
  int groups_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace gam
