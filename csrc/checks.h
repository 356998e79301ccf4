// Checks of one tensor, and the errors that name it.
#pragma once

#include <optional>
#include <string>

#include "lists.h"
#include "primitives.h"

namespace gam {

[[noreturn]] void refuse_value(const std::string& message);
[[noreturn]] void refuse_type(const std::string& message);

// The dtype as the loops know it, if they do.
std::optional<Dtype> known_dtype(at::ScalarType dtype);

// Raises TypeError unless it is a floating dtype that the core knows.
Dtype dtype_of(const TensorList& list, size_t i);

// Raises TypeError or ValueError unless it is a strided tensor of the device with all its elements in memory, without
// gaps.
void check_plain(const TensorList& list, size_t i, at::Device device);

// Whether it is that, but for the device.
bool is_plain(const at::Tensor& tensor);

// Whether the elements of a tensor lie in memory in this order. The stride of a dimension of one element is of no
// account.
bool lies_as(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides);

}  // namespace gam
