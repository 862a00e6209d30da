/// \file
/// Experts of random weights, packed and in double, and tokens that some of them get.
#pragma once

#include <eigenformer/expert_feed_forward.h>
#include <eigenformer/reference/expert_feed_forward.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "compare.h"

namespace eigenformer_test {

inline double silu_unit(double gate, double up) { return gate / (1 + std::exp(-gate)) * up; }

/// The weights of `count` experts, (hidden, in) and (in, hidden), and biases of all of them.
struct RandomExperts {
  RandomExperts(Index count, Index in, Index hidden)
      : gate_up_bias(random_tensor<float, 1>({count * 2 * hidden}, 91)),
        down_bias(random_tensor<float, 1>({count * in}, 92)) {
    for (Index e = 0; e < count; ++e) {
      const auto seed = static_cast<unsigned>(3 * e);
      const double spread = 1 / std::sqrt(static_cast<double>(in));
      gates.push_back(random_tensor<float, 2>({hidden, in}, seed, spread));
      ups.push_back(random_tensor<float, 2>({hidden, in}, seed + 1, spread));
      downs.push_back(random_tensor<float, 2>({in, hidden}, seed + 2, spread));
    }
  }
  std::vector<ef::reference::Expert> in_double(bool biases) const {
    std::vector<ef::reference::Expert> result;
    const Index hidden = gates[0].dimension(0), in = gates[0].dimension(1);
    for (std::size_t e = 0; e < gates.size(); ++e) {
      result.push_back({to_double(gates[e]), to_double(ups[e]), to_double(downs[e]), {}, {}, {}});
      if (!biases) continue;
      const float* const pair = gate_up_bias.data() + static_cast<Index>(e) * 2 * hidden;
      const float* const down = down_bias.data() + static_cast<Index>(e) * in;
      result.back().gate_bias.assign(pair, pair + hidden);
      result.back().up_bias.assign(pair + hidden, pair + 2 * hidden);
      result.back().down_bias.assign(down, down + in);
    }
    return result;
  }

  std::vector<ef::Tensor<float, 2>> gates, ups, downs;
  ef::Tensor<float, 1> gate_up_bias, down_bias;
};

/// Packed on a device, S the stored scalar.
template <typename S>
struct PackedExperts {
  template <typename D, typename View>
  PackedExperts(const D& device, const RandomExperts& from, View&& view,
                const ef::PackingOptions<S>& options = {}) {
    for (std::size_t e = 0; e < from.gates.size(); ++e) {
      const auto gate = view(from.gates[e]), up = view(from.ups[e]), down = view(from.downs[e]);
      gate_ups.push_back(ef::pack_gated_weight<S>(device, gate, up, options));
      downs.push_back(ef::pack_weight<S>(device, down, options));
    }
  }
  std::vector<ef::PackedGatedWeight<S>> gate_ups;
  std::vector<ef::PackedWeight<S>> downs;
};

/// The matrices of all experts, one below the other.
inline ef::Tensor<float, 2> stacked(const std::vector<ef::Tensor<float, 2>>& matrices) {
  const Index rows = matrices[0].dimension(0), columns = matrices[0].dimension(1);
  ef::Tensor<float, 2> all(static_cast<Index>(matrices.size()) * rows, columns);
  for (std::size_t e = 0; e < matrices.size(); ++e)
    std::copy_n(matrices[e].data(), matrices[e].size(), &all(static_cast<Index>(e) * rows, 0));
  return all;
}

/// k different experts of each token; where `one` is not -1, that one is each token's first.
inline ef::Tensor<std::int32_t, 2> some_experts(Index tokens, Index k, Index experts,
                                                Index one = -1) {
  ef::Tensor<std::int32_t, 2> ids(tokens, k);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < k; ++j)
      ids(t, j) = static_cast<std::int32_t>(((one < 0 ? t * t + 3 * t : one) + j) % experts);
  return ids;
}

}  // namespace eigenformer_test
