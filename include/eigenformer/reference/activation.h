/// \file
/// Activations and their derivatives in double, one element at a time: what the tests and a
/// doubting user compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "../activation.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

inline double silu(double x) { return x / (1 + std::exp(-x)); }
inline double silu_derivative(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s * (1 + x * (1 - s));
}

inline double gelu(double x, const GeluOptions& options = {}) {
  if (options.approximation == GeluApproximation::tanh)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
  return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
}
inline double gelu_derivative(double x, const GeluOptions& options = {}) {
  if (options.approximation == GeluApproximation::tanh) {
    const double c = std::sqrt(2 / std::numbers::pi), t = std::tanh(c * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
  }
  return 0.5 * std::erfc(-x / std::numbers::sqrt2) +
         x * std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
}

inline double relu(double x) { return x > 0 ? x : 0; }
inline double relu_derivative(double x) { return x > 0 ? 1 : 0; }

inline double softcap(double x, const SoftcapOptions& options) {
  const double cap = static_cast<double>(options.cap),
               scaled = x * static_cast<double>(options.scale);
  return cap == 0 ? scaled : cap * std::tanh(scaled / cap);
}

inline double swiglu(double gate, double up) { return silu(gate) * up; }
inline double geglu(double gate, double up, const GeluOptions& options = {}) {
  return gelu(gate, options) * up;
}
inline double clamped_swiglu(double gate, double up, const ClampedSwigluOptions& options = {}) {
  const double limit = static_cast<double>(options.limit), g = (std::min)(gate, limit),
               u = (std::max)(-limit, (std::min)(up, limit));
  return (u + 1) * g / (1 + std::exp(-static_cast<double>(options.alpha) * g));
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
