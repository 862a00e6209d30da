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
  C hi;          // the largest logit in play
  C lo;          // the smallest; never -infinity
  Index lo_end;  // tokens equal to lo are in play below this index

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool contains(C logit, Index token) const {
    return logit <= hi && (logit > lo || (logit == lo && token < lo_end));
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

EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool adjusts_logits(const RowParams& params) {
  return has_penalties(params) || !params.logit_bias.empty() || !params.token_mask.empty();
}

/// The logit of a token that occurs in the history, `occurrences` times of them in the output.
/// -infinity stays what it is.
template <typename C>
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE C penalized_logit(C logit, std::int32_t occurrences,
                                                             const RowParams& params) {
  if (logit < std::numeric_limits<C>::lowest()) return logit;
  double x = static_cast<double>(logit);
  // towards less likely on both sides of 0
  x = x < 0 ? x * params.repetition_penalty : x / params.repetition_penalty;
  // fused by name: a compiler would fuse it on one device and not on the other
  if (occurrences > 0)
    x -= std::fma(params.frequency_penalty, static_cast<double>(occurrences),
                  params.presence_penalty);
  return static_cast<C>(x);
}

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
