/// \file
/// Products of attention where queries, keys and values are bfloat16 and the instruction set
/// multiplies pairs of them (vdpbf16ps, tdpbf16ps): scores of queries and keys as they are, scaled
/// afterwards in float, and values by weights rounded to bfloat16. Few rows and many pack keys and
/// values alike: the pairs of a sum have one order, and packing a block takes a fraction of the
/// time in which memory brings it. Keys that a row does not see have weight 0 in its products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/workspace.h"
#include "../vector/copy.h"
#include "packed_scores.h"
#include "score.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Whether attention multiplies pairs.
template <typename Isa, typename TQ, typename TKV>
inline constexpr bool kPairProducts =
    std::is_same_v<TQ, bfloat16> && std::is_same_v<TKV, bfloat16> &&
    std::is_same_v<typename tile::Dot<bfloat16, bfloat16, Isa>::Unit, std::uint32_t>;

/// All nullptr where products are others.
struct PairScratch {
  std::uint32_t *queries, *weights;  // tiles of all rows, and of one tile's with a block
  bfloat16 *keys, *values, *zeros;   // panels of a block, and a row of zeros
  float* sums;                       // of a tile
};

template <typename Isa>
class PairProducts {
  using Dot = tile::Dot<bfloat16, bfloat16, Isa>;
  using Packed = PackedScores<Dot, Isa>;
  using V = simd::Vec<float, Isa>;
  static constexpr int columns = Dot::columns, at_once = tile::steps_at_once<Dot>,
                       kSteps = kAttentionKeyBlock / 2;  // of weights with values
  static_assert(Dot::step == 2 && V::lanes == columns / Dot::vectors && kSteps % at_once == 0);

 public:
  static PairScratch take_scratch(Index rows, Index depth, Index width, Workspace::Frame& frame) {
    PairScratch s{frame.take<std::uint32_t>(Packed::query_units(rows, depth)),
                  frame.take<std::uint32_t>(Index{Dot::rows} * kSteps),
                  frame.take<bfloat16>(Packed::key_elements(depth)),
                  frame.take<bfloat16>(width * kAttentionKeyBlock),
                  frame.take<bfloat16>(width),
                  frame.take<float>((std::max)(Packed::kSums, Dot::rows * width))};
    std::fill_n(s.zeros, width, bfloat16(0.0f));
    return s;
  }

  /// width: that of values and their sums, padded to whole panels.
  PairProducts(const PairScratch& scratch, Index depth, Index value_dim, Index width, float scale)
      : s_(scratch),
        packed_{depth, scratch.queries, scratch.keys, scratch.sums},
        value_dim_(value_dim),
        width_(width),
        scale_(scale) {}

  /// Row r of the queries starts at row(r).
  template <typename Row>
  void load_queries(Index rows, Row&& row) {
    const Index steps = tile::product_steps<Dot>(packed_.depth);
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      const int height = tiles.height(t);
      std::uint32_t* const to = packed_.tile_queries(first);
      tile::clear(to, steps * height);
      for (Index r = 0; r < tiles.valid(t); ++r)
        place_pairs(row(first + r), packed_.depth, height, r, to);
    }
  }

  void score(Index rows, const BlockRows<bfloat16>& block, const BlockRange* ranges,
             float* scores) {
    packed_.score(rows, block, ranges, [&](Index r, int key, const float* sums) {
      (V::load(sums) * V::set1(scale_)).store(scores + r * kAttentionKeyBlock + key);
    });
  }

  /// Packs the values of a block, zeros for those of `hidden` keys.
  void load_values(const BlockRows<bfloat16>& block, KeyBits hidden) {
    const auto row = [&](int j) {
      return j < block.count && (hidden >> j & 1) == 0 ? block.values[j] : s_.zeros;
    };
    const Index panel = Index{kSteps} * columns;
    auto* const panels = reinterpret_cast<std::uint32_t*>(s_.values);
    for (int step = 0; step < kSteps; ++step) {
      const bfloat16 *const even = row(2 * step), *const odd = row(2 * step + 1);
      std::uint32_t* to = panels + step * columns;
      for (Index d = 0; d < width_; d += columns, to += panel) {
        const Index n = std::clamp<Index>(value_dim_ - d, 0, columns);
        if (n < columns) tile::clear(to, columns);
        tile::join_pairs(even + d, odd + d, n, to);
      }
    }
  }

  /// sums[r] = factors[r] * sums[r] + weights[r] by the values that are loaded, for rows that see
  /// one of them.
  void add_values(Index rows, const float* weights, const BlockRange* ranges, const float* factors,
                  float* sums) {
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t), valid = tiles.valid(t);
      const int height = tiles.height(t);
      const KeySpan seen = seen_by_tile(ranges + first, static_cast<int>(valid));
      if (seen.begin >= seen.end) continue;
      const Index begin = seen.begin / (2 * at_once) * at_once,
                  steps = (seen.end + 2 * at_once - 1) / (2 * at_once) * at_once - begin;
      load_weights(weights + first * kAttentionKeyBlock + 2 * begin, valid, 2 * steps, height);
      const bfloat16* const from = s_.values + begin * 2 * columns;
      const Index stride = Index{height} * columns;
      tile::tile_products<Dot>(height,
                               {s_.weights, from, Index{kAttentionKeyBlock} * columns,
                                reinterpret_cast<std::uintptr_t>(from), 0},
                               steps, s_.sums, stride, width_ / columns, true);
      for (Index r = 0; r < valid; ++r)
        if (!ranges[first + r].empty())
          add_row(s_.sums + r * columns, stride, factors[first + r], sums + (first + r) * width_);
    }
  }

 private:
  /// `count` numbers of row r of a tile, the last pair of an odd count filled up with zero.
  static void place_pairs(const bfloat16* line, Index count, int height, Index r,
                          std::uint32_t* to) {
    const auto copy = [&](std::uint32_t* unit, Index from, Index n) {
      std::memcpy(static_cast<void*>(unit), line + from,
                  static_cast<std::size_t>((std::min)(n, count - from)) * sizeof(bfloat16));
    };
    if constexpr (at_once > 1) {
      for (Index k = 0; k < count; k += 2 * at_once)
        copy(to + (k / 2 / at_once * height + r) * at_once, k, 2 * at_once);
    } else {
      const Index whole = count / 2 * 2;
      for (Index k = 0; k < whole; k += 2)
        std::memcpy(static_cast<void*>(to + k / 2 * height + r), line + k, sizeof(std::uint32_t));
      if (whole < count) copy(to + whole / 2 * height + r, whole, 1);
    }
  }

  void load_weights(const float* weights, Index rows, Index count, int height) {
    if (rows < height) tile::clear(s_.weights, count / 2 * height);
    for (Index r = 0; r < rows; ++r) {
      alignas(64) bfloat16 rounded[kAttentionKeyBlock];
      convert_line<V>(weights + r * kAttentionKeyBlock, rounded, count);
      place_pairs(rounded, count, height, r, s_.weights);
    }
  }

  void add_row(const float* from, Index panel_stride, float factor, float* sums) {
    for (Index d = 0; d < width_; d += columns, from += panel_stride)
      for (int c = 0; c < columns; c += V::lanes)
        fma(V::load(sums + d + c), V::set1(factor), V::load(from + c)).store(sums + d + c);
  }

  const PairScratch& s_;
  Packed packed_;
  Index value_dim_, width_;
  float scale_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
