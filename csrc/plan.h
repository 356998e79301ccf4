// The plan of one optimizer's parameters on one device, as Python keeps it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "executor.h"
#include "lists.h"
#include "shapes.h"

namespace gam {

inline constexpr int64_t kMaxGroups = 1 << 20;

// The device, shapes, dtypes and groups of the parameters, and what carries the primitives out on them. It may be kept
// between steps: addresses are taken anew in every call.
class Plan {
 public:
  Plan(const TensorList& params, const std::vector<int64_t>& group);

  // Whether these parameters are, in everything the plan depends on, those it was made for.
  bool fits(const TensorList& params, const std::vector<int64_t>& group) const;

  // Whether lists of these dtypes, null where there is none, can be the state of a base optimizer.
  bool takes_state(const std::vector<TensorList>& state) const;

  at::Device device() const { return device_; }
  const Shapes& shapes() const { return *shapes_; }
  const std::shared_ptr<const Shapes>& shared_shapes() const { return shapes_; }
  int groups() const { return shapes_->groups(); }
  Executor& executor() const { return *executor_; }

  // Whether the last call with this pattern of accesses had the same fingerprint (addresses and layouts) and was found
  // free of overlaps. To find that out takes a sort, and addresses mostly stay. The GIL guards both functions.
  bool known(uint64_t accesses, const std::vector<uintptr_t>& fingerprint) const;
  void remember(uint64_t accesses, std::vector<uintptr_t> fingerprint);

 private:
  at::Device device_;
  std::shared_ptr<const Shapes> shapes_;
  std::unique_ptr<Executor> executor_;
  std::map<uint64_t, std::vector<uintptr_t>> known_;
};

}  // namespace gam
