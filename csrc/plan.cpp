#include "plan.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <numeric>
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
  Dtype dtype = Dtype::kFloat;
  std::vector<Shapes::Shape> shapes;
  shapes.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_plain(params, i, device);
    const Dtype own = dtype_of(params, i);
    if (i == 0) dtype = own;
    if (own != dtype) {
      refuse_type(c10::str("params must all be of one dtype, got ", params[0]->dtype(), " and, at ", i, ", ",
                           params[i]->dtype()));
    }
    if (group[i] < 0 || group[i] >= kMaxGroups) {
      refuse_value(c10::str("group[", i, "] must be the index of a parameter group, got ", group[i]));
    }
    shapes.push_back({params[i]->sizes().vec(), params[i]->strides().vec()});
  }
  return std::make_shared<const Shapes>(dtype, std::move(shapes), group);
}

uintptr_t address_of(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

}  // namespace

Plan::Plan(const TensorList& params, const std::vector<int64_t>& group)
    : device_(device_of(params)),
      shapes_(shapes_of(params, group, device_)),
      executor_(make_executor(device_, shapes_)) {
  take_addresses(params);
  if (params.held()) params.held()->fit(shapes_);
}

bool Plan::fits(const TensorList& params, const std::vector<int64_t>& group) {
  const std::vector<Leaf>& leaves = shapes_->leaves();
  if (params.size() != leaves.size() || group.size() != leaves.size() || device_of(params) != device_) return false;
  bool moved = false;
  for (size_t i = 0; i < leaves.size(); ++i) {
    check_plain(params, i, device_);
    const Shapes::Shape& shape = (*shapes_)[i];
    if (group[i] != leaves[i].group || dtype_of(params, i) != shapes_->dtype() ||
        params[i]->sizes() != at::IntArrayRef(shape.sizes) || !lies_as(*params[i], shape.sizes, shape.strides)) {
      return false;
    }
    moved = moved || addresses_[i] != address_of(*params[i]);
  }
  if (moved) take_addresses(params);
  if (params.held()) params.held()->fit(shapes_);
  return true;
}

bool Plan::takes_state(const std::vector<TensorList>& state) const {
  for (const TensorList& list : state) {
    for (size_t i = 0; i < std::min(list.size(), shapes_->size()); ++i) {
      const Shapes::Shape& shape = (*shapes_)[i];
      if (!list[i] || list[i]->sizes() != at::IntArrayRef(shape.sizes)) continue;
      if (known_dtype(list[i]->scalar_type()) != shapes_->dtype() || !lies_as(*list[i], shape.sizes, shape.strides)) {
        return false;
      }
    }
  }
  return true;
}

void Plan::take_addresses(const TensorList& params) {
  std::vector<uintptr_t> addresses;
  for (size_t i = 0; i < params.size(); ++i) addresses.push_back(address_of(*params[i]));
  std::vector<size_t> order(params.size());
  std::iota(order.begin(), order.end(), 0);
  const auto numel = [&](size_t i) { return shapes_->leaves()[i].numel; };
  order.erase(std::remove_if(order.begin(), order.end(), [&](size_t i) { return numel(i) == 0; }), order.end());
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return addresses[i] < addresses[j]; });
  for (size_t k = 1; k < order.size(); ++k) {
    const size_t before = order[k - 1], next = order[k];
    if (addresses[before] + static_cast<uintptr_t>(numel(before) * size_of(shapes_->dtype())) > addresses[next]) {
      refuse_value(c10::str(params.name_of(std::min(before, next)), " and ", params.name_of(std::max(before, next)),
                            " must not overlap in memory: give one of them memory of its own with clone()"));
    }
  }
  addresses_ = std::move(addresses);
}

}  // namespace gam
