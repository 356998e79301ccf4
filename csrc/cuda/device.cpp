#include "device.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
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
    result.capture = id + 1;  // so that it is never 0
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

// Pinned memory for copies, of one device. It is never given back: freeing it may wait for the device, and is not
// allowed while a graph is captured.
class Staging {
 public:
  // Room for a copy on the current stream; `copied` is to be recorded after it.
  struct Slot {
    void* host = nullptr;
    size_t bytes = 0;
    cudaEvent_t copied = nullptr;
  };

  Slot& reusable(size_t bytes) {
    for (Slot& slot : slots_) {
      if (slot.bytes >= bytes && is_free(slot)) return slot;
    }
    Slot slot;
    slot.bytes = (bytes + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
    slot.host = pinned(slot.bytes);
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
    slots_.push_back(slot);
    return slots_.back();
  }

  // Room that is never used again.
  void* permanent(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (!arena_ || arena_used_ + bytes > arena_bytes_) {
      arena_bytes_ = std::max(bytes, kArenaBytes);
      arena_ = static_cast<char*>(pinned(arena_bytes_));
      arena_used_ = 0;
    }
    void* const result = arena_ + arena_used_;
    arena_used_ += bytes;
    return result;
  }

 private:
  // Slots are a multiple of this, so that they fit tables that grow a little.
  static constexpr size_t kSlotBytes = 1 << 16;
  static constexpr size_t kArenaBytes = 1 << 20;

  // None of this may disturb the capture of a graph, by this thread or another.
  static void* pinned(size_t bytes) {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    void* host = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&host, bytes, cudaHostAllocPortable));
    return host;
  }

  static bool is_free(const Slot& slot) {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t state = cudaEventQuery(slot.copied);
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    C10_CUDA_CHECK(state);
    return true;
  }

  std::vector<Slot> slots_;
  char* arena_ = nullptr;
  size_t arena_bytes_ = 0, arena_used_ = 0;
};

}  // namespace

void upload(const void* from, int64_t bytes, void* to) {
  static std::mutex& mutex = *new std::mutex;
  static std::map<int, Staging>& by_device = *new std::map<int, Staging>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Staging& staging = by_device[stream.device_index()];
  const auto size = static_cast<size_t>(bytes);
  if (current_stream().capture != 0) {
    void* const host = staging.permanent(size);
    std::memcpy(host, from, size);
    C10_CUDA_CHECK(cudaMemcpyAsync(to, host, size, cudaMemcpyHostToDevice, stream));
    return;
  }
  const Staging::Slot& slot = staging.reusable(size);
  std::memcpy(slot.host, from, size);
  C10_CUDA_CHECK(cudaMemcpyAsync(to, slot.host, size, cudaMemcpyHostToDevice, stream));
  C10_CUDA_CHECK(cudaEventRecord(slot.copied, stream));
}

}  // namespace gam::cuda
