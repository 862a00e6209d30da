/// \file
/// Merged results of attention in plain loops and double.
#pragma once

#include <vector>

#include "attention.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// One state or more, all of one shape.
inline AttentionResult merge_attention_states(const std::vector<AttentionResult>& states) {
  AttentionResult merged = states.front();
  merged.output.setZero();
  merged.log_sum_exp.setConstant(-std::numeric_limits<double>::infinity());
  for (Index b = 0; b < merged.output.dimension(0); ++b)
    for (Index r = 0; r < merged.output.dimension(1); ++r)
      for (Index h = 0; h < merged.output.dimension(2); ++h) {
        double maximum = -std::numeric_limits<double>::infinity(), sum = 0;
        for (const AttentionResult& state : states)
          maximum = (std::max)(maximum, state.log_sum_exp(b, h, r));
        if (maximum == -std::numeric_limits<double>::infinity()) continue;
        for (const AttentionResult& state : states)
          sum += std::exp(state.log_sum_exp(b, h, r) - maximum);
        for (const AttentionResult& state : states) {
          const double weight = std::exp(state.log_sum_exp(b, h, r) - maximum) / sum;
          if (weight == 0) continue;
          for (Index d = 0; d < merged.output.dimension(3); ++d)
            merged.output(b, r, h, d) += weight * state.output(b, r, h, d);
        }
        merged.log_sum_exp(b, h, r) = maximum + std::log(sum);
      }
  return merged;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
