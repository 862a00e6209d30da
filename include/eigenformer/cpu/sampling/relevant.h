/// \file
/// Which tokens of a history can matter. Penalties that only lower logits, before a filter that
/// keeps the best k or what is near the best, need not look at tokens that lie too low as they are:
/// of a thousand tokens a few are left, found by one comparison each.
#pragma once

#include "filters.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What the first filter keeps at most: the best `count` tokens, and those whose logits are less
/// than `below` under the best. count 0: it may look at all tokens.
struct FirstCut {
  Index count = 0;
  double below = 0;
};

inline FirstCut first_cut(const problem::RowParams& params) {
  double inverse = 1;
  for (const SamplingStage stage : params.order) {
    if (stage <= SamplingStage::function) continue;
    if (stage == SamplingStage::temperature && params.dynatemp_range == 0) {
      if (params.temperature == 0) return {1, 0};
      inverse = problem::inverse_temperature(params.temperature);
    } else if (stage == SamplingStage::top_k) {
      return {params.top_k, 0};
    } else if (stage == SamplingStage::min_p && params.min_tokens_to_keep == 1 &&
               params.min_p > 0) {
      // and the tokens whose weight rounds to min_p
      return {1, (1e-9 - std::log((std::min)(params.min_p, 1.0))) / inverse};
    } else {
      return {};
    }
  }
  return {};
}

/// Whether penalties and biases raise no logit.
inline bool only_lowers(const problem::RowParams& params) {
  return params.repetition_penalty >= 1 && params.frequency_penalty >= 0 &&
         params.presence_penalty >= 0 &&
         std::all_of(params.logit_bias.begin(), params.logit_bias.end(),
                     [](const LogitBias& bias) { return bias.bias <= 0; });
}

struct RelevantHistory {
  std::span<const std::int32_t> prompt, output;
  Index size() const { return static_cast<Index>(prompt.size() + output.size()); }
};

/// The tokens of the history whose penalties can matter to a scanned row, in `memory`, which has
/// room for `room` tokens; the whole history where that is not known.
///
/// Of the maxima of blocks, count + more reach some logit, and so do as many tokens. Where no more
/// than `more` of these may fall, `count` of them stay: what the filter keeps lies at that logit or
/// above it, or `below` under it.
template <typename Isa, typename T>
RelevantHistory relevant_history(SamplingRow<T>& row, const problem::RowParams& params,
                                 std::int32_t* memory, Index room) {
  using C = compute_type<T>;
  const RelevantHistory all{params.prompt_tokens, params.output_tokens};
  const FirstCut cut = first_cut(params);
  constexpr Index few = 64;
  if (cut.count == 0 || !only_lowers(params) || all.size() < few || all.size() > room) return all;
  const auto biases = static_cast<Index>(params.logit_bias.size());
  for (Index more = 16; more <= row.blocks() - cut.count; more *= 4) {
    const C reached = kth_largest_bound<Isa>(row, cut.count + more);
    if (!(reached > row.band.lo)) break;
    const double end = static_cast<double>(reached) - cut.below;
    const C least =
        cut.below == 0 ? reached : static_cast<C>(end - 1e-6 * (std::abs(end) + cut.below));
    Index kept = 0, may_fall = 0;
    const auto keep = [&](std::span<const std::int32_t> tokens) {
      std::int32_t* const first = memory + kept;
      for (const std::int32_t token : tokens) {
        memory[kept] = token;
        kept += static_cast<C>(row.logits[token]) >= least;
      }
      return std::span<const std::int32_t>(first, memory + kept);
    };
    const auto output = keep(all.output), prompt = keep(all.prompt);
    for (Index i = 0; i < kept; ++i) may_fall += static_cast<C>(row.logits[memory[i]]) >= reached;
    if (may_fall + biases <= more) {
      row.reached = reached;
      row.reached_by = cut.count;
      return {prompt, output};
    }
    if (2 * kept > all.size()) break;
  }
  return all;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
