// What the executor needs of a device beside the kernels. In device.cpp by CUDA's runtime and torch's allocators; for
// the emulator, in tests/cuda_emulator/device.cpp, by the memory of the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <memory>

namespace gam::cuda {

// Makes a device the current one, for a scope.
class Guard {
 public:
  explicit Guard(at::Device device);
  ~Guard();
  Guard(const Guard&) = delete;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The functions below are about the current device.

// The current stream: its handle, a cudaStream_t; a number that no other stream of the device has; and, while it is
// captured into a graph, a number that no other capture has, else 0.
struct Stream {
  void* handle;
  int64_t id;
  uint64_t capture;
};
Stream current_stream();

// Memory for the work of the current stream. It may be freed as soon as that has been launched.
c10::DataPtr allocate(int64_t bytes);

// An uninitialised tensor, without a call of torch's dispatcher.
at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// Tells the allocator that the current stream works on the memory of a tensor, which may come from another: once freed,
// it is not given away before that work is done.
void record_use(const at::Tensor& tensor);

// Copies bytes to the device on the current stream, without waiting. A copy that is captured into a graph is repeated
// with it, so its bytes are kept for ever: a graph may outlive all that made it.
void upload(const void* from, int64_t bytes, void* to);

}  // namespace gam::cuda
