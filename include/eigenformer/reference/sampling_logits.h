/// \file
/// What changes logits before any filter, in plain code: in double, and each token of the history
/// looked at as often as it takes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

template <typename Logits>
std::vector<double> row_in_double(const Logits& logits, Index r) {
  std::vector<double> x;
  for (Index v = 0; v < logits.dimension(1); ++v) x.push_back(static_cast<double>(logits(r, v)));
  return x;
}

inline void take_log_softmax(std::vector<double>& x) {
  const double best = *std::max_element(x.begin(), x.end());
  double total = 0;
  for (const double logit : x) total += std::exp(logit - best);
  for (double& logit : x) logit -= best + std::log(total);
}

inline std::vector<std::int32_t> history_of(const SamplingParams& p) {
  std::vector<std::int32_t> tokens(p.prompt_tokens.begin(), p.prompt_tokens.end());
  tokens.insert(tokens.end(), p.output_tokens.begin(), p.output_tokens.end());
  return tokens;
}

inline bool ends_with(const std::vector<std::int32_t>& tokens,
                      const std::vector<std::int32_t>& ending) {
  return ending.size() <= tokens.size() &&
         std::equal(ending.rbegin(), ending.rend(), tokens.rbegin());
}

inline void apply_penalties(std::vector<double>& x, const SamplingParams& p) {
  if (p.penalize_log_probabilities) take_log_softmax(x);
  const std::vector<std::int32_t> tokens = history_of(p);
  const std::size_t window = static_cast<std::size_t>(p.penalty_window),
                    first = window > 0 && window < tokens.size() ? tokens.size() - window : 0;
  std::map<std::int32_t, int> counts;  // in the output
  for (std::size_t i = first; i < tokens.size(); ++i)
    counts[tokens[i]] += i >= p.prompt_tokens.size();
  for (const auto& [token, count] : counts) {
    double& logit = x[static_cast<std::size_t>(token)];
    logit = logit < 0 ? logit * p.repetition_penalty : logit / p.repetition_penalty;
    if (count > 0) logit -= p.frequency_penalty * count + p.presence_penalty;
  }
}

/// Weidmann, "DRY" (text-generation-webui, 2024), with the limits of llama.cpp.
inline void apply_dry(std::vector<double>& x, const SamplingParams& p) {
  std::vector<std::int32_t> tokens = history_of(p);
  const std::size_t window = static_cast<std::size_t>(p.dry_window);
  if (window > 0 && window < tokens.size())
    tokens.erase(tokens.begin(), tokens.end() - static_cast<std::ptrdiff_t>(window));
  const std::size_t n = tokens.size(), allowed = static_cast<std::size_t>(p.dry_allowed_length);
  if (n <= allowed) return;
  std::size_t limit = n;
  for (std::size_t begin = n; begin-- > 0 && limit == n;)
    for (const auto& breaker : p.dry_breakers)
      if (begin + breaker.size() <= n &&
          std::equal(breaker.begin(), breaker.end(),
                     tokens.begin() + static_cast<std::ptrdiff_t>(begin)))
        limit = (std::min)(limit, n - begin - breaker.size());
  if (limit < allowed) return;
  std::map<std::int32_t, std::size_t> longest;
  for (std::size_t end = 1; end < n; ++end) {  // the token at `end` came after [.., end)
    std::size_t length = 0;
    while (length < end && tokens[end - 1 - length] == tokens[n - 1 - length]) ++length;
    length = (std::min)(length, limit);
    if (length >= allowed) longest[tokens[end]] = (std::max)(longest[tokens[end]], length);
  }
  for (const auto& [token, length] : longest) {
    if (std::find(p.dry_breakers.begin(), p.dry_breakers.end(), std::vector{token}) !=
        p.dry_breakers.end())
      continue;
    double exponent = static_cast<double>(length - allowed);
    if (p.dry_base > 1.000001)
      exponent = (std::min)(exponent, std::floor(88.7228391 / std::log(p.dry_base)));
    x[static_cast<std::size_t>(token)] -= p.dry_multiplier * std::pow(p.dry_base, exponent);
  }
}

/// Bans every token that would end an n-gram of the history.
inline void ban_repeated_ngrams(std::vector<double>& x, const SamplingParams& p) {
  const std::vector<std::int32_t> tokens = history_of(p);
  const auto n = static_cast<std::size_t>(p.no_repeat_ngram);
  for (std::size_t end = n; n > 0 && end <= tokens.size(); ++end) {
    const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(end - n);
    if (ends_with(tokens, {first, first + static_cast<std::ptrdiff_t>(n - 1)}))
      x[static_cast<std::size_t>(tokens[end - 1])] = -std::numeric_limits<double>::infinity();
  }
}

inline void add_sequence(std::vector<double>& x, const SamplingParams& p,
                         std::vector<std::int32_t> sequence, double bias) {
  const auto last = static_cast<std::size_t>(sequence.back());
  sequence.pop_back();
  if (ends_with(history_of(p), sequence)) x[last] += bias;
}

/// One stage on a row `x` of logits.
template <typename Logits>
void adjust_logits(std::vector<double>& x, SamplingStage stage, const SamplingParams& p,
                   const Logits& logits) {
  constexpr double banned = -std::numeric_limits<double>::infinity();
  if (stage == SamplingStage::guidance && p.guidance_row >= 0 && p.guidance_scale != 1) {
    std::vector<double> without = row_in_double(logits, p.guidance_row);
    take_log_softmax(without);
    take_log_softmax(x);
    for (std::size_t t = 0; t < x.size(); ++t)
      x[t] = x[t] == banned || without[t] == banned
                 ? banned
                 : p.guidance_scale * (x[t] - without[t]) + without[t];
  }
  if (stage == SamplingStage::sequence_bias)
    for (const SequenceBias& s : p.sequence_bias)
      add_sequence(x, p, s.tokens, static_cast<double>(s.bias));
  if (stage == SamplingStage::penalties) apply_penalties(x, p);
  if (stage == SamplingStage::dry && p.dry_multiplier > 0) apply_dry(x, p);
  if (stage == SamplingStage::no_repeat_ngram) ban_repeated_ngrams(x, p);
  if (stage == SamplingStage::bad_words)
    for (const auto& word : p.bad_words) add_sequence(x, p, word, banned);
  if (stage == SamplingStage::logit_bias)
    for (const LogitBias& bias : p.logit_bias)
      x[static_cast<std::size_t>(bias.token)] += static_cast<double>(bias.bias);
  if (stage == SamplingStage::min_tokens &&
      static_cast<Index>(p.output_tokens.size()) < p.min_tokens)
    for (const std::int32_t token : p.stop_tokens) x[static_cast<std::size_t>(token)] = banned;
  if (stage == SamplingStage::token_mask && !p.token_mask.empty())
    for (std::size_t t = 0; t < x.size(); ++t)
      if ((p.token_mask[t / 32] >> (t % 32) & 1u) == 0) x[t] = banned;
  if (stage == SamplingStage::forced_tokens)
    for (const ForcedToken& forced : p.forced_tokens)
      if (forced.position == static_cast<Index>(p.output_tokens.size())) {
        std::fill(x.begin(), x.end(), banned);
        x[static_cast<std::size_t>(forced.token)] = 0;
      }
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
