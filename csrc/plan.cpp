#include "plan.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "checks.h"
#include "devices.h"

namespace gam {
namespace {

std::shared_ptr<const Shapes> shapes_of(const TensorList& params, const std::vector<int64_t>& group,
                                        at::Device device) {
  if (group.size() != params.size()) {
    refuse_value(c10::str("group must have one index a parameter, that is ", params.size(), ", got ", group.size()));
  }
  std::vector<Shapes::Shape> shapes;
  shapes.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_plain(params, i, device);
    const Dtype dtype = dtype_of(params, i);
    if (group[i] < 0 || group[i] >= kMaxGroups) {
      refuse_value(c10::str("group[", i, "] must be the index of a parameter group, got ", group[i]));
    }
    if (!is_free_of_self_overlap(*params[i])) {
      refuse_value(params.name_of(i) + " must not overlap itself in memory: give it memory of its own");
    }
    shapes.push_back({dtype, static_cast<int>(group[i]), params[i]->sizes().vec()});
  }
  return std::make_shared<const Shapes>(std::move(shapes));
}

}  // namespace

Plan::Plan(const TensorList& params, const std::vector<int64_t>& group)
    : device_(device_of(params)),
      shapes_(shapes_of(params, group, device_)),
      executor_(make_executor(device_, shapes_)) {
  if (params.held()) params.held()->fit(shapes_);
}

bool Plan::fits(const TensorList& params, const std::vector<int64_t>& group) const {
  const std::vector<Leaf>& leaves = shapes_->leaves();
  if (params.size() != leaves.size() || group.size() != leaves.size() || device_of(params) != device_) return false;
  for (size_t i = 0; i < leaves.size(); ++i) {
    check_plain(params, i, device_);
    if (group[i] != leaves[i].group || params[i]->sizes() != at::IntArrayRef((*shapes_)[i].sizes) ||
        dtype_of(params, i) != leaves[i].dtype) {
      return false;
    }
  }
  if (params.held()) params.held()->fit(shapes_);
  return true;
}

bool Plan::takes_state(const std::vector<TensorList>& state) const {
  for (const TensorList& list : state) {
    for (size_t i = 0; i < std::min(list.size(), shapes_->size()); ++i) {
      if (!list[i]) continue;
      if (known_dtype(list[i]->scalar_type()) != (*shapes_)[i].dtype) return false;
    }
  }
  return true;
}

bool Plan::known(uint64_t accesses, const std::vector<uintptr_t>& fingerprint) const {
  const auto found = known_.find(accesses);
  return found != known_.end() && found->second == fingerprint;
}

void Plan::remember(uint64_t accesses, std::vector<uintptr_t> fingerprint) {
  known_[accesses] = std::move(fingerprint);
}

}  // namespace gam
