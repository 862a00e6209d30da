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
  static constexpr int kPanel = Panels::kPanel, kRows = Call::kRows,
                       kVectors = kAttentionKeyBlock / Tile::lanes;  // of a row

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

  /// Dot products of row r, row `of` of the scratch, to weights relative to the greatest score, and
  /// the sums of these and of weighted dP. dP of pairs that it does not see is 0. Pairs with a
  /// `bad` key are NaN where the row sees it.
  void score_row(const Memory& m, Index n, Index r, const BlockRange& range, KeyBits hidden_keys,
                 KeyBits bad, Index of) const {
    if (range.empty()) return hide_row(m, n, r);
    const auto& f = on_.f;
    const bool softcap = f.softcap > 0;
    if (range.full() && hidden_keys == 0 && bad == 0 && !softcap && f.alibi_slopes == nullptr &&
        !f.bias.present())
      return weigh_row(m, n, r, of, [](int, V x, V& grad) {
        grad = select(equal(x, V::set1(-kInfinity)), V::zero(), grad);
        return x;
      });
    const BlockScores<C, Isa> rule(f, m.rows[r], m.blocks[n], range, hidden_keys);
    weigh_row(m, n, r, of, [&](int c, V x, V& grad) {
      C* const slopes = softcap ? on_.pair(m.slopes, n, r, c) : nullptr;
      x = rule(x, c, slopes);
      const auto hidden = equal(x, V::set1(-kInfinity));
      if (bad != 0) x = spoiled(x, hidden.bits(), bad >> c);
      grad = select(hidden, V::zero(), grad);
      if (softcap) select(hidden, V::zero(), V::load(slopes)).store(slopes);
      return x;
    });
  }

  /// The same with score(key, dot product, dP), which hides what it must of both.
  template <typename Score>
  void weigh_row(const Memory& m, Index n, Index r, Index of, Score&& score) const {
    const Index at = n * on_.shape.rows + r, stride = on_.shape.stride;
    const C *const dots = on_.scratch.scores + of * kPanel, *const grad_dots =
                                                                on_.scratch.grads + of * kPanel;
    V scores[kVectors], grads[kVectors], top = V::set1(-kInfinity), top_grad = V::zero();
    for_each_vector([&](int v) {
      const Index from = v / 2 * Index{kGroup} * kPanel + v % 2 * Tile::lanes;
      V x = V::load(dots + from), grad = V::load(grad_dots + from);
      if constexpr (Call::kPairs) x = x * V::set1(on_.f.scale);
      x = score(v * Tile::lanes, x, grad);
      scores[v] = x;
      grads[v] = grad;
      const auto higher = less(top, x);
      top = select(higher, x, top);
      top_grad = select(higher, grad, top_grad);
    });
    const C maximum = reduce_max(top), grad_of_top = grad_of(top, maximum, top_grad);
    m.maxima[at] = maximum;
    m.top_grads[at] = grad_of_top;
    const V reference = V::set1(maximum == -kInfinity ? C(0) : maximum),
            reference_grad = V::set1(grad_of_top);
    C *const weights = on_.pairs(m.weights, n, r, 0), *const to_grads = on_.pairs(m.grads, n, r, 0);
    V sum = V::zero(), delta = V::zero();
    for_each_vector([&](int v) {
      const Index to = v / 2 * stride + v % 2 * Tile::lanes;
      const V weight = exp_of_nonpositive(scores[v] - reference);
      weight.store(weights + to);
      grads[v].store(to_grads + to);
      sum = sum + weight;
      delta = fma(weight, grads[v] - reference_grad, delta);
    });
    m.sums[at] = reduce_add(sum);
    m.deltas[at] = reduce_add(delta);
  }

  /// f(vector) for those of a row; where they are few, they stay in registers.
  template <typename F>
  static EIGENFORMER_INLINE void for_each_vector(F&& f) {
    if constexpr (kVectors <= 4)
      tile::unroll<kVectors>(f);
    else
      for (int v = 0; v < kVectors; ++v) f(v);
  }

  /// Zeros for a row that sees no key of a block.
  void hide_row(const Memory& m, Index n, Index r) const {
    const Index at = n * on_.shape.rows + r;
    m.maxima[at] = -kInfinity;
    m.top_grads[at] = m.sums[at] = m.deltas[at] = C(0);
    for (int p = 0; p < Panels::kPanels; ++p) {
      fill_line(on_.pairs(m.weights, n, r, p), kPanel, V::zero());
      fill_line(on_.pairs(m.grads, n, r, p), kPanel, V::zero());
      if (on_.f.softcap > 0) fill_line(on_.pairs(m.slopes, n, r, p), kPanel, V::zero());
    }
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
