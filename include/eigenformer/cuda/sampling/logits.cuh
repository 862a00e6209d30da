/// \file
/// Guidance, penalties, biases, mask, forced tokens and the caller's function, by a block: the row
/// is copied to scratch in the compute type and changed there, as in cpu/sampling/logits.h. Each
/// number of a stage of ours is computed in double and rounded once.
#pragma once

#include "row.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// read(token) and write(token) for the tokens of a list, 256 at a time, so that a token that comes
/// twice is changed once: the reads of 256 are over before their writes begin, and a token's writes
/// all write the same.
template <typename Block, typename Read, typename Write>
EIGENFORMER_DEVICE void for_each_token(Block& block, std::span<const std::int32_t> tokens,
                                       Read read, Write write) {
  const auto count = static_cast<Index>(tokens.size());
  for (Index first = 0; first < count; first += block.size()) {
    const Index i = first + block.thread();
    const bool mine = i < count;
    const std::int32_t token = mine ? tokens[static_cast<std::size_t>(i)] : 0;
    if (mine) read(token);
    block.barrier();
    if (mine) write(token);
    block.barrier();
  }
}

/// Changes every distinct token of the history once. `counts` is (vocab) scratch.
template <typename Block, typename C>
EIGENFORMER_DEVICE void apply_penalties(Block& block, C* logits, const problem::RowParams& params,
                                        std::int32_t* counts) {
  constexpr std::int32_t done = -1;
  const auto nothing = [](std::int32_t) {};
  const auto clear = [&](std::int32_t token) { counts[token] = 0; };
  for_each_token(block, params.output_tokens, nothing, clear);
  for_each_token(block, params.prompt_tokens, nothing, clear);
  for_each_token(block, params.output_tokens, nothing,
                 [&](std::int32_t token) { block.atomic_add(counts + token, 1); });
  std::int32_t occurrences = done;
  C changed = 0;
  const auto read = [&](std::int32_t token) {
    occurrences = counts[token];
    if (occurrences != done) changed = problem::penalized_logit(logits[token], occurrences, params);
  };
  const auto write = [&](std::int32_t token) {
    if (occurrences == done) return;
    logits[token] = changed;
    counts[token] = done;
  };
  for_each_token(block, params.output_tokens, read, write);
  for_each_token(block, params.prompt_tokens, read, write);
}

/// Biases of one token add up in the order of the list: the first of them among 256 does it for
/// all.
template <typename Block, typename C>
EIGENFORMER_DEVICE void apply_bias(Block& block, C* logits, std::span<const LogitBias> biases) {
  const auto count = static_cast<Index>(biases.size());
  const LogitBias* const list = biases.data();
  for (Index first = 0; first < count; first += block.size()) {
    const Index own = first + block.thread();
    const Index end = first + block.size() < count ? first + block.size() : count;
    Index earlier = first;
    while (earlier < own && own < end && list[earlier].token != list[own].token) ++earlier;
    if (own < end && earlier == own) {
      C logit = logits[list[own].token];
      for (Index i = own; i < end; ++i)
        if (list[i].token == list[own].token)
          logit = static_cast<C>(static_cast<double>(logit) + static_cast<double>(list[i].bias));
      logits[list[own].token] = logit;
    }
    block.barrier();
  }
}

template <typename Block, typename C>
EIGENFORMER_DEVICE void apply_token_mask(Block& block, C* logits, Index vocab,
                                         std::span<const std::uint32_t> mask) {
  const std::uint32_t* const words = mask.data();
  for (Index t = block.thread(); t < vocab; t += block.size())
    if ((words[t / 32] >> (t % 32) & 1u) == 0) logits[t] = -std::numeric_limits<C>::infinity();
  block.barrier();
}

/// Log of the sum of exponentials of a row; NaN where the row is bad.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE double log_total(Block& block, const Arrays& arrays, SamplingRow<T> row) {
  if (scan_row(block, arrays, row) != SampleStatus::ok)
    return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(row.band.hi) +
         std::log(sum_in_order(block, arrays.sums, row.vocab, weights_of(row)));
}

/// Copies row r to `adjusted` and runs the stages that change logits, in the order of the
/// parameters.
template <typename Block, typename Arrays, typename T, typename C, typename Function>
EIGENFORMER_DEVICE void adjust_logits(Block& block, const Arrays& arrays,
                                      const problem::Sampling<T>& p, Index r, C* adjusted,
                                      std::int32_t* counts, const Function& function) {
  const problem::RowParams& params = p.params_of(r);
  const T* const logits = p.logits + r * p.vocab;
  const auto for_each = [&](auto change) {
    for (Index t = block.thread(); t < p.vocab; t += block.size()) adjusted[t] = change(t);
    block.barrier();
  };
  const auto total_of = [&](const T* of, const C* changed) {
    return log_total(block, arrays, SamplingRow<T>{of, changed, p.vocab, {}, 1.0});
  };
  for_each([&](Index t) { return static_cast<C>(logits[t]); });
  int bias_stages = 0;
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::guidance) {
      const T* const without = p.logits + params.guidance_row * p.vocab;
      const double total = total_of(logits, adjusted), total_without = total_of(without, nullptr);
      for_each([&](Index t) {
        return static_cast<C>(
            problem::guided_logit(static_cast<double>(adjusted[t]) - total,
                                  static_cast<double>(static_cast<C>(without[t])) - total_without,
                                  params.guidance_scale));
      });
    }
    if (stage == SamplingStage::penalties) {
      if (params.log_probability_penalties) {
        const double total = total_of(logits, adjusted);
        for_each([&](Index t) { return static_cast<C>(static_cast<double>(adjusted[t]) - total); });
      }
      apply_penalties(block, adjusted, params, counts);
    }
    if (stage == SamplingStage::token_mask)
      apply_token_mask(block, adjusted, p.vocab, params.token_mask);
    if (stage == SamplingStage::logit_bias)
      apply_bias(block, adjusted, problem::biases_of_stage(params, bias_stages++));
    if (stage == SamplingStage::forced_tokens)
      for_each([&](Index t) {
        return t == params.forced_token ? C(0) : -std::numeric_limits<C>::infinity();
      });
    if constexpr (problem::is_logit_function<Function>)
      if (stage == SamplingStage::function)
        for_each([&](Index t) { return static_cast<C>(function(r, t, adjusted[t])); });
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
