#include "plan.h"

#include <ATen/EmptyTensor.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "cpu/executor.h"

#if defined(GAM_CUDA)
#include "cuda/device.h"
#include "cuda/executor.h"
#endif

namespace gam {
namespace {

// With GAM_EMULATED, which tests define, the memory of the CPU stands in for that of a GPU.
bool is_cuda([[maybe_unused]] at::Device device) {
#if defined(GAM_EMULATED)
  return true;
#elif defined(GAM_CUDA)
  return device.is_cuda();
#else
  return false;
#endif
}

std::unique_ptr<Executor> make_executor([[maybe_unused]] at::Device device, std::shared_ptr<const Shapes> shapes) {
#if defined(GAM_CUDA)
  if (is_cuda(device)) return std::make_unique<cuda::Executor>(device, std::move(shapes));
#endif
#if defined(GAM_EMULATED)
  return nullptr;
#else
  return std::make_unique<cpu::Executor>(std::move(shapes));
#endif
}

std::shared_ptr<const Shapes> shapes_of(const TensorList& params, const std::vector<int64_t>& group,
                                        at::Device device) {
  if (group.size() != params.size()) {
    refuse_value(c10::str("group must have one index per parameter, that is ", params.size(), ", got ", group.size()));
  }
  std::vector<Shapes::Shape> shapes;
  shapes.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_plain(params, i, device);
    if (params[i]->scalar_type() != params[0]->scalar_type()) {
      refuse_type(c10::str("params must all be of one dtype, got ", params[0]->dtype(), " and, at ", i, ", ",
                           params[i]->dtype()));
    }
    if (group[i] < 0 || group[i] >= kMaxGroups) {
      refuse_value(c10::str("group[", i, "] must be the index of a parameter group, got ", group[i]));
    }
    shapes.push_back({params[i]->sizes().vec(), params[i]->strides().vec()});
  }
  const Dtype dtype = shapes.empty() ? Dtype::kFloat : *known_dtype(params[0]->scalar_type());
  return std::make_shared<const Shapes>(dtype, std::move(shapes), group);
}

uintptr_t address_of(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

}  // namespace

std::vector<std::string> device_types() {
#if defined(GAM_CUDA) && !defined(GAM_EMULATED)
  return {"cpu", "cuda"};
#else
  return {"cpu"};
#endif
}

at::Device device_of(const TensorList& tensors) {
  if (tensors.size() == 0 || !tensors[0] || !tensors[0]->defined()) return at::kCPU;
  const at::Device device = tensors[0]->device();
  if (!device.is_cpu() && !is_cuda(device)) {
    refuse_value(c10::str(tensors.name_of(0), " must be on one of the devices that the core was built for (",
                          c10::Join(", ", device_types()), "), got ", device));
  }
  return device;
}

at::Tensor empty([[maybe_unused]] at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides,
                 at::ScalarType dtype) {
#if defined(GAM_CUDA)
  if (is_cuda(device)) return cuda::empty(device, sizes, strides, dtype);
#endif
  return at::detail::empty_strided_cpu(sizes, strides, at::TensorOptions().dtype(dtype));
}

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
    if (group[i] != leaves[i].group || !is_like(*params[i], i)) return false;
    moved = moved || addresses_[i] != address_of(*params[i]);
  }
  if (moved) take_addresses(params);
  if (params.held()) params.held()->fit(shapes_);
  return true;
}

bool Plan::is_like(const at::Tensor& tensor, size_t i) const {
  const Shapes::Shape& shape = (*shapes_)[i];
  return known_dtype(tensor.scalar_type()) == shapes_->dtype() && tensor.sizes() == at::IntArrayRef(shape.sizes) &&
         lies_as(tensor, shape.sizes, shape.strides);
}

bool Plan::takes_state(const std::vector<TensorList>& state) const {
  for (const TensorList& list : state) {
    for (size_t i = 0; i < std::min(list.size(), shapes_->size()); ++i) {
      if (list[i] && list[i]->sizes() == at::IntArrayRef((*shapes_)[i].sizes) && !is_like(*list[i], i)) return false;
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
