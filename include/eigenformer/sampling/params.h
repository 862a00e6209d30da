/// \file
/// What a caller says about sampling: the parameters of one row, and how a call takes those and the
/// random numbers of many. `sampling.h` is the manual.
#pragma once

#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

#include "../core/check.h"
#include "../core/philox.h"
#include "../core/values.h"
#include "../core/workspace.h"
#include "../problem/sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The value of top_k that keeps every token.
inline constexpr Index kKeepAllTokens = (std::numeric_limits<Index>::max)();

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

inline void check_sampling_order(std::string_view name, const SamplingOrder& order) {
  unsigned seen = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto stage = static_cast<unsigned>(order[i]);
    require_that(stage < order.size() && (seen >> stage & 1u) == 0, name, "order has stage ", stage,
                 " at place ", i, ", expected every stage once");
    require_that((stage <= static_cast<unsigned>(SamplingStage::token_mask)) == (i < 3), name,
                 "order has stage ", stage, " at place ", i,
                 ", expected penalties, logit_bias and token_mask in the first three places");
    seen |= 1u << stage;
  }
}

inline void check_tokens(std::string_view name, std::string_view argument,
                         std::span<const std::int32_t> tokens, Index vocab) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    require_that(tokens[i] >= 0 && tokens[i] < vocab, name, argument, "[", i, "] is ", tokens[i],
                 ", expected a token in [0, ", vocab, ")");
}

/// O(1) but for the lists that come with the parameters.
inline void check_sampling_params(std::string_view name, const SamplingParams& p, Index vocab) {
  require_that(std::isfinite(p.temperature) && p.temperature >= 0, name, "temperature is ",
               p.temperature, ", expected 0 (greedy) or more");
  require_that(p.top_k >= 0, name, "top_k is ", p.top_k, ", expected 0 (all tokens) or more");
  require_that(!std::isnan(p.top_p), name, "top_p is NaN");
  require_that(p.min_p >= 0 && p.min_p <= 1, name, "min_p is ", p.min_p, ", expected 0 to 1");
  require_that(!std::isnan(p.typical_p), name, "typical_p is NaN");
  require_that(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, name,
               "repetition_penalty is ", p.repetition_penalty,
               ", expected a finite number above 0");
  require_that(std::isfinite(p.frequency_penalty), name, "frequency_penalty is ",
               p.frequency_penalty, ", expected a finite number");
  require_that(std::isfinite(p.presence_penalty), name, "presence_penalty is ", p.presence_penalty,
               ", expected a finite number");
  check_sampling_order(name, p.order);
  check_tokens(name, "prompt_tokens", p.prompt_tokens, vocab);
  check_tokens(name, "output_tokens", p.output_tokens, vocab);
  for (std::size_t i = 0; i < p.logit_bias.size(); ++i) {
    const LogitBias& bias = p.logit_bias[i];
    require_that(bias.token >= 0 && bias.token < vocab, name, "logit_bias[", i, "] has token ",
                 bias.token, ", expected a token in [0, ", vocab, ")");
    require_that(bias.bias < std::numeric_limits<float>::infinity(), name, "logit_bias[", i,
                 "] is ", bias.bias, ", expected a finite number or -infinity");
  }
  const Index words = static_cast<Index>(p.token_mask.size());
  require_that(words == 0 || words == (vocab + 31) / 32, name, "token_mask has ", words,
               " words, expected ", (vocab + 31) / 32, " (a bit for each of ", vocab,
               " tokens) or none");
}

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

inline void check_all_params(std::string_view name, const SamplingParamsView& params, Index batch,
                             Index vocab) {
  if (!params.per_row) return check_sampling_params(name, params.sets[0], vocab);
  require_that(static_cast<Index>(params.sets.size()) == batch, name, "params has ",
               params.sets.size(), " sets, logits has ", batch, " rows");
  for (std::size_t r = 0; r < params.sets.size(); ++r)
    check_sampling_params(join(name, "params of row ", r), params.sets[r], vocab);
}

/// The parameters as kernels take them, one row or all, in the frame.
inline const problem::RowParams* row_params(const SamplingParamsView& params,
                                            Workspace::Frame& frame) {
  const auto rows = frame.take<problem::RowParams>(static_cast<Index>(params.sets.size()));
  problem::RowParams* row = rows;
  for (const SamplingParams& p : params.sets)
    *row++ = {p.temperature,
              p.top_k == 0 ? kKeepAllTokens : p.top_k,
              p.top_p,
              p.min_p,
              p.typical_p,
              p.repetition_penalty,
              p.frequency_penalty,
              p.presence_penalty,
              p.order,
              p.top_k_ties,
              p.prompt_tokens,
              p.output_tokens,
              p.logit_bias,
              p.token_mask};
  return rows;
}

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
