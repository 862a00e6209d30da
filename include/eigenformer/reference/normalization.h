/// \file
/// RMSNorm, LayerNorm and their gradients in plain loops: what the tests and a doubting user
/// compare with.
#pragma once

#include <cmath>

#include "../normalization.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

inline Tensor<double, 2> rms_norm(const Tensor<double, 2>& x, const Tensor<double, 1>& weight,
                                  double epsilon) {
  Tensor<double, 2> y(x.dimension(0), x.dimension(1));
  for (Index i = 0; i < x.dimension(0); ++i) {
    double squares = 0;
    for (Index k = 0; k < x.dimension(1); ++k) squares += x(i, k) * x(i, k);
    const double rms = std::sqrt(squares / static_cast<double>(x.dimension(1)) + epsilon);
    for (Index j = 0; j < x.dimension(1); ++j) y(i, j) = x(i, j) / rms * weight(j);
  }
  return y;
}

struct RmsNormGradients {
  Tensor<double, 2> x;
  Tensor<double, 1> weight;
};

inline RmsNormGradients rms_norm_backward(const Tensor<double, 2>& grad_y,
                                          const Tensor<double, 2>& x,
                                          const Tensor<double, 1>& weight, double epsilon) {
  const Index rows = x.dimension(0), features = x.dimension(1);
  RmsNormGradients grad{Tensor<double, 2>(rows, features), Tensor<double, 1>(features)};
  grad.weight.setZero();
  for (Index i = 0; i < rows; ++i) {
    double squares = 0, projection = 0;
    for (Index k = 0; k < features; ++k) {
      squares += x(i, k) * x(i, k);
      projection += grad_y(i, k) * weight(k) * x(i, k);
    }
    const double n = static_cast<double>(features), rms = std::sqrt(squares / n + epsilon);
    for (Index j = 0; j < features; ++j) {
      grad.weight(j) += grad_y(i, j) * x(i, j) / rms;
      grad.x(i, j) = (grad_y(i, j) * weight(j) - x(i, j) * projection / (n * rms * rms)) / rms;
    }
  }
  return grad;
}

inline Tensor<double, 2> layer_norm(const Tensor<double, 2>& x, const Tensor<double, 1>& weight,
                                    const Tensor<double, 1>& bias, double epsilon) {
  const Index features = x.dimension(1);
  Tensor<double, 2> y(x.dimension(0), features);
  for (Index i = 0; i < x.dimension(0); ++i) {
    double mean = 0, variance = 0;
    for (Index k = 0; k < features; ++k) mean += x(i, k) / static_cast<double>(features);
    for (Index k = 0; k < features; ++k)
      variance += (x(i, k) - mean) * (x(i, k) - mean) / static_cast<double>(features);
    for (Index j = 0; j < features; ++j)
      y(i, j) = (x(i, j) - mean) / std::sqrt(variance + epsilon) * weight(j) + bias(j);
  }
  return y;
}

struct LayerNormGradients {
  Tensor<double, 2> x;
  Tensor<double, 1> weight, bias;
};

inline LayerNormGradients layer_norm_backward(const Tensor<double, 2>& grad_y,
                                              const Tensor<double, 2>& x,
                                              const Tensor<double, 1>& weight, double epsilon) {
  const Index rows = x.dimension(0), features = x.dimension(1);
  const double n = static_cast<double>(features);
  LayerNormGradients grad{Tensor<double, 2>(rows, features), Tensor<double, 1>(features),
                          Tensor<double, 1>(features)};
  grad.weight.setZero();
  grad.bias.setZero();
  for (Index i = 0; i < rows; ++i) {
    double mean = 0, variance = 0, mean_gradient = 0, projection = 0;
    for (Index k = 0; k < features; ++k) mean += x(i, k) / n;
    for (Index k = 0; k < features; ++k) variance += (x(i, k) - mean) * (x(i, k) - mean) / n;
    const double deviation = std::sqrt(variance + epsilon);
    for (Index k = 0; k < features; ++k) {
      mean_gradient += grad_y(i, k) * weight(k) / n;
      projection += grad_y(i, k) * weight(k) * (x(i, k) - mean) / deviation / n;
    }
    for (Index j = 0; j < features; ++j) {
      const double normalized = (x(i, j) - mean) / deviation;
      grad.weight(j) += grad_y(i, j) * normalized;
      grad.bias(j) += grad_y(i, j);
      grad.x(i, j) =
          (grad_y(i, j) * weight(j) - mean_gradient - normalized * projection) / deviation;
    }
  }
  return grad;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
