/// \file
/// CPU kernels of the tensor-parallel layers, apart from the products themselves: parts of rows put
/// together into rows, and the candidates of a vocabulary-parallel head. Sizes are those of
/// activations, small beside the weights: the interleaving reads and writes tokens * features
/// elements once, the selection of candidates reads this rank's logits twice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../problem/tensor_parallel.h"
#include "backend.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::Interleave<T>& p) {
  parallel_for(on, p.tokens, Cost{p.features}, [&](Index first, Index last, int) {
    for (int r = 0; r < p.ranks; ++r) {
      const ShardRange shard = problem::shard_of(p.features, r, p.ranks);
      const T* part = p.parts + p.tokens * shard.begin;
      for (Index t = first; t < last; ++t)
        eigenformer::detail::copy_elements(part + t * shard.size(),
                                           p.rows + t * p.features + shard.begin, shard.size());
    }
  });
}

/// kNone, or what forbids a draw from the row.
template <typename T>
std::int64_t fault_of(const T* row, Index size) {
  using C = compute_type<T>;
  bool good = true, nan = false;
  for (Index i = 0; i < size; ++i)
    good &= static_cast<C>(row[i]) < std::numeric_limits<C>::infinity();  // false for NaN
  if (good) return problem::VocabularyCandidate::kNone;
  for (Index i = 0; i < size; ++i)
    nan |= !(static_cast<C>(row[i]) <= std::numeric_limits<C>::infinity());
  return nan ? problem::VocabularyCandidate::kNan : problem::VocabularyCandidate::kInfinity;
}

template <typename T>
void best_candidates(const problem::Vocabulary<T>& p, Index row, std::int32_t* order) {
  const Index size = p.shard.size(), found = (std::min)(size, p.kept);
  const T* logits = p.logits + row * size;
  problem::VocabularyCandidate* candidates = p.candidates + row * p.kept;
  std::fill_n(candidates, p.kept,
              problem::VocabularyCandidate{-std::numeric_limits<double>::infinity(),
                                           problem::VocabularyCandidate::kNone});
  candidates[0].token = fault_of(logits, size);
  if (candidates[0].token != problem::VocabularyCandidate::kNone) return;
  const auto candidate = [&](Index i) {
    return problem::VocabularyCandidate{static_cast<double>(logits[i]), p.shard.begin + i};
  };
  if (found == 1) {
    // the first of the largest
    candidates[0] = candidate(std::max_element(logits, logits + size) - logits);
    return;
  }
  for (Index i = 0; i < size; ++i) order[i] = static_cast<std::int32_t>(i);
  const auto better = [logits](std::int32_t a, std::int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  if (found < size) std::nth_element(order, order + found, order + size, better);
  std::sort(order, order + found, better);
  for (Index i = 0; i < found; ++i) candidates[i] = candidate(order[i]);
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::Vocabulary<T>& p) {
  parallel_for(on, p.rows, Cost{p.shard.size()}, [&](Index first, Index last, int worker) {
    for (Index row = first; row < last; ++row)
      best_candidates(p, row, p.kept > 1 ? p.order + worker * p.shard.size() : nullptr);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
