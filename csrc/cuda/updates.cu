#include "launch.cuh"
#include "updates.cuh"

namespace gam::cuda {

void update(const Grid& grid, Dtype dtype, const UpdateArguments& arguments) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    switch (arguments.formula) {
#define GAM_CASE(functor, name)                                       \
  case Formula::k##functor:                                           \
    GAM_LAUNCH((update_kernel<T, functor>), grid, kBlock, arguments); \
    break;
      GAM_UPDATES(GAM_CASE)
#undef GAM_CASE
    }
  });
}

}  // namespace gam::cuda
