#include "launch.cuh"
#include "moves.cuh"

namespace gam::cuda {

void perturb(const Grid& grid, Dtype dtype, bool difference, bool weighted, const PerturbArguments& arguments) {
  const auto launch = [&](auto element, auto difference_, auto weighted_, auto folding) {
    GAM_LAUNCH((perturb_kernel<decltype(element), difference_.value, weighted_.value, folding.value>), grid, kBlock,
               arguments);
  };
  with_dtype(dtype, [&](auto element) {
    with_flag(difference, [&](auto d) {
      with_flag(weighted, [&](auto w) { with_flag(arguments.fold, [&](auto f) { launch(element, d, w, f); }); });
    });
  });
}

void copy(const Grid& grid, Dtype dtype, const CopyArguments& arguments) {
  with_dtype(dtype, [&](auto element) { GAM_LAUNCH((copy_kernel<decltype(element)>), grid, kBlock, arguments); });
}

void materialise(const Grid& grid, Dtype dtype, const MaterialiseArguments& arguments) {
  with_dtype(dtype,
             [&](auto element) { GAM_LAUNCH((materialise_kernel<decltype(element)>), grid, kBlock, arguments); });
}

}  // namespace gam::cuda
