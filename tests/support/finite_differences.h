/// \file
/// Gradients checked against central differences in double.
#pragma once

#include "compare.h"

namespace eigenformer_test {

/// Gradient of loss() with respect to each element of x, by central differences: error about
/// step^2, 1e-9 of the values' size.
template <typename Loss, int Rank>
ef::Tensor<double, Rank> finite_differences(ef::Tensor<double, Rank>& x, Loss&& loss,
                                            double step = 1e-5) {
  ef::Tensor<double, Rank> gradient(x.dimensions());
  for (Index i = 0; i < x.size(); ++i) {
    const double kept = x.data()[i];
    x.data()[i] = kept + step;
    const double above = loss();
    x.data()[i] = kept - step;
    const double below = loss();
    x.data()[i] = kept;
    gradient.data()[i] = (above - below) / (2 * step);
  }
  return gradient;
}

/// Sum of a * b: a scalar loss of a tensor y whose gradient with respect to y is b.
template <typename A, typename B>
double dot(const A& a, const B& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i)
    sum += static_cast<double>(a.data()[i]) * static_cast<double>(b.data()[i]);
  return sum;
}

}  // namespace eigenformer_test
