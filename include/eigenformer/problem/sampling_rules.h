/// \file
/// The rules of sampling that every backend shares: the tokens in play, their order, where a set of
/// them ends, what penalties do to a logit, and what is no probability.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/compiler.h"
#include "sampling_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// The tokens still in play.
template <typename C>
struct Band {
  C hi;                // no logit in play is larger, and one is equal
  C lo;                // none is smaller; never -infinity
  Index lo_end;        // tokens equal to lo are in play below this index
  Index hi_begin = 0;  // tokens equal to hi from this index on

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool contains(C logit, Index token) const {
    return (logit < hi || (logit == hi && token >= hi_begin)) &&
           (logit > lo || (logit == lo && token < lo_end));
  }
};

/// Monotone integer image of a logit: larger logits have larger keys, and -0 has the key of +0.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE std::uint32_t order_key(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  // no branch: the sign of a logit is a coin toss
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE std::uint64_t order_key(double x) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x + 0.0);
  return bits ^ ((std::uint64_t{0} - (bits >> 63)) | std::uint64_t{1} << 63);
}

/// The number of which order_key makes this key.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE float number_of_key(std::uint32_t key) {
  return std::bit_cast<float>(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double number_of_key(std::uint64_t key) {
  return std::bit_cast<double>(key ^ (key >> 63 != 0 ? std::uint64_t{1} << 63 : ~std::uint64_t{0}));
}

/// How many of `equals` tokens that weigh `each` it takes, after others of weight `above`, to reach
/// `target`, which all of them do: at least one.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index equals_taken(double above, double each,
                                                              Index equals, double target) {
  const double needed = each > 0 ? std::ceil((target - above) / each) : 1.0;
  Index taken = needed < 1                             ? 1
                : needed > static_cast<double>(equals) ? equals
                                                       : static_cast<Index>(needed);
  // the quotient is rounded
  while (taken > 1 && above + static_cast<double>(taken - 1) * each >= target) --taken;
  while (taken < equals && above + static_cast<double>(taken) * each < target) ++taken;
  return taken;
}

/// How many tokens mirostat 1 keeps of `vocab` (Basu et al., "Mirostat", 2021, algorithm 1), from
/// the Zipf exponent that sums over the best tokens estimate, and `mu` in bits.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index mirostat_count(double sum_products,
                                                                double sum_squares, double mu,
                                                                Index vocab) {
  if (!(sum_squares > 0)) return 1;  // of one token
  const double exponent = sum_products / sum_squares, excess = exponent - 1,
               n = static_cast<double>(vocab);
  const double factor = excess == 0 ? 1 / std::log(n) : excess / (1 - std::pow(n, -excess));
  const double count = std::pow(factor * std::exp2(mu), 1 / exponent);
  return count < 1 ? 1 : count < n ? static_cast<Index>(count) : vocab;
}

/// The tokens that it estimates the exponent by.
inline constexpr Index kMirostatTokens = 100;
/// The count from the logits of the best `n` tokens, best first.
template <typename C>
EIGENFORMER_INLINE Index mirostat_count(const C* best, Index n, double inverse_temperature,
                                        double mu, Index vocab) {
  double products = 0, squares = 0;
  for (Index i = 0; i + 1 < n; ++i) {
    const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    products +=
        t * (static_cast<double>(best[i]) - static_cast<double>(best[i + 1])) * inverse_temperature;
    squares += t * t;
  }
  return mirostat_count(products, squares, mu, vocab);
}

/// The temperature that llama.cpp makes of the entropy of `count` > 1 tokens.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double dynamic_temperature(const RowParams& params,
                                                                      double entropy, Index count) {
  const double least = params.temperature > params.dynatemp_range
                           ? params.temperature - params.dynatemp_range
                           : 0.0,
               share = entropy > 0 ? entropy / std::log(static_cast<double>(count)) : 0.0;
  return std::fma(params.temperature + params.dynatemp_range - least,
                  std::pow(share, params.dynatemp_exponent), least);
}

/// Of a temperature above 0. Finite, so that 0 times it is 0.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double inverse_temperature(double temperature) {
  const double inverse = 1.0 / temperature;
  return inverse < 1e300 ? inverse : 1e300;
}

EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE SampleStatus status_of_probability(double p) {
  if (p >= 0)
    return p < std::numeric_limits<double>::infinity() ? SampleStatus::ok
                                                       : SampleStatus::positive_infinity;
  return p < 0 ? SampleStatus::negative : SampleStatus::nan;
}

EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool has_penalties(const RowParams& params) {
  const bool repetition = params.repetition_penalty != 1.0 &&
                          !(params.prompt_tokens.empty() && params.output_tokens.empty());
  return repetition || ((params.frequency_penalty != 0.0 || params.presence_penalty != 0.0) &&
                        !params.output_tokens.empty());
}

/// Whether a stage of the order changes logits: those stand first.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool adjusts_logits(const RowParams& params) {
  return params.order[0] != SamplingStage::none && params.order[0] <= SamplingStage::function;
}

/// Whether a stage changes a logit by what all others are.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool looks_at_all_logits(const RowParams& params) {
  for (const SamplingStage stage : params.order)
    if (stage == SamplingStage::guidance || stage == SamplingStage::function ||
        (stage == SamplingStage::penalties && params.log_probability_penalties))
      return true;
  return false;
}

/// Whether a stage changes the logits of all tokens, and not of those in a list or mask alone.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool adjusts_all_logits(const RowParams& params) {
  for (const SamplingStage stage : params.order)
    if (stage == SamplingStage::forced_tokens) return true;
  return looks_at_all_logits(params);
}

/// The list of the logit_bias stage that comes after `earlier` others.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE std::span<const LogitBias> biases_of_stage(
    const RowParams& params, int earlier) {
  const auto index = static_cast<std::size_t>(earlier);
  const auto begin = static_cast<std::size_t>(earlier == 0 ? 0 : params.bias_ends[index - 1]);
  const auto end = static_cast<std::size_t>(params.bias_ends[index]);
  return {params.logit_bias.data() + begin, end - begin};
}

/// The logit that classifier-free guidance makes of a token's log-probabilities with and without
/// the prompt.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double guided_logit(double with, double without,
                                                               double scale) {
  constexpr double least = std::numeric_limits<double>::lowest();
  if (with < least || without < least) return -std::numeric_limits<double>::infinity();
  return std::fma(scale, with - without, without);
}

/// The logit of a token that occurs in the history, `occurrences` times of them in the output.
/// -infinity stays what it is.
template <typename C>
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE C penalized_logit(C logit, std::int32_t occurrences,
                                                             const RowParams& params) {
  if (logit < std::numeric_limits<C>::lowest()) return logit;
  double x = static_cast<double>(logit);
  // towards less likely on both sides of 0; both are computed, for the sign is a coin toss
  const double product = x * params.repetition_penalty, quotient = x / params.repetition_penalty;
  x = x < 0 ? product : quotient;
  // fused by name: a compiler would fuse it on one device and not on the other
  if (occurrences > 0)
    x -= std::fma(params.frequency_penalty, static_cast<double>(occurrences),
                  params.presence_penalty);
  return static_cast<C>(x);
}

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
