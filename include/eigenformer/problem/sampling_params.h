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

/// One step of the chain from logits to the distribution drawn from. Those up to `function` change
/// logits, the others filter tokens.
enum class SamplingStage : std::uint8_t {
  none,  ///< no step: fills the end of an order
  guidance,
  sequence_bias,
  penalties,
  dry,
  no_repeat_ngram,
  bad_words,
  logit_bias,
  min_tokens,
  token_mask,
  forced_tokens,
  function,
  temperature,
  top_k,
  top_p,
  min_p,
  typical_p,
  top_n_sigma,
  xtc,
  epsilon_cutoff,
  eta_cutoff,
  top_h,
  mirostat
};

/// Any stages, each at most once, those that change logits first: `{SamplingStage::penalties,
/// SamplingStage::temperature, SamplingStage::top_k}`.
using SamplingOrder = std::array<SamplingStage, 24>;

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

/// A stage beside those of callers: the tokens in play are what filters left before.
inline constexpr SamplingStage kFiltered{static_cast<std::uint8_t>(SamplingStage::mirostat) + 1};

/// SamplingParams, with lists that are the caller's or the call's.
struct RowParams {
  double temperature;
  Index top_k;  // vocab or more keeps all
  double top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty;
  // What is to be done, and no more: a stage that changes nothing is left out. All stages that add
  // to logits (sequence_bias, dry, no_repeat_ngram, bad_words, logit_bias, min_tokens) are
  // logit_bias here, neighbours one of them.
  SamplingOrder order;
  TopKTies top_k_ties;
  std::span<const std::int32_t> prompt_tokens, output_tokens;  // those that penalties see
  std::span<const LogitBias> logit_bias;
  std::span<const std::uint32_t> token_mask;
  // Number i of the logit_bias stages in the order adds [bias_ends[i - 1], bias_ends[i]) of the
  // list.
  std::array<std::int32_t, 6> bias_ends;
  bool log_probability_penalties;  // of the log-softmax of the logits
  std::int32_t forced_token;       // -1: none
  Index guidance_row;              // of the same logits
  double guidance_scale;
  Index min_tokens_to_keep;
  double top_n_sigma, xtc_probability, xtc_threshold, epsilon_cutoff, eta_cutoff, top_h;
  double dynatemp_range, dynatemp_exponent;
  std::int32_t mirostat;  // version 1 or 2
  double mirostat_mu;
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
