/// \file
/// What attention's backward pass is made of, and the memory it holds meanwhile. A task is
/// (sequence, KV head), a band some query rows of it (backward.h). Bands are worked on some at a
/// time, in order, in four phases: each is a number of items that any thread may take, and begins
/// when the one before is done.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../../../core/check.h"
#include "../../../core/workspace.h"
#include "../row.h"
#include "panels.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Query rows of a band. Loading and storing the sums of a key block is 1% of the work that 192
/// rows make of it; the pairs with 512 keys fit L3 and half of L2.
inline constexpr Index kAttentionBandRows = 192;

template <typename Problem>
Index positions_per_band(const Problem& p) {
  return std::max<Index>(1, kAttentionBandRows / std::max<Index>(1, p.group()));
}

/// Positions [first, first + queries) of a sequence, for the heads of a KV head.
struct AttentionBand {
  const problem::AttentionSequence* sequence;
  Index task, kv_head, first, queries;
  Index blocks;        // key blocks that it sees
  bool opens, closes;  // the first, the last of its task
};

enum class BackwardPhase { load, scores, rows, keys };

struct BackwardItem {
  BackwardPhase phase;
  Index band;        // the item is one of this band's
  Index index;       // which one
  Index first_band;  // the first of those at work
  Index before;      // items of all phases before
};

/// The bands of a request, and the items of their phases.
class BackwardPlan {
 public:
  template <typename Problem>
  BackwardPlan(const Problem& p, Index group_rows, Index at_once, Workspace::Frame& frame)
      : group_rows_(group_rows), heads_(p.group()) {
    const Index positions = positions_per_band(p);
    const auto bands_of = [&](const problem::AttentionSequence& s) {
      return std::max<Index>(1, (s.query_rows + positions - 1) / positions);
    };
    for (Index b = 0; b < p.batch; ++b) bands_ += bands_of(p.sequences[b]) * p.kv_heads;
    at_once_ = std::clamp<Index>(at_once, 1, std::max<Index>(1, bands_));
    band_ = frame.take<AttentionBand>(bands_);
    Index next = 0;
    for (Index task = 0; task < p.batch * p.kv_heads; ++task) {
      const problem::AttentionSequence& s = p.sequences[task / p.kv_heads];
      const Index count = bands_of(s);
      for (Index i = 0; i < count; ++i) {
        const Index first = i * positions, queries = (std::min)(positions, s.query_rows - first);
        Index blocks = 0;
        if (queries > 0)
          for_each_key_block(p.visibility, s.first_position + first, queries, s.key_length,
                             [&](Index) { ++blocks; });
        most_blocks_ = (std::max)(most_blocks_, blocks);
        band_[next++] = {&s,     task,   task % p.kv_heads, first, queries,
                         blocks, i == 0, i == count - 1};
      }
    }
    first_item_ = frame.take<Index>(kPhases * bands_ + 1);
    first_item_[0] = 0;
    for (Index e = 0; e < kPhases * bands_; ++e) {
      const BackwardItem place = place_of(e);
      first_item_[e + 1] = first_item_[e] + items_of(place);
    }
  }

  Index items() const { return first_item_[kPhases * bands_]; }
  Index at_once() const { return at_once_; }
  Index most_blocks() const { return most_blocks_; }
  const AttentionBand& band(Index i) const { return band_[i]; }
  /// Row groups of a band.
  Index groups(const AttentionBand& band) const {
    return (band.queries * heads_ + group_rows_ - 1) / group_rows_;
  }
  static Index key_blocks(const AttentionBand& band) {
    return (band.sequence->key_length + kAttentionKeyBlock - 1) / kAttentionKeyBlock;
  }

  BackwardItem item(Index i) const {
    const Index e =
        std::upper_bound(first_item_, first_item_ + kPhases * bands_ + 1, i) - first_item_ - 1;
    BackwardItem item = place_of(e);
    item.index = i - first_item_[e];
    return item;
  }

 private:
  static constexpr Index kPhases = 4;

  /// Of (bands at once, phase, band).
  BackwardItem place_of(Index e) const {
    const Index first = e / (kPhases * at_once_) * at_once_,
                count = (std::min)(at_once_, bands_ - first), local = e - kPhases * first;
    return {static_cast<BackwardPhase>(local / count), first + local % count, 0, first,
            first_item_[kPhases * first + local / count * count]};
  }

  Index items_of(const BackwardItem& place) const {
    const AttentionBand& band = band_[place.band];
    switch (place.phase) {
      case BackwardPhase::load:
        return groups(band) + (band.opens ? key_blocks(band) + 1 : 0);
      case BackwardPhase::scores:
        return band.blocks;
      case BackwardPhase::rows:
        return groups(band);
      case BackwardPhase::keys:
        break;
    }
    // All bands of a task that are at work stand together.
    const bool last =
        band.closes || place.band + 1 == (std::min)(place.first_band + at_once_, bands_);
    return last ? key_blocks(band) + 1 : 0;
  }

  Index group_rows_, heads_, at_once_ = 1, bands_ = 0, most_blocks_ = 0;
  AttentionBand* band_ = nullptr;
  Index* first_item_ = nullptr;
};

/// The panels [begin, end) of a key block that a tile of rows sees.
struct PanelRange {
  int begin, end;
};

/// Memory of a band. "By block": of each key block that it sees.
template <typename C>
struct BandMemory {
  C *queries, *grad_output;     // (rows, width), in panels
  C *weights, *grads, *slopes;  // by block (rows, 64), in panels; P and dS in the end
  // Where products are those of pairs (pairs.h), instead of queries and grad_output: both as left
  // operands, and P and dS as right ones.
  std::uint32_t *queries_along, *queries_across, *grad_output_along, *grad_output_across;
  std::uint32_t *weight_pairs, *grad_pairs;
  C *maxima, *top_grads, *sums, *deltas;  // by block (rows); sums become factors of weights
  problem::ScoreRow* rows;                // (rows)
  double* sink_terms;                     // (rows)
  Index* blocks;                          // where the blocks begin
  PanelRange* panels;                     // by block (row tiles)
  bool* bad_rows;                         // with an element that is no finite number
};

/// Memory of a task: its sequence as panels, by key block, and the sums of its gradients.
template <typename C>
struct TaskMemory {
  C *keys, *key_columns, *value_columns, *grad_keys, *grad_values;
  std::uint64_t* bad_keys;  // by block, keys with an element that is no finite number
  bfloat16 *keys_across, *keys_along, *values_along;  // instead of the first three, for pairs
};

/// Scratch of one worker: of a group of rows.
template <typename C>
struct BackwardScratch {
  C *scores, *grads, *slopes;     // (rows, 64)
  C* grad_queries;                // (rows, width), in panels
  C* values;                      // a key block, in panels
  double *query, *maxima;         // a row whose scores are taken in double, by blocks
  bfloat16 *lines, *value_lines;  // a group of rows or a key block
  std::uint32_t* tile;            // of dS
};

/// Sizes of all this, in elements.
struct BackwardShape {
  Index panel;         // columns of a panel
  Index rows, stride;  // of a band; elements of a panel of it
  Index width, value_width, blocks;
  Index keys;  // of the longest sequence, whole blocks

  /// group: rows that one item of a phase takes, of a band whose rows are a multiple of it.
  template <typename Problem, typename Panels>
  static BackwardShape of(const Problem& f, Panels, Index group) {
    Index keys = 0, queries = 0;
    for (Index b = 0; b < f.batch; ++b) {
      keys = (std::max)(keys, f.sequences[b].key_length);
      queries = (std::max)(queries, f.sequences[b].query_rows);
    }
    const Index rows = (std::min)(positions_per_band(f), queries) * f.group();
    keys = (keys + kAttentionKeyBlock - 1) / kAttentionKeyBlock * kAttentionKeyBlock;
    const Index padded = (rows + group - 1) / group * group;
    // Panels that lie whole pages apart would share their lines of L1: 8 rows lie between them.
    return {Panels::kPanel,
            padded,
            (padded + 8) * Panels::kPanel,
            Panels::Tile::padded(f.head_dim),
            Panels::Tile::padded(f.value_dim),
            0,
            keys};
  }
};

inline Index backward_product(Index a, Index b) {
  return detail::checked_product(a, b, "attention_backward", "scratch");
}

/// `pairs`: whether products are those of pairs.
template <typename C>
BandMemory<C> take_band(const BackwardShape& s, bool softcap, bool pairs, Workspace::Frame& frame) {
  const Index rows = backward_product(s.blocks, s.rows),
              all = backward_product(s.blocks * (kAttentionKeyBlock / s.panel), s.stride),
              units = rows / 2 * kAttentionKeyBlock, width = backward_product(s.rows / 2, s.width),
              value_width = backward_product(s.rows / 2, s.value_width);
  const auto take_units = [&](Index count) {
    return pairs ? frame.take<std::uint32_t>(count) : nullptr;
  };
  return {pairs ? nullptr : frame.take<C>(backward_product(s.width / s.panel, s.stride)),
          pairs ? nullptr : frame.take<C>(backward_product(s.value_width / s.panel, s.stride)),
          frame.take<C>(all),
          frame.take<C>(all),
          softcap ? frame.take<C>(all) : nullptr,
          take_units(width),
          take_units(width),
          take_units(value_width),
          take_units(value_width),
          take_units(units),
          take_units(units),
          frame.take<C>(rows),
          frame.take<C>(rows),
          frame.take<C>(rows),
          frame.take<C>(rows),
          frame.take<problem::ScoreRow>(s.rows),
          frame.take<double>(s.rows),
          frame.take<Index>(s.blocks),
          frame.take<PanelRange>(rows),
          frame.take<bool>(s.rows)};
}

template <typename C>
TaskMemory<C> take_task(const BackwardShape& s, bool pairs, Workspace::Frame& frame) {
  const Index keys = backward_product(s.keys, s.width),
              values = backward_product(s.keys, s.value_width);
  const auto take = [&](Index count) { return pairs ? nullptr : frame.take<C>(count); };
  const auto take_pairs = [&](Index count) {
    return pairs ? frame.take<bfloat16>(count) : nullptr;
  };
  return {take(keys),
          take(keys),
          take(values),
          frame.take<C>(keys),
          frame.take<C>(values),
          frame.take<std::uint64_t>(s.keys / kAttentionKeyBlock),
          take_pairs(keys),
          take_pairs(keys),
          take_pairs(values)};
}

template <typename C>
BackwardScratch<C> take_backward_scratch(const BackwardShape& s, Index group, bool softcap,
                                         Index head_dim, bool pairs, Workspace::Frame& frame) {
  const Index all = group * kAttentionKeyBlock,
              lines = (std::max)(group, Index{kAttentionKeyBlock});
  return {frame.take<C>(all),
          frame.take<C>(all),
          softcap ? frame.take<C>(all) : nullptr,
          frame.take<C>(backward_product(group, s.width)),
          pairs ? nullptr : frame.take<C>(backward_product(kAttentionKeyBlock, s.value_width)),
          frame.take<double>(head_dim),
          frame.take<double>(s.blocks),
          pairs ? frame.take<bfloat16>(backward_product(lines, s.width)) : nullptr,
          pairs ? frame.take<bfloat16>(backward_product(lines, s.value_width)) : nullptr,
          pairs ? frame.take<std::uint32_t>(all / 2) : nullptr};
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
