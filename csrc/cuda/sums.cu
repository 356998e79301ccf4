#include "launch.cuh"
#include "sums.cuh"

namespace gam::cuda {

void square_norm(const Grid& grid, Dtype dtype, bool difference, bool weighted, const SquareNormArguments& arguments) {
  const auto launch = [&](auto element, auto difference_, auto weighted_) {
    GAM_LAUNCH((square_norm_kernel<decltype(element), difference_.value, weighted_.value>), grid, kBlock, arguments);
  };
  with_dtype(dtype, [&](auto element) {
    with_flag(difference, [&](auto d) { with_flag(weighted, [&](auto w) { launch(element, d, w); }); });
  });
}

void inner_products(const Grid& grid, Dtype dtype, bool with_m, const InnerProductsArguments& arguments) {
  const auto launch = [&](auto element, auto with_m_) {
    GAM_LAUNCH((inner_products_kernel<decltype(element), with_m_.value>), grid, kBlock, arguments);
  };
  with_dtype(dtype, [&](auto element) { with_flag(with_m, [&](auto m) { launch(element, m); }); });
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
