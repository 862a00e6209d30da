/// \file
/// What follows from the tokens so far, as biases of the next one: penalties of repeated sequences
/// (DRY), n-grams that may not come twice, words that are banned or favoured. Done once per row on
/// the host, in O(history + what the parameters list): kernels only add.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/workspace.h"
#include "params.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline constexpr float kBanned = -std::numeric_limits<float>::infinity();

/// Prompt and output, the last token first.
struct History {
  std::span<const std::int32_t> prompt, output;

  Index size() const { return static_cast<Index>(prompt.size() + output.size()); }
  std::int32_t operator[](Index i) const {
    const auto back = static_cast<std::size_t>(i);
    return back < output.size() ? output[output.size() - 1 - back]
                                : prompt[prompt.size() - 1 - (back - output.size())];
  }
  /// Whether the last tokens are these.
  bool ends_with(std::span<const std::int32_t> tokens) const {
    const auto count = static_cast<Index>(tokens.size());
    if (count > size()) return false;
    for (Index i = 0; i < count; ++i)
      if ((*this)[i] != tokens[tokens.size() - 1 - static_cast<std::size_t>(i)]) return false;
    return true;
  }
};

/// repeats[k]: how many of the last tokens came in the same order k tokens earlier, for 1 <= k <
/// size. The Z function of the history read backwards: each comparison that succeeds moves `end`.
inline void count_repeats(const History& history, Index* repeats) {
  const Index n = history.size();
  Index begin = 0, end = 0;  // [begin, end) equals [0, end - begin)
  for (Index k = 1; k < n; ++k) {
    Index length = k < end ? (std::min)(repeats[k - begin], end - k) : 0;
    while (k + length < n && history[length] == history[k + length]) ++length;
    repeats[k] = length;
    if (k + length > end) begin = k, end = k + length;
  }
}

/// Tokens since the latest breaker among the last `window`, of those that begin with one token the
/// longest; `window` where there is none.
inline Index tokens_since_breaker(const History& history, Index window,
                                  const std::vector<std::vector<std::int32_t>>& breakers) {
  for (Index first = 0; first < window; ++first) {
    Index longest = 0;
    for (const auto& breaker : breakers) {
      const auto length = static_cast<Index>(breaker.size());
      if (length <= longest || length > first + 1) continue;
      Index i = 0;
      while (i < length && breaker[static_cast<std::size_t>(i)] == history[first - i]) ++i;
      if (i == length) longest = length;
    }
    if (longest > 0) return first + 1 - longest;
  }
  return window;
}

/// A list of biases that grows into memory of the frame.
struct BiasList {
  LogitBias* data;
  Index size = 0;

  void add(std::int32_t token, float bias) { data[size++] = {token, bias}; }
};

/// multiplier * base^(length - allowed_length) off each token that would make a repetition of
/// `length` tokens longer. `repeats` are those of the whole history.
inline void add_dry(BiasList& list, const SamplingParams& p, const History& history,
                    const Index* repeats) {
  const Index all = history.size(), window = p.dry_window > 0 ? (std::min)(p.dry_window, all) : all;
  if (window <= p.dry_allowed_length) return;
  const Index limit = tokens_since_breaker(history, window, p.dry_breakers);
  if (limit < p.dry_allowed_length) return;
  // in `bias` the lengths, until the longest of each token is known
  LogitBias* const first = list.data + list.size;
  LogitBias* last = first;
  for (Index k = 1; k < window; ++k) {
    const Index length = (std::min)({repeats[k], window - k, limit});
    if (length >= p.dry_allowed_length) *last++ = {history[k - 1], static_cast<float>(length)};
  }
  std::sort(first, last, [](const LogitBias& a, const LogitBias& b) {
    return a.token < b.token || (a.token == b.token && a.bias > b.bias);
  });
  last = std::unique(first, last,
                     [](const LogitBias& a, const LogitBias& b) { return a.token == b.token; });
  last = std::remove_if(first, last, [&](const LogitBias& found) {
    return std::any_of(p.dry_breakers.begin(), p.dry_breakers.end(), [&](const auto& breaker) {
      return breaker.size() == 1 && breaker[0] == found.token;
    });
  });
  // as llama.cpp limits it: base^exponent is a float
  const double largest = p.dry_base > 1.000001 ? std::floor(88.7228391 / std::log(p.dry_base))
                                               : std::numeric_limits<double>::infinity();
  for (LogitBias* found = first; found != last; ++found) {
    const double exponent =
        static_cast<double>(found->bias) - static_cast<double>(p.dry_allowed_length);
    const double penalty = p.dry_multiplier * std::pow(p.dry_base, (std::min)(exponent, largest));
    constexpr double most = (std::numeric_limits<float>::max)();
    found->bias = static_cast<float>(-(std::min)(penalty, most));
  }
  list.size += last - first;
}

inline void add_repeated_ngrams(BiasList& list, Index n, const History& history,
                                const Index* repeats) {
  for (Index k = 1; k < history.size(); ++k)
    if (repeats[k] >= n - 1) list.add(history[k - 1], kBanned);
  // one token alone has no earlier one to follow
  if (n == 1 && history.size() > 0) list.add(history[history.size() - 1], kBanned);
}

inline void add_sequence(BiasList& list, const std::vector<std::int32_t>& tokens, float bias,
                         const History& history) {
  if (history.ends_with(std::span(tokens).first(tokens.size() - 1))) list.add(tokens.back(), bias);
}

/// Appends what one stage adds to logits.
inline void add_biases(BiasList& list, SamplingStage stage, const SamplingParams& p,
                       const History& history, const Index* repeats) {
  if (stage == SamplingStage::dry) add_dry(list, p, history, repeats);
  if (stage == SamplingStage::no_repeat_ngram)
    add_repeated_ngrams(list, p.no_repeat_ngram, history, repeats);
  if (stage == SamplingStage::bad_words)
    for (const auto& word : p.bad_words) add_sequence(list, word, kBanned, history);
  if (stage == SamplingStage::sequence_bias)
    for (const SequenceBias& sequence : p.sequence_bias)
      add_sequence(list, sequence.tokens, sequence.bias, history);
  if (stage == SamplingStage::logit_bias)
    for (const LogitBias& bias : p.logit_bias) list.add(bias.token, bias.bias);
  if (stage == SamplingStage::min_tokens &&
      history.output.size() < static_cast<std::size_t>(p.min_tokens))
    for (const std::int32_t token : p.stop_tokens) list.add(token, kBanned);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
