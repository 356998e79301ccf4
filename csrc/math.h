// Every formula of the package, once: functions of numbers that the loops of cpu/ and the kernels of cuda/ call.
//
// T is opmath_t: double for double, float for float, bfloat16 and half. A formula rounds as it is written: the compiler
// may not contract, and what is fused says multiply_add. Symbols are those of gam_fast/backends/base.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GAM_FORMULA __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define GAM_FORMULA __forceinline
#else
#define GAM_FORMULA inline __attribute__((always_inline))
#endif

// The CPU loops are compiled once for each instruction set, each in a namespace of its own, so that the linker never
// hands the code of one to another.
#if !defined(GAM_ISA)
#define GAM_ISA any
#endif

namespace gam {
inline namespace GAM_ISA {

// a b + c, rounded once where the hardware can; a baseline x86-64, which cannot, rounds the product too.
GAM_FORMULA float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(GAM_NO_FMA)
  return a * b + c;
#else
  return std::fma(a, b, c);
#endif
}

GAM_FORMULA double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif defined(GAM_NO_FMA)
  return a * b + c;
#else
  return std::fma(a, b, c);
#endif
}

// The scalars between the sums and what uses them, as gam_fast/backends/scalars.py has them.

// 1 / (‖v‖ + ξ)
GAM_FORMULA double inverse_norm(double square) { return 1.0 / (std::sqrt(square) + 1e-12); }

// numerator / square, and 0 where the square is 0 or not a number
GAM_FORMULA double ratio(double numerator, double square) { return square > 0.0 ? numerator / square : 0.0; }

// ‖d‖² of the direction d = a u − γ m with a = 1 + γ κ
GAM_FORMULA double square_of_direction(double uu, double um, double mm, double gamma, double kappa) {
  const double a = 1.0 + gamma * kappa;
  return a * a * uu - 2.0 * a * gamma * um + gamma * gamma * mm;
}

// min(1, limit / ‖d‖)
GAM_FORMULA double clip_factor(double square, double limit) {
  const double factor = limit / (std::sqrt(square < 0.0 ? 0.0 : square) + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

// s (p + κ q)
GAM_FORMULA double factor_of(double p, double q, double kappa, double scale) { return scale * (kappa * q + p); }

// The elementwise radius of adaptive recipes, T = |θ| + η, applied to v.
template <class T>
struct Weigh {
  T eta;
  GAM_FORMULA T operator()(T v, T theta) const { return v * (std::fabs(theta) + eta); }
};

// origin + factor v
template <class T>
struct Perturb {
  T factor;
  GAM_FORMULA T operator()(T origin, T v) const { return multiply_add(factor, v, origin); }
};

// k into + l other
template <class T>
struct Fold {
  T k, l;
  GAM_FORMULA T operator()(T into, T other) const { return multiply_add(l, other, k * into); }
};

// Σ_t factor_t x_t over 1 to 3 terms, from the first to the last
template <class T>
struct Combine {
  T factor[3];
  GAM_FORMULA T operator()(T x) const { return factor[0] * x; }
  GAM_FORMULA T operator()(T x, T y) const { return multiply_add(factor[1], y, (*this)(x)); }
  GAM_FORMULA T operator()(T x, T y, T z) const { return multiply_add(factor[2], z, (*this)(x, y)); }
};

// The updates have no branches: options are factors of 0, 1 and −1, whose products are exact. Loops over them are then
// vectorized by every compiler, and threads of a GPU stay together. `decayed` is the θ that weight decay applies to; it
// is θ itself, or 0 where the decay is 0, so that an infinite parameter is not multiplied by 0.

// One step of torch.optim.SGD; returns the new parameter and advances the buffer.
//   d ← ±d + λ θ;   b ← μ b + (1 − τ) d;   θ − lr (d + μ b with Nesterov's momentum, else b)
// The first step, b ← d, has first = true, and a buffer of zeros.
template <class T>
struct Sgd {
  T lr, sign, weight_decay, momentum, of_direction;

  Sgd() = default;
  GAM_FORMULA Sgd(double lr, double momentum, double dampening, double weight_decay, bool maximize, bool first)
      : lr(T(lr)),
        sign(maximize ? T(-1) : T(1)),
        weight_decay(T(weight_decay)),
        momentum(T(momentum)),
        of_direction(first ? T(1) : T(1.0 - dampening)) {}

  GAM_FORMULA T operator()(T d, T theta, T decayed) const {
    return multiply_add(-lr, multiply_add(weight_decay, decayed, sign * d), theta);
  }
  template <bool Nesterov>
  GAM_FORMULA T with_momentum(T d, T theta, T decayed, T& buffer) const {
    d = multiply_add(weight_decay, decayed, sign * d);
    buffer = multiply_add(of_direction, d, momentum * buffer);
    return multiply_add(-lr, Nesterov ? multiply_add(momentum, buffer, d) : buffer, theta);
  }
};

// One step of torch.optim.Adam or AdamW; returns the new parameter and advances the averages.
//   m ← m + (1 − β₁)(d − m);   v ← β₂ v + (1 − β₂) d²;   θ − step_size m / (√v / root_correction + ε)
// with step_size = lr / (1 − β₁ᵗ) and root_correction = √(1 − β₂ᵗ). Coupled decay adds λθ to d; decoupled decay first
// multiplies θ by 1 − lr λ.
template <class T>
struct Adam {
  T sign, weight_decay, shrink, weight, of_average, of_direction, beta2, one_minus_beta2, eps, step_size,
      root_correction;

  Adam() = default;
  GAM_FORMULA Adam(double lr, double beta1, double beta2, double eps, double decay, bool decoupled, bool maximize,
                   double step_size, double root_correction)
      : sign(maximize ? T(-1) : T(1)),
        weight_decay(T(decoupled ? 0.0 : decay)),
        shrink(T(decoupled ? 1.0 - lr * decay : 1.0)),
        // Of the two ends m and d, the interpolation starts at the nearer one, as torch.lerp does.
        weight(1.0 - beta1 < 0.5 ? T(1.0 - beta1) : T(1.0 - beta1) - T(1)),
        of_average(1.0 - beta1 < 0.5 ? T(1) : T(0)),
        of_direction(T(1) - of_average),
        beta2(T(beta2)),
        one_minus_beta2(T(1.0 - beta2)),
        eps(T(eps)),
        step_size(T(step_size)),
        root_correction(T(root_correction)) {}

  GAM_FORMULA T advance(T d, T theta, T decayed, T& average, T& square) const {
    d = multiply_add(weight_decay, decayed, sign * d);
    average = multiply_add(weight, d - average, multiply_add(of_direction, d, of_average * average));
    square = multiply_add(one_minus_beta2 * d, d, beta2 * square);
    return theta * shrink;
  }
  GAM_FORMULA T moved(T theta, T average, T square) const {
    const T denominator = std::sqrt(square) / root_correction + eps;
    return theta + (-step_size * average) / denominator;
  }
  GAM_FORMULA T operator()(T d, T theta, T decayed, T& average, T& square) const {
    theta = advance(d, theta, decayed, average, square);
    return moved(theta, average, square);
  }
  GAM_FORMULA T operator()(T d, T theta, T decayed, T& average, T& square, T& largest) const {
    theta = advance(d, theta, decayed, average, square);
    largest = largest >= square ? largest : square;
    return moved(theta, average, largest);
  }
};

}  // namespace GAM_ISA
}  // namespace gam
