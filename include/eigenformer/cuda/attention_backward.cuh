/// \file
/// CUDA kernels of the gradients of attention (formulas: cpu/attention/backward.h), over tiles of
/// 64 queries of a head by 64 keys at absolute positions of their sequence, so that every sum has
/// one order; no two blocks write one element. The first launch has a block for each (64 queries,
/// head): it goes over the keys for maximum, sum and D of each row, from the very scores and dP
/// that P and dS are made of (a gradient of log_sum_exp is taken off D), and once more for dQ. The
/// second has a block for each (64 keys, KV head), which goes over the queries of the group's heads
/// in order for dK and dV. What a row needs passes from one to the other in some 24 bytes of
/// scratch per row; 16-bit gradients are summed in float, in scratch of their size. Rows whose
/// scores are too large for their rounding take them in double.
///
/// 18 * head_dim flops for each visible pair, 10 of them unavoidable: scores and dP are made three
/// times and never stored. Keys and values are read twice for each 64 queries of a head, queries
/// and grad_output once for each 64 keys: 64 bytes or more for 18 * 64 flops, mostly out of L2, so
/// that arithmetic is the limit. In 16 bits all products are those of tensor cores, their operands
/// staged through shared memory without overlap: 10% to 15% of an H100's peak is expected, 20% to
/// 30% of that of FMA in float.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <tuple>

#include "../core/workspace.h"
#include "attention_pairs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Rows, and dQ. A unit is (tile, head).
template <typename T>
struct AttentionQueryGradients {
  using C = compute_type<T>;
  using Row = AttentionRow<C>;
  using Pairs = PairTile<T>;
  static constexpr int kThreads = kTileThreads;
  AttentionPairs<T> on;
  const Index* first_tile;  // (batch + 1)
  Index tiles;
  GradientSums<C> sums;  // (rows, heads, head_dim)
  Row* rows;
  double* sink_gradients;  // (rows, heads) or nullptr

  static constexpr std::size_t shared_size() {
    return AttentionPairs<T>::shared_size(1) + shared_bytes<Row>(kTile);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = AttentionPairs<T>::arrays(block);
    const auto pairs = AttentionPairs<T>::pair_array(block);
    const auto known = block.template shared<Row>(kTile);
    const auto& f = on.p.forward;
    for (Index unit = block.index(); unit < tiles * f.heads; unit += block.count()) {
      const Index tile = unit / f.heads,
                  b = sequence_at(f.batch, tile, [&](Index i) { return first_tile[i]; });
      const AttentionTileAt at{f.sequences + b, unit % f.heads, (tile - first_tile[b]) * kTile, 0};
      if (find_rows(block, arrays, known, at, false)) find_rows(block, arrays, known, at, true);
      write_gradient(block, arrays, pairs, known, at);
      block.barrier();
    }
  }

 private:
  /// Online: the greatest score and its dP; relative to these the sums of weights and of weighted
  /// dP. A rescaled sum keeps its precision.
  struct State {
    double maximum, top, weights, grads;
  };
  /// The greater score, a NaN before all; both lanes of an exchange choose alike.
  EIGENFORMER_DEVICE static bool before(double score, double grad, double other,
                                        double other_grad) {
    if (score != score || other != other) return score != score;
    return score > other || (score == other && grad > other_grad);
  }

  /// Scores of a tile, and dP.
  template <typename Block>
  EIGENFORMER_DEVICE void add_tile(Block& block, const unsigned (&seen)[Pairs::kRows],
                                   Pairs& scores, Pairs& grads,
                                   State (&states)[Pairs::kRows]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      C maximum = static_cast<C>(states[k].maximum), top = static_cast<C>(states[k].top);
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c)
        if ((seen[k] >> c & 1) != 0 && before(scores.at(k, c), grads.at(k, c), maximum, top)) {
          maximum = scores.at(k, c);
          top = grads.at(k, c);
        }
      EIGENFORMER_UNROLL_ALL
      for (int apart = 1; apart < Pairs::kLanes; apart *= 2) {
        const C other = block.shuffle_xor(maximum, apart),
                other_top = block.shuffle_xor(top, apart);
        if (before(other, other_top, maximum, top)) {
          maximum = other;
          top = other_top;
        }
      }
      const C reference = maximum == -std::numeric_limits<C>::infinity() ? C(0) : maximum;
      C weights = 0, weighted = 0;
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c) {
        if ((seen[k] >> c & 1) == 0) continue;
        const C weight = std::exp(scores.at(k, c) - reference);
        weights += weight;
        weighted = std::fma(weight, grads.at(k, c) - top, weighted);
      }
      double sum = static_cast<double>(weights), grad = static_cast<double>(weighted);
      EIGENFORMER_UNROLL_ALL
      for (int apart = 1; apart < Pairs::kLanes; apart *= 2) {
        sum += block.shuffle_xor(sum, apart);
        grad += block.shuffle_xor(grad, apart);
      }
      const State fallen =
          relative_to(states[k], static_cast<double>(reference), static_cast<double>(top));
      states[k] = {static_cast<double>(maximum), static_cast<double>(top), fallen.weights + sum,
                   fallen.grads + grad};
    }
  }
  EIGENFORMER_DEVICE static State relative_to(const State& s, double maximum, double top) {
    const double fall = std::exp(s.maximum - maximum);
    return {maximum, top, s.weights * fall, fall * (s.grads + (s.top - top) * s.weights)};
  }

  /// Leaves what is known of the 64 rows. Returns whether one of them has to be taken in double
  /// and was not: then scores are relative to the maximum that is known.
  template <typename Block, typename Arrays, typename Known>
  EIGENFORMER_DEVICE bool find_rows(Block& block, const Arrays& arrays, const Known& known,
                                    AttentionTileAt at, bool again) const {
    State states[Pairs::kRows];
    bool wide[Pairs::kRows];
    double references[Pairs::kRows];
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      states[k] = {-on.kInfinity, 0, 0, 0};
      const Row row = again ? known.load(Pairs::row(block.thread(), k)) : Row{};
      wide[k] = row.kind == Row::kWide;
      references[k] = wide[k] ? row.maximum : 0.0;
    }
    for (at.key = 0; at.key < at.s->key_length; at.key += kTile) {
      if (!on.any_visible(at)) continue;
      Pairs scores, grads;
      on.multiply(block, arrays, at, scores, grads);
      unsigned seen[Pairs::kRows];
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < Pairs::kRows; ++k) seen[k] = on.seen_columns(block.thread(), at, k);
      on.score(block, at, scores, seen, wide, references, nullptr);
      add_tile(block, seen, scores, grads, states);
    }
    bool large = false;
    block.barrier();
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      const int r = Pairs::row(block.thread(), k);
      states[k].maximum += references[k];
      double sink_gradient = 0;
      const Row row = finish(at, r, states[k], wide[k], sink_gradient);
      large = large || (row.kind == Row::kWide && !wide[k]);
      if (block.thread() % Pairs::kLanes != 0) continue;
      known.store(r, row);
      if (at.row + r >= at.s->tensor_rows) continue;
      rows[on.row_index(at, r)] = row;
      if (sink_gradients != nullptr) sink_gradients[on.row_index(at, r)] = sink_gradient;
    }
    large = block.any(large);
    if (block.lane() == 0) arrays.flags.store(block.warp(), large);
    block.barrier();
    for (int w = 0; w < on.kWarps; ++w) large = large || arrays.flags.load(w) != 0;
    return large;
  }

  /// The sink is a key whose value is 0. A row without weight on a key gives no gradient.
  EIGENFORMER_DEVICE Row finish(const AttentionTileAt& at, Index r, State s, bool wide,
                                double& sink_gradient) const {
    if (s.weights == 0) return {};
    const auto& f = on.p.forward;
    const double sink = f.sinks == nullptr ? -on.kInfinity : static_cast<double>(f.sinks[at.head]);
    double sink_weight = 0;
    if (sink > -on.kInfinity) {
      if (sink > s.maximum) s = relative_to(s, sink, 0.0);
      sink_weight = std::exp(sink - s.maximum);
      s.weights += sink_weight;
      s.grads -= sink_weight * s.top;
    }
    double delta = s.grads / s.weights;
    if (on.p.grad_log_sum_exp != nullptr)  // dS = P (dP - D + its gradient)
      delta -= static_cast<double>(
          on.p.grad_log_sum_exp[at.s->lse_begin + at.head * f.lse_head_stride + at.row + r]);
    if (sink > -on.kInfinity) sink_gradient = -(sink_weight / s.weights * (s.top + delta));
    const bool large = wide || is_large_score<T, T>(s.maximum);
    return {s.maximum, static_cast<C>(1 / s.weights), static_cast<C>(s.top), static_cast<C>(delta),
            large ? Row::kWide : Row::kPlain};
  }

  template <typename Block, typename Arrays, typename PairArray, typename Known>
  EIGENFORMER_DEVICE void write_gradient(Block& block, const Arrays& arrays, const PairArray& pairs,
                                         const Known& known, AttentionTileAt at) const {
    const auto& f = on.p.forward;
    const auto row_of = [&](int r) { return known.load(r); };
    const auto sums_at = [&](Index r) {
      return at.row + r < at.s->tensor_rows ? sums.row(at.s->query_begin + at.row + r, at.head)
                                            : nullptr;
    };
    bool none = true;
    for (at.key = 0; at.key < at.s->key_length; at.key += kTile) {
      if (!on.any_visible(at)) continue;
      Pairs scores, grads;
      on.multiply(block, arrays, at, scores, grads);
      on.differentiate(block, at, scores, grads, row_of);
      const C unit = on.unit_of(block, arrays, grads);
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < Pairs::kRows; ++k) {
        EIGENFORMER_UNROLL_ALL
        for (int c = 0; c < Pairs::kColumns; ++c)
          pairs.store(
              Pairs::row(block.thread(), k) * kPairStride<T> + Pairs::column(block.thread(), c),
              static_cast<T>(grads.at(k, c) * unit));
      }
      on.add_rows(
          block, arrays, pairs, unit, f.head_dim, none,
          [&](Index j) { return on.key(false, at, j); },
          [&](Index r, Index j) {
            return on.sees(at, r, on.range(at, r), j) && known.load(r).kind != Row::kSilent;
          },
          sums_at);
      none = false;
    }
    on.write_rows(block, f.head_dim, none, f.scale, sums_at, [&](Index r) {
      return at.row + r < at.s->tensor_rows
                 ? on.p.query_gradient(at.s->query_begin + at.row + r, at.head)
                 : nullptr;
    });
  }
};

/// dK and dV. A unit is (tile of keys, KV head).
template <typename T>
struct AttentionKeyGradients {
  using C = compute_type<T>;
  using Row = AttentionRow<C>;
  using Pairs = PairTile<T>;
  static constexpr int kThreads = kTileThreads;
  AttentionPairs<T> on;
  const Index* first_tile;  // (batch + 1)
  Index tiles;
  GradientSums<C> key_sums, value_sums;  // (key rows, KV heads, width)
  const Row* rows;

  static constexpr std::size_t shared_size() { return AttentionPairs<T>::shared_size(2); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = AttentionPairs<T>::arrays(block);
    const auto probabilities = AttentionPairs<T>::pair_array(block);
    const auto grads = AttentionPairs<T>::pair_array(block);
    const auto& f = on.p.forward;
    for (Index unit = block.index(); unit < tiles * f.kv_heads; unit += block.count()) {
      const Index tile = unit / f.kv_heads,
                  b = sequence_at(f.batch, tile, [&](Index i) { return first_tile[i]; }),
                  kv_head = unit % f.kv_heads;
      AttentionTileAt at{f.sequences + b, 0, 0, (tile - first_tile[b]) * kTile};
      bool none = true;
      for (at.head = kv_head * on.group; at.head < (kv_head + 1) * on.group; ++at.head)
        for (at.row = 0; at.row < at.s->query_rows; at.row += kTile) {
          if (!on.any_visible(at)) continue;
          add_tile(block, arrays, probabilities, grads, at, kv_head, none);
          none = false;
        }
      write(block, at, kv_head, none);
      block.barrier();
    }
  }

 private:
  /// Whether row j of the tile is one of the keys, padding included.
  EIGENFORMER_DEVICE bool has_key(const AttentionTileAt& at, Index j) const {
    return at.key + j < (on.p.key_rows > at.s->key_length ? on.p.key_rows : at.s->key_length);
  }
  EIGENFORMER_DEVICE C* sums_at(const GradientSums<C>& sums, const AttentionTileAt& at,
                                Index kv_head, Index j) const {
    return has_key(at, j) ? sums.row(on.p.key_row(*at.s, at.key + j), kv_head) : nullptr;
  }

  template <typename Block, typename Arrays, typename PairArray>
  EIGENFORMER_DEVICE void add_tile(Block& block, const Arrays& arrays,
                                   const PairArray& probability_array, const PairArray& grad_array,
                                   const AttentionTileAt& at, Index kv_head, bool first) const {
    const auto& f = on.p.forward;
    Pairs scores, grads;
    on.multiply(block, arrays, at, scores, grads);
    on.differentiate(block, at, scores, grads, [&](int r) { return rows[on.row_index(at, r)]; });
    const C unit = on.unit_of(block, arrays, grads);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c) {
        const int to = Pairs::column(block.thread(), c) * kPairStride<T> +
                       Pairs::row(block.thread(), k);  // transposed
        probability_array.store(to, static_cast<T>(scores.at(k, c) * kProbabilityUnit));
        grad_array.store(to, static_cast<T>(grads.at(k, c) * unit));
      }
    }
    const auto takes = [&](Index j, Index r) {
      return on.sees(at, r, on.range(at, r), j) && rows[on.row_index(at, r)].kind != Row::kSilent;
    };
    on.add_rows(
        block, arrays, probability_array, kProbabilityUnit, f.value_dim, first,
        [&](Index r) { return on.grad_output(at, r); }, takes,
        [&](Index j) { return sums_at(value_sums, at, kv_head, j); });
    on.add_rows(
        block, arrays, grad_array, unit, f.head_dim, first,
        [&](Index r) { return on.query(at, r); }, takes,
        [&](Index j) { return sums_at(key_sums, at, kv_head, j); });
  }
  /// Keeps small probabilities of long rows in half's range.
  static constexpr C kProbabilityUnit = std::is_same_v<T, half> ? C(1024) : C(1);

  template <typename Block>
  EIGENFORMER_DEVICE void write(Block& block, const AttentionTileAt& at, Index kv_head,
                                bool none) const {
    const auto& f = on.p.forward;
    on.write_rows(
        block, f.head_dim, none, f.scale,
        [&](Index j) { return sums_at(key_sums, at, kv_head, j); },
        [&](Index j) {
          return has_key(at, j) ? on.p.key_gradient(*at.s, kv_head, at.key + j) : nullptr;
        });
    on.write_rows(
        block, f.value_dim, none, C(1),
        [&](Index j) { return sums_at(value_sums, at, kv_head, j); },
        [&](Index j) {
          return has_key(at, j) ? on.p.value_gradient(*at.s, kv_head, at.key + j) : nullptr;
        });
  }
};

/// The gradient of a head's sink over all rows.
struct SinkGradients {
  static constexpr int kThreads = kRowThreads;
  const double* terms;  // (rows, heads)
  Index rows, heads;
  float* gradients;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<double>(kThreads / kWarp);
    for (Index head = block.index(); head < heads; head += block.count()) {
      double sum = 0;
      for (Index row = block.thread(); row < rows; row += kThreads)
        sum += terms[row * heads + head];
      sum = reduce_block(block, scratch, sum, Add{});
      if (block.thread() == 0) gradients[head] = static_cast<float>(sum);
    }
  }
};

/// The launches of a call whose arrays are on the device.
template <typename D, typename T>
void launch_backward(const Backend<D>& on, const AttentionPairs<T>& pairs, const Index* query_tiles,
                     const Index* key_tiles, const Index (&tiles)[2], const Index (&counts)[4],
                     bool sinks) {
  using C = compute_type<T>;
  using Row = AttentionRow<C>;
  constexpr auto name = "attention_backward";
  const auto& p = pairs.p;
  const Index rows = counts[0], heads = p.forward.heads;
  constexpr bool own = std::is_same_v<T, C>;  // gradients are sums already
  with_scratch<Row, double, float, C, C, C>(
      on, name,
      {rows * heads, sinks ? rows * heads : 0, sinks ? heads : 0, own ? 0 : counts[1],
       own ? 0 : counts[2], own ? 0 : counts[3]},
      [&](Row* known, double* terms, float* sink_sums, C* queries, C* keys, C* values) {
        const auto sums = [&](auto* gradient, const problem::HeadStrides& strides, C* scratch,
                              Index all_heads, Index width) -> GradientSums<C> {
          if constexpr (own)
            return {gradient, strides};
          else
            return {scratch, {all_heads * width, width}};
        };
        const auto& f = p.forward;
        using Queries = AttentionQueryGradients<T>;
        using Keys = AttentionKeyGradients<T>;
        launch_rows(on, name, tiles[0] * heads, Queries::shared_size(),
                    Queries{pairs, query_tiles, tiles[0],
                            sums(p.grad_queries, p.grad_query_strides, queries, heads, f.head_dim),
                            known, sinks ? terms : nullptr});
        launch_rows(on, name, tiles[1] * p.forward.kv_heads, Keys::shared_size(),
                    Keys{pairs, key_tiles, tiles[1],
                         sums(p.grad_keys, p.grad_key_strides, keys, f.kv_heads, f.head_dim),
                         sums(p.grad_values, p.grad_value_strides, values, f.kv_heads, f.value_dim),
                         known});
        if (!sinks) return;
        launch_rows(on, name, heads, shared_bytes<double>(kRowThreads / kWarp),
                    SinkGradients{terms, rows, heads, sink_sums});
        stage_ring(on).fetch(name, p.grad_sinks, reinterpret_cast<const std::byte*>(sink_sums),
                             static_cast<std::size_t>(heads) * sizeof(float));
      });
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::AttentionBackward<T>& p) {
  const auto& f = p.forward;
  const bool sinks = p.grad_sinks != nullptr && f.sinks != nullptr && f.batch > 0;
  if (p.grad_sinks != nullptr && !sinks) std::fill_n(p.grad_sinks, f.heads, 0.0f);
  if (f.batch == 0) return;
  Workspace::Frame frame(thread_workspace());
  auto* const query_tiles = frame.take<Index>(f.batch + 1);
  auto* const key_tiles = frame.take<Index>(f.batch + 1);
  query_tiles[0] = key_tiles[0] = 0;
  Index key_rows = 0;
  for (Index b = 0; b < f.batch; ++b) {
    const problem::AttentionSequence& s = f.sequences[b];
    const Index keys = (std::max)(p.key_rows, s.key_length);
    query_tiles[b + 1] = query_tiles[b] + (s.tensor_rows + kTile - 1) / kTile;
    key_tiles[b + 1] = key_tiles[b] + (keys + kTile - 1) / kTile;
    key_rows += keys;
  }
  const auto span_of = [](const auto* array, Index count) {
    return std::span(array, static_cast<std::size_t>(array == nullptr ? 0 : count));
  };
  const Index* const first_query_tile = query_tiles;
  const Index* const first_key_tile = key_tiles;
  const problem::AttentionSequence& last = f.sequences[f.batch - 1];
  const Index rows = last.query_begin + last.tensor_rows;
  AttentionPairs<T> pairs{p, f.group()};
  auto& staged = pairs.p.forward;
  const Index *staged_query_tiles = nullptr, *staged_key_tiles = nullptr;
  std::tie(staged.sequences, staged_query_tiles, staged_key_tiles, staged.alibi_slopes,
           staged.sinks, staged.bit_mask.first_keys) =
      stage(on, "attention_backward", span_of(f.sequences, f.batch),
            span_of(first_query_tile, f.batch + 1), span_of(first_key_tile, f.batch + 1),
            span_of(f.alibi_slopes, f.heads), span_of(f.sinks, f.heads),
            span_of(f.bit_mask.first_keys, f.batch));
  launch_backward(on, pairs, staged_query_tiles, staged_key_tiles,
                  {query_tiles[f.batch], key_tiles[f.batch]},
                  {rows, rows * f.heads * f.head_dim, key_rows * f.kv_heads * f.head_dim,
                   key_rows * f.kv_heads * f.value_dim},
                  sinks);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
