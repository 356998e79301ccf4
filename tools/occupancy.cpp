// Computes how many blocks of a kernel fit a multiprocessor, by CUDA's cuda_occupancy.h, without a GPU.
//
// Reads lines "major minor registers shared_bytes threads", writes the number of blocks for each. Limits of processors:
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

#include <cuda_occupancy.h>

#include <cstdio>
#include <stdexcept>

static cudaOccDeviceProp properties(int major, int minor) {
  const bool data_center = (major == 8 && minor == 0) || major == 9 || major == 10;
  cudaOccDeviceProp p;
  p.computeMajor = major;
  p.computeMinor = minor;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = data_center ? 2048 : 1536;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerMultiprocessor = (data_center ? (major == 8 ? 164 : 228) : 100) << 10;
  p.numSms = 1;  // irrelevant for one multiprocessor
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
  p.reservedSharedMemPerBlock = 1024;
  return p;
}

int main() {
  int major, minor, registers, threads;
  size_t shared;
  while (std::scanf("%d %d %d %zu %d", &major, &minor, &registers, &shared, &threads) == 5) {
    const cudaOccDeviceProp device = properties(major, minor);
    const cudaOccDeviceState state;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0) != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "cuda_occupancy.h does not know %d.%d\n", major, minor);
      return 1;
    }
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
  return 0;
}
