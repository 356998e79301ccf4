// The plan of one block of parameters, which Python keeps, and the devices that this build supports.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"

namespace gam {

inline constexpr int64_t kMaxGroups = 1 << 20;

// "cpu", "cuda".
std::vector<std::string> device_types();

// The device of the first tensor; the CPU for an empty list. Raises ValueError for a device without support.
at::Device device_of(const TensorList& tensors);

// An uninitialised tensor.
at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// The device, dtype, shapes and groups of a block's parameters, and the executor of the primitives on them. A plan may
// be kept between steps: every call reads the addresses anew.
class Plan {
 public:
  Plan(const TensorList& params, const std::vector<int64_t>& group);

  // True if the plan serves these parameters: everything that it depends on is the same. Raises ValueError if they were
  // given other memory, and overlap.
  bool fits(const TensorList& params, const std::vector<int64_t>& group);

  // True if the tensors of these lists (null for missing ones) can be the state of a base optimizer: they have the
  // dtype and memory order of the parameters.
  bool takes_state(const std::vector<TensorList>& state) const;

  // True if a tensor has the dtype, shape and memory order of a parameter.
  bool is_like(const at::Tensor& tensor, size_t i) const;

  at::Device device() const { return device_; }
  const Shapes& shapes() const { return *shapes_; }
  const std::shared_ptr<const Shapes>& shared_shapes() const { return shapes_; }
  int groups() const { return shapes_->groups(); }
  Executor& executor() const { return *executor_; }

 private:
  // Records the addresses of the parameters. Raises ValueError if two overlap, since all are processed at once.
  void take_addresses(const TensorList& params);

  at::Device device_;
  std::shared_ptr<const Shapes> shapes_;
  std::unique_ptr<Executor> executor_;
  std::vector<uintptr_t> addresses_;
};

}  // namespace gam
