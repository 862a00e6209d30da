/// \file
/// A plain trainer in double for a tiny model: two layers with tanh between, softmax cross-entropy,
/// gradients of the mean over one big batch. What the tests and a doubting user compare gradient
/// accumulation and mixed precision with.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "loss.h"
#include "optimizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// logits = second tanh(first x + first_bias) + second_bias, weights flattened in that order into
/// one vector: first (hidden, features), first_bias (hidden), second (classes, hidden), second_bias
/// (classes).
struct Mlp {
  Index features, hidden, classes;
  OptimizedVector weights;

  std::size_t first(Index h, Index f) const { return static_cast<std::size_t>(h * features + f); }
  std::size_t first_bias(Index h) const { return static_cast<std::size_t>(hidden * features + h); }
  std::size_t second(Index c, Index h) const {
    return static_cast<std::size_t>(hidden * (features + 1) + c * hidden + h);
  }
  std::size_t second_bias(Index c) const {
    return static_cast<std::size_t>(hidden * (features + 1 + classes) + c);
  }
};

struct MlpGradient {
  LossResult loss;
  std::vector<double> gradient;  // of the mean loss; zero where no target counts
};

inline MlpGradient mlp_gradient(const Mlp& m, const Tensor<double, 2>& inputs,
                                const Tensor<std::int32_t, 1>& targets) {
  const Index rows = inputs.dimension(0);
  const std::vector<double>& w = m.weights.value;
  Tensor<double, 2> activations(rows, m.hidden), logits(rows, m.classes);
  for (Index r = 0; r < rows; ++r) {
    for (Index h = 0; h < m.hidden; ++h) {
      double sum = w[m.first_bias(h)];
      for (Index f = 0; f < m.features; ++f) sum += w[m.first(h, f)] * inputs(r, f);
      activations(r, h) = std::tanh(sum);
    }
    for (Index c = 0; c < m.classes; ++c) {
      logits(r, c) = w[m.second_bias(c)];
      for (Index h = 0; h < m.hidden; ++h) logits(r, c) += w[m.second(c, h)] * activations(r, h);
    }
  }
  MlpGradient result{{}, std::vector<double>(w.size())};
  const CrossEntropy entropy = cross_entropy(logits, targets);
  result.loss = entropy.loss;
  if (entropy.loss.count == 0) return result;
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < m.classes; ++c) {
      const double d = entropy.gradient(r, c) / static_cast<double>(entropy.loss.count);
      result.gradient[m.second_bias(c)] += d;
      for (Index h = 0; h < m.hidden; ++h) {
        result.gradient[m.second(c, h)] += d * activations(r, h);
        const double back = d * w[m.second(c, h)] * (1 - activations(r, h) * activations(r, h));
        result.gradient[m.first_bias(h)] += back;
        for (Index f = 0; f < m.features; ++f)
          result.gradient[m.first(h, f)] += back * inputs(r, f);
      }
    }
  }
  return result;
}

/// One AdamW step on one big batch; returns its loss. A batch in which no target counts makes no
/// step.
inline LossResult mlp_adamw_step(Mlp& m, const Tensor<double, 2>& inputs,
                                 const Tensor<std::int32_t, 1>& targets,
                                 const AdamWOptions& options) {
  const MlpGradient step = mlp_gradient(m, inputs, targets);
  if (step.loss.count > 0) adamw_step(m.weights, step.gradient, options);
  return step.loss;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
