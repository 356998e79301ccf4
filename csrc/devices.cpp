#include "devices.h"

#include <ATen/EmptyTensor.h>
#include <c10/util/StringUtil.h>

#include <utility>

#include "checks.h"
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

}  // namespace

at::Device device_of(const TensorList& tensors) {
  if (tensors.size() == 0 || !tensors[0] || !tensors[0]->defined()) return at::kCPU;
  const at::Device device = tensors[0]->device();
  if (!device.is_cpu() && !is_cuda(device)) {
    refuse_value(c10::str(tensors.name_of(0), " must be on one of the devices that the core was built for (",
                          c10::Join(", ", device_types()), "), got ", device));
  }
  return device;
}

std::unique_ptr<Executor> make_executor([[maybe_unused]] at::Device device, std::shared_ptr<const Shapes> shapes) {
#if defined(GAM_EMULATED)
  return std::make_unique<cuda::Executor>(device, std::move(shapes));
#else
#if defined(GAM_CUDA)
  if (is_cuda(device)) return std::make_unique<cuda::Executor>(device, std::move(shapes));
#endif
  return std::make_unique<cpu::Executor>(std::move(shapes));
#endif
}

at::Tensor empty([[maybe_unused]] at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides,
                 at::ScalarType dtype) {
#if defined(GAM_CUDA)
  if (is_cuda(device)) return cuda::empty(device, sizes, strides, dtype);
#endif
  return at::detail::empty_strided_cpu(sizes, strides, at::TensorOptions().dtype(dtype));
}

std::vector<std::string> device_types() {
#if defined(GAM_CUDA) && !defined(GAM_EMULATED)
  return {"cpu", "cuda"};
#else
  return {"cpu"};
#endif
}

}  // namespace gam
