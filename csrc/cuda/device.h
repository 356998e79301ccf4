// The executor's needs of a device, besides the kernels. device.cpp uses CUDA's runtime and torch's allocators; for the
// emulator, tests/cuda_emulator/device.cpp uses CPU memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <memory>

namespace gam::cuda {

// Makes a device current within a scope.
class Guard {
 public:
  explicit Guard(at::Device device);
  ~Guard();
  Guard(const Guard&) = delete;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The functions below act on the current device.

// The current stream: its handle (a cudaStream_t), a number unique among the device's streams, and, during a capture, a
// number unique among captures (otherwise 0).
struct Stream {
  void* handle;
  int64_t id;
  uint64_t capture;
};
Stream current_stream();

// Memory for work on the current stream. It may be freed as soon as the work has been launched.
c10::DataPtr allocate(int64_t bytes);

// An uninitialised tensor, without calling torch's dispatcher.
at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// Tells the allocator that the current stream uses the memory of a tensor, which may belong to another stream. Once
// freed, the memory is not reused before that work is done.
void record_use(const at::Tensor& tensor);

// Copies bytes to the device on the current stream, without waiting. A captured copy is repeated with its graph, which
// may outlive everything that made it. So its bytes are kept forever.
void upload(const void* from, int64_t bytes, void* to);

}  // namespace gam::cuda
