/// \file
/// Experts in plain double, token by token: what the tests and a doubting user compare with.
#pragma once

#include <vector>

#include "../expert_feed_forward.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// One expert: gate and up (hidden, in), down (out, hidden); biases empty or of their rows.
struct Expert {
  Tensor<double, 2> gate, up, down;
  std::vector<double> gate_bias, up_bias, down_bias;
};

/// weight x + bias.
inline std::vector<double> expert_product(const Tensor<double, 2>& weight, const double* x,
                                          const std::vector<double>& bias) {
  std::vector<double> y(static_cast<std::size_t>(weight.dimension(0)));
  for (std::size_t o = 0; o < y.size(); ++o) {
    y[o] = bias.empty() ? 0 : bias[o];
    for (Index i = 0; i < weight.dimension(1); ++i) y[o] += weight(static_cast<Index>(o), i) * x[i];
  }
  return y;
}

/// y[t] += the experts' results by weight. unit(gate, up) is one element of the hidden layer.
template <typename Unit>
void expert_feed_forward(Tensor<double, 2>& y, const Tensor<double, 2>& x,
                         const Tensor<std::int32_t, 2>& ids, const Tensor<double, 2>& weights,
                         const std::vector<Expert>& experts, Unit&& unit) {
  for (Index t = 0; t < ids.dimension(0); ++t)
    for (Index j = 0; j < ids.dimension(1); ++j) {
      const Expert& e = experts[static_cast<std::size_t>(ids(t, j))];
      const double* const row = x.data() + t * x.dimension(1);
      std::vector<double> hidden = expert_product(e.gate, row, e.gate_bias);
      const std::vector<double> up = expert_product(e.up, row, e.up_bias);
      for (std::size_t h = 0; h < hidden.size(); ++h) hidden[h] = unit(hidden[h], up[h]);
      const std::vector<double> result = expert_product(e.down, hidden.data(), e.down_bias);
      for (std::size_t o = 0; o < result.size(); ++o)
        y(t, static_cast<Index>(o)) += weights(t, j) * result[o];
    }
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
