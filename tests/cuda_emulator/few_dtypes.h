// Included before all else where compiling would take long: kernels of the two dtypes that are tested there.
#pragma once

#include "../../csrc/cuda/launch.cuh"

namespace gam::cuda {

template <class F>
void with_few_dtypes(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat) return f(float());
  if (dtype == Dtype::kHalf) return f(Half());
  throw std::invalid_argument("no kernels of this dtype here");
}

}  // namespace gam::cuda

#define with_dtype with_few_dtypes
