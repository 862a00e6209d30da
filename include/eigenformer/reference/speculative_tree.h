/// \file
/// Verification of a token tree in plain code: what the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

struct VerifiedTree {
  std::vector<std::int32_t> tokens, nodes;
};

/// Of one row, of distributions that are all good. q and p (nodes + 1, vocab), q empty where drafts
/// are certain. A generator of the row's own draws at row 0.
inline VerifiedTree verified_tree(const std::vector<std::int32_t>& tokens,
                                  const std::vector<std::int32_t>& parents,
                                  const Tensor<double, 2>& q, const Tensor<double, 2>& p,
                                  bool with_replacement, const Philox& rng, std::uint32_t row) {
  const auto vocab = static_cast<std::size_t>(p.dimension(1));
  const auto row_of = [&](const Tensor<double, 2>& x, std::int32_t place) {
    const double* const first = x.data() + place * x.dimension(1);
    return std::vector<double>(first, first + vocab);
  };
  const auto sum_of = [](const std::vector<double>& x) {
    return std::accumulate(x.begin(), x.end(), 0.0);
  };
  const auto normalized = [&](std::vector<double> x) {
    const double sum = sum_of(x);
    for (double& v : x) v /= sum > 0 ? sum : 1;
    return x;
  };
  VerifiedTree result;
  std::int32_t node = -1;
  std::vector<double> left = row_of(p, 0), draft;
  if (q.size() > 0) draft = row_of(q, 0);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    bool tried = parents[i] == node && tokens[i] >= 0;
    for (std::size_t before = 0; before < i; ++before)
      if (parents[before] == node && tokens[before] == tokens[i])
        tried = tried && with_replacement && q.size() > 0;
    if (!tried || sum_of(left) == 0 || (q.size() > 0 && sum_of(draft) == 0)) continue;
    const auto token = static_cast<std::size_t>(tokens[i]);
    std::vector<double> own = draft;
    if (q.size() == 0) {
      own.assign(vocab, 0.0);
      own[token] = 1;
    }
    const double u = rng.uniform(row, static_cast<std::uint32_t>(i), Philox::Purpose::acceptance);
    if (u * own[token] < left[token]) {
      result.tokens.push_back(tokens[i]);
      result.nodes.push_back(node = static_cast<std::int32_t>(i));
      left = row_of(p, node + 1);
      if (q.size() > 0) draft = row_of(q, node + 1);
      continue;
    }
    for (std::size_t v = 0; v < vocab; ++v) left[v] = (std::max)(0.0, left[v] - own[v]);
    left = normalized(left);
    if (!with_replacement && q.size() > 0) {
      draft[token] = 0;
      draft = normalized(draft);
    }
  }
  if (sum_of(left) == 0) left = row_of(p, node + 1);
  const double target = rng.uniform(row, 0, Philox::Purpose::last_token) * sum_of(left);
  double sum = 0;
  std::int32_t last = -1;
  for (std::size_t v = 0; v < vocab && sum <= target; ++v) {
    sum += left[v];
    if (left[v] > 0) last = static_cast<std::int32_t>(v);
  }
  result.tokens.push_back(last);
  return result;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
