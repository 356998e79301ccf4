// The launches as the executor sees them, without CUDA's headers. Each function is one launch.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace gam::cuda {

// The type of all leaves; kAny where they differ, or where a leaf cannot be walked in the order of memory.
enum class Types : uint8_t { kDouble, kFloat, kBFloat16, kHalf, kAny };

// A grid of as many blocks, on a stream (a cudaStream_t).
struct Grid {
  int64_t blocks;
  void* stream;
};

void square_norm(const Grid& grid, Types types, bool difference, bool weighted, const SquareNormArguments& arguments);
void inner_products(const Grid& grid, Types types, bool with_m, const InnerProductsArguments& arguments);
// `columns` is 1 or kSums.
void totals(const Grid& grid, int columns, const TotalsArguments& arguments);
void perturb(const Grid& grid, Types types, bool difference, bool weighted, const PerturbArguments& arguments);
void copy(const Grid& grid, Types types, const CopyArguments& arguments);
void materialise(const Grid& grid, Types types, const MaterialiseArguments& arguments);
void sgd(const Grid& grid, Types types, const SgdArguments& arguments);
void adam(const Grid& grid, Types types, const AdamArguments& arguments);

// How many kernels have been launched in this process.
int64_t launches();

}  // namespace gam::cuda
