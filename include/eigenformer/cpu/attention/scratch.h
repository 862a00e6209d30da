/// \file
/// Scratch of attention's forward kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "../../core/check.h"
#include "../../core/workspace.h"
#include "int8_scores.h"
#include "pair_products.h"
#include "row.h"
#include "score.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Query rows [first, first + count) of a sequence, padding included, for the heads of `kv_heads`
/// KV heads.
struct AttentionTask {
  const problem::AttentionSequence* sequence;
  Index kv_head, kv_heads, first, count;

  /// Positions that are no padding.
  Index queries() const { return std::clamp<Index>(sequence->query_rows - first, 0, count); }
};

/// What some keys make of some rows: weights relative to the maximum, their sums by lanes, and the
/// sums of weighted values.
template <typename C>
struct AttentionState {
  C *maxima, *lane_sums, *sums;
  bool* sees;  // whether the row sees one of the keys
};

template <typename C>
void copy_states(const AttentionState<C>& from, const AttentionState<C>& to, Index rows,
                 Index width, Index lanes) {
  std::copy_n(from.maxima, rows, to.maxima);
  std::copy_n(from.lane_sums, rows * lanes, to.lane_sums);
  std::copy_n(from.sums, rows * width, to.sums);
  std::copy_n(from.sees, rows, to.sees);
}

/// Adds what later keys make of the rows, both brought to the greater maximum. A row that sees none
/// of the one or of the other keeps its bits.
template <typename Tile, typename C>
void merge_states(const AttentionState<C>& sums, const AttentionState<C>& later, Index rows,
                  Index width) {
  using V = typename Tile::V;
  constexpr C kNone = -std::numeric_limits<C>::infinity();
  const auto row = [&](const AttentionState<C>& s, Index r) {
    return AttentionState<C>{s.maxima + r, s.lane_sums + r * Tile::lanes, s.sums + r * width,
                             s.sees + r};
  };
  for (Index r = 0; r < rows; ++r) {
    if (!later.sees[r]) continue;
    if (!sums.sees[r]) {
      copy_states(row(later, r), row(sums, r), 1, width, Tile::lanes);
      continue;
    }
    const C maximum = (std::max)(sums.maxima[r], later.maxima[r]),
            reference = maximum == kNone ? C(0) : maximum;
    const V factor = exp_of_nonpositive(V::set1(sums.maxima[r] - reference)),
            of_later = exp_of_nonpositive(V::set1(later.maxima[r] - reference));
    const auto add = [&](C* to, const C* from, Index count) {
      for (Index i = 0; i < count; i += Tile::lanes)
        fma(V::load(to + i), factor, V::load(from + i) * of_later).store(to + i);
    };
    add(sums.sums + r * width, later.sums + r * width, width);
    add(sums.lane_sums + r * Tile::lanes, later.lane_sums + r * Tile::lanes, Tile::lanes);
    sums.maxima[r] = maximum;
  }
}

/// Whether queries are quantized for the scores; for double they are not.
template <typename TQ, typename TKV>
inline constexpr bool kInt8Scores =
    std::is_same_v<TKV, std::int8_t> && std::is_same_v<compute_type<TQ>, float>;

/// What the rows of a tile see of a block of keys.
struct TileKeys {
  KeySpan seen;
  bool one_piece;
};

/// Scratch of one worker.
template <typename C>
struct AttentionScratch {
  C *queries, *scores, *keys, *values, *factors;
  AttentionState<C> now, folded;  // of the present fold, and of those before it
  C* block_sums;                  // a few rows'
  double *query, *averages;       // of rows in double
  Index* large_rows;
  bool* finite;
  BlockRange* ranges;  // the keys of a block that rows see,
  KeyBits* hidden;     // and within them do not; nullptr where nothing is masked
  TileKeys* tiles;     // of the tile that begins with a row
  KeyEnds* bad_values;
  Int8ScoreScratch int8;
  PairScratch pairs;
};

/// a * b numbers, whose bytes do not overflow.
inline Index attention_product(Index a, Index b) {
  const Index count = detail::checked_product(a, b, "attention", "scratch");
  detail::checked_product(count, Index{sizeof(double)}, "attention", "scratch");
  return count;
}

template <typename Tile, typename C>
AttentionState<C> take_attention_state(Index rows, Index width, Workspace::Frame& frame) {
  return {frame.take<C>(rows), frame.take<C>(attention_product(rows, Tile::lanes)),
          frame.take<C>(attention_product(rows, width)), frame.take<bool>(rows)};
}

/// Query positions of a task.
template <typename Isa, typename Problem>
Index positions_per_block(const Problem& p) {
  return std::max<Index>(1, kAttentionQueryRows<Isa> / std::max<Index>(1, p.group()));
}

/// Whether the rows of a sequence are few for every KV head.
template <typename Problem>
bool has_few_rows(const Problem& p, const problem::AttentionSequence& s) {
  return s.tensor_rows <= kAttentionFewRows / (std::max)(Index{1}, p.group());
}

/// For tasks of up to `rows` rows, kAttentionFewRows at least.
template <typename Isa, typename TQ, typename TKV, typename Function>
auto take_attention_scratch(const problem::Attention<TQ, TKV, Function>& p, Index rows,
                            Workspace::Frame& frame) {
  using C = compute_type<TQ>;
  using Tile = AttentionTile<C, Isa>;
  const Index width = Tile::padded(p.value_dim);
  // What overflows is said before memory is asked for.
  attention_product(std::max<Index>(rows, kAttentionKeyBlock), (std::max)(p.head_dim, width));
  const bool folds = std::any_of(
      p.sequences, p.sequences + p.batch,
      [](const problem::AttentionSequence& s) { return s.key_length > kAttentionFold; });
  AttentionScratch<C> s{
      frame.take<C>(attention_product(rows, p.head_dim)),
      frame.take<C>(attention_product(rows, kAttentionKeyBlock)),
      frame.take<C>(attention_product(p.head_dim, kAttentionKeyBlock)),
      frame.take<C>(attention_product(kAttentionKeyBlock, Tile::value_stride(width))),
      frame.take<C>(rows),
      take_attention_state<Tile, C>(rows, width, frame),
      take_attention_state<Tile, C>(folds ? rows : 0, width, frame),
      frame.take<C>(attention_product(kAttentionFewRows, width)),
      frame.take<double>(p.head_dim),
      frame.take<double>(attention_product(kRowsInDouble, width)),
      frame.take<Index>(rows),
      frame.take<bool>(rows),
      frame.take<BlockRange>(rows),
      p.masked() ? frame.take<KeyBits>(rows) : nullptr,
      frame.take<TileKeys>(rows),
      frame.take<KeyEnds>(p.value_dim),
      {},
      {}};
  if constexpr (kInt8Scores<TQ, TKV>)
    s.int8 = Int8Scores<Isa>::take_scratch(rows, p.head_dim, frame);
  if constexpr (kPairProducts<Isa, TQ, TKV>)
    s.pairs = PairProducts<Isa>::take_scratch(rows, p.head_dim, width, frame);
  // Lanes and rows that nobody sees are computed with and thrown away.
  const auto clear = [](C* values, Index count) {
    fill_line(values, count, simd::Vec<C, Isa>::zero());
  };
  clear(s.scores, rows * kAttentionKeyBlock);
  clear(s.queries, kAttentionFewRows * p.head_dim);
  clear(s.now.sums, kAttentionFewRows * width);
  clear(s.factors, kAttentionFewRows);
  return s;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
