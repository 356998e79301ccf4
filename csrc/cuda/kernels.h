// The launches, declared without CUDA's headers for the executor. Each function is one launch.
#pragma once

#include "arguments.h"

namespace gam::cuda {

// A grid of `blocks` blocks on a stream (a cudaStream_t).
struct Grid {
  int64_t blocks;
  void* stream;
};

void square_norm(const Grid& grid, Dtype dtype, bool difference, bool weighted, const SumsArguments& arguments);
void inner_products(const Grid& grid, Dtype dtype, bool with_m, const SumsArguments& arguments);
// `columns` is 1 or kSums.
void totals(const Grid& grid, int columns, const TotalsArguments& arguments);
void perturb(const Grid& grid, Dtype dtype, bool difference, bool weighted, bool folded,
             const PerturbArguments& arguments);
void copy(const Grid& grid, Dtype dtype, const CopyArguments& arguments);
void update(const Grid& grid, Dtype dtype, const UpdateArguments& arguments);

// The number of kernels launched in this process.
int64_t launches();

}  // namespace gam::cuda
