/// \file
/// Tiles of pairs of queries and keys, as the gradients of attention have them: products, scores,
/// probabilities, and sums over the pairs. A pair that is not visible takes no part in any sum, so
/// that what only one of the two sees may hold NaN.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_scores.cuh"
#include "collectives.cuh"
#include "kv_rows.cuh"
#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// What the gradients need of a row and head.
template <typename C>
struct AttentionRow {
  enum Kind { kSilent, kPlain, kWide };  // takes no part; scores in C; in double
  double maximum;                        // of its scores
  C inverse;                             // of the sum of the weights relative to it
  C top, delta;  // dP of the greatest score, and how far the mean of dP is from it
  int kind;
};

/// Where a tile lies: rows [row, row + 64) of a sequence, by 64 keys from `key` on.
struct AttentionTileAt {
  const problem::AttentionSequence* s;
  Index head, row, key;
};

/// Shared memory of a block.
template <typename Operand, typename Flags, typename Scratch>
struct TileArrays {
  Operand rows, columns;  // (64, 32) of the operands
  Flags flags;            // (warps)
  Scratch scratch;        // (warps)
};

/// The request, and the pairs of its tiles.
template <typename T>
struct AttentionPairs {
  using C = compute_type<T>;
  using Row = AttentionRow<C>;
  using Pairs = PairTile<T>;
  static constexpr int kWarps = kTileThreads / kWarp;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  problem::AttentionBackward<T> p;
  const problem::AttentionSequence* sequences;
  const float* slopes;
  const float* sinks;
  Index group;

  static constexpr std::size_t shared_size(int pair_arrays) {
    return 2 * shared_bytes<T>(kTile * kOperandStride<T>) + shared_bytes<int>(kWarps) +
           shared_bytes<C>(kWarps) +
           static_cast<std::size_t>(pair_arrays) * shared_bytes<T>(kTile * kPairStride<T>);
  }
  template <typename Block>
  EIGENFORMER_DEVICE static auto arrays(Block& block) {
    const auto rows = block.template shared<T>(kTile * kOperandStride<T>);
    const auto columns = block.template shared<T>(kTile * kOperandStride<T>);
    const auto flags = block.template shared<int>(kWarps);
    const auto scratch = block.template shared<C>(kWarps);
    return TileArrays<decltype(rows), decltype(flags), decltype(scratch)>{rows, columns, flags,
                                                                          scratch};
  }
  template <typename Block>
  EIGENFORMER_DEVICE static auto pair_array(Block& block) {
    return block.template shared<T>(kTile * kPairStride<T>);
  }

  EIGENFORMER_DEVICE Index row_index(const AttentionTileAt& at, Index r) const {
    return (at.s->query_begin + at.row + r) * p.forward.heads + at.head;
  }
  /// Row r of the tile; nullptr where it is padding.
  EIGENFORMER_DEVICE const T* query(const AttentionTileAt& at, Index r) const {
    if (at.row + r >= at.s->query_rows) return nullptr;
    return p.forward.queries + row_index(at, r) * p.forward.head_dim;
  }
  EIGENFORMER_DEVICE const T* grad_output(const AttentionTileAt& at, Index r) const {
    if (at.row + r >= at.s->query_rows) return nullptr;
    return p.grad_output + row_index(at, r) * p.forward.value_dim;
  }
  EIGENFORMER_DEVICE const T* key(bool value, const AttentionTileAt& at, Index j) const {
    if (at.key + j >= at.s->key_length) return nullptr;
    const KvRows<T> rows{p.forward.source, nullptr, nullptr};
    return rows.row(value, at.s->key_sequence, at.head / group, at.s->key_begin + at.key + j);
  }
  EIGENFORMER_DEVICE bool visible(const AttentionTileAt& at, Index r, Index j) const {
    return at.row + r < at.s->query_rows && at.key + j < at.s->key_length &&
           p.forward.visibility.visible(at.s->first_position + at.row + r, at.key + j);
  }
  EIGENFORMER_DEVICE bool any_visible(const AttentionTileAt& at) const {
    const Index rows = at.s->query_rows - at.row, end = at.key + kTile;
    return cuda::any_visible(p.forward.visibility, at.s->first_position + at.row,
                             rows < kTile ? rows : kTile, at.key,
                             end < at.s->key_length ? end : at.s->key_length);
  }

  /// The products of the tile: scaled scores (unscaled on tensor cores) and dP.
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void multiply(Block& block, const Arrays& a, const AttentionTileAt& at,
                                   Pairs& scores, Pairs& grads) const {
    const auto product = [&](Pairs& sums, Index width, C factor, auto row_at, auto column_at) {
      sums.clear();
      for (Index d = 0; d < width; d += kTileDepth) {
        block.barrier();
        load_operand<T, false>(block, a.rows, d, width, row_at, factor);
        load_operand<T, false>(block, a.columns, d, width, column_at);
        block.barrier();
        sums.add(block, a.rows, a.columns,
                 static_cast<int>(width - d < kTileDepth ? width - d : kTileDepth));
      }
    };
    product(
        scores, p.forward.head_dim, Pairs::kMma ? C(1) : p.forward.scale,
        [&](Index r) { return query(at, r); }, [&](Index j) { return key(false, at, j); });
    product(
        grads, p.forward.value_dim, C(1), [&](Index r) { return grad_output(at, r); },
        [&](Index j) { return key(true, at, j); });
  }

  /// The score of pair (r, j) from its product, or in double from its elements.
  EIGENFORMER_DEVICE Score<double> score(const AttentionTileAt& at, Index r, Index j, C product,
                                         bool wide) const {
    const auto& f = p.forward;
    const float slope = slopes == nullptr ? 0.0f : slopes[at.head];
    const Index distance = at.key + j - (at.s->first_position + at.row + r);
    if (wide) {
      const T* const q = query(at, r);
      const double scale = static_cast<double>(f.scale);
      const double exact = key_product<double, C>(key(false, at, j), f.head_dim, [&](Index d) {
        return static_cast<double>(static_cast<C>(q[d])) * scale;
      });
      return score_of_product<double>(exact, static_cast<double>(f.softcap),
                                      static_cast<double>(slope), distance);
    }
    if (Pairs::kMma) product *= f.scale;
    const auto found = score_of_product<C>(product, f.softcap, static_cast<C>(slope), distance);
    return {static_cast<double>(found.value), static_cast<double>(found.slope)};
  }

  /// Products of a tile to P and dS, 0 where nobody sees or takes part; row_of(r) knows row r.
  template <typename Block, typename RowOf>
  EIGENFORMER_DEVICE void differentiate(Block& block, const AttentionTileAt& at, Pairs& scores,
                                        Pairs& grads, const RowOf& row_of) const {
    for (int k = 0; k < Pairs::kRows; ++k) {
      const int r = Pairs::row(block.thread(), k);
      const Row row = at.row + r < at.s->query_rows ? row_of(r) : Row{};
      for (int c = 0; c < Pairs::kColumns; ++c) {
        const int j = Pairs::column(block.thread(), c);
        C probability = 0, grad = 0;
        if (row.kind != Row::kSilent && visible(at, r, j)) {
          const auto s = score(at, r, j, scores.at(k, c), row.kind == Row::kWide);
          probability = std::exp(static_cast<C>(s.value - row.maximum)) * row.inverse;
          grad = probability * ((grads.at(k, c) - row.top) - row.delta) * static_cast<C>(s.slope);
        }
        scores.at(k, c) = probability;
        grads.at(k, c) = grad;
      }
    }
  }

  /// A power of two that brings the greatest of the pairs near 1 where T has few exponents: half
  /// would lose what is below 6e-8.
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE C unit_of(Block& block, const Arrays& a, Pairs& pairs) const {
    if constexpr (std::is_same_v<T, half>) {
      C greatest = 0;
      for (const C value : pairs.values) greatest = LargerOrNan{}(greatest, std::fabs(value));
      greatest = reduce_block(block, a.scratch, greatest, LargerOrNan{});
      if (!(greatest > 0 && is_finite(greatest))) return C(1);
      const int exponent = std::ilogb(greatest);
      return std::ldexp(C(1), exponent < -120 ? 120 : -exponent);
    } else {
      return C(1);
    }
  }

  /// sums(r, d) += the sum over k of pairs(r, k) / unit * operand row k, in whole. `takes(r, k)`
  /// says which pairs take part; sums_at(r) is where row r begins, nullptr outside.
  template <typename Block, typename Arrays, typename PairArray, typename RowAt, typename Takes,
            typename SumsAt>
  EIGENFORMER_DEVICE void add_rows(Block& block, const Arrays& a, const PairArray& pairs, C unit,
                                   Index width, bool first, const RowAt& row_at, const Takes& takes,
                                   const SumsAt& sums_at) const {
    for (Index d = 0; d < width; d += kTileDepth) {
      block.barrier();
      const bool found = block.any(load_operand<T, true>(block, a.columns, d, width, row_at));
      if (block.lane() == 0) a.flags.store(block.warp(), found);
      block.barrier();
      RowTile<T> sums;
      sums.multiply(block, pairs, a.columns);
      bool any = false;
      for (int w = 0; w < kWarps; ++w) any = any || a.flags.load(w) != 0;
      for (int i = 0; i < sums.kSize; ++i) {
        const int r = sums.row(block.thread(), i);
        const Index column = d + sums.column(block.thread(), i);
        C* const to = sums_at(r);
        if (to == nullptr || column >= width) continue;
        C sum = sums.values[i] * (1 / unit);
        for (int k = 0; any && k < kTile; ++k)
          if (takes(r, k) && !is_finite(row_at(k)[column]))
            sum += static_cast<C>(pairs.load(r * kPairStride<T> + k)) *
                   static_cast<C>(row_at(k)[column]);
        to[column] = first ? sum : to[column] + sum;
      }
    }
  }

  /// gradient = sums * factor for the elements of RowTile that this thread has summed; 0 where
  /// there are none. The sums of row r begin at sums_at(r).
  template <typename Block, typename SumsAt, typename GradientAt>
  EIGENFORMER_DEVICE void write_rows(Block& block, Index width, bool none, C factor,
                                     const SumsAt& sums_at, const GradientAt& gradient_at) const {
    for (Index d = 0; d < width; d += kTileDepth)
      for (int i = 0; i < RowTile<T>::kSize; ++i) {
        const int r = RowTile<T>::row(block.thread(), i);
        const Index column = d + RowTile<T>::column(block.thread(), i);
        T* const to = gradient_at(r);
        if (to != nullptr && column < width)
          to[column] = static_cast<T>(none ? C(0) : sums_at(r)[column] * factor);
      }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
