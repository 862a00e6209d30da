/// \file
/// The second phase of attention's backward pass: the pairs of a band with a key block.
#pragma once

#include <bit>
#include <limits>

#include "call.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename T>
class BackwardScores {
  using Call = BackwardCall<Isa, T>;
  using C = compute_type<T>;
  using Panels = typename Call::Panels;
  using Tile = typename Panels::Tile;
  using V = typename Panels::V;
  using Band = AttentionBand;
  using Memory = BandMemory<C>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  static constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
  static constexpr Index kBlock = kAttentionKeyBlock, kGroup = Call::kGroup;
  static constexpr int kPanel = Panels::kPanel, kRows = Call::kRows;

 public:
  explicit BackwardScores(const Call& call) : on_(call) {}

  /// Weights of the band's pairs with its key block n, relative to the greatest score that a row
  /// has there, and dP.
  void score(const Band& band, const Memory& m, const TaskMemory<C>& task, Index n) const {
    Index begin = -1, i = 0;
    for_each_key_block(on_.f.visibility, band.sequence->first_position + band.first, band.queries,
                       band.sequence->key_length, [&](Index b) {
                         if (i++ == n) begin = b;
                       });
    m.blocks[n] = begin;
    const KeyBits bad_keys = task.bad_keys[begin / kBlock];
    for (Index first = 0; first < on_.rows(band); first += kGroup) {
      BlockRange ranges[kGroup];
      KeyBits hidden[kGroup];
      for (Index r = 0; r < kGroup; ++r) {
        if (r > 0 && first + r < on_.rows(band) && !on_.f.masked() &&
            m.rows[first + r].position == m.rows[first + r - 1].position)
          ranges[r] = ranges[r - 1], hidden[r] = 0;
        else
          ranges[r] = on_.range_of(band, m, first + r, begin, hidden[r]);
      }
      PanelRange* const panels = m.panels + (n * on_.shape.rows + first) / kRows;
      for (Index t = 0; t < kGroup / kRows; ++t) panels[t] = panels_of(ranges + t * kRows);
      multiply(m, task, panels, first, begin);
      for (Index r = 0; r < kGroup; ++r)
        score_row(m, n, first + r, ranges[r], hidden[r],
                  m.bad_rows[first + r] ? ~KeyBits{0} : bad_keys, r);
      for (Index r = 0; r < kGroup; ++r)
        if (!ranges[r].empty()) weigh_row(m, n, first + r, r);
    }
  }

 private:
  static PanelRange panels_of(const BlockRange* ranges) {
    const KeySpan seen = seen_by_tile(ranges, kRows);
    if (seen.begin >= seen.end) return {0, 0};
    return {seen.begin / kPanel, (seen.end + kPanel - 1) / kPanel};
  }

  /// Dot products of rows [first, first + kGroup) with the keys and the values at `begin`.
  void multiply(const Memory& m, const TaskMemory<C>& task, const PanelRange* panels, Index first,
                Index begin) const {
    const Index width = on_.shape.width, value_width = on_.shape.value_width;
    if constexpr (Call::kPairs) {
      for (Index t = 0; t < kGroup / kRows; ++t) {
        const PanelRange seen = panels[t];
        if (seen.begin >= seen.end) continue;
        const auto of_panels = [&](const std::uint32_t* rows, const bfloat16* columns, Index depth,
                                   C* out) {
          Call::Pairs::multiply(rows + (first + t * kRows) * (depth / 2),
                                columns + begin * depth + seen.begin * kPanel * depth,
                                kPanel * depth, depth / 2, seen.end - seen.begin, true,
                                out + (seen.begin * kGroup + t * kRows) * kPanel);
        };
        of_panels(m.queries_along, task.keys_along, width, on_.scratch.scores);
        of_panels(m.grad_output_along, task.values_along, value_width, on_.scratch.grads);
      }
    } else {
      multiply_tiles(panels, m.queries + first * kPanel, task.key_columns + begin * width, width,
                     on_.scratch.scores);
      multiply_tiles(panels, m.grad_output + first * kPanel,
                     task.value_columns + begin * value_width, value_width, on_.scratch.grads);
    }
  }

  /// out (kGroup, 64), in panels, = rows * columns, the panels that a tile sees.
  void multiply_tiles(const PanelRange* panels, const C* rows, const C* columns, Index depth,
                      C* out) const {
    for (int p = 0; p < Panels::kPanels; ++p)
      for (Index t = 0; t < kGroup / kRows; ++t) {
        if (p < panels[t].begin || p >= panels[t].end) continue;
        V sum[kRows][2];
        Panels::clear(sum);
        Panels::multiply(rows + t * kRows * kPanel, on_.shape.stride, columns + p * kPanel * depth,
                         depth, sum);
        Panels::store(sum, out + (p * kGroup + t * kRows) * kPanel, kPanel);
      }
  }

  /// Where the scratch has key c of row r of a group.
  static Index place(Index r, int c) {
    return (c / kPanel * Index{kGroup} + r) * kPanel + c % kPanel;
  }

  /// Dot products of row r, row `of` of the scratch, to scores in place; the greatest and its dP.
  /// dP of pairs that it does not see is 0. Pairs with a `bad` key are NaN where the row sees it.
  void score_row(const Memory& m, Index n, Index r, const BlockRange& range, KeyBits hidden_keys,
                 KeyBits bad, Index of) const {
    const Index at = n * on_.shape.rows + r;
    if (range.empty()) {
      m.maxima[at] = -kInfinity;
      m.top_grads[at] = m.sums[at] = m.deltas[at] = C(0);
      for (int p = 0; p < Panels::kPanels; ++p) {
        fill_line(on_.pairs(m.weights, n, r, p), kPanel, V::zero());
        fill_line(on_.pairs(m.grads, n, r, p), kPanel, V::zero());
        if (on_.f.softcap > 0) fill_line(on_.pairs(m.slopes, n, r, p), kPanel, V::zero());
      }
      return;
    }
    const BlockScores<C, Isa> rule(on_.f, m.rows[r], m.blocks[n], range, hidden_keys);
    V top = V::set1(-kInfinity), top_grad = V::zero();
    for (int c = 0; c < kBlock; c += Tile::lanes) {
      C* const slopes = on_.f.softcap > 0 ? on_.pair(m.slopes, n, r, c) : nullptr;
      C* const score = on_.scratch.scores + place(of, c);
      V x = V::load(score);
      if constexpr (Call::kPairs) x = x * V::set1(on_.f.scale);
      x = rule(x, c, slopes);
      const auto hidden = equal(x, V::set1(-kInfinity));
      if (bad != 0) x = spoiled(x, hidden.bits(), bad >> c);
      const V grad = select(hidden, V::zero(), V::load(on_.scratch.grads + place(of, c)));
      if (slopes != nullptr) select(hidden, V::zero(), V::load(slopes)).store(slopes);
      x.store(score);
      grad.store(on_.pair(m.grads, n, r, c));
      const auto higher = less(top, x);
      top = select(higher, x, top);
      top_grad = select(higher, grad, top_grad);
    }
    m.maxima[at] = reduce_max(top);
    m.top_grads[at] = grad_of(top, m.maxima[at], top_grad);
  }

  /// Scores of row r to weights, and the sums of these and of weighted dP.
  void weigh_row(const Memory& m, Index n, Index r, Index of) const {
    const Index at = n * on_.shape.rows + r;
    const V reference = V::set1(m.maxima[at] == -kInfinity ? C(0) : m.maxima[at]),
            reference_grad = V::set1(m.top_grads[at]);
    V sum = V::zero(), delta = V::zero();
    for (int c = 0; c < kBlock; c += Tile::lanes) {
      const V weight = exp_of_nonpositive(V::load(on_.scratch.scores + place(of, c)) - reference);
      weight.store(on_.pair(m.weights, n, r, c));
      sum = sum + weight;
      delta = fma(weight, V::load(on_.pair(m.grads, n, r, c)) - reference_grad, delta);
    }
    m.sums[at] = reduce_add(sum);
    m.deltas[at] = reduce_add(delta);
  }

  /// NaN in the bad lanes that are not hidden.
  static V spoiled(V x, std::uint32_t hidden, std::uint64_t bad) {
    C lanes[Tile::lanes];
    x.store(lanes);
    for (int i = 0; i < Tile::lanes; ++i)
      if ((bad >> i & 1) != 0 && (hidden >> i & 1) == 0) lanes[i] = kNaN;
    return V::load(lanes);
  }

  /// The dP of the first lane that has the maximum.
  static C grad_of(V scores, C maximum, V grads) {
    C values[Tile::lanes];
    grads.store(values);
    const int lane = std::countr_zero(equal(scores, V::set1(maximum)).bits());
    return lane < Tile::lanes ? values[lane] : C(0);
  }

  const Call& on_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
