/// \file
/// What a caller says about sampling one row: the parameters of every filter, the order they run
/// in, the tokens that penalties count, logit bias and token mask; and the status a row ends with.
/// `sampling.h` is the manual.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "../core/philox.h"
#include "../core/tensor.h"
#include "../core/values.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The value of top_k that keeps every token.
inline constexpr Index kKeepAllTokens = (std::numeric_limits<Index>::max)();

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

/// Every stage once; penalties, logit bias and token mask, which change logits, hold the first
/// three places in any order. A stage whose parameter has its default value does nothing.
using SamplingOrder = std::array<SamplingStage, 8>;

/// Hugging Face transformers.
inline constexpr SamplingOrder kHuggingFaceOrder{
    SamplingStage::penalties,   SamplingStage::logit_bias, SamplingStage::token_mask,
    SamplingStage::temperature, SamplingStage::top_k,      SamplingStage::top_p,
    SamplingStage::min_p,       SamplingStage::typical_p};
/// vLLM's engine version 1; typical_p, which vLLM lacks, comes last.
inline constexpr SamplingOrder kVllmOrder{SamplingStage::token_mask, SamplingStage::logit_bias,
                                          SamplingStage::penalties,  SamplingStage::temperature,
                                          SamplingStage::min_p,      SamplingStage::top_k,
                                          SamplingStage::top_p,      SamplingStage::typical_p};
/// llama.cpp: the filters see the distribution at temperature 1.
inline constexpr SamplingOrder kLlamaCppOrder{
    SamplingStage::token_mask, SamplingStage::logit_bias, SamplingStage::penalties,
    SamplingStage::top_k,      SamplingStage::typical_p,  SamplingStage::top_p,
    SamplingStage::min_p,      SamplingStage::temperature};

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

struct SamplingParams {
  double temperature = 1;  ///< logits are divided by it; 0 is greedy
  /// number of most likely tokens kept; 0, like vocab or more, keeps all
  Index top_k = kKeepAllTokens;
  /// probability of the smallest set of most likely tokens kept; <= 0 keeps one, >= 1 all
  double top_p = 1;
  double min_p = 0;  ///< least probability kept, in units of the best token's, from 0 to 1
  /// probability of the smallest set of most typical tokens kept; <= 0 the most typical, >= 1 all
  double typical_p = 1;
  /// positive logits divided by it, others multiplied, for tokens of prompt_tokens and
  /// output_tokens
  double repetition_penalty = 1;
  double frequency_penalty = 0;  ///< subtracted once for each occurrence in output_tokens
  double presence_penalty = 0;   ///< subtracted from tokens that occur in output_tokens
  SamplingOrder order = kHuggingFaceOrder;
  TopKTies top_k_ties = TopKTies::lowest_index;
  // Lists may be containers with a name, which must live as long as the parameters are used, or
  // braced lists and temporaries, which the parameters own (core/values.h).
  Values<std::int32_t> prompt_tokens = {};  ///< without padding: every id counts
  Values<std::int32_t> output_tokens = {};  ///< tokens generated so far
  Values<LogitBias> logit_bias = {};        ///< biases of a token that occurs twice add up
  /// Bit t % 32 of word t / 32 says that token t is allowed, as grammar engines write it;
  /// ceil(vocab / 32) words, or none: all allowed.
  Values<std::uint32_t> token_mask = {};
};

namespace detail {

/// top_k as a number of tokens: 0 says all.
constexpr Index kept_by_top_k(const SamplingParams& params) {
  return params.top_k == 0 ? kKeepAllTokens : params.top_k;
}

}  // namespace detail

/// How a row ended. A row that is not ok harms no other.
enum class SampleStatus : std::uint8_t {
  ok,
  nan,                ///< the row holds NaN
  positive_infinity,  ///< the row holds +infinity, as given or after penalties and bias
  no_token,  ///< every logit is -infinity, as given or after bias and mask; every probability is 0
  negative   ///< the row holds a negative probability
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
