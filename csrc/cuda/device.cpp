#include "device.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace gam::cuda {

struct Guard::Impl {
  c10::cuda::CUDAGuard guard;
};

Guard::Guard(at::Device device) : impl_(new Impl{c10::cuda::CUDAGuard(device)}) {}
Guard::~Guard() = default;

Stream current_stream() {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  Stream result{stream.stream(), stream.id(), 0};
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
    result.capture = id + 1;  // + 1, so that it is never 0
  }
  return result;
}

c10::DataPtr allocate(int64_t bytes) {
  return c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes));
}

at::Tensor empty(at::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  const Guard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, c10::cuda::CUDACachingAllocator::get(),
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype);
}

void record_use(const at::Tensor& tensor) {
  c10::cuda::CUDACachingAllocator::recordStream(tensor.storage().data_ptr(),
                                                c10::cuda::getCurrentCUDAStream(tensor.device().index()));
}

namespace {

// Pinned host memory. It is never freed: freeing may wait for the device, and is not allowed during a capture. None of
// this may disturb a capture, by this thread or another.
void* pinned(size_t bytes) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* host = nullptr;
  C10_CUDA_CHECK(cudaHostAlloc(&host, bytes, cudaHostAllocPortable));
  return host;
}

// Memory for a copy; record `copied` on the copy's stream after it.
struct Slot {
  void* host = nullptr;
  size_t bytes = 0;
  cudaEvent_t copied = nullptr;

  bool is_free() const {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t state = cudaEventQuery(copied);
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    C10_CUDA_CHECK(state);
    return true;
  }
};

// Slot sizes are multiples of this, so that they fit tables that grow a little.
constexpr size_t kSlotBytes = 1 << 16;

// Returns a free slot of a device that is large enough; makes one if there is none.
Slot& slot_for(size_t bytes, std::vector<Slot>& slots) {
  for (Slot& slot : slots) {
    if (slot.bytes >= bytes && slot.is_free()) return slot;
  }
  Slot slot;
  slot.bytes = (bytes + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
  slot.host = pinned(slot.bytes);
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
  slots.push_back(slot);
  return slots.back();
}

}  // namespace

void upload(const void* from, int64_t bytes, void* to) {
  static std::mutex& mutex = *new std::mutex;
  static std::map<int, std::vector<Slot>>& slots = *new std::map<int, std::vector<Slot>>;  // by device
  const std::lock_guard<std::mutex> lock(mutex);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto size = static_cast<size_t>(bytes);
  // a graph keeps its own copy forever
  const Slot slot = current_stream().capture != 0 ? Slot{pinned(size)} : slot_for(size, slots[stream.device_index()]);
  std::memcpy(slot.host, from, size);
  C10_CUDA_CHECK(cudaMemcpyAsync(to, slot.host, size, cudaMemcpyHostToDevice, stream));
  if (slot.copied) C10_CUDA_CHECK(cudaEventRecord(slot.copied, stream));
}

}  // namespace gam::cuda
