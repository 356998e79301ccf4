// Every formula of the package, once: functions of numbers that the loops of cpu/ and the kernels of cuda/ call.
//
// T is opmath_t: double for double; float for float, bfloat16 and half. A formula rounds as it is written: the compiler
// must not contract, and fused operations are written as multiply_add. Symbols are those of gam_fast/backends/base.py.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GAM_FORMULA __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define GAM_FORMULA __forceinline
#else
#define GAM_FORMULA inline __attribute__((always_inline))
#endif

// The CPU loops are compiled once per instruction set, each in its own namespace, so that the linker never mixes their
// code.
#if !defined(GAM_ISA)
#define GAM_ISA any
#endif

namespace gam {
inline namespace GAM_ISA {

// a b + c, rounded once if the hardware can; a baseline x86-64 cannot, and rounds the product too.
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

// The scalars computed from the sums, as in gam_fast/backends/scalars.py.

// 1 / (‖v‖ + ξ)
GAM_FORMULA double inverse_norm(double square) { return 1.0 / (std::sqrt(square) + 1e-12); }

// numerator / square, or 0 if the square is 0 or NaN
GAM_FORMULA double ratio(double numerator, double square) { return square > 0.0 ? numerator / square : 0.0; }

// ‖d‖² of the direction d = a u − γ m with a = 1 + γ κ
GAM_FORMULA double square_of_direction(double uu, double um, double mm, double gamma, double kappa) {
  const double a = 1.0 + gamma * kappa;
  return a * a * uu - 2.0 * a * gamma * um + gamma * gamma * mm;
}

// min(1, limit / (‖d‖ + 1e-6))
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

  Combine() = default;
  GAM_FORMULA explicit Combine(const double* f) : factor{T(f[0]), T(f[1]), T(f[2])} {}
  GAM_FORMULA T operator()(T x) const { return factor[0] * x; }
  GAM_FORMULA T operator()(T x, T y) const { return multiply_add(factor[1], y, (*this)(x)); }
  GAM_FORMULA T operator()(T x, T y, T z) const { return multiply_add(factor[2], z, (*this)(x, y)); }
};

// The steps of base optimizers. Each is constructed from the numbers of a parameter group and of a leaf, in the order
// of its enumerations. It returns the new parameter and advances state[0 … kState). State that a leaf does not have is
// 0, and is not stored.
//
// The steps have no branches: options are factors of 0, 1 and −1, whose products are exact, or selections between two
// values. So every compiler vectorizes loops over them, and GPU threads do not diverge.

// ±d + λ θ; if λ is 0, without the product, so that an infinite θ gives no NaN.
template <class T>
GAM_FORMULA T with_decay(T d, T theta, T sign, T weight_decay) {
  return multiply_add(weight_decay, weight_decay != T(0) ? theta : T(0), sign * d);
}

// a + weight (b − a), computed from the nearer end, as torch.lerp does
template <class T>
struct Interpolate {
  T weight, of_a, of_b;

  Interpolate() = default;
  GAM_FORMULA explicit Interpolate(double w)
      : weight(w < 0.5 ? T(w) : T(w) - T(1)), of_a(w < 0.5 ? T(1) : T(0)), of_b(T(1) - of_a) {}
  GAM_FORMULA T operator()(T a, T b) const { return multiply_add(weight, b - a, multiply_add(of_b, b, of_a * a)); }
};

// torch.optim.SGD; the state is the buffer b.
//   d ← ±d + λ θ;   b ← μ b + (1 − τ) d;   θ − lr (d + μ b with Nesterov's momentum, else b)
// In the first step of a leaf, and in every step without momentum, b ← d: `first`, with a buffer of zeros.
template <class T>
struct Sgd {
  static constexpr int kState = 1;
  enum OfGroup { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kOfGroup };
  enum OfLeaf { kFirst, kOfLeaf };

  T lr, sign, weight_decay, momentum, of_direction;
  bool nesterov;

  Sgd() = default;
  GAM_FORMULA Sgd(const double* group, const double* leaf)
      : lr(T(group[kLr])),
        sign(group[kMaximize] != 0.0 ? T(-1) : T(1)),
        weight_decay(T(group[kWeightDecay])),
        momentum(T(group[kMomentum])),
        of_direction(leaf[kFirst] != 0.0 ? T(1) : T(1.0 - group[kDampening])),
        nesterov(group[kNesterov] != 0.0) {}

  GAM_FORMULA T operator()(T d, T theta, T* state) const {
    d = with_decay(d, theta, sign, weight_decay);
    const T buffer = multiply_add(of_direction, d, momentum * state[0]);
    state[0] = buffer;
    return multiply_add(-lr, nesterov ? multiply_add(momentum, buffer, d) : buffer, theta);
  }
};

// torch.optim.Adam and AdamW; the state is m, v and, with amsgrad, the largest v so far, which replaces v in θ.
//   m ← m + (1 − β₁)(d − m);   v ← β₂ v + (1 − β₂) d²;   shrink θ − step_size m / (√v / root_correction + ε)
// with step_size = lr / (1 − β₁ᵗ) and root_correction = √(1 − β₂ᵗ). Coupled decay adds λθ to d. Decoupled decay has
// shrink = 1 − lr λ instead.
template <class T>
struct Adam {
  static constexpr int kState = 3;
  enum OfGroup { kBeta1, kBeta2, kEps, kWeightDecay, kShrink, kMaximize, kOfGroup };
  enum OfLeaf { kStepSize, kRootCorrection, kOfLeaf };

  T sign, weight_decay, shrink, beta2, one_minus_beta2, eps, step_size, root_correction;
  Interpolate<T> average;

  Adam() = default;
  GAM_FORMULA Adam(const double* group, const double* leaf)
      : sign(group[kMaximize] != 0.0 ? T(-1) : T(1)),
        weight_decay(T(group[kWeightDecay])),
        shrink(T(group[kShrink])),
        beta2(T(group[kBeta2])),
        one_minus_beta2(T(1.0 - group[kBeta2])),
        eps(T(group[kEps])),
        step_size(T(leaf[kStepSize])),
        root_correction(T(leaf[kRootCorrection])),
        average(1.0 - group[kBeta1]) {}

  GAM_FORMULA T operator()(T d, T theta, T* state) const {
    d = with_decay(d, theta, sign, weight_decay);
    const T m = average(state[0], d), v = multiply_add(one_minus_beta2 * d, d, beta2 * state[1]);
    const T largest = state[2] >= v ? state[2] : v;  // v itself without amsgrad
    state[0] = m, state[1] = v, state[2] = largest;
    return theta * shrink + (-step_size * m) / (std::sqrt(largest) / root_correction + eps);
  }
};

// Lion (arXiv 2302.06675) as in pytorch-optimizer; the state is m.
//   θ ← shrink θ − lr sign(m + (1 − β₁)(d − m));   m ← m + (1 − β₂)(d − m);   decay as in Adam
template <class T>
struct Lion {
  static constexpr int kState = 1;
  enum OfGroup { kLr, kBeta1, kBeta2, kWeightDecay, kShrink, kMaximize, kOfGroup };
  enum OfLeaf { kOfLeaf };

  T lr, sign, weight_decay, shrink;
  Interpolate<T> update, average;

  Lion() = default;
  GAM_FORMULA Lion(const double* group, const double*)
      : lr(T(group[kLr])),
        sign(group[kMaximize] != 0.0 ? T(-1) : T(1)),
        weight_decay(T(group[kWeightDecay])),
        shrink(T(group[kShrink])),
        update(1.0 - group[kBeta1]),
        average(1.0 - group[kBeta2]) {}

  GAM_FORMULA T operator()(T d, T theta, T* state) const {
    d = with_decay(d, theta, sign, weight_decay);
    const T c = update(state[0], d);
    state[0] = average(state[0], d);
    return multiply_add(-lr, (c > T(0) ? T(1) : T(0)) - (c < T(0) ? T(1) : T(0)), theta * shrink);
  }
};

// Puts the direction in place of the parameter, without state or numbers.
template <class T>
struct Assign {
  static constexpr int kState = 1;
  enum OfGroup { kOfGroup };
  enum OfLeaf { kOfLeaf };

  Assign() = default;
  GAM_FORMULA Assign(const double*, const double*) {}
  GAM_FORMULA T operator()(T d, T, T*) const { return d; }
};

}  // namespace GAM_ISA

// The functors above, each with its name in Python.
#define GAM_UPDATES(X) X(Sgd, "sgd") X(Adam, "adam") X(Lion, "lion") X(Assign, "assign")

enum class Formula : uint8_t {
#define GAM_FORMULA_OF(functor, name) k##functor,
  GAM_UPDATES(GAM_FORMULA_OF)
#undef GAM_FORMULA_OF
};

}  // namespace gam
