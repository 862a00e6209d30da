/// \file
/// What changes logits before any filter: penalties, bias and mask. A row that has any is copied to
/// scratch in the compute type and changed there: O(vocab + history), each number computed in
/// double and rounded once.
#pragma once

#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::adjusts_logits, problem::has_penalties, problem::penalized_logit;

/// Changes every distinct token of the history once. `counts` is (vocab) scratch.
template <typename C>
void apply_penalties(C* logits, Index vocab, const problem::RowParams& params,
                     std::int32_t* counts) {
  std::fill(counts, counts + vocab, 0);
  for (const std::int32_t token : params.output_tokens) ++counts[token];
  constexpr std::int32_t done = -1;
  const auto penalize = [&](std::int32_t token) {
    if (counts[token] == done) return;
    logits[token] = penalized_logit(logits[token], counts[token], params);
    counts[token] = done;
  };
  for (const std::int32_t token : params.output_tokens) penalize(token);
  for (const std::int32_t token : params.prompt_tokens) penalize(token);
}

template <typename C>
void apply_token_mask(C* logits, Index vocab, std::span<const std::uint32_t> mask) {
  for (Index word = 0; word * 32 < vocab; ++word) {
    const std::uint32_t bits = mask[static_cast<std::size_t>(word)];
    if (bits == 0xFFFFFFFFu) continue;
    const Index count = std::min<Index>(32, vocab - word * 32);
    for (Index bit = 0; bit < count; ++bit)
      logits[word * 32 + bit] =
          (bits >> bit & 1u) != 0 ? logits[word * 32 + bit] : -std::numeric_limits<C>::infinity();
  }
}

/// Copies a row to `adjusted` and applies penalties, bias and mask in the order of the parameters.
template <typename Isa, typename T, typename C>
void adjust_logits(const T* logits, Index vocab, const problem::RowParams& params, C* adjusted,
                   std::int32_t* counts) {
  convert_line<simd::Vec<C, Isa>>(logits, adjusted, vocab);
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::penalties && has_penalties(params))
      apply_penalties(adjusted, vocab, params, counts);
    if (stage == SamplingStage::token_mask && !params.token_mask.empty())
      apply_token_mask(adjusted, vocab, params.token_mask);
    if (stage == SamplingStage::logit_bias)
      for (const LogitBias& bias : params.logit_bias)
        adjusted[bias.token] = static_cast<C>(static_cast<double>(adjusted[bias.token]) +
                                              static_cast<double>(bias.bias));
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
