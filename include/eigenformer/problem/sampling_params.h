/// \file
/// What kernels are told about sampling one row: the parameters of every filter, the order they run
/// in, the tokens that penalties count, logit bias and token mask; and the status a row ends with.
/// The caller's side of it is in sampling/params.h, `sampling.h` is the manual.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// One step of the chain from logits to the distribution drawn from.
enum class SamplingStage : std::uint8_t {
  penalties,
  logit_bias,
  token_mask,
  temperature,
  top_k,
  top_p,
  min_p,
  typical_p
};

/// What top-k does with tokens equal to the k-th largest.
enum class TopKTies : std::uint8_t {
  lowest_index,  ///< exactly k tokens: of equals, those of lowest index
  keep_all       ///< all equals of the k-th, so possibly more than k (Hugging Face, vLLM)
};

/// A number added to the logit of one token; -infinity bans it.
struct LogitBias {
  std::int32_t token;
  float bias;
};

namespace problem {

/// SamplingParams, with lists that are the caller's.
struct RowParams {
  double temperature;
  Index top_k;  // vocab or more keeps all
  double top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty;
  std::array<SamplingStage, 8> order;
  TopKTies top_k_ties;
  std::span<const std::int32_t> prompt_tokens, output_tokens;
  std::span<const LogitBias> logit_bias;
  std::span<const std::uint32_t> token_mask;
};

}  // namespace problem

/// How a row ended. A row that is not ok harms no other.
enum class SampleStatus : std::uint8_t {
  ok,
  nan,                ///< the row holds NaN
  positive_infinity,  ///< the row holds +infinity, as given or after penalties and bias
  no_token,  ///< every logit is -infinity, as given or after bias and mask; every probability is 0
  negative   ///< the row holds a negative probability
};

}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
