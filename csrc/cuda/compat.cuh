// The only file that distinguishes nvcc, for a GPU, from a plain C++ compiler, for the emulator in tests/cuda_emulator.
// Device code includes this file, and no other header of CUDA or of a standard library except math.h.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define GAM_PARAM(T) const __grid_constant__ T  // stays in the constant bank and is never copied
#define GAM_SHARED(T, name, n) __shared__ T name[n]
// A pointer from a table could point to any memory; accesses to global memory have faster instructions.
#define GAM_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#define GAM_START(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "cuemu.h"
#define GAM_PARAM(T) const T&
#define GAM_SHARED(T, name, n) CUEMU_SHARED(T, name, n)
#define GAM_ASSUME_GLOBAL(pointer)
#define GAM_START(kernel, blocks, threads, stream, ...) \
  cuemu::launch(static_cast<unsigned>(blocks), threads, [&] { kernel(__VA_ARGS__); })
#endif
