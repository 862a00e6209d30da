/// \file
/// The third phase of attention's backward pass: rows over all their keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename T>
class BackwardRows {
  using Call = BackwardCall<Isa, T>;
  using C = compute_type<T>;
  using Panels = typename Call::Panels;
  using Tile = typename Panels::Tile;
  using V = typename Panels::V;
  using Band = AttentionBand;
  using Memory = BandMemory<C>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  static constexpr C kLargest = (std::numeric_limits<C>::max)();
  static constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
  static constexpr Index kBlock = kAttentionKeyBlock, kGroup = Call::kGroup;
  static constexpr int kPanel = Panels::kPanel, kRows = Call::kRows;

 public:
  static_assert(kGroup % Tile::lanes == 0);
  explicit BackwardRows(const Call& call) : on_(call) {}

  /// P, dS and the gradients of queries of rows [first, first + kGroup).
  void finish_rows(const Band& band, const Memory& m, const TaskMemory<C>& task,
                   Index first) const {
    RowGroup rows;
    find_maxima(band, m, first, rows);
    combine(band, m, first, rows);
    for (Index r = 0; r < kGroup; ++r) finish_row(band, m, first, r, rows);
    fill_line(on_.scratch.grad_queries, kGroup * on_.shape.width, V::zero());
    for (Index n = 0; n < band.blocks; ++n) {
      const PanelRange* const panels = m.panels + (n * on_.shape.rows + first) / kRows;
      for (Index r = 0; r < kGroup; ++r)
        if (rows.bad[r]) spoil(band, m, n, first + r);
      if constexpr (Call::kPairs) {
        add_pairs(m, task, n, first, panels, rows);
      } else {
        for (Index r = 0; r < kGroup; ++r) scale_row(m, n, first, r, panels[r / kRows], rows);
        add_products(m, task, n, first, panels);
      }
    }
    for (Index r = 0; r < kGroup && first + r < on_.rows(band); ++r)
      Panels::store_row(on_.scratch.grad_queries, r, kGroup * kPanel, on_.f.scale, on_.f.head_dim,
                        on_.query_gradient(band, first + r));
  }

 private:
  /// Of kGroup rows over all their key blocks. dP counts from top_grad, that of the greatest score.
  struct RowGroup {
    C maxima[kGroup], top_grads[kGroup], deltas[kGroup];
    double sums[kGroup], weighted[kGroup];
    bool weightless[kGroup], bad[kGroup];
  };

  double sink(const Band& band, Index r) const {
    return on_.f.sinks == nullptr ? -std::numeric_limits<double>::infinity()
                                  : static_cast<double>(on_.f.sinks[on_.head(band, r)]);
  }

  /// The greatest score of each row, and its dP.
  void find_maxima(const Band& band, const Memory& m, Index first, RowGroup& rows) const {
    fill_line(rows.maxima, kGroup, V::set1(-kInfinity));
    fill_line(rows.top_grads, kGroup, V::zero());
    for (Index n = 0; n < band.blocks; ++n)
      for (Index r = 0; r < kGroup; r += Tile::lanes) {
        const Index at = n * on_.shape.rows + first + r;
        const V maximum = V::load(rows.maxima + r), other = V::load(m.maxima + at);
        const auto higher = less(maximum, other);
        select(higher, other, maximum).store(rows.maxima + r);
        select(higher, V::load(m.top_grads + at), V::load(rows.top_grads + r))
            .store(rows.top_grads + r);
      }
    for (Index r = 0; r < kGroup; ++r) {
      rows.weightless[r] = rows.maxima[r] == -kInfinity;
      const C of_sink = static_cast<C>(sink(band, first + r));
      if (!(of_sink > rows.maxima[r])) continue;
      rows.maxima[r] = of_sink;
      rows.top_grads[r] = C(0);  // a sink is a key whose value is 0
    }
  }

  /// The blocks' sums of weights and of weighted dP to those of the rows. `sums` become the factors
  /// that bring the weights of a block to the row's maximum.
  void combine(const Band& band, const Memory& m, Index first, RowGroup& rows) const {
    std::fill_n(rows.sums, kGroup, 0.0);
    std::fill_n(rows.weighted, kGroup, 0.0);
    for (Index n = 0; n < band.blocks; ++n)
      for (Index r = 0; r < kGroup; r += Tile::lanes) {
        const Index at = n * on_.shape.rows + first + r;
        C sums[Tile::lanes], factors[Tile::lanes];
        const V maximum = V::load(rows.maxima + r),
                reference = select(equal(maximum, V::set1(-kInfinity)), V::zero(), maximum);
        const V factor = exp_of_nonpositive(V::load(m.maxima + at) - reference);
        V::load(m.sums + at).store(sums);
        factor.store(factors);
        factor.store(m.sums + at);
        for (int i = 0; i < Tile::lanes; ++i) {
          const double f = static_cast<double>(factors[i]),
                       weight = f * static_cast<double>(sums[i]);
          const C shift = m.top_grads[at + i] - rows.top_grads[r + i];
          rows.sums[r + i] += weight;
          rows.weighted[r + i] +=
              f * static_cast<double>(m.deltas[at + i]) + weight * static_cast<double>(shift);
        }
      }
  }

  /// Factors of the weights and D of row first + r, in the group. A row without weight on a key
  /// (nothing visible, or all scores -infinity) gives no gradient whatever it holds.
  void finish_row(const Band& band, const Memory& m, Index first, Index r, RowGroup& rows) const {
    const Index of = first + r;
    double& sum = rows.sums[r];
    double factor = 0, delta = 0;
    rows.bad[r] = false;
    m.sink_terms[of] = 0;
    if (!rows.weightless[r] || sum != 0) {  // a NaN is weight
      double maximum = static_cast<double>(rows.maxima[r]);
      if (std::isfinite(sum) && is_large_score(rows.maxima[r], kAttentionLargeScore<T, T>))
        maximum = rescore_row(band, m, of, rows.top_grads[r], sum, rows.weighted[r]);
      const double top_grad = static_cast<double>(rows.top_grads[r]), of_sink = sink(band, of);
      // A sink of -infinity takes no part, whatever the row's gradient holds: 0 * NaN would be NaN.
      const bool sinks = of_sink > -std::numeric_limits<double>::infinity();
      const double sink_weight = sinks ? std::exp(of_sink - maximum) : 0.0;
      sum += sink_weight;
      delta = (rows.weighted[r] - sink_weight * top_grad) / sum;
      // The derivative of log_sum_exp by a score is P.
      if (on_.p.grad_log_sum_exp != nullptr)
        delta -= static_cast<double>(*on_.log_sum_exp_gradient(band, of));
      if (sinks) m.sink_terms[of] = -sink_weight / sum * (top_grad + delta);
      factor = 1 / sum;
      rows.bad[r] = !(std::isfinite(sum) && std::abs(delta) <= kLargest && std::isfinite(top_grad));
    }
    if (rows.bad[r]) factor = delta = 0, rows.top_grads[r] = C(0);
    rows.deltas[r] = static_cast<C>(delta);
    for (Index n = 0; n < band.blocks; ++n) {
      C& f = m.sums[n * on_.shape.rows + of];
      f = factor == 0 ? C(0) : f * static_cast<C>(factor);
    }
  }

  /// The weights of row r from scores in double; returns their maximum.
  double rescore_row(const Band& band, const Memory& m, Index r, C top_grad, double& sum,
                     double& weighted) const {
    query_in_double(on_.f, on_.token(band, r) * on_.f.heads + on_.head(band, r), on_.scratch.query);
    RunningMaximum maximum{sink(band, r)};
    C scores[kBlock], slopes[kBlock];
    KeyBits hidden;
    for (Index n = 0; n < band.blocks; ++n) {
      const BlockRange range = on_.range_of(band, m, r, m.blocks[n], hidden);
      if (!range.empty()) {
        std::fill_n(slopes, kBlock, C(0));
        scores_in_double<Isa>(on_.f, on_.scratch.query, on_.key_block(band, m.blocks[n]), m.rows[r],
                              m.blocks[n], range, hidden, maximum, scores,
                              on_.f.softcap > 0 ? slopes : nullptr);
        for (int c = 0; c < kBlock; c += kPanel) {
          std::copy_n(scores + c, kPanel, on_.pair(m.weights, n, r, c));
          if (on_.f.softcap > 0) std::copy_n(slopes + c, kPanel, on_.pair(m.slopes, n, r, c));
        }
      }
      on_.scratch.maxima[n] = maximum.value;
    }
    sum = weighted = 0;
    for (Index n = 0; n < band.blocks; ++n) {
      if (on_.range_of(band, m, r, m.blocks[n], hidden).empty()) continue;
      const V rise = V::set1(static_cast<C>(maximum.value - on_.scratch.maxima[n]));
      V weights = V::zero(), grads = V::zero();
      for (int c = 0; c < kBlock; c += Tile::lanes) {
        C* const to = on_.pair(m.weights, n, r, c);
        const V weight = exp_of_nonpositive(V::load(to) - rise);
        weight.store(to);
        weights = weights + weight;
        grads = fma(weight, V::load(on_.pair(m.grads, n, r, c)) - V::set1(top_grad), grads);
      }
      sum += static_cast<double>(reduce_add(weights));
      weighted += static_cast<double>(reduce_add(grads));
      m.sums[n * on_.shape.rows + r] = C(1);
    }
    return maximum.value;
  }

  /// P and dS of row first + r in column c of panel p, from its weights and dP.
  EIGENFORMER_INLINE void scaled_pair(const Memory& m, Index n, Index first, Index r, int p, int c,
                                      const RowGroup& rows, V& probability, V& ds) const {
    const V factor = V::set1(rows.bad[r] ? C(1) : m.sums[n * on_.shape.rows + first + r]);
    probability = V::load(on_.pairs(m.weights, n, first + r, p) + c) * factor;
    ds = probability * (V::load(on_.pairs(m.grads, n, first + r, p) + c) -
                        V::set1(rows.top_grads[r]) - V::set1(rows.deltas[r]));
    if (on_.f.softcap > 0) ds = ds * V::load(on_.pairs(m.slopes, n, first + r, p) + c);
  }

  /// Weights and dP of row first + r to P and dS, in place.
  void scale_row(const Memory& m, Index n, Index first, Index r, PanelRange panels,
                 const RowGroup& rows) const {
    for (int p = panels.begin; p < panels.end; ++p)
      for (int c = 0; c < kPanel; c += Tile::lanes) {
        V probability, ds;
        scaled_pair(m, n, first, r, p, c, rows, probability, ds);
        probability.store(on_.pairs(m.weights, n, first + r, p) + c);
        ds.store(on_.pairs(m.grads, n, first + r, p) + c);
      }
  }

  /// dS of rows [first, first + kGroup) with key block n by its keys, to the gradients of queries.
  void add_products(const Memory& m, const TaskMemory<C>& task, Index n, Index first,
                    const PanelRange* panels) const {
    const C* const keys = task.keys + m.blocks[n] * on_.shape.width;
    for (Index c = 0; c < on_.shape.width; c += kPanel)
      for (Index t = 0; t < kGroup / kRows; ++t) {
        const PanelRange seen = panels[t];
        if (seen.begin >= seen.end) continue;
        V sum[kRows][2];
        Panels::clear(sum);
        Panels::multiply(on_.pairs(m.grads, n, first + t * kRows, seen.begin), on_.shape.stride,
                         keys + c * kBlock + seen.begin * kPanel * kPanel,
                         (seen.end - seen.begin) * kPanel, sum);
        Panels::add(sum, on_.scratch.grad_queries + c * kGroup + t * kRows * kPanel);
      }
  }

  /// The same by products of pairs, from weights and dP of these rows; P and dS to the panels of
  /// the last phase.
  void add_pairs(const Memory& m, const TaskMemory<C>& task, Index n, Index first,
                 const PanelRange* panels, const RowGroup& rows) const {
    using Pairs = typename Call::Pairs;
    const bfloat16* const keys = task.keys_across + m.blocks[n] * on_.shape.width;
    for (Index t = 0; t < kGroup / kRows; ++t) {
      alignas(64) bfloat16 lines[kRows * kBlock];
      for (Index r = 0; r < kRows; r += 2)
        pack_rows(m, n, first, t * kRows + r, rows, lines + r * kBlock);
      const PanelRange seen = panels[t];
      if (seen.begin >= seen.end) continue;
      Pairs::pack_tile(lines, on_.scratch.tile);
      constexpr Index steps = kPanel / 2;  // of a panel of pairs
      Pairs::multiply(on_.scratch.tile + seen.begin * steps * kRows,
                      keys + seen.begin * kPanel * kPanel, kBlock * kPanel,
                      (seen.end - seen.begin) * steps, on_.shape.width / kPanel, false,
                      on_.scratch.grad_queries + t * kRows * kPanel);
    }
  }

  /// P and dS of rows r and r + 1 of a group, in pairs of the two; dS to lines (2, 64) besides.
  void pack_rows(const Memory& m, Index n, Index first, Index r, const RowGroup& rows,
                 bfloat16* lines) const {
    for (int p = 0; p < Panels::kPanels; ++p) {
      std::uint32_t* const weights = on_.row_pairs(m.weight_pairs, n, first + r, p);
      std::uint32_t* const grads = on_.row_pairs(m.grad_pairs, n, first + r, p);
      V probabilities[2][2], ds[2][2];  // of two rows and the two halves of a panel
      for (int row = 0; row < 2; ++row) {
        for (int half = 0; half < 2; ++half)
          scaled_pair(m, n, first, r + row, p, half * Tile::lanes, rows, probabilities[row][half],
                      ds[row][half]);
        tile::store_rounded(Isa{}, ds[row][0], ds[row][1], lines + row * kBlock + p * kPanel);
      }
      for (int half = 0; half < 2; ++half) {
        const int c = half * Tile::lanes;
        tile::store_rounded_pairs(Isa{}, probabilities[0][half], probabilities[1][half],
                                  weights + c);
        tile::store_rounded_pairs(Isa{}, ds[0][half], ds[1][half], grads + c);
      }
    }
  }

  /// NaN for weight and dP of every pair of row r with the keys that it sees in block n.
  void spoil(const Band& band, const Memory& m, Index n, Index r) const {
    KeyBits hidden;
    const BlockRange range = on_.range_of(band, m, r, m.blocks[n], hidden);
    if (range.empty()) return;
    const BlockScores<C, Isa> rule(on_.f, m.rows[r], m.blocks[n], range, hidden);
    for (int c = 0; c < kBlock; c += Tile::lanes) {
      const V pair_value =
          select(equal(rule(V::zero(), c), V::set1(-kInfinity)), V::zero(), V::set1(kNaN));
      pair_value.store(on_.pair(m.weights, n, r, c));
      pair_value.store(on_.pair(m.grads, n, r, c));
    }
  }

  const Call& on_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
