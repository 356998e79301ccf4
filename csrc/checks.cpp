#include "checks.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <numeric>
#include <vector>

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

// The number of elements from the first to the last in memory, gaps included.
static int64_t span(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  if (tensor.is_non_overlapping_and_dense()) return tensor.numel();
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += tensor.stride(d) * (tensor.size(d) - 1);
  return last + 1;
}

static bool has_plain_memory(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && tensor.has_storage() && !tensor.is_neg() &&
         !tensor._is_zerotensor();
}

static size_t needed_bytes(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.storage_offset() + span(tensor)) * tensor.element_size();
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
  if (tensor.dim() > kMaxDims) {
    refuse_value(c10::str(list.name_of(i), " must have at most ", kMaxDims, " dimensions, got ", tensor.dim()));
  }
  if (!is_in_memory(tensor)) {
    refuse_value(c10::str(list.name_of(i), " must have its elements in memory: its storage has ",
                          tensor.storage().nbytes(), " bytes of ", needed_bytes(tensor)));
  }
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && has_plain_memory(tensor) && tensor.dim() <= kMaxDims &&
         is_in_memory(tensor);
}

bool is_free_of_self_overlap(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense() || tensor.numel() <= 1) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the largest offset within the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

std::pair<uintptr_t, uintptr_t> extent(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(span(tensor)) * tensor.element_size()};
}

bool are_interleaved(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() != b.strides() || a.element_size() != b.element_size() || a.dim() == 0) return false;
  const int64_t item = static_cast<int64_t>(a.element_size());
  int64_t row = 0, step = 0;  // the largest stride, and the greatest common divisor of all
  for (int64_t d = 0; d < a.dim(); ++d) {
    row = std::max(row, a.stride(d) * item);
    step = std::gcd(step, a.stride(d) * item);
  }
  if (step == 0) return false;
  const auto inner = [&](const at::Tensor& t) {  // bytes that a row spans
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += t.stride(d) * item == row ? 0 : t.stride(d) * (t.size(d) - 1);
    return (last + 1) * item;
  };
  const auto distance = static_cast<int64_t>(reinterpret_cast<intptr_t>(b.const_data_ptr()) -
                                             reinterpret_cast<intptr_t>(a.const_data_ptr()));
  const int64_t phase = (distance % step + step) % step, column = (distance % row + row) % row;
  return (phase >= item && phase <= step - item) || (column >= inner(a) && column + inner(b) <= row);
}

}  // namespace gam
