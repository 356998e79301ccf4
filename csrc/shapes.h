// The shapes, dtypes and groups of one optimizer's parameters.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "primitives.h"

namespace gam {

class Shapes {
 public:
  struct Shape {
    Dtype dtype;
    int group;
    std::vector<int64_t> sizes;
  };

  explicit Shapes(std::vector<Shape> shapes) : shapes_(std::move(shapes)) {
    for (const Shape& shape : shapes_) {
      int64_t numel = 1;
      for (const int64_t size : shape.sizes) numel *= size;
      leaves_.push_back({shape.dtype, shape.group, static_cast<int>(shape.sizes.size()), numel, shape.sizes.data()});
      groups_ = std::max(groups_, shape.group + 1);
      bytes_ += numel * size_of(shape.dtype);
    }
  }
  Shapes(const Shapes&) = delete;  // leaves point into shapes

  size_t size() const { return shapes_.size(); }
  const Shape& operator[](size_t i) const { return shapes_[i]; }
  const std::vector<Leaf>& leaves() const { return leaves_; }
  int groups() const { return groups_; }
  int64_t bytes() const { return bytes_; }  // of one list of tensors

 private:
  std::vector<Shape> shapes_;
  std::vector<Leaf> leaves_;
  int groups_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace gam
