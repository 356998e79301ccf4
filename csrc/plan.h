// The plan of one block of parameters, as Python keeps it, and the devices that this build of the core works on.
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

// The device of the first of them, and the CPU without any. Raises ValueError for one that this build does not serve.
at::Device device_of(const TensorList& tensors);

// An uninitialised tensor.
at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// The device, dtype, shapes and groups of the parameters of a block, and what carries the primitives out on them. It
// may be kept between steps: addresses are taken anew in every call.
class Plan {
 public:
  Plan(const TensorList& params, const std::vector<int64_t>& group);

  // True if these parameters are, in everything the plan depends on, those it was made for. Raises ValueError where
  // they were given other memory, and overlap.
  bool fits(const TensorList& params, const std::vector<int64_t>& group);

  // True if the tensors of these lists, null where there is none, can be the state of a base optimizer: of the dtype of
  // the parameters, and in their order in memory.
  bool takes_state(const std::vector<TensorList>& state) const;

  // Tells whether a tensor has the dtype and shape of a parameter, and its order in memory.
  bool is_like(const at::Tensor& tensor, size_t i) const;

  at::Device device() const { return device_; }
  const Shapes& shapes() const { return *shapes_; }
  const std::shared_ptr<const Shapes>& shared_shapes() const { return shapes_; }
  int groups() const { return shapes_->groups(); }
  Executor& executor() const { return *executor_; }

 private:
  // Remembers where the parameters lie. Raises ValueError where two overlap, since all are worked on at once.
  void take_addresses(const TensorList& params);

  at::Device device_;
  std::shared_ptr<const Shapes> shapes_;
  std::unique_ptr<Executor> executor_;
  std::vector<uintptr_t> addresses_;
};

}  // namespace gam
