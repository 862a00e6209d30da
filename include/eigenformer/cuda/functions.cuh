/// \file
/// The activation functions of problem/activation.h for one number: value(x) and derivative(x), as
/// in cpu/vector/functions.h. Arguments of products stay within [-800, 800], where every function
/// has reached its limit: infinities give the limit and not 0 * infinity. NaN gives NaN.
#pragma once

#include <cmath>

#include "../problem/activation.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// NaN passes through.
template <typename C>
EIGENFORMER_DEVICE C at_least(C x, C least) {
  return x < least ? least : x;
}
template <typename C>
EIGENFORMER_DEVICE C clamp_to_limits(C x) {
  x = at_least(x, C(-800));
  return x > C(800) ? C(800) : x;
}

template <typename C>
EIGENFORMER_DEVICE C sigmoid(C x) {
  return C(1) / (C(1) + std::exp(-x));
}

/// Distribution function of the normal distribution, without cancellation for negative x.
template <typename C>
EIGENFORMER_DEVICE C normal_distribution(C x) {
  return C(0.5) * std::erfc(x * static_cast<C>(-0.70710678118654752440));
}

template <typename Tag>
struct ActivationFunction;

template <>
struct ActivationFunction<problem::Identity> {
  template <typename C>
  static EIGENFORMER_DEVICE C value(C x) {
    return x;
  }
};

template <>
struct ActivationFunction<problem::Silu> {
  template <typename C>
  static EIGENFORMER_DEVICE C value(C x) {
    return at_least(x, C(-800)) / (C(1) + std::exp(-x));
  }
  template <typename C>
  static EIGENFORMER_DEVICE C derivative(C x) {
    x = clamp_to_limits(x);
    const C s = sigmoid(x);
    return s * std::fma(x, C(1) - s, C(1));
  }
};

template <>
struct ActivationFunction<problem::GeluErf> {
  template <typename C>
  static EIGENFORMER_DEVICE C value(C x) {
    return at_least(x, C(-800)) * normal_distribution(x);
  }
  template <typename C>
  static EIGENFORMER_DEVICE C derivative(C x) {
    x = clamp_to_limits(x);
    const C density = static_cast<C>(0.39894228040143267794) * std::exp(x * x * C(-0.5));
    return std::fma(x, density, normal_distribution(x));
  }
};

template <>
struct ActivationFunction<problem::GeluTanh> {
  // (1 + tanh(u)) / 2 is sigmoid(2 u)
  static constexpr double kTwoRootTwoOverPi = 1.59576912160573071176;
  template <typename C>
  static EIGENFORMER_DEVICE C twice_u(C x) {
    return x * std::fma(x * x, static_cast<C>(kTwoRootTwoOverPi * 0.044715),
                        static_cast<C>(kTwoRootTwoOverPi));
  }
  template <typename C>
  static EIGENFORMER_DEVICE C value(C x) {
    return at_least(x, C(-800)) / (C(1) + std::exp(-twice_u(x)));
  }
  template <typename C>
  static EIGENFORMER_DEVICE C derivative(C x) {
    x = clamp_to_limits(x);
    const C s = sigmoid(twice_u(x));
    const C slope = std::fma(x * x, static_cast<C>(3 * kTwoRootTwoOverPi * 0.044715),
                             static_cast<C>(kTwoRootTwoOverPi));
    return s * std::fma(x * slope, C(1) - s, C(1));
  }
};

template <>
struct ActivationFunction<problem::Relu> {
  template <typename C>
  static EIGENFORMER_DEVICE C value(C x) {
    return at_least(x, C(0));
  }
  template <typename C>
  static EIGENFORMER_DEVICE C derivative(C x) {
    return x != x ? x : (x > C(0) ? C(1) : C(0));
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
