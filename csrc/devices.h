// Which devices this build of the core works on: the one place that knows.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "executor.h"
#include "lists.h"

namespace gam {

// The device of the first of them, and the CPU without any. Raises ValueError for one that this build does not serve.
at::Device device_of(const TensorList& tensors);

std::unique_ptr<Executor> make_executor(at::Device device, std::shared_ptr<const Shapes> shapes);

// An uninitialised tensor.
at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// "cpu", "cuda".
std::vector<std::string> device_types();

}  // namespace gam
