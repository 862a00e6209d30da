/// \file
/// A request of attention, and the scores of one of its rows in double: for rows whose scores are
/// so large that their rounding in float would show. Such rows are rare, so this reads keys where
/// they lie, without packing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "../../problem/attention.h"
#include "../../problem/kv_source.h"
#include "../../problem/score.h"
#include "../../problem/visibility.h"
#include "../backend.h"
#include "../vector/functions.h"
#include "score.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Rows of a query block: packing a key block for 128 costs 8% of the work on it, and what they
/// take of heads of 128 fits half of an L2 of 512 KiB. Machines with AVX-512 have more.
template <typename Isa>
inline constexpr Index kAttentionQueryRows = std::is_base_of_v<isa::avx512, Isa> ? 256 : 128;

/// Keys whose blocks are summed together, before they are added to the rest: at absolute positions.
/// Where tasks are few, threads take the folds of one.
inline constexpr Index kAttentionFold = 16 * kAttentionKeyBlock;

/// How many rows go over their keys in double together.
inline constexpr Index kRowsInDouble = 32;

/// The first and the last of some keys; {-1, -1} where there is none.
struct KeyEnds {
  Index first, last;
};

/// How many workers a request is worth, at kPackCycles per multiply-add (the second was worth it
/// from 65536 on in all, in a ParallelRegion too).
template <typename Backend, typename Problem>
Index attention_workers(const Backend& on, const Problem& p, Index tasks) {
  double work = 0;
  for (Index b = 0; b < p.batch; ++b) {
    const problem::AttentionSequence& s = p.sequences[b];
    work += static_cast<double>(s.query_rows) * static_cast<double>(s.key_length) *
            static_cast<double>(p.heads * (p.head_dim + p.value_dim));
  }
  return part_count(on, tasks, Cost{1, kPackCycles * work / static_cast<double>(tasks)});
}

/// The block of a KvSource that attention reads next: keys [begin, begin + count) of a sequence and
/// KV head.
template <typename TKV>
struct KeyBlock {
  const KvSource<TKV>& source;
  Index sequence, kv_head, begin;
  int count;

  const TKV* key(int j) const { return source.key_row(sequence, kv_head, begin + j); }
  const TKV* value(int j) const { return source.value_row(sequence, kv_head, begin + j); }
  float key_scale(int j) const {
    if constexpr (std::is_same_v<TKV, std::int8_t>)
      return source.key_scale(sequence, kv_head, begin + j);
    return 1.0f;
  }
  float value_scale(int j) const {
    if constexpr (std::is_same_v<TKV, std::int8_t>)
      return source.value_scale(sequence, kv_head, begin + j);
    return 1.0f;
  }
};

/// The largest score that float sums serve. A score is rounded relative to its size, by a few units
/// of 2^-24 of it at head_dim 128, and that is the relative error of its weight: at 32 within the
/// tolerance of float (tests: at 64 no longer), at 1024 far below that of 16 bits and INT8.
template <typename TQ, typename TKV>
inline constexpr float kAttentionLargeScore =
    std::is_same_v<TQ, float> && std::is_same_v<TKV, float> ? 32.0f : 1024.0f;

/// Whether the scores of a row with this maximum are to be taken in double, where float serves up
/// to `limit`.
template <typename C>
bool is_large_score(C maximum, float limit) {
  if constexpr (std::is_same_v<C, double>)
    return false;
  else
    return std::abs(maximum) > limit && std::abs(maximum) <= (std::numeric_limits<float>::max)();
}

/// Four vectors of sums, then their total: one order on an ISA. Not sum_over_vectors: a head has no
/// blocks to sum, however long it is.
template <typename Isa, typename S>
double dot_in_double(const double* x, const S* y, Index count) {
  using W = simd::Vec<double, Isa>;
  W sums[4] = {W::zero(), W::zero(), W::zero(), W::zero()};
  Index d = 0;
  for (; d + 4 * W::lanes <= count; d += 4 * W::lanes)
    for (int i = 0; i < 4; ++i)
      sums[i] = fma(W::load(x + d + i * W::lanes), W::load(y + d + i * W::lanes), sums[i]);
  for (; d < count; d += W::lanes) {
    const int n = static_cast<int>(std::min<Index>(W::lanes, count - d));
    sums[0] = fma(W::load_partial(x + d, n), W::load_partial(y + d, n), sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// The scales of channels of INT8 keys, (head_dim) of a KV head, or nullptr: queries take them, for
/// q . (stored * scales) = (q * scales) . stored.
template <typename Problem>
const float* channel_scales(const Problem& p, Index kv_head) {
  const float* const scales = p.source.key_channel_scales;
  return scales == nullptr ? nullptr : scales + kv_head * p.head_dim;
}

/// query[0, head_dim): the row at `row` of (rows * heads), times the scale.
template <typename Problem>
void query_in_double(const Problem& p, Index row, double* query) {
  const auto* const from = p.query(row / p.heads, row % p.heads);
  const float* const scales = channel_scales(p, row % p.heads / p.group());
  for (Index d = 0; d < p.head_dim; ++d) {
    query[d] = static_cast<double>(from[d]) * static_cast<double>(p.scale);
    if (scales != nullptr) query[d] *= static_cast<double>(scales[d]);
  }
}

/// The greatest score of a row so far; what is relative to an earlier one is multiplied by e^-rise.
struct RunningMaximum {
  double value = -std::numeric_limits<double>::infinity();

  /// Its rise, when a score of `other` is met.
  double rise_to(double other) {
    if (!(other > value)) return 0;
    return other - std::exchange(value, other);
  }
};

/// Scores of a query with the keys of a block that begins at block_begin, less the greatest so far,
/// rounded when they are small numbers: scores[0, 64), -infinity where the query does not see the
/// key. slopes[0, 64), of the softcap, where given. Returns how much the maximum rose.
template <typename Isa, typename TQ, typename TKV, typename Function>
double scores_in_double(const problem::Attention<TQ, TKV, Function>& p, const double* query,
                        const KeyBlock<TKV>& block, const problem::ScoreRow& row, Index block_begin,
                        const BlockRange& range, KeyBits hidden, RunningMaximum& maximum,
                        compute_type<TQ>* scores, compute_type<TQ>* slopes = nullptr) {
  using C = compute_type<TQ>;
  double x[kAttentionKeyBlock];
  double top = -std::numeric_limits<double>::infinity();
  const KeyBits seen = keys_of(range) & ~hidden;
  for (int j = 0; j < kAttentionKeyBlock; ++j) {
    x[j] = -std::numeric_limits<double>::infinity();
    if ((seen >> j & 1) == 0) continue;
    const auto score =
        problem::score_of_product(p, p.function, row, block_begin + j,
                                  dot_in_double<Isa>(query, block.key(j), p.head_dim) *
                                      static_cast<double>(block.key_scale(j)));
    x[j] = score.value;
    if (slopes != nullptr) slopes[j] = static_cast<C>(score.slope);
    top = (std::max)(top, x[j]);
  }
  const double rise = maximum.rise_to(top);
  const double reference = top == -std::numeric_limits<double>::infinity() ? 0 : maximum.value;
  for (int j = 0; j < kAttentionKeyBlock; ++j) scores[j] = static_cast<C>(x[j] - reference);
  return rise;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
