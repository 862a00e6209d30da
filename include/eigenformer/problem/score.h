/// \file
/// The score of one query and one key by the rule of problem/score_rule.h, from their scaled
/// product: what CUDA kernels compute everywhere and the CPU where it takes scores one by one.
#pragma once

#include <cmath>

#include "score_rule.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// A score, and its derivative by the scaled product it is made of, before a function of scores.
template <typename S>
struct Score {
  S value, slope;
};

/// In S, for a key that the row sees. Biased false: there is no bias, and no register for one.
template <typename S, bool Biased = true, typename C, typename Function>
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Score<S> score_of_product(const ScoreRule<C>& rule,
                                                                     const Function& function,
                                                                     const ScoreRow& row, Index key,
                                                                     S product) {
  Score<S> score{product, S(1)};
  if (rule.softcap > 0) {
    const S cap = static_cast<S>(rule.softcap), t = std::tanh(product / cap);
    score = {cap * t, std::fma(-t, t, S(1))};
  }
  if (rule.alibi_slopes != nullptr)  // one rounding, wherever this is compiled
    score.value = std::fma(static_cast<S>(rule.alibi_slopes[row.head]),
                           static_cast<S>(key - row.position), score.value);
  if (Biased && rule.bias.present()) score.value += static_cast<S>(rule.bias.at(row, key));
  if constexpr (is_score_function<Function>)
    score.value = static_cast<S>(function(score.value, row.at(key)));
  return score;
}

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
