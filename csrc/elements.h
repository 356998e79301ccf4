// 16-bit elements and their values, and the working precision of each dtype.
#pragma once

#include <cstdint>
#include <cstring>

#include "math.h"
#include "primitives.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <c10/util/Half.h>
#endif

namespace gam {
inline namespace GAM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Working {
  using type = float;
};
template <>
struct Working<double> {
  using type = double;
};
template <class T>
using opmath_t = typename Working<T>::type;

GAM_FORMULA double value_of(double x) { return x; }
GAM_FORMULA float value_of(float x) { return x; }
GAM_FORMULA float value_of(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
GAM_FORMULA float value_of(Half x) {
#if defined(__CUDACC__)
  return __half2float(__half(__half_raw{x.bits}));
#else
  return c10::detail::fp16_ieee_to_fp32_value(x.bits);
#endif
}

GAM_FORMULA void put(double x, double& to) { to = x; }
GAM_FORMULA void put(float x, float& to) { to = x; }
GAM_FORMULA void put(float x, BFloat16& to) {  // to the nearest, ties to even; NaN stays NaN
#if defined(__CUDACC__)
  to.bits = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;  // one instruction for two numbers
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}
GAM_FORMULA void put(float x, Half& to) {
#if defined(__CUDACC__)
  to.bits = static_cast<__half_raw>(__float2half_rn(x)).x;
#else
  to.bits = c10::detail::fp16_ieee_from_fp32_value(x);
#endif
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with a value of the dtype's type.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kDouble:
      return f(double());
    case Dtype::kFloat:
      return f(float());
    case Dtype::kBFloat16:
      return f(BFloat16());
    case Dtype::kHalf:
      return f(Half());
  }
}

}  // namespace GAM_ISA
}  // namespace gam
