/// \file
/// Beam search in plain code: whole sequences, all candidates sorted. What the tests and a doubting
/// user compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../beam_search.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// The finished hypotheses of one sequence, best first. next(tokens) gives the log-probability of
/// every token after those.
template <typename Next>
std::vector<Hypothesis> beam_search(const BeamSearchOptions& options, Next next) {
  using Tokens = std::vector<std::int32_t>;
  struct Beam {
    Tokens tokens;
    double sum;
  };
  const auto beams = static_cast<std::size_t>(options.beams);
  const auto score = [&](double sum, Index length) {
    return sum / std::pow(static_cast<double>(length), options.length_penalty);
  };
  std::vector<Beam> live{{{}, 0.0}};
  std::vector<Hypothesis> finished;
  for (Index length = 1; length <= options.max_new_tokens && !live.empty(); ++length) {
    std::vector<Beam> all;
    for (const Beam& beam : live) {
      const std::vector<double> scores = next(beam.tokens);
      for (std::size_t t = 0; t < scores.size(); ++t) {
        all.push_back({beam.tokens, beam.sum + scores[t]});
        all.back().tokens.push_back(static_cast<std::int32_t>(t));
      }
    }
    std::erase_if(all, [](const Beam& beam) { return std::isinf(beam.sum); });
    std::stable_sort(all.begin(), all.end(),
                     [](const Beam& a, const Beam& b) { return a.sum > b.sum; });
    all.resize(
        (std::min)(all.size(), beams * (std::max)(std::size_t{2}, 1 + options.end_tokens.size())));
    live.clear();
    for (std::size_t i = 0; i < all.size(); ++i) {
      const bool ends = length == options.max_new_tokens ||
                        std::count(options.end_tokens.begin(), options.end_tokens.end(),
                                   all[i].tokens.back()) > 0;
      if (!ends && live.size() < beams) live.push_back(all[i]);
      if (ends && i < beams)
        finished.push_back({all[i].tokens, all[i].sum, score(all[i].sum, length)});
    }
    std::stable_sort(finished.begin(), finished.end(),
                     [](const Hypothesis& a, const Hypothesis& b) { return a.score > b.score; });
    finished.resize((std::min)(finished.size(), beams));
    if (finished.size() < beams || live.empty()) continue;
    if (options.stopping == BeamStopping::early) break;
    const bool longest = options.stopping == BeamStopping::never && options.length_penalty > 0;
    if (score(live[0].sum, longest ? options.max_new_tokens : length) <= finished.back().score)
      break;
  }
  return finished;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
