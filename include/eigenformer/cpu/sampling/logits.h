/// \file
/// What changes logits before any filter: guidance, penalties, biases, mask and forced tokens. A
/// row that has any is copied to scratch in the compute type and changed there: O(vocab + history),
/// each number computed in double and rounded once.
#pragma once

#include "../../problem/sampling.h"
#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::adjusts_logits, problem::has_penalties, problem::penalized_logit;

/// Changes every distinct token of the history once. `counts` is (vocab) scratch.
template <typename C>
void apply_penalties(C* logits, const problem::RowParams& params, std::int32_t* counts) {
  // of the tokens that occur, and no others: vocabularies are a hundred histories
  for (const std::int32_t token : params.output_tokens) counts[token] = 0;
  for (const std::int32_t token : params.prompt_tokens) counts[token] = 0;
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

/// Log of the sum of exponentials of a row; NaN where the row is bad.
template <typename Isa, typename T, typename C>
double log_total(const T* logits, Index vocab, const SamplingScratch<C>& scratch) {
  SamplingRow<T> row{logits, vocab, scratch.block_max, {}, 1.0};
  if (scan_row<Isa>(row) != SampleStatus::ok) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(row.band.hi) + std::log(sum_weights<Isa>(row, scratch.block_sum));
}

template <typename C>
void subtract(C* logits, Index vocab, double number) {
  for (Index t = 0; t < vocab; ++t)
    logits[t] = static_cast<C>(static_cast<double>(logits[t]) - number);
}

/// Classifier-free guidance by another row of the batch.
template <typename Isa, typename T, typename C>
void apply_guidance(C* logits, Index vocab, const T* without, double scale,
                    const SamplingScratch<C>& scratch) {
  const double total = log_total<Isa>(logits, vocab, scratch),
               total_without = log_total<Isa>(without, vocab, scratch);
  for (Index t = 0; t < vocab; ++t)
    logits[t] = static_cast<C>(problem::guided_logit(
        static_cast<double>(logits[t]) - total,
        static_cast<double>(static_cast<C>(without[t])) - total_without, scale));
}

/// Copies row r to scratch and runs the stages that change logits.
template <typename Isa, typename T, typename C>
void adjust_logits(const problem::Sampling<T>& p, Index r, const SamplingScratch<C>& scratch) {
  const problem::RowParams& params = p.params_of(r);
  C* const adjusted = scratch.adjusted;
  convert_line<simd::Vec<C, Isa>>(p.logits + r * p.vocab, adjusted, p.vocab);
  int bias_stages = 0;
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::guidance)
      apply_guidance<Isa>(adjusted, p.vocab, p.logits + params.guidance_row * p.vocab,
                          params.guidance_scale, scratch);
    if (stage == SamplingStage::penalties) {
      if (params.log_probability_penalties)
        subtract(adjusted, p.vocab, log_total<Isa>(adjusted, p.vocab, scratch));
      apply_penalties(adjusted, params, scratch.counts);
    }
    if (stage == SamplingStage::token_mask) apply_token_mask(adjusted, p.vocab, params.token_mask);
    if (stage == SamplingStage::logit_bias)
      for (const LogitBias& bias : problem::biases_of_stage(params, bias_stages++))
        adjusted[bias.token] = static_cast<C>(static_cast<double>(adjusted[bias.token]) +
                                              static_cast<double>(bias.bias));
    if (stage == SamplingStage::function)
      p.function(p.function_object, r, {adjusted, static_cast<std::size_t>(p.vocab)});
    if (stage == SamplingStage::forced_tokens) {
      std::fill(adjusted, adjusted + p.vocab, -std::numeric_limits<C>::infinity());
      adjusted[params.forced_token] = 0;
    }
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
