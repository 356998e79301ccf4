#include "checks.h"

#include <c10/util/StringUtil.h>

namespace py = pybind11;

namespace gam {

void refuse_value(const std::string& message) { throw py::value_error(message); }
void refuse_type(const std::string& message) { throw py::type_error(message); }

std::optional<Dtype> known_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      return std::nullopt;
  }
}

Dtype dtype_of(const TensorList& list, size_t i) {
  if (const std::optional<Dtype> dtype = known_dtype(list[i]->scalar_type())) return *dtype;
  refuse_type(
      c10::str(list.name_of(i), " must be of dtype float64, float32, bfloat16 or float16, got ", list[i]->dtype()));
}

static bool has_plain_memory(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && tensor.has_storage() && !tensor.is_neg() &&
         !tensor._is_zerotensor();
}

static size_t needed_bytes(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.storage_offset() + tensor.numel()) * tensor.element_size();
}

static bool is_in_memory(const at::Tensor& tensor) {
  return tensor.numel() == 0 || tensor.storage().nbytes() >= needed_bytes(tensor);
}

void check_plain(const TensorList& list, size_t i, at::Device device) {
  const at::Tensor& tensor = *list[i];
  if (!tensor.defined()) refuse_type(list.name_of(i) + " must be a tensor, got an undefined one");
  if (tensor.device() != device) {
    refuse_value(c10::str(list.name_of(i), " must be on ", device.is_cpu() ? "the CPU" : device.str(), ", got ",
                          tensor.device()));
  }
  if (tensor.layout() != at::kStrided) {
    refuse_type(c10::str(list.name_of(i), " must be strided, got ", tensor.layout()));
  }
  if (!has_plain_memory(tensor)) {
    refuse_type(list.name_of(i) + " must be a plain tensor with memory of its own, not a subclass or a lazy view");
  }
  if (!tensor.is_non_overlapping_and_dense()) {
    refuse_value(c10::str(list.name_of(i), " must be dense in memory, got strides ", tensor.strides(), " of shape ",
                          tensor.sizes()));
  }
  if (!is_in_memory(tensor)) {
    refuse_value(c10::str(list.name_of(i), " must have its elements in memory: its storage has ",
                          tensor.storage().nbytes(), " bytes of ", needed_bytes(tensor)));
  }
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && has_plain_memory(tensor) && tensor.is_non_overlapping_and_dense() &&
         is_in_memory(tensor);
}

bool lies_as(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (tensor.strides() == strides) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && tensor.strides()[d] != strides[d]) return tensor.numel() == 0;
  }
  return true;
}

}  // namespace gam
