/// \file
/// Tiles of pairs of queries and keys, as the gradients of attention have them: products, scores,
/// probabilities, and sums over the pairs. A pair that is not visible takes no part in any sum, so
/// that what only one of the two sees may hold NaN.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_score.cuh"
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

/// Rows of heads that gradients are summed in: the gradients themselves where they are of C.
template <typename C>
struct GradientSums {
  C* data;
  problem::HeadStrides strides;

  EIGENFORMER_DEVICE C* row(Index row, Index head) const {
    return data + row * strides.token + head * strides.head;
  }
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
  problem::AttentionBackward<T> p;  // its arrays on the device
  Index group;

  static constexpr std::size_t shared_size(int pair_arrays) {
    return shared_bytes<T>(kTile * kPairOperand<T>) + shared_bytes<T>(kTile * kRowOperand<T>) +
           shared_bytes<int>(kWarps) + shared_bytes<C>(kWarps) +
           static_cast<std::size_t>(pair_arrays) * shared_bytes<T>(kTile * kPairStride<T>);
  }
  template <typename Block>
  EIGENFORMER_DEVICE static auto arrays(Block& block) {
    const auto rows = block.template shared<T>(kTile * kPairOperand<T>);
    const auto columns = block.template shared<T>(kTile * kRowOperand<T>);  // of both kinds
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
    return p.forward.query(at.s->query_begin + at.row + r, at.head);
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
  /// The keys of the tile that row r sees.
  EIGENFORMER_DEVICE TileRange range(const AttentionTileAt& at, Index r) const {
    if (at.row + r >= at.s->query_rows) return {0, 0, 0};
    return tile_range(p.forward.visibility, at.s->first_position + at.row + r, at.s->key_length,
                      at.key, kTile);
  }
  EIGENFORMER_DEVICE problem::ScoreRow score_row(const AttentionTileAt& at, Index r) const {
    return {at.s - p.forward.sequences, at.head, at.s->query_begin + at.row + r,
            at.s->first_position + at.row + r};
  }
  /// Whether row r sees key j of the tile; `here` is its range.
  EIGENFORMER_DEVICE bool sees(const AttentionTileAt& at, Index r, const TileRange& here,
                               Index j) const {
    return here.sees(static_cast<int>(j)) &&
           (!p.forward.masked() || p.forward.unmasked(score_row(at, r), at.key + j));
  }
  /// Those of a thread's columns that its row k sees, as bits.
  EIGENFORMER_DEVICE unsigned seen_columns(int thread, const AttentionTileAt& at, int k) const {
    const int r = Pairs::row(thread, k);
    const TileRange here = range(at, r);
    return cuda::seen_columns<Pairs>(thread, [&](int j) { return sees(at, r, here, j); });
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
        load_operand<T, kPairOperand<T>>(block, a.rows, 0, d, width, row_at, [&](auto& values) {
          if (factor != 1)
            for (T& value : values.values) value = static_cast<T>(static_cast<C>(value) * factor);
        });
        load_operand<T, kPairOperand<T>>(block, a.columns, 0, d, width, column_at, [](auto&) {});
        block.barrier();
        sums.add(block, a.rows, 0, a.columns, 0, width - d);
      }
    };
    product(
        scores, p.forward.head_dim, Pairs::kMma ? C(1) : p.forward.scale,
        [&](Index r) { return query(at, r); }, [&](Index j) { return key(false, at, j); });
    product(
        grads, p.forward.value_dim, C(1), [&](Index r) { return grad_output(at, r); },
        [&](Index j) { return key(true, at, j); });
  }

  /// Products of a tile to scores: those of row k of this thread's relative to references[k] where
  /// the row is wide, which are made of its elements in double; those that are seen. Where grads
  /// are given they are multiplied by the scores' slopes.
  template <typename Block>
  EIGENFORMER_DEVICE void score(Block& block, const AttentionTileAt& at, Pairs& scores,
                                const unsigned (&seen)[Pairs::kRows],
                                const bool (&wide)[Pairs::kRows],
                                const double (&references)[Pairs::kRows], Pairs* grads) const {
    const auto& f = p.forward;
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      const auto row = score_row(at, Pairs::row(block.thread(), k));
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c) {
        if ((seen[k] >> c & 1) == 0) continue;
        const C product = Pairs::kMma ? scores.at(k, c) * f.scale : scores.at(k, c);
        const auto found = problem::score_of_product<C>(
            f, f.function, row, at.key + Pairs::column(block.thread(), c), product);
        scores.at(k, c) = found.value;
        if (grads != nullptr && !wide[k]) grads->at(k, c) *= found.slope;
      }
    }
    rescore(block, scores, grads, wide, references, [&](int r, int j) -> problem::Score<double> {
      if (!sees(at, r, range(at, r), j)) return {0, 0};
      return score_of_rows<double>(f, query(at, r), key(false, at, j), score_row(at, r),
                                   at.key + j);
    });
  }

  /// Products of a tile to P and dS, 0 where nobody sees or takes part; row_of(r) knows row r.
  template <typename Block, typename RowOf>
  EIGENFORMER_DEVICE void differentiate(Block& block, const AttentionTileAt& at, Pairs& scores,
                                        Pairs& grads, const RowOf& row_of) const {
    Row rows[Pairs::kRows];
    unsigned seen[Pairs::kRows];
    bool wide[Pairs::kRows];
    double references[Pairs::kRows];
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      const int r = Pairs::row(block.thread(), k);
      rows[k] = at.row + r < at.s->query_rows ? row_of(r) : Row{};
      seen[k] = rows[k].kind == Row::kSilent ? 0 : seen_columns(block.thread(), at, k);
      wide[k] = rows[k].kind == Row::kWide;
      references[k] = rows[k].maximum;
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c)
        grads.at(k, c) = (grads.at(k, c) - rows[k].top) - rows[k].delta;
    }
    score(block, at, scores, seen, wide, references, &grads);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < Pairs::kRows; ++k) {
      const C maximum = wide[k] ? C(0) : static_cast<C>(rows[k].maximum);
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c) {
        const bool part = (seen[k] >> c & 1) != 0;
        const C probability = std::exp(scores.at(k, c) - maximum) * rows[k].inverse;
        scores.at(k, c) = part ? probability : C(0);
        grads.at(k, c) = part ? probability * grads.at(k, c) : C(0);
      }
    }
  }

  /// A power of two that brings the greatest of the finite pairs near 1 where T has few exponents:
  /// half would lose what is below 6e-8.
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE C unit_of(Block& block, const Arrays& a, Pairs& pairs) const {
    if constexpr (std::is_same_v<T, half>) {
      C greatest = 0;
      EIGENFORMER_UNROLL_ALL
      for (const C value : pairs.values)
        if (is_finite(value)) greatest = Larger{}(greatest, std::fabs(value));
      greatest = reduce_block(block, a.scratch, greatest, Larger{});
      if (greatest == 0) return C(1);
      const int exponent = std::ilogb(greatest);
      return std::ldexp(C(1), exponent < -120 ? 120 : -exponent);
    } else {
      return C(1);
    }
  }

  /// sums(r, d) += the sum over k of pairs(r, k) / unit * operand row k, in whole. takes(r, k)
  /// says which pairs take part; sums_at(r) is where row r begins, nullptr outside.
  template <typename Block, typename Arrays, typename PairArray, typename RowAt, typename Takes,
            typename SumsAt>
  EIGENFORMER_DEVICE void add_rows(Block& block, const Arrays& a, const PairArray& pairs, C unit,
                                   Index width, bool first, const RowAt& row_at, const Takes& takes,
                                   const SumsAt& sums_at) const {
    for (Index d = 0; d < width; d += kTileDepth) {
      block.barrier();
      bool found = false;
      load_operand<T, kRowOperand<T>>(block, a.columns, 0, d, width, row_at,
                                      [&](auto& values) { found |= make_finite(values); });
      found = block.any(found);
      if (block.lane() == 0) a.flags.store(block.warp(), found);
      block.barrier();
      RowTile<T> sums;
      sums.clear();
      sums.add_all(block, pairs, a.columns);
      bool any = false;
      for (int w = 0; w < kWarps; ++w) any = any || a.flags.load(w) != 0;
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < sums.kSize; ++i) {
        const int r = sums.row(block.thread(), i);
        const Index column = d + sums.column(block.thread(), i);
        C* const to = sums_at(r);
        if (to == nullptr || column >= width) continue;
        const C sum = sums.values[i] * (1 / unit);
        to[column] = first ? sum : to[column] + sum;
      }
      for (int i = 0; any && i < sums.kSize; ++i)
        add_not_finite(pairs, sums.row(block.thread(), i), d + sums.column(block.thread(), i),
                       width, row_at, takes, sums_at);
    }
  }
  template <typename PairArray, typename RowAt, typename Takes, typename SumsAt>
  EIGENFORMER_DEVICE void add_not_finite(const PairArray& pairs, int r, Index column, Index width,
                                         const RowAt& row_at, const Takes& takes,
                                         const SumsAt& sums_at) const {
    C* const to = sums_at(r);
    if (to == nullptr || column >= width) return;
    for (int k = 0; k < kTile; ++k)
      if (takes(r, k) && !is_finite(row_at(k)[column]))
        to[column] +=
            static_cast<C>(pairs.load(r * kPairStride<T> + k)) * static_cast<C>(row_at(k)[column]);
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
