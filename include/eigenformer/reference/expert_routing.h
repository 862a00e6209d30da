/// \file
/// Expert routing in plain double, by stable sorts: what the tests and a doubting user compare
/// with.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../expert_routing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// One token, of finite logits or some of -infinity; bias empty or (experts).
inline void expert_routing(const double* logits, Index experts, Index k,
                           const std::vector<double>& bias, const ExpertRoutingOptions& options,
                           std::int32_t* ids, double* weights) {
  const auto n = static_cast<std::size_t>(experts);
  const auto softmax = [](std::vector<double> x) {
    const double best = *std::max_element(x.begin(), x.end());
    for (double& value : x) value = std::exp(value - best);
    const double sum = std::accumulate(x.begin(), x.end(), 0.0);
    for (double& value : x) value /= sum;
    return x;
  };
  const std::vector<double> x(logits, logits + experts);
  std::vector<double> scores = options.scores == ExpertScores::softmax ? softmax(x) : x;
  if (options.scores == ExpertScores::sigmoid)
    for (double& score : scores) score = 1 / (1 + std::exp(-score));
  std::vector<double> choice = bias.empty() && options.groups == 1 ? x : scores;
  for (std::size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
  const auto size = static_cast<std::ptrdiff_t>(experts / options.groups);
  std::vector<double> of_group;
  for (auto group = choice.begin(); size > 1 && group != choice.end(); group += size) {
    std::vector<double> members(group, group + size);
    std::sort(members.rbegin(), members.rend());
    of_group.push_back(members[0] + members[1]);
  }
  const auto best_first = [](const std::vector<double>& values) {
    std::vector<std::size_t> order(values.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return values[a] > values[b]; });
    return order;
  };
  std::vector<bool> kept(n, options.groups == 1);
  if (options.groups > 1) {
    const auto order = best_first(of_group);
    for (std::size_t g = 0; g < static_cast<std::size_t>(options.kept_groups); ++g)
      std::fill_n(kept.begin() + static_cast<std::ptrdiff_t>(order[g]) * size, size, true);
  }
  std::vector<double> chosen;
  Index count = 0;
  for (const std::size_t e : best_first(choice)) {
    if (!kept[e] || count == k) continue;
    ids[count++] = static_cast<std::int32_t>(e);
    chosen.push_back(scores[e]);
  }
  if (options.scores == ExpertScores::softmax_of_chosen) chosen = softmax(chosen);
  double sum = options.normalise ? std::accumulate(chosen.begin(), chosen.end(), 0.0) : 1;
  if (options.normalise && options.scores == ExpertScores::sigmoid) sum += 1e-20;
  for (std::size_t j = 0; j < chosen.size(); ++j)
    weights[j] = sum > 0 ? chosen[j] / sum * static_cast<double>(options.scale) : 0;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
