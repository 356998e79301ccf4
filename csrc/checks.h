// Checks of one tensor, and the errors that name it.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "lists.h"
#include "primitives.h"

namespace gam {

[[noreturn]] void refuse_value(const std::string& message);
[[noreturn]] void refuse_type(const std::string& message);

// The dtype as the loops know it, if they do.
std::optional<Dtype> known_dtype(at::ScalarType dtype);

// Raises TypeError unless it is a floating dtype that the core knows.
Dtype dtype_of(const TensorList& list, size_t i);

// Raises TypeError or ValueError unless it is a strided tensor of the device with all its elements in memory.
void check_plain(const TensorList& list, size_t i, at::Device device);

// Whether it is that, but for the device.
bool is_plain(const at::Tensor& tensor);

// Whether no two elements share memory; false also where that is hard to say.
bool is_free_of_self_overlap(const at::Tensor& tensor);

// The bytes that a tensor spans.
std::pair<uintptr_t, uintptr_t> extent(const at::Tensor& tensor);

// Whether two tensors whose extents meet are seen to have no byte in common, as columns of one matrix have not.
bool are_interleaved(const at::Tensor& a, const at::Tensor& b);

}  // namespace gam
