// csrc/cuda/device.h for the emulator: a device whose memory is that of the CPU, and whose work is done when launched.

#include "../../csrc/cuda/device.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <set>

#include "emulated.h"

namespace gam::cuda {
namespace {

int64_t stream_id = 0;
uint64_t capture_id = 0;
int64_t uploads = 0;
std::set<const void*> recorded;

}  // namespace

struct Guard::Impl {};
Guard::Guard(at::Device) {}
Guard::~Guard() = default;

Stream current_stream() { return {nullptr, stream_id, capture_id}; }

c10::DataPtr allocate(int64_t bytes) {
  c10::DataPtr memory = c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
  std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));  // NaN
  return memory;
}

at::Tensor empty(at::Device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_cpu(sizes, strides, at::TensorOptions().dtype(dtype));
}

void record_use(const at::Tensor& tensor) { recorded.insert(tensor.storage().data_ptr().get()); }

void upload(const void* from, int64_t bytes, void* to) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  ++uploads;
}

void use_stream(int64_t id) { stream_id = id; }
void capture(uint64_t id) { capture_id = id; }
int64_t upload_count() { return uploads; }
bool was_recorded(int64_t address) { return recorded.count(reinterpret_cast<const void*>(address)) != 0; }
void forget_records() { recorded.clear(); }

}  // namespace gam::cuda
