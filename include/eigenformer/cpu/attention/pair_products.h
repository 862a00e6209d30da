/// \file
/// Products of attention where queries, keys and values are bfloat16 and the instruction set
/// multiplies pairs of them (vdpbf16ps, tdpbf16ps): scores of queries and keys as they are, scaled
/// afterwards in float, and values by weights rounded to bfloat16. Few rows read keys and values
/// where they lie (few_units.h; not those of AMX), many pack them: the pairs of a sum have one
/// order. Keys that a row does not see have weight 0 in its products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/workspace.h"
#include "../vector/copy.h"
#include "few_units.h"
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
  using Few = FewRows<float, Isa>;
  using FewUnits = cpu::FewUnits<Dot, Isa>;
  static constexpr bool kInPlace = kTakesUnits<Dot>;
  static constexpr int columns = Dot::columns, at_once = tile::steps_at_once<Dot>,
                       kSteps = kAttentionKeyBlock / 2;  // of weights with values
  static_assert(Dot::step == 2 && V::lanes == columns / Dot::vectors && kSteps % at_once == 0);

 public:
  static PairScratch take_scratch(Index rows, Index depth, Index width, Workspace::Frame& frame) {
    Index few = 0;
    if constexpr (kInPlace) few = FewUnits::query_units(depth) * kAttentionFewRows;
    PairScratch s{frame.take<std::uint32_t>((std::max)(Packed::query_units(rows, depth), few)),
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
    if constexpr (kInPlace)
      if (rows <= kAttentionFewRows)
        return Few::with_rows(rows, [&](auto tile) {
          std::fill_n(s_.queries, FewUnits::query_units(packed_.depth) * tile, 0u);
          for (Index r = 0; r < rows; ++r)
            FewUnits::template place_query<tile>(row(r), packed_.depth, r, s_.queries);
        });
    const Index steps = tile::product_steps<Dot>(packed_.depth);
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      const int height = tiles.height(t);
      std::uint32_t* const to = packed_.tile_queries(first);
      tile::clear(to, steps * height);
      place_pairs([&](Index r) { return row(first + r); }, packed_.depth, tiles.valid(t), height,
                  to);
    }
  }

  void score(Index rows, const BlockRows<bfloat16>& block, const bfloat16* const* then,
             const BlockRange* ranges, float* scores) {
    if constexpr (kInPlace)
      if (rows <= kAttentionFewRows)
        return Few::with_rows(rows, [&](auto tile) {
          FewUnits::template score<tile>(
              s_.queries, packed_.depth, block, then, seen_by_tile(ranges, static_cast<int>(rows)),
              [&](int r, int key, V sum) {
                (sum * V::set1(scale_)).store(scores + r * kAttentionKeyBlock + key);
              });
        });
    static_cast<void>(then);  // packing asks by itself
    packed_.for_each_tile(rows, block, ranges, [&](const auto& t) {
      tile::for_each_tile_sum<Dot>(
          t.height, t.operands, tile::product_steps<Dot>(packed_.depth), t.panels, s_.sums,
          ScoreTile{V::set1(scale_), t.valid,
                    scores + t.first * kAttentionKeyBlock + t.begin * columns});
    });
  }

  /// The weights of a row stand rounded where its scores were.
  static bfloat16* weights_of(float* scores) { return reinterpret_cast<bfloat16*>(scores); }

  /// Whether `rows` rows read values where they lie.
  static constexpr bool in_place(Index rows) { return kInPlace && rows <= kAttentionFewRows; }

  /// sums[r] = factors[r] * sums[r] + weights[r] by the values of a block where they lie.
  void add_values_in_place(Index rows, float* scores, const BlockRows<bfloat16>& block,
                           const BlockRange* ranges, const float* factors, float* sums,
                           const bfloat16* const* then) {
    if constexpr (kInPlace)
      Few::with_rows(rows, [&](auto tile) {
        FewUnits::template add_values<tile>(rows, weights_of(scores), block, ranges, factors,
                                            value_dim_, width_, sums, s_.sums, s_.zeros, then);
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
        tile::join_pairs(Isa{}, even + d, odd + d, n, to);
      }
    }
  }

  /// sums[r] = factors[r] * sums[r] + weights of row r by the values that are loaded, for rows that
  /// see one of them. weights_of(scores[r]) are the weights.
  void add_values(Index rows, float* scores, const BlockRange* ranges, const float* factors,
                  float* sums) {
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t), valid = tiles.valid(t);
      const int height = tiles.height(t);
      const KeySpan seen = seen_by_tile(ranges + first, static_cast<int>(valid));
      if (seen.begin >= seen.end) continue;
      const Index begin = seen.begin / (2 * at_once) * at_once,
                  steps = (seen.end + 2 * at_once - 1) / (2 * at_once) * at_once - begin;
      load_weights(weights_of(scores + first * kAttentionKeyBlock) + 2 * begin, valid, 2 * steps,
                   height);
      const bfloat16* const from = s_.values + begin * 2 * columns;
      tile::for_each_tile_sum<Dot>(height,
                                   {s_.weights, from, Index{kAttentionKeyBlock} * columns,
                                    reinterpret_cast<std::uintptr_t>(from), 0},
                                   steps, width_ / columns, s_.sums,
                                   SumTile{rows_that_see(ranges + first, valid), factors + first,
                                           sums + first * width_, width_});
    }
  }

 private:
  struct ScoreTile {
    V scale;
    int rows;
    float* scores;
    EIGENFORMER_INLINE void operator()(Index panel, int row, int v, V sums) const {
      if (row < rows)
        (sums * scale).store(scores + row * kAttentionKeyBlock + panel * columns + v * V::lanes);
    }
  };

  struct SumTile {
    std::uint32_t rows;  // a bit for each
    const float* factors;
    float* sums;
    Index width;
    EIGENFORMER_INLINE void operator()(Index panel, int row, int v, V terms) const {
      if ((rows >> row & 1) == 0) return;
      float* const to = sums + row * width + panel * columns + v * V::lanes;
      fma(V::load(to), V::set1(factors[row]), terms).store(to);
    }
  };

  static std::uint32_t rows_that_see(const BlockRange* ranges, Index rows) {
    std::uint32_t bits = 0;
    for (Index r = 0; r < rows; ++r) bits |= static_cast<std::uint32_t>(!ranges[r].empty()) << r;
    return bits;
  }

  /// `count` numbers of each of a tile's rows, the last pair of an odd count filled up with zero.
  template <typename Row>
  static void place_pairs(Row&& row, Index count, Index rows, int height, std::uint32_t* to) {
    const auto copy = [&](void* pairs, Index r, Index from, auto n) {
      std::memcpy(pairs, row(r) + from, static_cast<std::size_t>(n) * sizeof(bfloat16));
    };
    if constexpr (at_once > 1) {
      for (Index r = 0; r < rows; ++r)
        for (Index k = 0; k < count; k += 2 * at_once)
          copy(to + (k / 2 / at_once * height + r) * at_once, r, k,
               (std::min)(Index{2 * at_once}, count - k));
    } else {
      constexpr int block = tile::transpose_size(Isa{});
      std::uint32_t stage[block * block];  // (rows, pairs)
      static_assert(Dot::rows <= block);
      for (Index k = 0; k < count; k += 2 * block) {
        const Index pairs = (std::min)(Index{block}, (count - k + 1) / 2);
        if (count - k < 2 * pairs) tile::clear(stage, block * block);
        for (Index r = 0; r < rows; ++r) {
          if (count - k >= 2 * block)  // a known size: others are copied by a slow loop
            copy(stage + r * block, r, k, std::integral_constant<Index, 2 * block>{});
          else
            copy(stage + r * block, r, k, count - k);
        }
        tile::transpose(Isa{}, stage, block * Index{sizeof(stage[0])}, static_cast<int>(rows),
                        static_cast<int>(pairs), to + k / 2 * height, height);
      }
    }
  }

  /// From rows whose scores they took the place of.
  void load_weights(const bfloat16* weights, Index rows, Index count, int height) {
    constexpr Index stride = kAttentionKeyBlock * Index{sizeof(float) / sizeof(bfloat16)};
    if (rows < height) tile::clear(s_.weights, count / 2 * height);
    if constexpr (at_once > 1) {
      place_pairs([&](Index r) { return weights + r * stride; }, count, rows, height, s_.weights);
    } else {
      constexpr int block = tile::transpose_size(Isa{});
      for (Index k = 0; k < count; k += 2 * block)
        tile::transpose(Isa{}, weights + k, stride * Index{sizeof(bfloat16)},
                        static_cast<int>(rows),
                        static_cast<int>((std::min)(Index{block}, (count - k) / 2)),
                        s_.weights + k / 2 * height, height);
    }
  }

  const PairScratch& s_;
  Packed packed_;
  Index value_dim_, width_;
  float scale_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
