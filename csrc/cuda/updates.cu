#include "launch.cuh"
#include "updates.cuh"

namespace gam::cuda {

void sgd(const Grid& grid, Types types, const SgdArguments& arguments) {
  with_types(types, [&](auto only) { GAM_LAUNCH((sgd_kernel<decltype(only)>), grid, kBlock, arguments); });
}

void adam(const Grid& grid, Types types, const AdamArguments& arguments) {
  with_types(types, [&](auto only) { GAM_LAUNCH((adam_kernel<decltype(only)>), grid, kBlock, arguments); });
}

}  // namespace gam::cuda
