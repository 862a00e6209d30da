/// \file
/// AdamW and SGD in plain loops in double: what the tests and a doubting user compare with.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "../optimizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// One flat parameter with its state.
struct OptimizedVector {
  std::vector<double> value;
  std::vector<double> first = std::vector<double>(value.size());
  std::vector<double> second = std::vector<double>(value.size());
  int steps = 0;
};

inline void adamw_step(OptimizedVector& x, const std::vector<double>& gradient,
                       const AdamWOptions& o) {
  ++x.steps;
  for (std::size_t i = 0; i < x.value.size(); ++i) {
    x.first[i] = o.beta1 * x.first[i] + (1 - o.beta1) * gradient[i];
    x.second[i] = o.beta2 * x.second[i] + (1 - o.beta2) * gradient[i] * gradient[i];
    const double m = x.first[i] / (1 - std::pow(o.beta1, x.steps)),
                 v = x.second[i] / (1 - std::pow(o.beta2, x.steps));
    x.value[i] -= o.learning_rate * (m / (std::sqrt(v) + o.epsilon) + o.weight_decay * x.value[i]);
  }
}

inline void sgd_step(OptimizedVector& x, const std::vector<double>& gradient, const SgdOptions& o) {
  ++x.steps;
  for (std::size_t i = 0; i < x.value.size(); ++i) {
    const double d = gradient[i] + o.weight_decay * x.value[i];
    x.first[i] = o.momentum * x.first[i] + d;
    x.value[i] -= o.learning_rate * (o.nesterov ? d + o.momentum * x.first[i] : x.first[i]);
  }
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
