/// \file
/// Products of tiles of attention by a block of 128 threads: 64 rows of one operand with 64 of the
/// other give 64 x 64 pairs (PairTile), and a matrix of pairs times 64 rows gives 64 sums of rows
/// (RowTile), 32 columns of the operands at a time, which lie in shared memory. 16-bit numbers pass
/// through the tensor cores and are summed in float; float and double through FMA, in ascending
/// order. A row of the results belongs to lanes of one warp, and depends on no other row.
#pragma once

#include <cmath>
#include <limits>

#include "../packs.cuh"
#include "fragment.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr int kTile = 64;          // rows and columns of a tile of pairs
inline constexpr int kTileThreads = 128;  // of a block
inline constexpr int kTileDepth = 32;     // columns of the operands at a time

/// Elements from row to row in shared memory: the rows of a fragment lie in different banks.
template <typename T>
inline constexpr int kOperandStride = kTileDepth + 16 / static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kPairStride = kTile + 16 / static_cast<int>(sizeof(T));

template <typename T>
inline constexpr bool kOnTensorCores = sizeof(T) == 2;

/// Fragment A of rows [row, row + 16) and columns [column, column + 16) of an array.
template <typename T, typename Array>
EIGENFORMER_DEVICE FragmentA<T> load_fragment_a(const Array& array, int stride, int lane, int row,
                                                int column) {
  FragmentA<T> a;
  for (int i = 0; i < a.kSize; i += 2) {
    const auto two = array.template pack<Pack<T, 2>>((row + a.row(lane, i)) * stride + column +
                                                     a.column(lane, i));
    a.values[i] = two[0];
    a.values[i + 1] = two[1];
  }
  return a;
}

/// A tile of pairs: (row, column) is a sum over the columns of the operands' rows `row` and
/// `column`. A thread has kRows x kColumns of them; kLanes neighbouring lanes share a row.
template <typename T>
struct PairTile {
  using C = compute_type<T>;
  static constexpr bool kMma = kOnTensorCores<T>;
  static constexpr int kRows = kMma ? 2 : 8, kColumns = kMma ? 16 : 4, kLanes = kMma ? 4 : 16;
  C values[32];

  EIGENFORMER_DEVICE static int row(int thread, int r) {
    return kMma ? thread / kWarp * 16 + thread % kWarp / 4 + 8 * r : thread / 16 + 8 * r;
  }
  EIGENFORMER_DEVICE static int column(int thread, int c) {
    return kMma ? c / 2 * 8 + thread % 4 * 2 + c % 2 : thread % 16 + 16 * c;
  }
  EIGENFORMER_DEVICE C& at(int r, int c) {
    return values[kMma ? c / 2 * 4 + r * 2 + c % 2 : r * 4 + c];
  }
  EIGENFORMER_DEVICE void clear() {
    for (C& value : values) value = C(0);
  }

  /// The first `depth` columns of the operands, and those up to a multiple of 16 bytes or 16
  /// columns.
  template <typename Block, typename Array>
  EIGENFORMER_DEVICE void add(Block& block, const Array& rows, const Array& columns, int depth) {
    constexpr int stride = kOperandStride<T>;
    if constexpr (kMma) {
      for (int d = 0; d < depth; d += Tile<T>::kDepth) {
        const auto a = load_fragment_a<T>(rows, stride, block.lane(), block.warp() * 16, d);
        for (int n = 0; n < 8; ++n) {
          FragmentB<T> b;
          for (int i = 0; i < b.kSize; i += 2) {
            const auto two = columns.template pack<Pack<T, 2>>(
                (8 * n + b.column(block.lane(), i)) * stride + d + b.row(block.lane(), i));
            b.values[i] = two[0];
            b.values[i + 1] = two[1];
          }
          auto sums = fragment(n);
          block.mma(sums, a, b);
          take(n, sums);
        }
      }
    } else {
      constexpr int width = pack_width<T>;
      const int thread = block.thread();
      for (int d = 0; d < depth; d += width) {
        Pack<T, width> b[kColumns];
        for (int c = 0; c < kColumns; ++c)
          b[c] = columns.template pack<Pack<T, width>>(column(thread, c) * stride + d);
        for (int r = 0; r < kRows; ++r) {
          const auto a = rows.template pack<Pack<T, width>>(row(thread, r) * stride + d);
          for (int c = 0; c < kColumns; ++c)
            for (int i = 0; i < width; ++i) at(r, c) = std::fma(a[i], b[c][i], at(r, c));
        }
      }
    }
  }

 private:
  EIGENFORMER_DEVICE FragmentD<T> fragment(int n) const {
    return {{values[4 * n], values[4 * n + 1], values[4 * n + 2], values[4 * n + 3]}};
  }
  EIGENFORMER_DEVICE void take(int n, const FragmentD<T>& sums) {
    for (int i = 0; i < 4; ++i) values[4 * n + i] = sums.values[i];
  }
};

/// 64 rows of 32 columns: row `row` is the sum over k of pairs(row, k) times row k of an operand. A
/// thread has 16 of the elements.
template <typename T>
struct RowTile {
  using C = compute_type<T>;
  static constexpr bool kMma = kOnTensorCores<T>;
  static constexpr int kSize = 16;
  C values[kSize];

  EIGENFORMER_DEVICE static int row(int thread, int i) {
    return kMma ? thread / kWarp * 16 + FragmentD<bfloat16>::row(thread % kWarp, i % 4)
                : thread / 8 + i / 4 * 16;
  }
  EIGENFORMER_DEVICE static int column(int thread, int i) {
    return kMma ? i / 4 * 8 + FragmentD<bfloat16>::column(thread % kWarp, i % 4)
                : thread % 8 * 4 + i % 4;
  }

  template <typename Block, typename Pairs, typename Array>
  EIGENFORMER_DEVICE void multiply(Block& block, const Pairs& pairs, const Array& operand) {
    constexpr int stride = kOperandStride<T>;
    for (C& value : values) value = C(0);
    if constexpr (kMma) {
      for (int k = 0; k < kTile; k += Tile<T>::kDepth) {
        const auto a =
            load_fragment_a<T>(pairs, kPairStride<T>, block.lane(), block.warp() * 16, k);
        for (int n = 0; n < 4; ++n) {
          FragmentB<T> b;
          for (int i = 0; i < b.kSize; ++i)
            b.values[i] = operand.load((k + b.row(block.lane(), i)) * stride + 8 * n +
                                       b.column(block.lane(), i));
          FragmentD<T> sums{
              {values[4 * n], values[4 * n + 1], values[4 * n + 2], values[4 * n + 3]}};
          block.mma(sums, a, b);
          for (int i = 0; i < 4; ++i) values[4 * n + i] = sums.values[i];
        }
      }
    } else {
      constexpr int width = pack_width<T>;
      const int thread = block.thread();
      for (int k = 0; k < kTile; k += width) {
        Pack<T, width> a[4];
        for (int r = 0; r < 4; ++r)
          a[r] = pairs.template pack<Pack<T, width>>(row(thread, 4 * r) * kPairStride<T> + k);
        for (int i = 0; i < width; ++i)
          for (int c = 0; c < 4; c += width) {
            const auto b =
                operand.template pack<Pack<T, width>>((k + i) * stride + thread % 8 * 4 + c);
            for (int r = 0; r < 4; ++r)
              for (int j = 0; j < width; ++j)
                values[4 * r + c + j] = std::fma(a[r][i], b[j], values[4 * r + c + j]);
          }
      }
    }
  }
};

template <typename T>
EIGENFORMER_DEVICE bool is_finite(T x) {
  using C = compute_type<T>;
  return std::fabs(static_cast<C>(x)) <= (std::numeric_limits<C>::max)();
}

/// Columns [column, column + 32) of 64 rows times a factor, into shared memory: row_at(r) is where
/// row r begins, nullptr for a row of zeros; columns from `width` on are zeros. Where Finite,
/// numbers that are not finite become 0, so that pairs nobody sees (of weight 0) stay out of sums.
/// Returns whether this thread met one.
template <typename T, bool Finite, typename Block, typename Array, typename RowAt>
EIGENFORMER_DEVICE bool load_operand(Block& block, const Array& array, Index column, Index width,
                                     const RowAt& row_at, compute_type<T> factor = 1) {
  constexpr int pack = pack_width<T>, packs = kTileDepth / pack;
  bool found = false;
  for (int at = block.thread(); at < kTile * packs; at += kTileThreads) {
    const int r = at / packs, c = at % packs * pack;
    const T* const from = row_at(r);
    Pack<T, pack> values;
    const bool whole =
        from != nullptr && column + c + pack <= width && packs_fit<pack>(from + column + c, 0);
    if (whole)
      values = load_pack<T, pack>(from + column + c);
    else
      for (int i = 0; i < pack; ++i)
        values[i] = from != nullptr && column + c + i < width ? from[column + c + i] : T(0);
    for (int i = 0; i < pack; ++i) {
      if (factor != 1) values[i] = static_cast<T>(static_cast<compute_type<T>>(values[i]) * factor);
      if (Finite && !is_finite(values[i])) {
        values[i] = T(0);
        found = true;
      }
    }
    array.store_pack(r * kOperandStride<T> + c, values);
  }
  return found;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
