/// \file
/// What a caller says about sampling: the parameters of one row, and how a call takes those and the
/// random numbers of many. `sampling.h` is the manual.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "../core/philox.h"
#include "../core/values.h"
#include "../problem/sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The value of top_k that keeps every token.
inline constexpr Index kKeepAllTokens = (std::numeric_limits<Index>::max)();

/// Hugging Face transformers 5 (generation/utils.py, _get_logits_processor); what it lacks comes
/// last of its kind.
inline constexpr SamplingOrder kHuggingFaceOrder{
    SamplingStage::guidance,   SamplingStage::sequence_bias,
    SamplingStage::penalties,  SamplingStage::no_repeat_ngram,
    SamplingStage::bad_words,  SamplingStage::logit_bias,
    SamplingStage::dry,        SamplingStage::min_tokens,
    SamplingStage::token_mask, SamplingStage::forced_tokens,
    SamplingStage::function,   SamplingStage::temperature,
    SamplingStage::top_h,      SamplingStage::top_k,
    SamplingStage::top_p,      SamplingStage::min_p,
    SamplingStage::typical_p,  SamplingStage::epsilon_cutoff,
    SamplingStage::eta_cutoff, SamplingStage::top_n_sigma,
    SamplingStage::xtc,        SamplingStage::mirostat};
/// vLLM's engine version 1 (v1/sample/sampler.py).
inline constexpr SamplingOrder kVllmOrder{
    SamplingStage::guidance,        SamplingStage::token_mask,  SamplingStage::bad_words,
    SamplingStage::min_tokens,      SamplingStage::logit_bias,  SamplingStage::sequence_bias,
    SamplingStage::no_repeat_ngram, SamplingStage::penalties,   SamplingStage::dry,
    SamplingStage::forced_tokens,   SamplingStage::function,    SamplingStage::temperature,
    SamplingStage::min_p,           SamplingStage::top_k,       SamplingStage::top_p,
    SamplingStage::typical_p,       SamplingStage::top_n_sigma, SamplingStage::top_h,
    SamplingStage::epsilon_cutoff,  SamplingStage::eta_cutoff,  SamplingStage::xtc,
    SamplingStage::mirostat};
/// llama.cpp (common/sampling.cpp and the default chain of common/common.h): the filters see the
/// distribution at temperature 1, mirostat that at the temperature.
inline constexpr SamplingOrder kLlamaCppOrder{
    SamplingStage::guidance,        SamplingStage::token_mask,
    SamplingStage::logit_bias,      SamplingStage::min_tokens,
    SamplingStage::sequence_bias,   SamplingStage::bad_words,
    SamplingStage::penalties,       SamplingStage::dry,
    SamplingStage::no_repeat_ngram, SamplingStage::forced_tokens,
    SamplingStage::function,        SamplingStage::top_n_sigma,
    SamplingStage::top_k,           SamplingStage::typical_p,
    SamplingStage::top_p,           SamplingStage::min_p,
    SamplingStage::epsilon_cutoff,  SamplingStage::eta_cutoff,
    SamplingStage::top_h,           SamplingStage::xtc,
    SamplingStage::temperature,     SamplingStage::mirostat};

/// A sequence of tokens whose last one gets a bias where the tokens before it end the history.
struct SequenceBias {
  std::vector<std::int32_t> tokens;
  float bias;
};

/// Number `position` of the output tokens, the first being 0, is `token`.
struct ForcedToken {
  Index position;
  std::int32_t token;
};

/// What a request keeps between its tokens for SamplingParams::mirostat.
struct MirostatState {
  double target = 5;       ///< surprise wanted, in bits (tau)
  double rate = .1;        ///< of learning (eta)
  double mu = 2 * target;  ///< what SamplingParams::mirostat_mu is to be for the next token

  /// Of a drawn token's `processed_log_probabilities` (sample_with_log_probabilities).
  void update(double log_probability) {
    if (std::isfinite(log_probability)) mu -= rate * (-log_probability / std::log(2.0) - target);
  }
};

struct SamplingParams {
  double temperature = 1;  ///< logits are divided by it; 0 is greedy
  /// number of most likely tokens kept; 0, like vocab or more, keeps all
  Index top_k = kKeepAllTokens;
  /// probability of the smallest set of most likely tokens kept; <= 0 keeps one, >= 1 all
  double top_p = 1;
  double min_p = 0;  ///< least probability kept, in units of the best token's; above 1 as 1
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

  /// top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff and xtc leave so many, if there are
  Index min_tokens_to_keep = 1;
  double top_n_sigma = 0;        ///< deviations below the largest logit; 0 keeps all
  double xtc_probability = 0;    ///< of excluding the top choices of a token, from 0 to 1
  double xtc_threshold = .1;     ///< least probability of a top choice
  double epsilon_cutoff = 0;     ///< least probability kept
  double eta_cutoff = 0;         ///< the same, less where the entropy is large
  double top_h = 1;              ///< share of the entropy kept; 1 keeps all
  double dynatemp_range = 0;     ///< temperature is from temperature - range to temperature + range
  double dynatemp_exponent = 1;  ///< of the entropy's share of its maximum
  int mirostat = 0;              ///< version 1 or 2; 0 is none
  double mirostat_mu = 10;       ///< bits, see MirostatState

  // Of the history: prompt_tokens and, after them, output_tokens.
  Index penalty_window = 0;  ///< penalties see so many tokens, the last ones; 0: all
  /// penalties are those of log-probabilities, the log-softmax of the logits
  bool penalize_log_probabilities = false;
  double dry_multiplier = 0, dry_base = 1.75;
  Index dry_allowed_length = 2;
  Index dry_window = 0;                                      ///< the last tokens; 0: all
  std::vector<std::vector<std::int32_t>> dry_breakers = {};  ///< repetition ends at these sequences
  Index no_repeat_ngram = 0;                                 ///< n: no n tokens twice; 0: none
  std::vector<std::vector<std::int32_t>> bad_words = {};     ///< sequences that never come
  std::vector<SequenceBias> sequence_bias = {};
  Index min_tokens = 0;  ///< stop_tokens are banned from fewer output tokens on
  Values<std::int32_t> stop_tokens = {};
  Values<ForcedToken> forced_tokens = {};
  double guidance_scale = 1;
  Index guidance_row = -1;  ///< row of the logits that knows nothing of the prompt; -1: none
};

namespace detail {

/// Parameters of a call: one set for all rows, or a span, vector or array of them, one per row.
template <typename P>
concept SamplingSets = std::same_as<P, SamplingParams> ||
                       std::convertible_to<const P&, std::span<const SamplingParams>>;
struct SamplingParamsView {
  std::span<const SamplingParams> sets;
  bool per_row;
  template <SamplingSets P>
  SamplingParamsView(const P& params) : per_row(!std::same_as<P, SamplingParams>) {
    if constexpr (std::same_as<P, SamplingParams>)
      sets = {&params, 1};
    else
      sets = params;
  }
};

}  // namespace detail

/// The random numbers of a call: one generator for all rows (row r draws at row r of its counter),
/// or one generator per row (each row draws at row 0 of its own, so that a request's draws follow
/// it from batch to batch). Made implicitly from a Philox, a span, vector or array of them; it
/// refers to them (and owns a Philox that is a temporary), and the call advances each by one.
class Generators {
 public:
  Generators(Philox& shared) : data_(&shared), size_(1), per_row_(false) {}
  Generators(Philox&& shared) : owned_(shared), data_(nullptr), size_(1), per_row_(false) {}
  Generators(std::span<Philox> one_per_row)
      : data_(one_per_row.data()), size_(static_cast<Index>(one_per_row.size())), per_row_(true) {}
  template <typename Range>
    requires(std::is_convertible_v<Range&, std::span<Philox>> &&
             !std::is_same_v<std::remove_cvref_t<Range>, Generators> &&
             !std::is_same_v<std::remove_cvref_t<Range>, std::span<Philox>>)
  Generators(Range& one_per_row) : Generators(std::span<Philox>(one_per_row)) {}

  const Philox* data() const { return data_ != nullptr || per_row_ ? data_ : &owned_; }
  Index size() const { return size_; }
  bool per_row() const { return per_row_; }
  void advance() {
    Philox* const first = data_ != nullptr || per_row_ ? data_ : &owned_;
    for (Index i = 0; i < size_; ++i) first[i].advance();
  }

 private:
  Philox owned_;
  Philox* data_;
  Index size_;
  bool per_row_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
