/// \file
/// What changes logits before any filter. Penalties, biases and masks change few of them or ban the
/// others, and the row stays where it lies (changes.h). Guidance, forced tokens, penalties on
/// log-probabilities and the caller's function change all: such a row is copied to scratch in the
/// compute type and changed there. Each number is computed in double and rounded once.
#pragma once

#include "../../problem/sampling.h"
#include "relevant.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::adjusts_all_logits, problem::adjusts_logits, problem::has_penalties;

/// Distinct tokens that penalties and biases of a row may change, at most.
inline Index most_changes(const problem::RowParams& params, Index vocab) {
  std::size_t count = params.logit_bias.size();
  if (has_penalties(params)) count += params.prompt_tokens.size() + params.output_tokens.size();
  return (std::min)(vocab, static_cast<Index>(count));
}

/// scan_row, with the maxima of what the mask allows; the status is that of the whole row.
template <typename Isa, typename T, typename C>
SampleStatus scan_allowed(SamplingRow<T>& row, LogitChanges<C>& changes) {
  using V = simd::Vec<C, Isa>;
  const V none = V::set1(-std::numeric_limits<C>::infinity());
  LineMaximum<V> line;
  V best = none;
  const auto scan = [&](Index block, const auto* x) {
    line.add(x, SamplingBlock::size);
    V most = line.all();
    line.restart();
    best = maximum(most, best);
    const BlockBits allowed = changes.allowed(block);
    if (!allowed.all()) {
      changes.first[block] = kMasked;
      most = none;
      for (Index i = 0; i < SamplingBlock::size && allowed.count() > 0; i += V::lanes)
        most = maximum(select(allowed.template mask<V>(i), V::load(x + i), none), most);
    }
    row.block_max[block] = reduce_max(most);
  };
  const Index whole = row.vocab / SamplingBlock::size;
  for (Index block = 0; block < whole; ++block)
    scan(block, row.logits + block * SamplingBlock::size);
  if (whole < row.blocks()) {
    alignas(64) C x[SamplingBlock::size];
    load_block<Isa>(row.logits, row.vocab, whole, x);
    scan(whole, static_cast<const C*>(x));
  }
  return status_of_maximum(reduce_max(best), line.nan.bits() != 0);
}

/// Chains the changes by block, or makes them at once where changes.copied says so, and brings the
/// maxima of the row up to them.
template <typename Isa, typename T, typename C>
SampleStatus apply_changes(SamplingRow<T>& row, LogitChanges<C>& changes) {
  using V = simd::Vec<C, Isa>;
  row.changes = &changes;
  std::int32_t* const fallen = changes.places;  // blocks; the hash has done its work
  Index n = 0;
  bool nan = false;
  for (Index i = 0; i < changes.size; ++i) {
    ChangedLogit<C>& change = changes.list[i];
    if (!changes.allows(change.token)) continue;
    const Index block = change.token / SamplingBlock::size;
    if (changes.copied) {
      if (changes.first[block] == kNoChange) {
        load_block<Isa>(row.logits, row.vocab, block, changes.logits + block * SamplingBlock::size);
        changes.first[block] = kCopied;
      }
      changes.logits[change.token] = change.value;
    } else {
      change.next = changes.first[block];
      changes.first[block] = static_cast<std::int32_t>(i);
    }
    nan = nan || holds_nan(change.value);
    C& most = row.block_max[block];
    if (change.value >= most)
      most = change.value;
    else if (change.given >= most)
      fallen[n++] = static_cast<std::int32_t>(block);
  }
  alignas(64) C x[SamplingBlock::size];
  for (Index i = 0; i < n; ++i) {
    LineMaximum<V> line;
    line.add(block_logits<Isa>(row, fallen[i], x), SamplingBlock::size);
    row.block_max[fallen[i]] = reduce_max(line.all());
  }
  V best = V::set1(-std::numeric_limits<C>::infinity());
  const Index whole = row.blocks() / V::lanes * V::lanes;
  for (Index at = 0; at < whole; at += V::lanes) best = maximum(V::load(row.block_max + at), best);
  C hi = reduce_max(best) + C(0);  // as in scan_maxima
  for (Index at = whole; at < row.blocks(); ++at) hi = (std::max)(hi, row.block_max[at]);
  row.band = {hi, std::numeric_limits<C>::lowest(), row.vocab};
  row.inverse_temperature = 1;
  return status_of_maximum(hi, nan);
}

/// Scans row r and runs the stages that change few of its logits.
template <typename Isa, typename T, typename C>
SampleStatus change_logits(const problem::Sampling<T>& p, Index r, SamplingRow<T>& row,
                           LogitChanges<C>& changes) {
  const problem::RowParams& params = p.params_of(r);
  changes.mask = {};
  for (const SamplingStage stage : params.order)
    if (stage == SamplingStage::token_mask) changes.mask = params.token_mask;
  std::fill(changes.first, changes.first + row.blocks(), kNoChange);
  const SampleStatus status =
      changes.mask.empty() ? scan_row<Isa>(row) : scan_allowed<Isa>(row, changes);
  if (status != SampleStatus::ok) return status;
  const Index most = most_changes(params, p.vocab);
  RelevantHistory history{params.prompt_tokens, params.output_tokens};
  // the band that the bound asks for is that of a row without a mask
  if (changes.mask.empty() && has_penalties(params))
    history = relevant_history<Isa>(row, params, changes.relevant, changes.capacity);
  changes.start((std::min)(most, history.size() + static_cast<Index>(params.logit_bias.size())));
  // where filters read all blocks, to copy those with changes one by one takes longer
  changes.copied = changes.mask.empty() && first_cut(params).count == 0;
  int bias_stages = 0;
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::penalties)
      changes.penalize(row.logits, {0, p.vocab}, params, history.prompt, history.output);
    if (stage == SamplingStage::logit_bias)
      for (const LogitBias& bias : problem::biases_of_stage(params, bias_stages++))
        changes.add(row.logits, bias);
  }
  return apply_changes<Isa>(row, changes);
}

template <typename C>
void apply_token_mask(C* logits, const ShardRange& own, std::span<const std::uint32_t> mask) {
  for (Index word = own.begin / 32; word * 32 < own.end; ++word) {
    const std::uint32_t bits = mask[static_cast<std::size_t>(word)];
    if (bits == 0xFFFFFFFFu) continue;
    const Index end = (std::min)(own.end, word * 32 + 32);
    for (Index token = (std::max)(own.begin, word * 32); token < end; ++token) {
      C& logit = logits[token - own.begin];
      logit = (bits >> (token % 32) & 1u) != 0 ? logit : -std::numeric_limits<C>::infinity();
    }
  }
}

/// Runs a stage, where it looks at single tokens, on those of `own`, where the logits begin.
template <typename C>
void adjust_tokens(C* logits, const ShardRange& own, const problem::RowParams& params,
                   SamplingStage stage, int& bias_stages, LogitChanges<C>& changes) {
  const auto is_own = [&](Index token) { return token >= own.begin && token < own.end; };
  if (stage == SamplingStage::penalties) {
    changes.start(most_changes(params, own.size()));
    changes.penalize(logits, own, params, params.prompt_tokens, params.output_tokens);
    for (Index i = 0; i < changes.size; ++i) logits[changes.list[i].token] = changes.list[i].value;
  }
  if (stage == SamplingStage::token_mask) apply_token_mask(logits, own, params.token_mask);
  if (stage == SamplingStage::logit_bias)
    for (const LogitBias& bias : problem::biases_of_stage(params, bias_stages++))
      if (is_own(bias.token)) {
        C& logit = logits[bias.token - own.begin];
        logit = static_cast<C>(static_cast<double>(logit) + static_cast<double>(bias.bias));
      }
  if (stage == SamplingStage::forced_tokens) {
    std::fill(logits, logits + own.size(), -std::numeric_limits<C>::infinity());
    if (is_own(params.forced_token)) logits[params.forced_token - own.begin] = 0;
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

/// Classifier-free guidance by another row of the batch, from the logs of the sums of exponentials
/// of both.
template <typename T, typename C>
void apply_guidance(C* logits, Index count, const T* without, double scale, double log_sum,
                    double log_sum_without) {
  for (Index t = 0; t < count; ++t)
    logits[t] = static_cast<C>(problem::guided_logit(
        static_cast<double>(logits[t]) - log_sum,
        static_cast<double>(static_cast<C>(without[t])) - log_sum_without, scale));
}

/// Copies row r to scratch and runs all stages that change logits there.
template <typename Isa, typename T, typename C>
void adjust_logits(const problem::Sampling<T>& p, Index r, const SamplingScratch<C>& scratch) {
  const problem::RowParams& params = p.params_of(r);
  C* const adjusted = scratch.adjusted;
  convert_line<simd::Vec<C, Isa>>(p.logits + r * p.vocab, adjusted, p.vocab);
  int bias_stages = 0;
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::guidance) {
      const T* const without = p.logits + params.guidance_row * p.vocab;
      apply_guidance(adjusted, p.vocab, without, params.guidance_scale,
                     log_total<Isa>(adjusted, p.vocab, scratch),
                     log_total<Isa>(without, p.vocab, scratch));
    }
    if (stage == SamplingStage::penalties && params.log_probability_penalties)
      subtract(adjusted, p.vocab, log_total<Isa>(adjusted, p.vocab, scratch));
    if (stage == SamplingStage::function)
      p.function(r, 0, {adjusted, static_cast<std::size_t>(p.vocab)});
    adjust_tokens(adjusted, {0, p.vocab}, params, stage, bias_stages, *scratch.changes);
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
