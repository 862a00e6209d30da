/// \file
/// The products of attention's backward pass. Every operand is a matrix in panels of kPanel
/// columns: element (r, c) at data[c / kPanel * stride + r * kPanel + c % kPanel], so that a panel
/// is read from one end to the other and stays in L1, whether it stands left, right or transposed.
/// A row of a tile is one chain of multiply-adds whatever rows stand beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C, typename Isa>
struct AttentionPanels {
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  static constexpr int lanes = V::lanes;
  static constexpr int kPanel = Tile::kPanel;
  static constexpr int kRows = Tile::kRows;
  static constexpr int kPanels = kAttentionKeyBlock / kPanel;                // of a key block
  static constexpr Index kBlockStride = Index{kAttentionKeyBlock} * kPanel;  // of 64 rows

  /// Row `row` of a matrix = source * factor, zeros from `width` on. What is no finite number
  /// becomes 0, so that a product with 0 is 0: false where there is such an element.
  template <typename S>
  static bool load_row(const S* source, C factor, Index width, Index padded_width, Index row,
                       Index stride, C* matrix) {
    const V f = V::set1(factor);
    bool finite = true;
    for (Index c = 0; c < padded_width; c += lanes) {
      const int count = static_cast<int>(std::clamp<Index>(width - c, 0, lanes));
      V x = (count == lanes ? V::load(source + c) : V::load_partial(source + c, count)) * f;
      const auto is_finite = less_equal(abs(x), V::set1((std::numeric_limits<C>::max)()));
      constexpr std::uint32_t every_lane = ~std::uint32_t{0} >> (32 - lanes);
      if ((is_finite.bits() & every_lane) != every_lane) {
        x = select(is_finite, x, V::zero());
        finite = false;
      }
      x.store(at(matrix, row, c, stride));
    }
    return finite;
  }

  /// Columns [0, width) of 64 rows to rows of 64 columns.
  static void transpose_block(const C* rows, Index width, C* columns) {
    for (Index j = 0; j < kAttentionKeyBlock; j += lanes)
      for (Index c = 0; c < width; c += lanes) {
        V block[lanes];
        for (int i = 0; i < lanes; ++i) block[i] = V::load(at(rows, j + i, c, kBlockStride));
        transpose(block);
        for (int i = 0; i < lanes; ++i) block[i].store(at(columns, c + i, j, width * kPanel));
      }
  }

  /// sum[r] += row r of a * panel b. depth, the columns of a, is a multiple of kPanel.
  template <int R>
  static EIGENFORMER_INLINE void multiply(const C* a, Index stride, const C* b, Index depth,
                                          V (&sum)[R][2]) {
    for (Index k = 0; k < depth; k += kPanel, a += stride)
      for (int i = 0; i < kPanel; ++i, b += kPanel) multiply_add(a + i, kPanel, b, sum);
  }

  /// sum[c] += column c of panel a, from its top, * panel b: `depth` rows of each.
  template <int R>
  static EIGENFORMER_INLINE void multiply_transposed(const C* a, const C* b, Index depth,
                                                     V (&sum)[R][2]) {
    for (Index k = 0; k < depth; ++k, a += kPanel, b += kPanel) multiply_add(a, 1, b, sum);
  }

  template <int R>
  static EIGENFORMER_INLINE void clear(V (&sum)[R][2]) {
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::zero();
  }

  template <int R>
  static EIGENFORMER_INLINE void store(const V (&sum)[R][2], C* to, Index row_stride) {
    for (int r = 0; r < R; ++r) {
      sum[r][0].store(to + r * row_stride);
      sum[r][1].store(to + r * row_stride + lanes);
    }
  }

  /// to[r] += sum[r], rows of one panel.
  template <int R>
  static EIGENFORMER_INLINE void add(const V (&sum)[R][2], C* to) {
    for (int r = 0; r < R; ++r, to += kPanel) {
      (V::load(to) + sum[r][0]).store(to);
      (V::load(to + lanes) + sum[r][1]).store(to + lanes);
    }
  }

  /// f(std::integral_constant<int, R>, first) over tiles that cover the columns of a panel, nearly
  /// equal ones: 6, 5 and 5 of 16 columns keep more chains of additions at work than 6, 6 and 4.
  template <typename F>
  static EIGENFORMER_INLINE void for_column_tiles(F&& f) {
    constexpr int tiles = (kPanel + kRows - 1) / kRows, least = kPanel / tiles,
                  larger = kPanel % tiles;
    int c = 0;
    if constexpr (larger > 0)
      for (; c < larger * (least + 1); c += least + 1)
        f(std::integral_constant<int, least + 1>{}, c);
    for (; c < kPanel; c += least) f(std::integral_constant<int, least>{}, c);
  }

  /// Row `row` of a matrix times `factor`, to its `width` elements.
  template <typename S>
  static void store_row(const C* matrix, Index row, Index stride, C factor, Index width, S* to) {
    for (Index c = 0; c < width; c += kPanel)
      scale_line(at(matrix, row, c, stride), V::set1(factor), to + c,
                 std::min<Index>(kPanel, width - c));
  }

  template <typename P>
  static EIGENFORMER_INLINE P* at(P* matrix, Index row, Index column, Index stride) {
    return matrix + column / kPanel * stride + row * kPanel + column % kPanel;
  }

 private:
  template <int R>
  static EIGENFORMER_INLINE void multiply_add(const C* weights, Index stride, const C* row,
                                              V (&sum)[R][2]) {
    const V b0 = V::load(row), b1 = V::load(row + lanes);
    for (int r = 0; r < R; ++r) {
      const V weight = V::set1(weights[r * stride]);
      sum[r][0] = fma(weight, b0, sum[r][0]);
      sum[r][1] = fma(weight, b1, sum[r][1]);
    }
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
