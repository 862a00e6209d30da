/// \file
/// Functions of a vector, apart from exp (simd/simd.h): sigmoid, erfc, tanh, and the activation
/// functions, which the activation kernels and the epilogues of matrix products share.
///
/// An activation function (problem/activation.h names them) has two templates here: value<V>(x) and
/// derivative<V>(x). Arguments of products are clamped to [-800, 800], where every function here
/// has reached its limit: infinities then give the limit and not 0 * infinity. A NaN passes through
/// every clamp.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../../problem/activation.h"
#include "../simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename V>
EIGENFORMER_INLINE V clamp_to_limits(V x) {
  return minimum(V::set1(800), maximum(V::set1(-800), x));  // in this order a NaN passes through
}

/// 1 / (1 + e^-x). Relative error below 3e-7 for float, 0 below -88.8.
template <typename V>
EIGENFORMER_INLINE V sigmoid(V x) {
  return V::set1(1) / (V::set1(1) + simd::exp(V::zero() - x));
}

/// erfc(z) for z >= 0: t e^(-z^2) P(t) with t = 1 / (1 + z / 2), the form of Hastings (1955); P of
/// degree 9 is our own Chebyshev fit of e^(z^2) erfc(z) / t on z in [0, 9.5] (error 1.3e-8 on
/// values of 0.28 to 1). Float: absolute error below 2e-7, relative below 3e-7 + 1.2e-7 z^2. Double
/// calls std::erfc lane by lane.
template <typename V>
EIGENFORMER_INLINE V erfc_of_positive(V z) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return V::make([&](int i) { return std::erfc(z.v[i]); });
  } else {
    const V t = V::set1(1.0f) / fma(z, V::set1(0.5f), V::set1(1.0f));
    V p = V::set1(0.02014725944f);
    p = fma(p, t, V::set1(-0.1644381257f));
    p = fma(p, t, V::set1(0.5218200105f));
    p = fma(p, t, V::set1(-0.7881048781f));
    p = fma(p, t, V::set1(0.5142102493f));
    p = fma(p, t, V::set1(-0.1451309655f));
    p = fma(p, t, V::set1(0.240586545f));
    p = fma(p, t, V::set1(0.2356785033f));
    p = fma(p, t, V::set1(0.2831819435f));
    p = fma(p, t, V::set1(0.2820494531f));
    return t * p * simd::exp(V::zero() - z * z);
  }
}

/// Distribution function of the normal distribution, without cancellation for negative x.
template <typename V>
EIGENFORMER_INLINE V normal_distribution(V x) {
  const V tail =
      V::set1(0.5f) *
      erfc_of_positive(abs(x) * V::set1(static_cast<typename V::scalar>(0.70710678118654752440)));
  return select(less(x, V::zero()), tail, V::set1(1) - tail);
}

/// Relative error about 2e-7 for float: the Taylor polynomial where 1 - e^-2|x| would cancel,
/// that quotient elsewhere.
template <typename V>
EIGENFORMER_INLINE V tanh(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return V::make([&](int i) { return std::tanh(x.v[i]); });
  } else {
    const V a = abs(x), square = x * x;
    const V e = simd::exp_of_nonpositive(a * V::set1(-2.0f));
    const V magnitude = (V::set1(1.0f) - e) / (V::set1(1.0f) + e);
    const V large = select(less(x, V::zero()), V::zero() - magnitude, magnitude);
    // x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835 - 1382x^11/155925 + 21844x^13/6081075: below
    // 1e-7 relative for |x| < 0.5
    V p = V::set1(static_cast<float>(21844.0 / 6081075));
    p = fma(p, square, V::set1(static_cast<float>(-1382.0 / 155925)));
    p = fma(p, square, V::set1(static_cast<float>(62.0 / 2835)));
    p = fma(p, square, V::set1(static_cast<float>(-17.0 / 315)));
    p = fma(p, square, V::set1(static_cast<float>(2.0 / 15)));
    p = fma(p, square, V::set1(static_cast<float>(-1.0 / 3)));
    const V near_zero = fma(p * square, x, x);
    return select(less(a, V::set1(0.5f)), near_zero, large);
  }
}

template <typename Tag>
struct ActivationFunction;

template <>
struct ActivationFunction<problem::Identity> {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return x;
  }
};

template <>
struct ActivationFunction<problem::Silu> {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return maximum(V::set1(-800), x) / (V::set1(1) + simd::exp(V::zero() - x));
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    x = clamp_to_limits(x);
    const V s = sigmoid(x);
    return s * fma(x, V::set1(1) - s, V::set1(1));
  }
};

template <>
struct ActivationFunction<problem::GeluErf> {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return maximum(V::set1(-800), x) * normal_distribution(x);
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    x = clamp_to_limits(x);
    const V density = V::set1(static_cast<typename V::scalar>(0.39894228040143267794)) *
                      simd::exp(x * x * V::set1(-0.5f));
    return fma(x, density, normal_distribution(x));
  }
};

template <>
struct ActivationFunction<problem::GeluTanh> {
  // (1 + tanh(u)) / 2 is sigmoid(2 u): no tanh is needed, and nothing cancels for negative x.
  template <typename V>
  static EIGENFORMER_INLINE V twice_u(V x) {
    using C = typename V::scalar;
    return x * fma(x * x, V::set1(static_cast<C>(kTwoRootTwoOverPi * 0.044715)),
                   V::set1(static_cast<C>(kTwoRootTwoOverPi)));
  }
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return maximum(V::set1(-800), x) / (V::set1(1) + simd::exp(V::zero() - twice_u(x)));
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    using C = typename V::scalar;
    x = clamp_to_limits(x);
    const V s = sigmoid(twice_u(x));
    const V slope = fma(x * x, V::set1(static_cast<C>(3 * kTwoRootTwoOverPi * 0.044715)),
                        V::set1(static_cast<C>(kTwoRootTwoOverPi)));
    return s * fma(x * slope, V::set1(1) - s, V::set1(1));
  }
  static constexpr double kTwoRootTwoOverPi = 1.59576912160573071176;
};

template <>
struct ActivationFunction<problem::Relu> {
  template <typename V>
  static EIGENFORMER_INLINE V value(V x) {
    return maximum(V::zero(), x);  // in this order a NaN passes through
  }
  template <typename V>
  static EIGENFORMER_INLINE V derivative(V x) {
    return select(is_nan(x), x, select(less(V::zero(), x), V::set1(1), V::zero()));
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
