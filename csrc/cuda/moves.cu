#include "launch.cuh"
#include "moves.cuh"

namespace gam::cuda {

void perturb(const Grid& grid, Types types, bool difference, bool weighted, const PerturbArguments& arguments) {
  with_parameters(types, [&](auto only) {
    using T = decltype(only);
    if (difference && weighted) {
      GAM_LAUNCH((perturb_kernel<T, true, true>), grid, kBlock, arguments);
    } else if (difference) {
      GAM_LAUNCH((perturb_kernel<T, true, false>), grid, kBlock, arguments);
    } else if (weighted) {
      GAM_LAUNCH((perturb_kernel<T, false, true>), grid, kBlock, arguments);
    } else {
      GAM_LAUNCH((perturb_kernel<T, false, false>), grid, kBlock, arguments);
    }
  });
}

void copy(const Grid& grid, const CopyArguments& arguments) { GAM_LAUNCH(copy_kernel, grid, kBlock, arguments); }

void materialise(const Grid& grid, Types types, const MaterialiseArguments& arguments) {
  with_parameters(types, [&](auto only) { GAM_LAUNCH((materialise_kernel<decltype(only)>), grid, kBlock, arguments); });
}

}  // namespace gam::cuda
