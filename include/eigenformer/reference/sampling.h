/// \file
/// Sampling in plain code: sort in double, walk the sorted list. What the tests and a doubting user
/// compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// A token in play: its scaled logit, its probability among those in play, its index.
struct Candidate {
  double logit, probability;
  Index token;
};

inline void renormalize(std::vector<Candidate>& tokens, double temperature = 1) {
  double best = -std::numeric_limits<double>::infinity(), total = 0;
  for (const Candidate& c : tokens) best = (std::max)(best, c.logit);
  for (Candidate& c : tokens) c.logit = (c.logit - best) / temperature;
  for (const Candidate& c : tokens) total += std::exp(c.logit);
  for (Candidate& c : tokens) c.probability = std::exp(c.logit) / total;
}

/// Number of leading tokens whose probabilities sum to at least p; all of them where rounding keeps
/// the sum below.
inline std::size_t nucleus_size(const std::vector<Candidate>& tokens, double p) {
  double sum = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if ((sum += tokens[i].probability) >= p) return i + 1;
  return tokens.size();
}

inline void keep_typical(std::vector<Candidate>& tokens, double p) {
  double entropy = 0;
  for (const Candidate& c : tokens)
    if (c.probability > 0) entropy -= c.probability * std::log(c.probability);
  const auto distance = [&](const Candidate& c) {
    return std::abs(-std::log(c.probability) - entropy);
  };
  std::stable_sort(tokens.begin(), tokens.end(), [&](const Candidate& a, const Candidate& b) {
    return distance(a) < distance(b);
  });
  // equals may differ by rounding here
  const double farthest = distance(tokens[nucleus_size(tokens, p) - 1]) * (1 + 1e-12) + 1e-12;
  std::erase_if(tokens, [&](const Candidate& c) { return distance(c) > farthest; });
}

inline void apply_stage(std::vector<Candidate>& tokens, SamplingStage stage,
                        const SamplingParams& p) {
  std::stable_sort(tokens.begin(), tokens.end(), [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  });
  std::size_t keep = tokens.size();
  if (stage == SamplingStage::temperature && p.temperature == 0) keep = 1;
  if (stage == SamplingStage::top_k && p.top_k > 0 && p.top_k < static_cast<Index>(keep)) {
    keep = static_cast<std::size_t>(p.top_k);
    while (p.top_k_ties == TopKTies::keep_all && keep < tokens.size() &&
           tokens[keep].logit == tokens[keep - 1].logit)
      ++keep;
  }
  if (stage == SamplingStage::top_p && p.top_p < 1) keep = nucleus_size(tokens, p.top_p);
  if (stage == SamplingStage::min_p)
    while (keep > 1 && tokens[keep - 1].probability < p.min_p * tokens[0].probability) --keep;
  tokens.resize(keep);
  if (stage == SamplingStage::typical_p && p.typical_p < 1) keep_typical(tokens, p.typical_p);
  renormalize(tokens, stage == SamplingStage::temperature && p.temperature > 0 ? p.temperature : 1);
}

/// Penalties, bias and mask on one row, in their order.
inline void adjust_logits(std::vector<double>& x, SamplingStage stage, const SamplingParams& p) {
  for (std::size_t t = 0; t < x.size(); ++t) {
    if (stage == SamplingStage::penalties) {
      const auto id = static_cast<std::int32_t>(t);
      const auto count = std::count(p.output_tokens.begin(), p.output_tokens.end(), id);
      const auto seen = count + std::count(p.prompt_tokens.begin(), p.prompt_tokens.end(), id);
      if (seen > 0) x[t] = x[t] < 0 ? x[t] * p.repetition_penalty : x[t] / p.repetition_penalty;
      if (count > 0) x[t] -= p.frequency_penalty * static_cast<double>(count) + p.presence_penalty;
    }
    if (stage == SamplingStage::token_mask && !p.token_mask.empty() &&
        (p.token_mask[t / 32] >> (t % 32) & 1u) == 0)
      x[t] = -std::numeric_limits<double>::infinity();
  }
  if (stage == SamplingStage::logit_bias)
    for (const LogitBias& bias : p.logit_bias)
      x[static_cast<std::size_t>(bias.token)] += static_cast<double>(bias.bias);
}

/// The tokens that may be drawn in a row, of logits that have a token to draw.
template <typename Logits>
std::vector<Candidate> candidates(const Logits& logits, Index r, const SamplingParams& params) {
  std::vector<double> x;
  for (Index v = 0; v < logits.dimension(1); ++v) x.push_back(static_cast<double>(logits(r, v)));
  for (std::size_t i = 0; i < 3; ++i) adjust_logits(x, params.order[i], params);
  std::vector<Candidate> tokens;
  for (Index v = 0; v < logits.dimension(1); ++v)
    if (x[static_cast<std::size_t>(v)] > -std::numeric_limits<double>::infinity())
      tokens.push_back({x[static_cast<std::size_t>(v)], 0, v});
  renormalize(tokens);
  for (std::size_t i = 3; i < params.order.size(); ++i)
    apply_stage(tokens, params.order[i], params);
  return tokens;
}

/// The distribution of every row, (batch, vocab).
template <typename Logits>
Tensor<double, 2> sampling_probabilities(const Logits& logits, const SamplingParams& params) {
  Tensor<double, 2> result(logits.dimension(0), logits.dimension(1));
  result.setZero();
  for (Index r = 0; r < logits.dimension(0); ++r)
    for (const Candidate& c : candidates(logits, r, params)) result(r, c.token) = c.probability;
  return result;
}

/// Its logarithm, (batch, vocab): -infinity where nothing is drawn.
template <typename Logits>
Tensor<double, 2> sampling_log_probabilities(const Logits& logits, const SamplingParams& params) {
  Tensor<double, 2> result(logits.dimension(0), logits.dimension(1));
  result.setConstant(-std::numeric_limits<double>::infinity());
  for (Index r = 0; r < logits.dimension(0); ++r) {
    const std::vector<Candidate> tokens = candidates(logits, r, params);
    std::size_t best = 0;  // its logit is 0
    for (std::size_t i = 1; i < tokens.size(); ++i)
      if (tokens[i].logit > tokens[best].logit) best = i;
    double others = 0;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      others += i == best ? 0.0 : std::exp(tokens[i].logit);
    for (const Candidate& c : tokens) result(r, c.token) = c.logit - std::log1p(others);
  }
  return result;
}

/// Lowest index of the largest logit of every row.
template <typename Logits>
Tensor<std::int32_t, 1> greedy_sample(const Logits& logits) {
  Tensor<std::int32_t, 1> ids(logits.dimension(0));
  for (Index r = 0; r < logits.dimension(0); ++r) {
    ids(r) = 0;
    for (Index v = 1; v < logits.dimension(1); ++v)
      if (logits(r, v) > logits(r, ids(r))) ids(r) = static_cast<std::int32_t>(v);
  }
  return ids;
}

/// The tokens of one row of verify_speculative, of distributions that are all good. A generator of
/// the row's own draws at row 0. q (drafts, vocab), p (drafts + 1, vocab).
inline std::vector<std::int32_t> verified_tokens(const std::vector<std::int32_t>& drafts,
                                                 const Tensor<double, 2>& q,
                                                 const Tensor<double, 2>& p, const Philox& rng,
                                                 std::uint32_t row) {
  const Index vocab = p.dimension(1);
  std::vector<std::int32_t> tokens;
  std::vector<double> weights(static_cast<std::size_t>(vocab));
  for (std::uint32_t i = 0; i <= drafts.size(); ++i) {
    const bool bonus = i == drafts.size();
    if (!bonus &&
        rng.uniform(row, i, Philox::Purpose::acceptance) * q(i, drafts[i]) < p(i, drafts[i])) {
      tokens.push_back(drafts[i]);
      continue;
    }
    double total = 0;
    for (Index v = 0; v < vocab; ++v)
      total += weights[static_cast<std::size_t>(v)] =
          bonus ? p(i, v) : (std::max)(0.0, p(i, v) - q(i, v));
    if (total == 0)
      for (Index v = 0; v < vocab; ++v) total += weights[static_cast<std::size_t>(v)] = p(i, v);
    const double target = rng.uniform(row, 0, Philox::Purpose::last_token) * total;
    double sum = 0;
    std::int32_t last = -1;
    for (Index v = 0; v < vocab && sum <= target; ++v) {
      sum += weights[static_cast<std::size_t>(v)];
      if (weights[static_cast<std::size_t>(v)] > 0) last = static_cast<std::int32_t>(v);
    }
    tokens.push_back(last);
    break;
  }
  return tokens;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
