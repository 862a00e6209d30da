/// \file
/// The products of attention's backward pass where queries, keys, values and gradients are bfloat16
/// and the instruction set multiplies pairs of them (vdpbf16ps, tdpbf16ps), as the forward pass
/// does (pair_products.h), by the register tiles of linear layers. P and dS are rounded to bfloat16
/// first.
///
/// Both operands of a product hold pairs along what is summed: queries, grad_output and keys, which
/// stand on either side, are held twice. dK and dV are summed transposed, so that P and dS are the
/// right operand there, with pairs of two rows, lane by lane; only for dQ are pairs of dS along the
/// keys, and transposed in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../linear/activations.h"
#include "../../tile/pack.h"
#include "../../tile/product.h"
#include "../pair_products.h"
#include "plan.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa>
struct BackwardPairs {
  using Dot = tile::Dot<bfloat16, bfloat16, Isa>;
  using V = simd::Vec<float, Isa>;
  using Unit = std::uint32_t;
  static constexpr Index kBlock = kAttentionKeyBlock, kColumns = Dot::columns;
  static constexpr int kRows = Dot::rows, kGroup = kRows * (kRows < 16 ? 4 : 2);
  static_assert(kGroup % (2 * tile::steps_at_once<Dot>) == 0 && kColumns == 2 * V::lanes);

  /// row[0, width) of bfloat16, zeros up to padded_width and for what is no finite number: false
  /// where there is such an element.
  static bool load_row(const bfloat16* source, Index width, Index padded_width, bfloat16* row) {
    bool finite = true;
    for (Index c = 0; c < padded_width; c += V::lanes) {
      const int count = static_cast<int>(std::clamp<Index>(width - c, 0, V::lanes));
      V x = count == V::lanes ? V::load(source + c) : V::load_partial(source + c, count);
      const auto is_finite = less_equal(abs(x), V::set1((std::numeric_limits<float>::max)()));
      constexpr std::uint32_t every_lane = ~std::uint32_t{0} >> (32 - V::lanes);
      if ((is_finite.bits() & every_lane) != every_lane) {
        x = select(is_finite, x, V::zero());
        finite = false;
      }
      x.store(row + c);
    }
    return finite;
  }

  /// A group of rows (width), the first of which is row `first` of `rows`, as left operand with
  /// pairs along its columns, and transposed with pairs of rows.
  static void pack_rows(const bfloat16* group, Index width, Index first, Index rows, Unit* along,
                        Unit* across) {
    for (Index t = 0; t < kGroup; t += kRows)
      tile::pack_tile<Dot>(Isa{}, tile::MatrixOperand<bfloat16>{group, width, 1}, t, kRows, kRows,
                           0, width, along + (first + t) * (width / 2));
    const Tiles<Dot> tiles(width);
    for (Index t = 0; t < tiles.count(); ++t)
      tile::pack_tile<Dot>(Isa{}, tile::MatrixOperand<bfloat16>{group, 1, width}, tiles.first(t),
                           tiles.height(t), tiles.height(t), 0, kGroup,
                           across + tiles.first(t) * (rows / 2) + first / 2 * tiles.height(t));
  }

  /// A block of keys (64, width) as right operand: pairs along the columns; pairs of keys.
  static void pack_along(const bfloat16* block, Index width, bfloat16* to) {
    pack_panels({{{block, width, 1}}, kBlock}, width, to);
  }
  static void pack_across(const bfloat16* block, Index width, bfloat16* to) {
    pack_panels({{{block, 1, width}}, width}, kBlock, to);
  }

  /// sums (panel, kGroup, columns of a panel) = or += a tile of rows by panels of `steps` pairs.
  static void multiply(const Unit* rows, const bfloat16* panels, Index panel_stride, Index steps,
                       Index count, bool from_zero, float* sums) {
    tile::tile_products<Dot>(
        kRows, {rows, panels, panel_stride, reinterpret_cast<std::uintptr_t>(panels), 0}, steps,
        sums, kGroup * kColumns, count, from_zero);
  }

  /// sums (width, columns of a panel) += pairs of rows [top, top + count) of `rows`, transposed, by
  /// a panel of P or dS.
  static void add_transposed(const Unit* across, Index width, Index rows, Index top, Index count,
                             const bfloat16* panel, float* sums) {
    const Tiles<Dot> tiles(width);
    for (Index t = 0; t < tiles.count(); ++t) {
      const int height = tiles.height(t);
      const Unit* const from = across + tiles.first(t) * (rows / 2) + top / 2 * height;
      tile::tile_products<Dot>(height, {from, panel, 0, reinterpret_cast<std::uintptr_t>(panel), 0},
                               count / 2, sums + tiles.first(t) * kColumns, 0, 1, false);
    }
  }

  /// A tile of rows (64) of dS as left operand with pairs of keys.
  static void pack_tile(const bfloat16* lines, Unit* to) {
    tile::pack_tile<Dot>(Isa{}, tile::MatrixOperand<bfloat16>{lines, kBlock, 1}, 0, kRows, kRows, 0,
                         kBlock, to);
  }

  /// Key j of the transposed sums of a block, and those after it: 16 rows (width) times `factor`.
  /// f(i) is where row j + i < count goes.
  template <typename To>
  static void store_keys(const float* sums, Index padded_width, Index j, Index count, float factor,
                         Index width, To&& to) {
    const float* const panel = sums + j / kColumns * padded_width * kColumns + j % kColumns;
    for (Index d = 0; d < width; d += V::lanes) {
      V block[V::lanes];
      for (int i = 0; i < V::lanes; ++i)
        block[i] = V::load(panel + (d + i) * kColumns) * V::set1(factor);
      transpose(block);
      const int n = static_cast<int>(std::min<Index>(V::lanes, width - d));
      for (int i = 0; i < V::lanes && j + i < count; ++i) block[i].store_partial(to(j + i) + d, n);
    }
  }

 private:
  static void pack_panels(const tile::WeightRows<bfloat16, 1>& rows, Index depth, bfloat16* to) {
    for (Index p = 0; p * kColumns < rows.rows; ++p)
      tile::pack_panel<Dot>(Isa{}, rows, p, 0, depth, depth / 2, to + p * depth * kColumns);
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
