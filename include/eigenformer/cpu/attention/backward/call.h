/// \file
/// A request of attention's backward pass as its phases see it: where what lies, and who sees whom.
/// Rows count within a band: all heads of its first position, then those of the next.
#pragma once

#include <algorithm>

#include "../row.h"
#include "../score.h"
#include "pairs.h"
#include "plan.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename T>
struct BackwardCall {
  using C = compute_type<T>;
  using Panels = AttentionPanels<C, Isa>;
  using Band = AttentionBand;
  using Pairs = BackwardPairs<Isa>;
  static constexpr bool kPairs = kPairProducts<Isa, T, T>;
  // Rows of a tile, and those that one item of a phase takes.
  static constexpr int kRows = [] {
    if constexpr (kPairs)
      return Pairs::kRows;
    else
      return Panels::kRows;
  }();
  static constexpr int kGroup = [] {
    if constexpr (kPairs)
      return Pairs::kGroup;
    else
      return 4 * Panels::kRows;
  }();

  const problem::AttentionBackward<T>& p;
  const problem::Attention<T, T>& f;
  const BackwardShape& shape;
  const BackwardScratch<C>& scratch;  // the worker's
  Index group;

  BackwardCall(const problem::AttentionBackward<T>& problem, const BackwardShape& sizes,
               const BackwardScratch<C>& worker_scratch)
      : p(problem),
        f(problem.forward),
        shape(sizes),
        scratch(worker_scratch),
        group(problem.forward.group()) {}

  Index rows(const Band& band) const { return band.queries * group; }
  Index head(const Band& band, Index r) const { return band.kv_head * group + r % group; }
  Index position(const Band& band, Index r) const {
    return band.sequence->first_position + band.first + r / group;
  }
  /// Its row in the tensor of queries.
  Index token(const Band& band, Index r) const {
    return band.sequence->query_begin + band.first + r / group;
  }
  const T* query(const Band& band, Index r) const { return f.query(token(band, r), head(band, r)); }
  T* query_gradient(const Band& band, Index r) const {
    return p.query_gradient(token(band, r), head(band, r));
  }
  const T* grad_output(const Band& band, Index r) const {
    return p.grad_output + (token(band, r) * f.heads + head(band, r)) * f.value_dim;
  }
  const C* log_sum_exp_gradient(const Band& band, Index r) const {
    return p.grad_log_sum_exp + band.sequence->lse_begin + head(band, r) * f.lse_head_stride +
           band.first + r / group;
  }
  T* key_gradient(const Band& band, Index j) const {
    return p.key_gradient(*band.sequence, band.kv_head, j);
  }
  T* value_gradient(const Band& band, Index j) const {
    return p.value_gradient(*band.sequence, band.kv_head, j);
  }
  KeyBlock<T> key_block(const Band& band, Index begin) const {
    const problem::AttentionSequence& s = *band.sequence;
    return {f.source, s.key_sequence, band.kv_head, s.key_begin + begin,
            static_cast<int>(std::min<Index>(kAttentionKeyBlock, s.key_length - begin))};
  }

  /// Pairs of rows r and r + 1 with panel `panel` of a band's key block n, r even.
  std::uint32_t* row_pairs(std::uint32_t* matrix, Index n, Index r, Index panel) const {
    return matrix + ((n * Panels::kPanels + panel) * shape.rows + r) / 2 * Panels::kPanel;
  }

  /// Row r of panel `panel` of a band's key block n.
  C* pairs(C* matrix, Index n, Index r, Index panel) const {
    return matrix + (n * Panels::kPanels + panel) * shape.stride + r * Panels::kPanel;
  }
  C* pair(C* matrix, Index n, Index r, int key) const {
    return pairs(matrix, n, r, key / Panels::kPanel) + key % Panels::kPanel;
  }

  problem::ScoreRow score_row_of(const Band& band, Index r) const {
    return {band.sequence - f.sequences, head(band, r), token(band, r), position(band, r)};
  }
  /// The keys that row r sees of the block at `begin`; `hidden` are those in between that it does
  /// not see.
  BlockRange range_of(const Band& band, const BandMemory<C>& m, Index r, Index begin,
                      KeyBits& hidden) const {
    hidden = 0;
    if (r >= rows(band)) return {0, 0, 0};
    BlockRange range =
        block_range(f.visibility, m.rows[r].position, band.sequence->key_length, begin);
    if (f.masked()) hidden = hide_masked(f, m.rows[r], begin, range);
    return range;
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
