/// \file
/// Products of tiles of attention by a block of 128 threads: 64 rows of one operand with 64 of the
/// other give 64 x 64 pairs (PairTile), and a matrix of pairs times 64 rows gives 64 sums of rows
/// (RowTile), 32 columns of the operands at a time, which lie in shared memory. 16-bit numbers pass
/// through the tensor cores and are summed in float; float and double through FMA, in ascending
/// order. A row of the results belongs to lanes of one warp, and depends on no other row.
///
/// Operands of PairTile are read as operand.cuh says: a lane's 16 bytes are its parts of two
/// instructions. Those of RowTile are transposed on their way to the registers.
#pragma once

#include <cmath>
#include <limits>

#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr int kTile = 64;          // rows and columns of a tile of pairs
inline constexpr int kTileThreads = 128;  // of a block
inline constexpr int kTileDepth = 32;     // columns of the operands at a time

template <typename T>
inline constexpr bool kOnTensorCores = sizeof(T) == 2;

/// Elements from row to row in shared memory, of operands of PairTile, of RowTile, and of pairs:
/// such that what a warp loads at once lies in different banks.
template <typename T>
inline constexpr int kPairOperand =
    kOnTensorCores<T> ? kTileDepth : kTileDepth + 16 / static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kRowOperand = kTileDepth + 16 / static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kPairStride = kTile + 16 / static_cast<int>(sizeof(T));

/// A tile of pairs: (row, column) is a sum over the columns of the operands' rows `row` and
/// `column`. A thread has kRows x kColumns of them; kLanes neighbouring lanes share a row.
template <typename T>
struct PairTile {
  using C = compute_type<T>;
  static constexpr bool kMma = kOnTensorCores<T>;
  static constexpr int kRows = kMma ? 2 : 8, kColumns = kMma ? 16 : 4, kLanes = kMma ? 4 : 16;
  static constexpr int kSize = 32;
  C values[kSize];

  EIGENFORMER_DEVICE static int row(int thread, int r) {
    return kMma ? thread / kWarp * 16 + thread % kWarp / 4 + 8 * r : thread / 16 + 8 * r;
  }
  EIGENFORMER_DEVICE static int column(int thread, int c) {
    return kMma ? c / 2 * 8 + thread % 4 * 2 + c % 2 : thread % 16 + 16 * c;
  }
  EIGENFORMER_DEVICE static constexpr int index(int r, int c) {
    return kMma ? c / 2 * 4 + r * 2 + c % 2 : r * 4 + c;
  }
  EIGENFORMER_DEVICE C& at(int r, int c) { return values[index(r, c)]; }
  EIGENFORMER_DEVICE void clear() {
    EIGENFORMER_UNROLL_ALL
    for (C& value : values) value = C(0);
  }

  /// 32 columns of the operands, which begin at these elements of the arrays; from `depth` on they
  /// are zeros.
  template <typename Block, typename Array>
  EIGENFORMER_DEVICE void add(Block& block, const Array& rows, Index row_base, const Array& columns,
                              Index column_base, [[maybe_unused]] Index depth) {
    constexpr int stride = kPairOperand<T>;
    const int thread = block.thread();
    if constexpr (kMma) {
      const int lane = block.lane(), place = lane / 4 * stride + lane % 4 * 8;
      const auto load = [&](const Array& array, Index base, int row) {
        return array.template pack<Pack<T, 8>>(base + row * stride + place);
      };
      const auto low = load(rows, row_base, block.warp() * 16),
                 high = load(rows, row_base, block.warp() * 16 + 8);
      EIGENFORMER_UNROLL_ALL
      for (int n = 0; n < 8; ++n) {
        FragmentD<T> sums{{values[4 * n], values[4 * n + 1], values[4 * n + 2], values[4 * n + 3]}};
        multiply_step<T>(block, sums, low, high, load(columns, column_base, 8 * n));
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < 4; ++i) values[4 * n + i] = sums.values[i];
      }
    } else {
      constexpr int width = pack_width<T>;
      for (int d = 0; d < kTileDepth && d < depth; d += width) {
        Pack<T, width> b[kColumns];
        EIGENFORMER_UNROLL_ALL
        for (int c = 0; c < kColumns; ++c)
          b[c] =
              columns.template pack<Pack<T, width>>(column_base + column(thread, c) * stride + d);
        EIGENFORMER_UNROLL_ALL
        for (int r = 0; r < kRows; ++r) {
          const auto a = rows.template pack<Pack<T, width>>(row_base + row(thread, r) * stride + d);
          EIGENFORMER_UNROLL_ALL
          for (int c = 0; c < kColumns; ++c) {
            EIGENFORMER_UNROLL_ALL
            for (int i = 0; i < width; ++i) at(r, c) = std::fma(a[i], b[c][i], at(r, c));
          }
        }
      }
    }
  }

  /// What RowTile takes where these pairs are its own: columns [16 * k, 16 * k + 16).
  template <typename Block>
  EIGENFORMER_DEVICE FragmentA<T> fragment(Block& block, int k) const {
    FragmentA<T> a;
    EIGENFORMER_UNROLL_ALL
    for (int i = 0; i < a.kSize; i += 2) {
      const C* const two = values + 4 * (2 * k + i / 4) + i % 4;
      block.round_pair(a.values + i, two[0], two[1]);
    }
    return a;
  }
};

/// 64 rows of 32 columns: to row `row` is added the sum over k of pairs(row, k) times row k of an
/// operand. A thread has 16 of the elements.
template <typename T>
struct RowTile {
  using C = compute_type<T>;
  static constexpr bool kMma = kOnTensorCores<T>;
  static constexpr int kSize = 16;
  C values[kSize];

  EIGENFORMER_DEVICE static int row(int thread, int i) {
    return kMma ? thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8
                : thread / 8 + i / 4 * 16;
  }
  EIGENFORMER_DEVICE static int column(int thread, int i) {
    return kMma ? i / 4 * 8 + thread % 4 * 2 + i % 2 : thread % 8 * 4 + i % 4;
  }
  EIGENFORMER_DEVICE void clear() {
    EIGENFORMER_UNROLL_ALL
    for (C& value : values) value = C(0);
  }

  /// Columns [16 * k, 16 * k + 16) of pairs, and these rows of the operand, which begins at
  /// `base`.
  template <typename Block, typename Array>
  EIGENFORMER_DEVICE void add(Block& block, const FragmentA<T>& pairs, int k, const Array& operand,
                              Index base) {
    const int lane = block.lane();
    const Index place = base + (16 * k + lane % 16) * kRowOperand<T> + lane / 16 * 8;
    EIGENFORMER_UNROLL_ALL
    for (int side = 0; side < 2; ++side) {
      FragmentB<T> b[2];
      block.load_rows(operand, place + 16 * side, b);
      EIGENFORMER_UNROLL_ALL
      for (int n = 0; n < 2; ++n) {
        C* const at = values + 8 * side + 4 * n;
        FragmentD<T> sums{{at[0], at[1], at[2], at[3]}};
        block.mma(sums, pairs, b[n]);
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < 4; ++i) at[i] = sums.values[i];
      }
    }
  }

  /// All 64 of them, pairs in shared memory.
  template <typename Block, typename Array>
  EIGENFORMER_DEVICE void add_all(Block& block, const Array& pairs, const Array& operand) {
    constexpr int stride = kPairStride<T>;
    if constexpr (kMma) {
      for (int k = 0; k < kTile / 16; ++k) {
        FragmentA<T> a;
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < a.kSize; i += 2) {
          const auto two = pairs.template pack<Pack<T, 2>>(
              (block.warp() * 16 + a.row(block.lane(), i)) * stride + 16 * k +
              a.column(block.lane(), i));
          a.values[i] = two[0];
          a.values[i + 1] = two[1];
        }
        add(block, a, k, operand, 0);
      }
    } else {
      constexpr int width = pack_width<T>;
      const int thread = block.thread();
      for (int k = 0; k < kTile; k += width) {
        Pack<T, width> a[4];
        EIGENFORMER_UNROLL_ALL
        for (int r = 0; r < 4; ++r)
          a[r] = pairs.template pack<Pack<T, width>>(row(thread, 4 * r) * stride + k);
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < width; ++i) {
          EIGENFORMER_UNROLL_ALL
          for (int c = 0; c < 4; c += width) {
            const auto b = operand.template pack<Pack<T, width>>((k + i) * kRowOperand<T> +
                                                                 thread % 8 * 4 + c);
            EIGENFORMER_UNROLL_ALL
            for (int r = 0; r < 4; ++r) {
              EIGENFORMER_UNROLL_ALL
              for (int j = 0; j < width; ++j)
                values[4 * r + c + j] = std::fma(a[r][i], b[j], values[4 * r + c + j]);
            }
          }
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

/// Numbers that are not finite become 0; returns whether there was one. An operand of RowTile has
/// none, so that pairs nobody sees, of weight 0, stay out of the sums.
template <typename T, int Width>
EIGENFORMER_DEVICE bool make_finite(Pack<T, Width>& values) {
  bool found = false;
  EIGENFORMER_UNROLL_ALL
  for (int i = 0; i < Width; ++i)
    if (!is_finite(values[i])) {
      values[i] = T(0);
      found = true;
    }
  return found;
}

/// The elements [column, column + Width) of a row of `width`; from there on, and where the row is
/// nullptr, zeros.
template <int Width, typename T>
EIGENFORMER_DEVICE Pack<T, Width> row_pack(const T* row, Index column, Index width) {
  if (row != nullptr && column + Width <= width && packs_fit<Width>(row + column, 0))
    return load_pack<T, Width>(row + column);
  Pack<T, Width> values;
  EIGENFORMER_UNROLL_ALL
  for (int i = 0; i < Width; ++i)
    values[i] = row != nullptr && column + i < width ? row[column + i] : T(0);
  return values;
}

/// Columns [column, column + 32) of 64 rows into shared memory, each pack as change(pack) leaves
/// it: row_at(r) is where row r begins, nullptr for a row of zeros.
template <typename T, int Stride, typename Block, typename Array, typename RowAt, typename Change>
EIGENFORMER_DEVICE void load_operand(Block& block, const Array& array, Index base, Index column,
                                     Index width, const RowAt& row_at, const Change& change) {
  constexpr int pack = pack_width<T>, packs = kTileDepth / pack;
  for (int at = block.thread(); at < kTile * packs; at += kTileThreads) {
    const int r = at / packs, c = at % packs * pack;
    auto values = row_pack<pack>(row_at(r), column + c, width);
    change(values);
    array.store_pack(base + r * Stride + c, values);
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
