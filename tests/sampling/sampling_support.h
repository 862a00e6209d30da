/// \file
/// What the tests of sampling share: rows with known probabilities, the sets kept, comparison with
/// the reference, parameters to sweep.
#pragma once

#include <eigenformer/reference/sampling.h>
#include <eigenformer/sampling.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "infinity.h"

namespace eigenformer_test {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
using Ids = ef::Tensor<std::int32_t, 1>;

template <typename T = float>
ef::Tensor<T, 2> row_of(const std::vector<double>& values) {
  ef::Tensor<T, 2> row(1, static_cast<Index>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) row.data()[i] = static_cast<T>(values[i]);
  return row;
}

/// Logits whose softmax is `probabilities`.
inline ef::Tensor<double, 2> log_of(std::vector<double> probabilities) {
  for (double& p : probabilities) p = std::log(p);
  return row_of<double>(probabilities);
}

template <typename Probabilities>
std::set<Index> kept(const Probabilities& p, Index row = 0) {
  std::set<Index> tokens;
  for (Index v = 0; v < p.dimension(1); ++v)
    if (p(row, v) > 0) tokens.insert(v);
  return tokens;
}
template <typename Logits>
std::set<Index> kept_by(const Logits& logits, const ef::SamplingParams& params) {
  return kept(ef::sampling_probabilities(logits, params));
}
using Set = std::set<Index>;

template <typename Logits>
void check_distribution(const Logits& logits, const ef::SamplingParams& params,
                        const std::string& what) {
  const auto actual = ef::sampling_probabilities(logits, params);
  const auto expected = ef::reference::sampling_probabilities(logits, params);
  for (Index r = 0; r < logits.dimension(0); ++r)
    for (Index v = 0; v < logits.dimension(1); ++v)
      if (expected(r, v) > 1e-35) {  // below, a float may be 0
        ASSERT_GT(actual(r, v), 0.0f) << what << " row " << r << " token " << v << " is missing";
      } else {
        ASSERT_LT(actual(r, v), 1e-30f)
            << what << " row " << r << " token " << v << " should be out";
      }
  EXPECT_LT(relative_error(actual, expected), 1e-6) << what;
}

inline std::vector<std::pair<std::string, ef::SamplingParams>> parameter_sets() {
  return {
      {"plain", {}},
      {"hot", {.temperature = 1.7}},
      {"cold", {.temperature = 0.03}},
      {"greedy", {.temperature = 0}},
      {"top-k 1", {.top_k = 1}},
      {"top-k 5", {.top_k = 5}},
      {"top-k 50", {.temperature = .7, .top_k = 50}},
      {"top-k 5 all ties", {.top_k = 5, .top_k_ties = ef::TopKTies::keep_all}},
      {"top-k 3000", {.top_k = 3000}},
      {"top-p 0.9", {.top_p = .9f}},
      {"top-p 0.3", {.temperature = 2, .top_p = .3f}},
      {"top-p 0.9999", {.top_p = .9999f}},
      {"top-p 0", {.top_p = 0}},
      {"min-p 0.05", {.min_p = .05f}},
      {"min-p 1", {.min_p = 1}},
      {"typical 0.9", {.typical_p = .9f}},
      {"typical 0.2", {.temperature = 1.5, .typical_p = .2f}},
      {"typical 0.5 before top-k 3",
       {.top_k = 3,
        .typical_p = .5,
        .order = {ef::SamplingStage::penalties, ef::SamplingStage::logit_bias,
                  ef::SamplingStage::token_mask, ef::SamplingStage::typical_p,
                  ef::SamplingStage::temperature, ef::SamplingStage::top_k,
                  ef::SamplingStage::top_p, ef::SamplingStage::min_p}}},
      {"combined", {.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f}},
      {"combined vLLM",
       {.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f, .order = ef::kVllmOrder}},
      {"combined llama.cpp",
       {.temperature = .8f,
        .top_k = 40,
        .top_p = .95f,
        .min_p = .05f,
        .typical_p = .9f,
        .order = ef::kLlamaCppOrder}},
      {"llama.cpp greedy", {.temperature = 0, .top_k = 40, .order = ef::kLlamaCppOrder}}};
}

/// Pearson's statistic against its mean and spread: sqrt(2 * statistic) is normal around sqrt(2 *
/// cells - 3) with deviation 1.
inline void expect_distributed(const std::vector<double>& counts,
                               const std::vector<double>& probabilities, const std::string& what) {
  double total = 0, statistic = 0, cells = 0, rest_count = 0, rest_expected = 0;
  for (double c : counts) total += c;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * total;
    if (probabilities[i] == 0) {
      ASSERT_EQ(counts[i], 0) << what << ": token " << i << " has no probability";
    } else if (expected < 8) {
      rest_count += counts[i], rest_expected += expected;
    } else {
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected, ++cells;
    }
  }
  if (rest_expected > 1)
    statistic += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected,
        ++cells;
  if (cells < 2) return;  // one token is all: that no other came is asserted above
  EXPECT_LT(std::sqrt(2 * statistic) - std::sqrt(2 * (cells - 1) - 1), 4.0)
      << what << ": chi-square " << statistic << " over " << cells << " cells";
}

}  // namespace eigenformer_test
