#include "launch.cuh"
#include "moves.cuh"

namespace gam::cuda {

void perturb(const Grid& grid, Types types, bool difference, bool weighted, const PerturbArguments& arguments) {
  const auto launch = [&](auto only, auto difference_, auto weighted_, auto folding) {
    GAM_LAUNCH((perturb_kernel<decltype(only), difference_.value, weighted_.value, folding.value>), grid, kBlock,
               arguments);
  };
  with_types(types, [&](auto only) {
    with_flag(difference, [&](auto d) {
      with_flag(weighted, [&](auto w) { with_flag(arguments.fold, [&](auto f) { launch(only, d, w, f); }); });
    });
  });
}

void copy(const Grid& grid, Types types, const CopyArguments& arguments) {
  with_types(types, [&](auto only) { GAM_LAUNCH((copy_kernel<decltype(only)>), grid, kBlock, arguments); });
}

void materialise(const Grid& grid, Types types, const MaterialiseArguments& arguments) {
  with_types(types, [&](auto only) { GAM_LAUNCH((materialise_kernel<decltype(only)>), grid, kBlock, arguments); });
}

}  // namespace gam::cuda
