// The plan of one block of parameters, as Python keeps it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "executor.h"
#include "lists.h"
#include "shapes.h"

namespace gam {

inline constexpr int64_t kMaxGroups = 1 << 20;

// The device, dtype, shapes and groups of the parameters of a block, and what carries the primitives out on them. It
// may be kept between steps: addresses are taken anew in every call.
class Plan {
 public:
  Plan(const TensorList& params, const std::vector<int64_t>& group);

  // Whether these parameters are, in everything the plan depends on, those it was made for. Raises ValueError where
  // they were given other memory, and overlap.
  bool fits(const TensorList& params, const std::vector<int64_t>& group);

  // Whether the tensors of these lists, null where there is none, can be the state of a base optimizer: of the dtype of
  // the parameters, and in their order in memory.
  bool takes_state(const std::vector<TensorList>& state) const;

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
