/// \file
/// Softmax cross-entropy in plain loops in double: what the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../loss.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

struct CrossEntropy {
  LossResult loss;
  Tensor<double, 2> gradient;  // of the sum, times gradient_scale
};

inline CrossEntropy cross_entropy(const Tensor<double, 2>& logits,
                                  const Tensor<std::int32_t, 1>& targets, double gradient_scale = 1,
                                  const CrossEntropyOptions& options = {}) {
  const Index rows = logits.dimension(0), classes = logits.dimension(1);
  CrossEntropy result{{}, Tensor<double, 2>(rows, classes)};
  result.gradient.setZero();
  for (Index r = 0; r < rows; ++r) {
    if (targets(r) == options.ignore_index) continue;
    double maximum = -std::numeric_limits<double>::infinity(), sum = 0, logit_sum = 0;
    for (Index k = 0; k < classes; ++k) maximum = (std::max)(maximum, logits(r, k));
    for (Index k = 0; k < classes; ++k) sum += std::exp(logits(r, k) - maximum);
    for (Index k = 0; k < classes; ++k) logit_sum += logits(r, k);
    const double log_sum_exp = maximum + std::log(sum), s = options.label_smoothing;
    result.loss.sum +=
        log_sum_exp - (1 - s) * logits(r, targets(r)) + options.z_loss * log_sum_exp * log_sum_exp;
    if (s > 0) result.loss.sum -= s / static_cast<double>(classes) * logit_sum;
    ++result.loss.count;
    for (Index k = 0; k < classes; ++k) {
      const double wanted = s / static_cast<double>(classes) + (k == targets(r) ? 1 - s : 0);
      const double p = std::exp(logits(r, k) - log_sum_exp);
      result.gradient(r, k) =
          (p * (1 + 2 * options.z_loss * log_sum_exp) - wanted) * gradient_scale;
    }
  }
  return result;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
