/// \file
/// The linear layer and its gradients in plain loops, in double: what the tests and a doubting user
/// compare with.
#pragma once

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// x (tokens, in), weight (out, in); bias (out) or nullptr.
inline Tensor<double, 2> linear(const Tensor<double, 2>& x, const Tensor<double, 2>& weight,
                                const double* bias = nullptr) {
  const Index tokens = x.dimension(0), in = x.dimension(1), out = weight.dimension(0);
  Tensor<double, 2> y(tokens, out);
  for (Index t = 0; t < tokens; ++t)
    for (Index o = 0; o < out; ++o) {
      double sum = 0;
      for (Index i = 0; i < in; ++i) sum += x(t, i) * weight(o, i);
      y(t, o) = sum + (bias == nullptr ? 0.0 : bias[o]);
    }
  return y;
}

inline Tensor<double, 2> linear_backward_input(const Tensor<double, 2>& grad_y,
                                               const Tensor<double, 2>& weight) {
  const Index tokens = grad_y.dimension(0), out = weight.dimension(0), in = weight.dimension(1);
  Tensor<double, 2> grad_x(tokens, in);
  for (Index t = 0; t < tokens; ++t)
    for (Index i = 0; i < in; ++i) {
      double sum = 0;
      for (Index o = 0; o < out; ++o) sum += grad_y(t, o) * weight(o, i);
      grad_x(t, i) = sum;
    }
  return grad_x;
}

/// Adds to grad_weight (out, in).
inline void linear_backward_weight(Tensor<double, 2>& grad_weight, const Tensor<double, 2>& grad_y,
                                   const Tensor<double, 2>& x) {
  for (Index t = 0; t < x.dimension(0); ++t)
    for (Index o = 0; o < grad_weight.dimension(0); ++o)
      for (Index i = 0; i < grad_weight.dimension(1); ++i)
        grad_weight(o, i) += grad_y(t, o) * x(t, i);
}

/// Adds to grad_bias (out).
inline void linear_backward_bias(Tensor<double, 1>& grad_bias, const Tensor<double, 2>& grad_y) {
  for (Index t = 0; t < grad_y.dimension(0); ++t)
    for (Index o = 0; o < grad_bias.dimension(0); ++o) grad_bias(o) += grad_y(t, o);
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
