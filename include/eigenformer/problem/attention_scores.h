/// \file
/// What asking for the scores of attention asks for.
#pragma once

#include "attention.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// `forward` carries queries, keys and the rule; its values, output and log_sum_exp are not used.
template <typename T, typename Function = NoScoreFunction>
struct AttentionScores {
  using Compute = compute_type<T>;
  Attention<T, T, Function> forward;
  Compute* scores;     // (batch, heads, rows, keys)
  Index rows, keys;    // of a sequence in the tensors, padding included
  bool probabilities;  // rather than scores; 0 rather than -infinity where a key is not seen

  EIGENFORMER_INLINE Index lines() const { return forward.batch * forward.heads * rows; }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
