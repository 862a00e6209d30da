/// \file
/// Activations of a matrix product: how the rows of a block fall into register tiles, and their
/// packing, for int8 with the quantization of each token on the way.
#pragma once

#include "../tile/pack.h"
#include "../tile/product.h"
#include "../vector/quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using tile::MatrixOperand;
using tile::WeightRows;

/// How the rows of a block fall into tiles: whole ones, but a short last one shares its rows with
/// the one before it. Of 16 rows two tiles of 8 rather than 12 and 4: the 8 sums of a tile of 4
/// barely cover the latency of their own multiply-adds.
template <typename Dot>
class Tiles {
 public:
  explicit Tiles(Index block_rows)
      : rows_(block_rows), count_((block_rows + Dot::rows - 1) / Dot::rows), split_(block_rows) {
    const Index rest = block_rows % Dot::rows;
    if (tile::steps_at_once<Dot> == 1 && count_ > 1 && rest > 0 && rest <= Dot::rows / 3)
      split_ = (count_ - 2) * Dot::rows + tile::whole_height<Dot>(2 * Dot::rows / 3);
    else if (count_ > 0)
      split_ = (count_ - 1) * Dot::rows;
  }
  Index count() const { return count_; }
  Index first(Index t) const { return t + 1 == count_ ? split_ : t * Dot::rows; }
  Index valid(Index t) const {
    return (t + 1 == count_ ? rows_ : t + 2 == count_ ? split_ : (t + 1) * Dot::rows) - first(t);
  }
  int height(Index t) const { return tile::tile_height<Dot>(valid(t)); }
  /// Of the last tile's end.
  Index padded_rows() const { return count_ == 0 ? 0 : split_ + height(count_ - 1); }
  /// An upper bound of padded_rows for any number of rows up to this.
  static constexpr Index padded_rows(Index rows) {
    return (rows + Dot::rows - 1) / Dot::rows * Dot::rows;
  }
  /// An upper bound of those of all parts that have so many rows together, however they are
  /// divided: each tile may be as much higher than its rows as any is.
  static constexpr Index padded_rows_of_parts(Index rows) {
    Index most = 0;
    for (Index r = 1; r <= Dot::rows; ++r)
      most = std::max<Index>(most, (rows * tile::tile_height<Dot>(r) + r - 1) / r);
    return most;
  }

 private:
  Index rows_, count_;
  Index split_;  // first row of the last tile
};

/// What quantized activations are scaled by and what is taken off their sums.
struct ActivationScales {
  float* scales;  // (rows)
  // [tile][group][row of the tile]: `offset_factor` times the sum of the group's values, 0 where
  // weights are signed
  std::int32_t* offsets;
  Index group;  // k of one group; the depth where there is one
  Index groups;
  // what unsigned weights are too large by: 128, of int4 8, or 0 where they have minimums
  std::int32_t offset_factor = 128;
  float* sums = nullptr;  // as the offsets: the sums of groups that have minimums
};

inline std::int32_t sum_of(const std::int8_t* values, Index count) {
  std::int32_t sum = 0;
  for (Index i = 0; i < count; ++i) sum += values[i];
  return sum;
}

/// Modulo 2^32: from 132,105 inputs on 128 times their sum may leave 32 bits, as the sums it is
/// taken off do.
inline void add_wrapping(std::int32_t& to, std::int32_t number) {
  to = static_cast<std::int32_t>(static_cast<std::uint32_t>(to) +
                                 static_cast<std::uint32_t>(number));
}

/// Quads of `n` quantized activations from k on into their places in a tile; n is a multiple of 4
/// but at the end.
template <typename Dot>
void place_quads(const std::int8_t* values, Index k, Index n, int height, typename Dot::Unit* to) {
  if constexpr (tile::steps_at_once<Dot> != 1) {
    constexpr Index at_once = Index{Dot::step} * tile::steps_at_once<Dot>;
    for (Index at = 0; at < n; at += at_once)
      std::memcpy(static_cast<void*>(to + (k + at) / at_once * height * tile::steps_at_once<Dot>),
                  values + at, static_cast<std::size_t>((std::min)(at_once, n - at)));
  } else {
    to += k / 4 * height * Dot::units;
    for (Index at = 0; at < n; at += 4, to += height * Dot::units) {
      std::uint32_t quad;
      std::memcpy(&quad, values + at, 4);
      if constexpr (Dot::units == 1)
        *to = quad;
      else
        tile::split_quad(quad, to[0], to[height]);
    }
  }
}

/// Quantizes a row of activations, r of the tile that begins with row `first`, into its place in a
/// tile of int8.
template <typename Dot, typename Isa, typename X>
void pack_quantized_row(Isa, const X* row, Index depth, int height, typename Dot::Unit* to,
                        const ActivationScales& result, Index first, Index r) {
  constexpr Index chunk = 256;  // a multiple of every group size but the whole depth
  alignas(64) std::int8_t values[chunk];
  const float scale = activation_scale<Isa>(row, depth);
  result.scales[first + r] = scale;
  const Index numbers = first * result.groups + r;
  for (Index k = 0; k < depth; k += chunk) {
    const Index n = (std::min)(chunk, depth - k), padded = (n + 3) / 4 * 4;
    // the next row, whose maximum comes next
    for (Index at = 0; at < n; at += 64 / Index{sizeof(X)})
      simd::prefetch_after(row + k + at, depth * Index{sizeof(X)});
    quantize_activation_line<Isa>(row + k, n, scale, values);
    std::fill(values + n, values + padded, std::int8_t{0});
    place_quads<Dot>(values, k, padded, height, to);
    if constexpr (Dot::unsigned_weights)
      for (Index at = 0, part = (std::min)(chunk, result.group); at < n; at += part) {
        const std::int32_t sum = sum_of(values + at, (std::min)(part, n - at));
        const Index number = numbers + (k + at) / result.group * height;
        add_wrapping(result.offsets[number], result.offset_factor * sum);
        if (result.sums != nullptr) result.sums[number] = static_cast<float>(sum);
      }
  }
}

/// The same of `rows` rows of a tile, row i of which starts at row(i), and zeros beyond them; r is
/// the tile's first row in the results.
template <typename Dot, typename Isa, typename Row>
void pack_quantized_rows(Isa isa, Index rows, Index depth, int height, typename Dot::Unit* to,
                         const ActivationScales& results, Index r, Row&& row) {
  const Index steps = tile::product_steps<Dot>(depth);
  if (rows < height) tile::clear(to, steps * Dot::units * height);
  // the last of the 16 steps may stay empty
  if (steps * Dot::step > depth && tile::steps_at_once<Dot> != 1)
    tile::clear(to + (steps - tile::steps_at_once<Dot>)*height,
                Index{tile::steps_at_once<Dot>} * height);
  std::fill_n(results.offsets + r * results.groups, height * results.groups, 0);
  if (results.sums != nullptr)
    std::fill_n(results.sums + r * results.groups, height * results.groups, 0.0f);
  for (Index i = 0; i < rows; ++i) {
    constexpr Index to_next = tile::steps_at_once<Dot>;  // from one row of a tile to the next
    pack_quantized_row<Dot>(isa, row(i), depth, height, to + i * to_next, results, r, i);
  }
}

/// Packs k of [first, end) of a tile of `rows` valid rows of `height`, where they are quantized all
/// of k; `r` is the tile's first row in the block.
template <typename Dot, typename Isa, typename X>
void pack_activations(Isa isa, const MatrixOperand<X>& x, Index row, Index rows, int height,
                      Index first, Index end, typename Dot::Unit* to,
                      const ActivationScales& scales, Index r) {
  if constexpr (tile::quantizes_activations<Dot>) {
    pack_quantized_rows<Dot>(isa, rows, end, height, to, scales, r,
                             [&](Index i) { return x.data + (row + i) * x.row_stride; });
  } else {
    tile::pack_tile<Dot>(isa, x, row, rows, height, first, end, to);
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
