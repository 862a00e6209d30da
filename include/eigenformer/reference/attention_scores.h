/// \file
/// The scores of attention in plain loops and double.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../attention/scores.h"
#include "attention.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// q (batch, rows, heads, head_dim), k (batch, keys, kv_heads, head_dim) -> (batch, heads, rows,
/// keys)
inline Tensor<double, 4> attention_scores(const Tensor<double, 4>& q, const Tensor<double, 4>& k,
                                          const std::vector<Index>& key_lengths,
                                          const std::vector<Index>& query_lengths,
                                          AttentionScoreStage stage, AttentionOptions options) {
  const bool masked = stage >= AttentionScoreStage::masked,
             probabilities = stage == AttentionScoreStage::probabilities;
  if (!masked) {
    options.alibi_slopes = {};
    options.bias = {};
    if (stage == AttentionScoreStage::scaled) options.softcap = 0;
  }
  const Index rows = q.dimension(1), heads = q.dimension(2), keys = k.dimension(1),
              group = heads == 0 ? 1 : heads / k.dimension(2);
  const double infinity = std::numeric_limits<double>::infinity();
  Tensor<double, 4> scores(q.dimension(0), heads, rows, keys);
  for (Index b = 0; b < q.dimension(0); ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < rows; ++i) {
        const AttentionRow at{b,
                              h,
                              i,
                              rows,
                              key_lengths[static_cast<std::size_t>(b)],
                              query_lengths[static_cast<std::size_t>(b)]};
        const double sink =
            options.sinks.empty() ? -infinity : options.sinks[static_cast<std::size_t>(h)];
        double maximum = sink, sum = 0;
        for (Index j = 0; j < keys; ++j) {
          const bool seen =
              masked ? attention_sees(options, at, j) : i < at.query_length && j < at.key_length;
          scores(b, h, i, j) = seen ? attention_score(options, &q(b, i, h, 0),
                                                      &k(b, j, h / group, 0), q.dimension(3), at, j)
                                    : -infinity;
          maximum = (std::max)(maximum, scores(b, h, i, j));
        }
        if (!probabilities) continue;
        if (maximum == -infinity) maximum = 0;
        for (Index j = 0; j < keys; ++j) sum += std::exp(scores(b, h, i, j) - maximum);
        sum += std::exp(sink - maximum);
        for (Index j = 0; j < keys; ++j)
          scores(b, h, i, j) = sum == 0 ? 0.0 : std::exp(scores(b, h, i, j) - maximum) / sum;
      }
  return scores;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
