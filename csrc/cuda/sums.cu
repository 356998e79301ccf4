#include "launch.cuh"
#include "sums.cuh"

namespace gam::cuda {

void square_norm(const Grid& grid, Types types, bool difference, bool weighted, const SquareNormArguments& arguments) {
  with_types(types, [&](auto only) {
    using T = decltype(only);
    if (difference && weighted) {
      GAM_LAUNCH((square_norm_kernel<T, true, true>), grid, kBlock, arguments);
    } else if (difference) {
      GAM_LAUNCH((square_norm_kernel<T, true, false>), grid, kBlock, arguments);
    } else if (weighted) {
      GAM_LAUNCH((square_norm_kernel<T, false, true>), grid, kBlock, arguments);
    } else {
      GAM_LAUNCH((square_norm_kernel<T, false, false>), grid, kBlock, arguments);
    }
  });
}

void inner_products(const Grid& grid, Types types, bool with_m, const InnerProductsArguments& arguments) {
  with_types(types, [&](auto only) {
    using T = decltype(only);
    if (with_m) {
      GAM_LAUNCH((inner_products_kernel<T, true>), grid, kBlock, arguments);
    } else {
      GAM_LAUNCH((inner_products_kernel<T, false>), grid, kBlock, arguments);
    }
  });
}

void totals(const Grid& grid, int columns, const TotalsArguments& arguments) {
  if (columns == kSums) {
    GAM_LAUNCH((totals_kernel<kSums>), grid, kTotalsBlock, arguments);
  } else {
    GAM_LAUNCH((totals_kernel<1>), grid, kTotalsBlock, arguments);
  }
}

int64_t launches() { return launch_count.load(std::memory_order_relaxed); }

}  // namespace gam::cuda
