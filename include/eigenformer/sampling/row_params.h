/// \file
/// From SamplingParams to what kernels are told: checks, what the tokens so far ask for
/// (history.h), and an order that holds only the stages that do something.
#pragma once

#include <cstdio>
#include <string_view>

#include "../core/check.h"
#include "../problem/sampling_rules.h"
#include "history.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline constexpr std::array<std::string_view, 23> kStageNames{
    "none",        "guidance",        "sequence_bias", "penalties",
    "dry",         "no_repeat_ngram", "bad_words",     "logit_bias",
    "min_tokens",  "token_mask",      "forced_tokens", "function",
    "temperature", "top_k",           "top_p",         "min_p",
    "typical_p",   "top_n_sigma",     "xtc",           "epsilon_cutoff",
    "eta_cutoff",  "top_h",           "mirostat"};
static_assert(kStageNames.size() == static_cast<std::size_t>(SamplingStage::mirostat) + 1);

/// Whether the parameters of a stage ask for anything.
inline bool asks_for(const SamplingParams& p, SamplingStage stage, Index vocab) {
  switch (stage) {
    case SamplingStage::none:
    case SamplingStage::function:
      return false;  // the call's
    case SamplingStage::guidance:
      return p.guidance_row >= 0 && p.guidance_scale != 1;
    case SamplingStage::sequence_bias:
      return !p.sequence_bias.empty();
    case SamplingStage::penalties:
      return p.repetition_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0;
    case SamplingStage::dry:
      return p.dry_multiplier > 0;
    case SamplingStage::no_repeat_ngram:
      return p.no_repeat_ngram > 0;
    case SamplingStage::bad_words:
      return !p.bad_words.empty();
    case SamplingStage::logit_bias:
      return !p.logit_bias.empty();
    case SamplingStage::min_tokens:
      return p.min_tokens > 0;
    case SamplingStage::token_mask:
      return !p.token_mask.empty();
    case SamplingStage::forced_tokens:
      return !p.forced_tokens.empty();
    case SamplingStage::temperature:
      return p.temperature != 1 || p.dynatemp_range > 0;
    case SamplingStage::top_k:
      return p.top_k > 0 && p.top_k < vocab;
    case SamplingStage::top_p:
      return p.top_p < 1;
    case SamplingStage::min_p:
      return p.min_p > 0;
    case SamplingStage::typical_p:
      return p.typical_p < 1;
    case SamplingStage::top_n_sigma:
      return p.top_n_sigma > 0;
    case SamplingStage::xtc:
      return p.xtc_probability > 0;
    case SamplingStage::epsilon_cutoff:
      return p.epsilon_cutoff > 0;
    case SamplingStage::eta_cutoff:
      return p.eta_cutoff > 0;
    case SamplingStage::top_h:
      return p.top_h < 1;
    case SamplingStage::mirostat:
      return p.mirostat != 0;
  }
  return false;
}

inline void check_sampling_order(std::string_view name, const SamplingParams& p, Index vocab) {
  unsigned seen = 0, filters = 0;
  bool ended = false;
  for (std::size_t i = 0; i < p.order.size(); ++i) {
    const auto stage = static_cast<unsigned>(p.order[i]);
    require_that(stage < kStageNames.size(), name, "order has stage ", stage, " at place ", i,
                 ", expected one of SamplingStage");
    ended = ended || stage == 0;
    if (stage == 0) continue;
    const std::string_view stage_name = kStageNames[stage];
    require_that(!ended, name, "order has stage ", stage_name, " at place ", i, " after none");
    require_that((seen >> stage & 1u) == 0, name, "order has stage ", stage_name, " at place ", i,
                 " again, expected it once");
    seen |= 1u << stage;
    if (p.order[i] > SamplingStage::function) ++filters;
    require_that(filters == 0 || p.order[i] > SamplingStage::function, name, "order has stage ",
                 stage_name, " at place ", i,
                 ", expected it before all filters: it changes logits");
  }
  for (unsigned stage = 1; stage < kStageNames.size(); ++stage)
    require_that(
        (seen >> stage & 1u) != 0 || !asks_for(p, static_cast<SamplingStage>(stage), vocab), name,
        "order has no stage ", kStageNames[stage], ", whose parameters are set");
}

inline void check_token(std::string_view name, std::string_view argument, std::size_t i,
                        std::int32_t token, Index vocab) {
  require_that(token >= 0 && token < vocab, name, argument, "[", i, "] is ", token,
               ", expected a token in [0, ", vocab, ")");
}
inline void check_tokens(std::string_view name, std::string_view argument,
                         std::span<const std::int32_t> tokens, Index vocab) {
  std::int32_t least = 0, most = 0;
  for (const std::int32_t token : tokens) {  // without a branch: a history is long
    least = (std::min)(least, token);
    most = (std::max)(most, token);
  }
  if (least >= 0 && most < vocab) return;
  for (std::size_t i = 0; i < tokens.size(); ++i) check_token(name, argument, i, tokens[i], vocab);
}

inline void check_bias(std::string_view name, std::string_view argument, std::size_t i,
                       float bias) {
  require_that(bias < std::numeric_limits<float>::infinity(), name, argument, "[", i, "] is ", bias,
               ", expected a finite number or -infinity");
}

inline void check_sampling_lists(std::string_view name, const SamplingParams& p, Index vocab) {
  check_tokens(name, "prompt_tokens", p.prompt_tokens, vocab);
  check_tokens(name, "output_tokens", p.output_tokens, vocab);
  check_tokens(name, "stop_tokens", p.stop_tokens, vocab);
  for (std::size_t i = 0; i < p.logit_bias.size(); ++i) {
    const LogitBias& bias = p.logit_bias[i];
    require_that(bias.token >= 0 && bias.token < vocab, name, "logit_bias[", i, "] has token ",
                 bias.token, ", expected a token in [0, ", vocab, ")");
    check_bias(name, "logit_bias", i, bias.bias);
  }
  const auto sequences = [&](std::string_view argument, const auto& all, auto tokens_of) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::vector<std::int32_t>& tokens = tokens_of(all[i]);
      require_that(!tokens.empty(), name, argument, "[", i, "] is empty");
      for (const std::int32_t token : tokens)
        require_that(token >= 0 && token < vocab, name, argument, "[", i, "] has token ", token,
                     ", expected a token in [0, ", vocab, ")");
    }
  };
  const auto itself = [](const auto& tokens) -> const auto& { return tokens; };
  sequences("dry_breakers", p.dry_breakers, itself);
  sequences("bad_words", p.bad_words, itself);
  sequences("sequence_bias", p.sequence_bias,
            [](const SequenceBias& s) -> const auto& { return s.tokens; });
  for (std::size_t i = 0; i < p.sequence_bias.size(); ++i)
    check_bias(name, "sequence_bias", i, p.sequence_bias[i].bias);
  for (std::size_t i = 0; i < p.forced_tokens.size(); ++i)
    check_token(name, "forced_tokens", i, p.forced_tokens[i].token, vocab);
  const Index words = static_cast<Index>(p.token_mask.size());
  require_that(words == 0 || words == (vocab + 31) / 32, name, "token_mask has ", words,
               " words, expected ", (vocab + 31) / 32, " (a bit for each of ", vocab,
               " tokens) or none");
}

/// O(1) but for the lists that come with the parameters.
inline void check_sampling_params(std::string_view name, const SamplingParams& p, Index batch,
                                  Index vocab) {
  const auto expect = [&](bool ok, std::string_view argument, auto value,
                          std::string_view expected) {
    require_that(ok, name, argument, " is ", value, ", expected ", expected);
  };
  const auto at_least = [&](std::string_view argument, auto value, auto least) {
    require_that(value >= least && value - value == 0, name, argument, " is ", value,
                 ", expected a finite number, ", least, " or more");
  };
  const auto finite = [&](std::string_view argument, double value) {
    expect(std::isfinite(value), argument, value, "a finite number");
  };
  const auto number = [&](std::string_view argument, double value) {
    require_that(!std::isnan(value), name, argument, " is NaN");
  };
  const auto share = [&](std::string_view argument, double value) {
    expect(value >= 0 && value <= 1, argument, value, "0 to 1");
  };
  expect(std::isfinite(p.temperature) && p.temperature >= 0, "temperature", p.temperature,
         "0 (greedy) or more");
  expect(p.top_k >= 0, "top_k", p.top_k, "0 (all tokens) or more");
  number("top_p", p.top_p);
  expect(p.min_p >= 0, "min_p", p.min_p, "0 (all tokens) or more");
  number("typical_p", p.typical_p);
  expect(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, "repetition_penalty",
         p.repetition_penalty, "a finite number above 0");
  finite("frequency_penalty", p.frequency_penalty);
  finite("presence_penalty", p.presence_penalty);
  at_least("min_tokens_to_keep", p.min_tokens_to_keep, Index{1});
  number("top_n_sigma", p.top_n_sigma);
  share("xtc_probability", p.xtc_probability);
  expect(p.xtc_threshold > 0, "xtc_threshold", p.xtc_threshold, "a number above 0");
  share("epsilon_cutoff", p.epsilon_cutoff);
  share("eta_cutoff", p.eta_cutoff);
  number("top_h", p.top_h);
  at_least("dynatemp_range", p.dynatemp_range, 0.0);
  finite("dynatemp_exponent", p.dynatemp_exponent);
  expect(p.mirostat >= 0 && p.mirostat <= 2, "mirostat", p.mirostat, "0 (none), 1 or 2");
  finite("mirostat_mu", p.mirostat_mu);
  at_least("penalty_window", p.penalty_window, Index{0});
  at_least("dry_multiplier", p.dry_multiplier, 0.0);
  at_least("dry_base", p.dry_base, 1.0);
  at_least("dry_allowed_length", p.dry_allowed_length, Index{0});
  at_least("dry_window", p.dry_window, Index{0});
  at_least("no_repeat_ngram", p.no_repeat_ngram, Index{0});
  at_least("min_tokens", p.min_tokens, Index{0});
  finite("guidance_scale", p.guidance_scale);
  expect(p.guidance_row >= -1 && p.guidance_row < (std::max)(batch, Index{1}), "guidance_row",
         p.guidance_row, "-1 (none) or a row of the logits");
  require_that(p.guidance_scale == 1 || p.guidance_row >= 0, name, "guidance_scale is ",
               p.guidance_scale, ", but guidance_row names no row");
  check_sampling_lists(name, p, vocab);
  check_sampling_order(name, p, vocab);
}

inline void check_all_params(std::string_view name, const SamplingParamsView& params, Index batch,
                             Index vocab) {
  if (!params.per_row) return check_sampling_params(name, params.sets[0], batch, vocab);
  require_that(static_cast<Index>(params.sets.size()) == batch, name, "params has ",
               params.sets.size(), " sets, logits has ", batch, " rows");
  for (std::size_t r = 0; r < params.sets.size(); ++r) {
    char row_name[100];  // a string would allocate in every call
    std::snprintf(row_name, sizeof(row_name), "%.*s: params of row %zu",
                  static_cast<int>((std::min)(name.size(), std::size_t{60})), name.data(), r);
    check_sampling_params(row_name, params.sets[r], batch, vocab);
  }
}

template <typename F, typename Logits>
concept LogitFunction = requires(const F& f, compute_type<scalar_of<Logits>> logit) {
  { f(Index{}, Index{}, logit) } -> std::convertible_to<compute_type<scalar_of<Logits>>>;
};

inline void require_function_stage(std::string_view name, const SamplingParamsView& params) {
  for (const SamplingParams& p : params.sets)
    require_that(
        std::find(p.order.begin(), p.order.end(), SamplingStage::function) != p.order.end(), name,
        "order has no stage function, but the call has a function");
}

/// What tells a distribution without drawing from it has no number for XTC.
inline void require_no_coin(std::string_view name, const SamplingParamsView& params) {
  for (const SamplingParams& p : params.sets)
    require_that(p.xtc_probability == 0 || p.xtc_probability == 1, name, "xtc_probability is ",
                 p.xtc_probability, ", expected 0 or 1: this call draws no number");
}

/// The last `window` tokens of the history, all where it is 0.
inline History history_of(const SamplingParams& p, Index window) {
  History history{p.prompt_tokens, p.output_tokens};
  if (window == 0 || window >= history.size()) return history;
  const auto outputs = (std::min)(static_cast<std::size_t>(window), history.output.size());
  history.output = history.output.last(outputs);
  history.prompt = history.prompt.last(static_cast<std::size_t>(window) - outputs);
  return history;
}

inline bool adds_biases(SamplingStage stage) {
  return stage == SamplingStage::sequence_bias || stage == SamplingStage::dry ||
         stage == SamplingStage::no_repeat_ngram || stage == SamplingStage::bad_words ||
         stage == SamplingStage::logit_bias || stage == SamplingStage::min_tokens;
}

inline std::int32_t forced_token(const SamplingParams& p) {
  for (const ForcedToken& forced : p.forced_tokens)
    if (forced.position == static_cast<Index>(p.output_tokens.size())) return forced.token;
  return -1;
}

/// The stages that do something, and the biases of those that add any.
inline void set_order(problem::RowParams& row, const SamplingParams& p, bool function, Index vocab,
                      Workspace::Frame& frame) {
  const History history = history_of(p, 0);
  const auto asked = [&](SamplingStage stage) { return asks_for(p, stage, vocab); };
  const Index n = history.size();
  Index* repeats = nullptr;
  if (asked(SamplingStage::dry) || asked(SamplingStage::no_repeat_ngram)) {
    repeats = frame.take<Index>(n);
    count_repeats(history, repeats);
  }
  const Index most = (asked(SamplingStage::dry) ? n : 0) +
                     (asked(SamplingStage::no_repeat_ngram) ? n : 0) +
                     static_cast<Index>(p.bad_words.size() + p.sequence_bias.size() +
                                        p.logit_bias.size() + p.stop_tokens.size());
  BiasList list{frame.take<LogitBias>(most)};
  row.order = {};
  row.bias_ends = {};
  std::size_t stages = 0, bias_stages = 0;
  for (const SamplingStage stage : p.order) {
    if (adds_biases(stage) && asked(stage)) {
      const Index before = list.size;
      add_biases(list, stage, p, history, repeats);
      if (list.size == before) continue;
      if (stages == 0 || row.order[stages - 1] != SamplingStage::logit_bias) {
        row.order[stages++] = SamplingStage::logit_bias;
        ++bias_stages;
      }
      row.bias_ends[bias_stages - 1] = static_cast<std::int32_t>(list.size);
    } else if (stage == SamplingStage::function
                   ? function
                   : asked(stage) &&
                         (stage != SamplingStage::penalties || problem::has_penalties(row)) &&
                         (stage != SamplingStage::forced_tokens || row.forced_token >= 0)) {
      row.order[stages++] = stage;
    }
  }
  row.logit_bias = {list.data, static_cast<std::size_t>(list.size)};
}

/// The parameters as kernels take them, one row or all, in the frame. `function`: the call has one.
inline const problem::RowParams* row_params(const SamplingParamsView& params, bool function,
                                            Index vocab, Workspace::Frame& frame) {
  const auto rows = frame.take<problem::RowParams>(static_cast<Index>(params.sets.size()));
  problem::RowParams* row = rows;
  for (const SamplingParams& p : params.sets) {
    const History penalized = history_of(p, p.penalty_window);
    const Index top_k = p.top_k == 0 ? kKeepAllTokens : p.top_k;
    *row = {.temperature = p.temperature,
            .top_k = (std::max)(top_k, p.min_tokens_to_keep),
            .top_p = p.top_p,
            .min_p = (std::min)(p.min_p, 1.0),
            .typical_p = p.typical_p,
            .repetition_penalty = p.repetition_penalty,
            .frequency_penalty = p.frequency_penalty,
            .presence_penalty = p.presence_penalty,
            .order = {},
            .top_k_ties = p.top_k_ties,
            .prompt_tokens = penalized.prompt,
            .output_tokens = penalized.output,
            .logit_bias = {},
            .token_mask = p.token_mask,
            .bias_ends = {},
            .log_probability_penalties = p.penalize_log_probabilities,
            .forced_token = forced_token(p),
            .guidance_row = p.guidance_row,
            .guidance_scale = p.guidance_scale,
            .min_tokens_to_keep = p.min_tokens_to_keep,
            .top_n_sigma = p.top_n_sigma,
            .xtc_probability = p.xtc_probability,
            .xtc_threshold = p.xtc_threshold,
            .epsilon_cutoff = p.epsilon_cutoff,
            .eta_cutoff = p.eta_cutoff,
            .top_h = p.top_h,
            .dynatemp_range = p.dynatemp_range,
            .dynatemp_exponent = p.dynatemp_exponent,
            .mirostat = p.mirostat,
            .mirostat_mu = p.mirostat_mu};
    set_order(*row++, p, function, vocab, frame);
  }
  return rows;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
