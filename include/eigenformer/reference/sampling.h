/// \file
/// Sampling in plain code: sort in double, walk the sorted list. What the tests and a doubting user
/// compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sampling.h"
#include "sampling_logits.h"

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

/// Leading tokens of at least `least` probability, and at least `n` of them.
inline std::size_t probable_size(const std::vector<Candidate>& tokens, double least,
                                 std::size_t n) {
  std::size_t size = 0;
  while (size < tokens.size() && (size < n || tokens[size].probability >= least)) ++size;
  return size;
}

/// The same, with the equals of the n-th.
inline std::size_t probable_size_with_ties(const std::vector<Candidate>& tokens, double least,
                                           std::size_t n) {
  std::size_t size = probable_size(tokens, least, n);
  while (size < tokens.size() && tokens[size].logit == tokens[size - 1].logit) ++size;
  return size;
}

inline double entropy_term(const Candidate& c) {
  return c.probability > 0 ? -c.probability * std::log(c.probability) : 0.0;
}
inline double entropy(const std::vector<Candidate>& tokens) {
  double sum = 0;
  for (const Candidate& c : tokens) sum += entropy_term(c);
  return sum;
}

inline void keep_typical(std::vector<Candidate>& tokens, double p, std::size_t n) {
  const double all = entropy(tokens);
  const auto distance = [&](const Candidate& c) {
    return std::abs(-std::log(c.probability) - all);
  };
  std::stable_sort(tokens.begin(), tokens.end(), [&](const Candidate& a, const Candidate& b) {
    return distance(a) < distance(b);
  });
  const std::size_t kept = (std::min)((std::max)(nucleus_size(tokens, p), n), tokens.size());
  // equals may differ by rounding here
  const double farthest = distance(tokens[kept - 1]) * (1 + 1e-12) + 1e-12;
  std::erase_if(tokens, [&](const Candidate& c) { return distance(c) > farthest; });
}

/// Tokens of a logit of at least the best less so many standard deviations.
inline std::size_t top_n_sigma_size(const std::vector<Candidate>& tokens, double deviations) {
  double mean = 0, variance = 0;
  const auto count = static_cast<double>(tokens.size());
  for (const Candidate& c : tokens) mean += c.logit / count;
  for (const Candidate& c : tokens) variance += (c.logit - mean) * (c.logit - mean) / count;
  std::size_t size = 1;
  while (size < tokens.size() &&
         tokens[size].logit >= tokens[0].logit - deviations * std::sqrt(variance))
    ++size;
  return size;
}

/// The longest prefix whose terms of the entropy sum to at most `share` of it.
inline std::size_t top_h_size(const std::vector<Candidate>& tokens, double share) {
  const double most = share * entropy(tokens) * (1 + 1e-12);
  double sum = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if ((sum += entropy_term(tokens[i])) > most) return (std::max)(i, std::size_t{1});
  return tokens.size();
}

inline std::size_t mirostat_1_size(const std::vector<Candidate>& tokens, double mu, Index vocab) {
  double products = 0, squares = 0;
  for (std::size_t i = 0; i + 1 < tokens.size() && i < 99; ++i) {
    const double t = std::log((static_cast<double>(i) + 2) / (static_cast<double>(i) + 1));
    products += t * (tokens[i].logit - tokens[i + 1].logit);
    squares += t * t;
  }
  const auto size = static_cast<std::size_t>(problem::mirostat_count(products, squares, mu, vocab));
  return (std::min)(size, tokens.size());
}

inline double temperature_of(const std::vector<Candidate>& tokens, const SamplingParams& p) {
  if (p.dynatemp_range == 0) return p.temperature;
  if (tokens.size() == 1) return 1;
  const double least = (std::max)(0.0, p.temperature - p.dynatemp_range),
               most = p.temperature + p.dynatemp_range,
               share = entropy(tokens) / std::log(static_cast<double>(tokens.size()));
  return least + (most - least) * std::pow((std::max)(share, 0.0), p.dynatemp_exponent);
}

/// One filter. `excludes`: XTC is to exclude tokens.
inline void apply_stage(std::vector<Candidate>& tokens, SamplingStage stage,
                        const SamplingParams& p, Index vocab, bool excludes) {
  std::stable_sort(tokens.begin(), tokens.end(), [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  });
  std::size_t keep = tokens.size();
  const auto n = static_cast<std::size_t>(p.min_tokens_to_keep);
  double temperature = 1;
  if (stage == SamplingStage::temperature) {
    temperature = temperature_of(tokens, p);
    if (temperature == 0) keep = 1, temperature = 1;
  }
  const Index k = (std::max)(p.top_k, p.min_tokens_to_keep);
  if (stage == SamplingStage::top_k && p.top_k > 0 && k < static_cast<Index>(keep)) {
    keep = static_cast<std::size_t>(k);
    while (p.top_k_ties == TopKTies::keep_all && keep < tokens.size() &&
           tokens[keep].logit == tokens[keep - 1].logit)
      ++keep;
  }
  if (stage == SamplingStage::top_p && p.top_p < 1)
    keep = (std::max)(nucleus_size(tokens, p.top_p), n);
  if (stage == SamplingStage::min_p)
    keep = probable_size(tokens, (std::min)(p.min_p, 1.0) * tokens[0].probability, n);
  if (stage == SamplingStage::epsilon_cutoff)
    keep = probable_size_with_ties(tokens, p.epsilon_cutoff, n);
  if (stage == SamplingStage::eta_cutoff)
    keep = probable_size_with_ties(
        tokens, (std::min)(p.eta_cutoff, std::sqrt(p.eta_cutoff) * std::exp(-entropy(tokens))), n);
  if (stage == SamplingStage::top_n_sigma && p.top_n_sigma > 0)
    keep = top_n_sigma_size(tokens, p.top_n_sigma);
  if (stage == SamplingStage::top_h && p.top_h < 1) keep = top_h_size(tokens, p.top_h);
  if (stage == SamplingStage::mirostat && p.mirostat == 1)
    keep = mirostat_1_size(tokens, p.mirostat_mu, vocab);
  if (stage == SamplingStage::mirostat && p.mirostat == 2)
    keep = probable_size(tokens, std::exp2(-p.mirostat_mu), 1);
  tokens.resize((std::min)(keep, tokens.size()));
  if (stage == SamplingStage::typical_p && p.typical_p < 1) keep_typical(tokens, p.typical_p, n);
  if (stage == SamplingStage::xtc && excludes) {
    const std::size_t choices = probable_size(tokens, p.xtc_threshold, 0);
    if (choices > 1 && tokens.size() - (choices - 1) >= n)
      tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(choices - 1));
  }
  renormalize(tokens, temperature);
}

/// The tokens that may be drawn in a row, of logits that have a token to draw.
template <typename Logits>
std::vector<Candidate> candidates(const Logits& logits, Index r, const SamplingParams& params,
                                  bool excludes) {
  std::vector<double> x = row_in_double(logits, r);
  for (const SamplingStage stage : params.order)
    if (stage <= SamplingStage::function) adjust_logits(x, stage, params, logits);
  std::vector<Candidate> tokens;
  for (std::size_t v = 0; v < x.size(); ++v)
    if (x[v] > -std::numeric_limits<double>::infinity())
      tokens.push_back({x[v], 0, static_cast<Index>(v)});
  renormalize(tokens);
  for (const SamplingStage stage : params.order)
    if (stage > SamplingStage::function)
      apply_stage(tokens, stage, params, logits.dimension(1), excludes);
  return tokens;
}
template <typename Logits>
std::vector<Candidate> candidates(const Logits& logits, Index r, const SamplingParams& params) {
  return candidates(logits, r, params, params.xtc_probability == 1);
}

/// The token that `sample` draws in a row, from the numbers of its generator.
template <typename Logits>
std::int32_t sampled_token(const Logits& logits, Index r, const SamplingParams& params,
                           const Philox& rng, std::uint32_t row) {
  const bool excludes = params.xtc_probability > 0 &&
                        rng.uniform(row, 0, Philox::Purpose::exclusion) <= params.xtc_probability;
  std::vector<Candidate> tokens = candidates(logits, r, params, excludes);
  std::sort(tokens.begin(), tokens.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  const double u = rng.uniform(row);
  double sum = 0;
  for (const Candidate& c : tokens)
    if ((sum += c.probability) > u) return static_cast<std::int32_t>(c.token);
  return static_cast<std::int32_t>(tokens.back().token);
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
