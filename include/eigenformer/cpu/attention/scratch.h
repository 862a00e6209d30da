/// \file
/// Scratch of attention's forward kernel.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../../core/check.h"
#include "../../core/workspace.h"
#include "few_rows.h"
#include "row.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Scratch of one worker.
template <typename C>
struct AttentionScratch {
  C *queries, *sums, *scores, *keys, *values, *maxima, *lane_sums, *factors;
  C *folded_sums, *folded_maxima, *folded_lane_sums;  // of the keys before the present fold
  C* block_sums;                                      // a tile's, or a few rows'
  double *query, *averages;                           // of rows in double
  Index* large_rows;
  bool* finite;
  BlockRange* ranges;
  KeyEnds* bad_values;
};

/// Query positions of a task.
template <typename Problem>
Index positions_per_block(const Problem& p) {
  return std::max<Index>(1, kAttentionQueryRows / std::max<Index>(1, p.group()));
}

template <typename Isa, typename TQ, typename TKV>
auto take_attention_scratch(const problem::Attention<TQ, TKV>& p, Workspace::Frame& frame) {
  using C = compute_type<TQ>;
  using Tile = AttentionTile<C, Isa>;
  const auto product = [](Index a, Index b) {
    return detail::checked_product(a, b, "attention", "scratch");
  };
  const Index rows = (std::max)(positions_per_block(p) * p.group(), kAttentionFewRows),
              width = Tile::padded(p.value_dim);
  const bool folds = std::any_of(
      p.sequences, p.sequences + p.batch,
      [](const problem::AttentionSequence& s) { return s.key_length > kAttentionFold; });
  const Index folded_rows = folds ? rows : 0;
  AttentionScratch<C> s{
      frame.take<C>(product(rows, p.head_dim)),
      frame.take<C>(product(rows, width)),
      frame.take<C>(product(rows, kAttentionKeyBlock)),
      frame.take<C>(product(p.head_dim, kAttentionKeyBlock)),
      frame.take<C>(product(kAttentionKeyBlock, width)),
      frame.take<C>(rows),
      frame.take<C>(product(rows, Tile::lanes)),
      frame.take<C>(rows),
      frame.take<C>(product(folded_rows, width)),
      frame.take<C>(folded_rows),
      frame.take<C>(product(folded_rows, Tile::lanes)),
      frame.take<C>(product((std::max)(Index{Tile::kRows}, kAttentionFewRows), width)),
      frame.take<double>(p.head_dim),
      frame.take<double>(product(kRowsInDouble, width)),
      frame.take<Index>(rows),
      frame.take<bool>(rows),
      frame.take<BlockRange>(rows),
      frame.take<KeyEnds>(p.value_dim)};
  // Lanes and rows that nobody sees are computed with and thrown away.
  const auto clear = [](C* values, Index count) {
    fill_line(values, count, simd::Vec<C, Isa>::zero());
  };
  clear(s.scores, rows * kAttentionKeyBlock);
  clear(s.queries, kAttentionFewRows * p.head_dim);
  clear(s.sums, kAttentionFewRows * width);
  clear(s.factors, kAttentionFewRows);
  return s;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
