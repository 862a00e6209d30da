/// \file
/// Scores of INT8 keys: queries are quantized by row (vector/quantize_line.h), so that
///
///   score = (exact int32 sum of query * key) * ((query scale * scale of the scores) * key scale)
///
/// has the same bits on every instruction set, whichever instructions sum. Many rows meet packed
/// panels of keys, as activations of a linear layer meet its weights; a few read keys where they
/// lie, a vector along the head at a time. A query with NaN or infinity has the scale NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../core/workspace.h"
#include "../vector/quantize_line.h"
#include "few_units.h"
#include "packed_scores.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// All nullptr where scores are float.
struct Int8ScoreScratch {
  float* scales;          // (rows) of the queries, times the scale of the scores
  std::int32_t* offsets;  // (rows) to take off the sums
  std::uint32_t* tiles;   // queries of many rows, as tile/generic.h packs them
  void* lines;          // those of a few: (kAttentionFewRows, parts, width of a line dot), or units
  std::int8_t* panels;  // a block of keys, packed
  std::int32_t* sums;   // of a tile with a block
};

template <typename Isa>
class Int8Scores {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  using Line = tile::LineDot<Isa>;
  using Activation = typename Line::Activation;
  using V = simd::Vec<float, Isa>;
  using Packed = PackedScores<Dot, Isa>;
  using Few = FewRows<float, Isa>;
  using UnitDot = tile::GroupedDot<Isa>;
  using FewUnits = cpu::FewUnits<UnitDot, Isa>;
  static constexpr bool kUnits = kTakesUnits<UnitDot>;
  static_assert(V::lanes == Line::lanes && V::lanes == Dot::columns / Dot::vectors);

 public:
  /// Sizes do not overflow: depth is limited (attention.h).
  static Int8ScoreScratch take_scratch(Index rows, Index depth, Workspace::Frame& frame) {
    const Index lines = kAttentionFewRows * parts(depth) * Line::width;
    Int8ScoreScratch s{frame.take<float>(Tiles<Dot>::padded_rows(rows)),
                       frame.take<std::int32_t>(Tiles<Dot>::padded_rows(rows)),
                       frame.take<std::uint32_t>(Packed::query_units(rows, depth)),
                       frame.take<Activation>(lines),
                       frame.take<std::int8_t>(Packed::key_elements(depth)),
                       frame.take<std::int32_t>(Packed::kSums)};
    // rows beyond the few are computed with and thrown away
    std::fill_n(static_cast<Activation*>(s.lines), lines, Activation{0});
    return s;
  }

  Int8Scores(const Int8ScoreScratch& scratch, Index depth, float scale)
      : s_(scratch),
        packed_{depth, scratch.tiles, scratch.panels, scratch.sums},
        depth_(depth),
        scale_(scale) {}

  /// Row r of the queries starts at row(r).
  template <typename Row>
  void load_queries(Index rows, Row&& row) {
    if (rows > kAttentionFewRows)
      load_tiles(rows, row);
    else if constexpr (kUnits)
      Few::with_rows(rows, [&](auto tile) {
        for (Index r = 0; r < rows; ++r) load_units<tile>(row(r), r);
      });
    else
      for (Index r = 0; r < rows; ++r) load_line(row(r), r);
    for (Index r = 0; r < rows; ++r) s_.scales[r] *= scale_;
  }

  /// scores[r][j], at least of the keys between the first and the last in ranges[r].
  void score(Index rows, const BlockRows<std::int8_t>& block, const std::int8_t* const* then,
             const BlockRange* ranges, float* scores) {
    if (rows > kAttentionFewRows) return score_tiles(rows, block, ranges, scores);
    const KeySpan seen = seen_by_tile(ranges, static_cast<int>(rows));
    Few::with_rows(rows, [&](auto tile) {
      if constexpr (kUnits)
        score_units<tile>(rows, block, then, seen, scores);
      else
        score_lines<tile>(rows, block, then, seen, scores);
    });
  }

 private:
  /// Loads that a row takes.
  static Index parts(Index depth) { return (depth + Line::width - 1) / Line::width; }

  /// Where part `part` of a row starts, and how many of its k are its own, the last of the vector:
  /// the last part ends with the row, so that nothing beyond is read, and repeats k as zeros.
  struct Part {
    Index begin, own;
  };
  Part part(Index p) const {
    const Index begin = p * Line::width, own = (std::min)(Index{Line::width}, depth_ - begin);
    return {depth_ < Line::width ? 0 : begin + own - Line::width, own};
  }

  template <typename Query>
  void load_line(const Query* query, Index r) {
    const float scale = activation_scale<Isa>(query, depth_);
    auto* to = static_cast<Activation*>(s_.lines) + r * parts(depth_) * Line::width;
    std::int32_t sum = 0;
    for (Index p = 0; p < parts(depth_); ++p, to += Line::width) {
      alignas(64) std::int8_t values[Line::width] = {};
      const auto [begin, own] = part(p);
      std::int8_t* const first = depth_ < Line::width ? values : values + Line::width - own;
      quantize_activation_line<Isa>(query + p * Line::width, own, scale, first);
      std::copy_n(values, Line::width, to);
      sum += sum_of(values, Line::width);
    }
    s_.scales[r] = scale;
    s_.offsets[r] = 0;
    if constexpr (Line::unsigned_weights) add_wrapping(s_.offsets[r], 128 * sum);
  }

  template <int R, typename Query>
  void load_units(const Query* query, Index r) {
    const float scale = activation_scale<Isa>(query, depth_);
    auto* const to = static_cast<std::uint32_t*>(s_.lines);
    std::int32_t sum = 0;
    for (Index d = 0; d < depth_; d += Line::width) {
      alignas(64) std::int8_t values[Line::width] = {};
      const Index own = (std::min)(Index{Line::width}, depth_ - d);
      quantize_activation_line<Isa>(query + d, own, scale, values);
      FewUnits::template place_query<R>(values, own, r, to + d / UnitDot::step * R);
      sum += sum_of(values, Line::width);
    }
    s_.scales[r] = scale;
    s_.offsets[r] = 0;
    if constexpr (UnitDot::unsigned_weights) add_wrapping(s_.offsets[r], 128 * sum);
  }

  template <typename Row>
  void load_tiles(Index rows, Row&& row) {
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      pack_quantized_rows<Dot>(Isa{}, tiles.valid(t), depth_, tiles.height(t),
                               packed_.tile_queries(first), {s_.scales, s_.offsets, depth_, 1},
                               first, [&](Index i) { return row(first + i); });
    }
  }

  /// scores[0, lanes) of keys whose scales are at `key_scales`.
  static EIGENFORMER_INLINE void store(const std::int32_t* sums, std::int32_t offset, float scale,
                                       const float* key_scales, float* scores) {
    (V::load_difference(sums, offset) * (V::set1(scale) * V::load(key_scales))).store(scores);
  }

  template <int R>
  void score_units(Index rows, const BlockRows<std::int8_t>& block, const std::int8_t* const* then,
                   KeySpan seen, float* scores) {
    FewUnits::template score<R>(static_cast<const std::uint32_t*>(s_.lines), depth_, block, then,
                                seen, [&](int r, int key, auto sum) {
                                  if (r >= rows) return;
                                  alignas(64) std::int32_t totals[Line::lanes];
                                  UnitDot::store(totals, sum);
                                  store(totals, s_.offsets[r], s_.scales[r], block.key_scales + key,
                                        scores + r * kAttentionKeyBlock + key);
                                });
  }

  template <int R>
  void score_lines(Index rows, const BlockRows<std::int8_t>& block, const std::int8_t* const* then,
                   KeySpan seen, float* scores) {
    constexpr int lanes = Line::lanes;
    for (int j = seen.begin / lanes * lanes; j < seen.end; j += lanes) {
      const std::int8_t* const* const later = Few::after(block.keys, then, j, lanes);
      typename Line::Accumulator sums[R][lanes];
      for (int i = 0; i < lanes; ++i) {
        AttentionTile<float, Isa>::prefetch_row(later[i], depth_);
        dot_lines<R>(block.keys[j + i], [&](int r, auto sum) { sums[r][i] = sum; });
      }
      for (int r = 0; r < rows; ++r) {
        alignas(64) std::int32_t totals[lanes];
        Line::totals(sums[r], totals);
        store(totals, s_.offsets[r], s_.scales[r], block.key_scales + j,
              scores + r * kAttentionKeyBlock + j);
      }
    }
  }

  /// f(row, sum by lanes) of R queries with a key.
  template <int R, typename F>
  EIGENFORMER_INLINE void dot_lines(const std::int8_t* key, F&& f) {
    const Index stride = parts(depth_) * Line::width;
    const auto* queries = static_cast<const Activation*>(s_.lines);
    typename Line::Accumulator sum[R];
    tile::unroll<R>([&](auto r) { sum[r] = Line::zero(); });
    const auto add = [&](const std::int8_t* from, Index at) {
      const auto weights = Line::weights(from);
      tile::unroll<R>(
          [&](auto r) { sum[r] = Line::multiply_add(sum[r], weights, queries + r * stride + at); });
    };
    const Index whole = depth_ / Line::width;
    for (Index p = 0; p < whole; ++p) add(key + p * Line::width, p * Line::width);
    if (whole * Line::width < depth_) {
      alignas(64) std::int8_t copied[Line::width] = {};
      if (whole == 0) std::copy_n(key, depth_, copied);
      add(whole == 0 ? copied : key + part(whole).begin, whole * Line::width);
    }
    tile::unroll<R>([&](auto r) { f(r, sum[r]); });
  }

  void score_tiles(Index rows, const BlockRows<std::int8_t>& block, const BlockRange* ranges,
                   float* scores) {
    packed_.score(rows, block, ranges, [&](Index r, int key, const std::int32_t* sums) {
      store(sums, s_.offsets[r], s_.scales[r], block.key_scales + key,
            scores + r * kAttentionKeyBlock + key);
    });
  }

  const Int8ScoreScratch& s_;
  Packed packed_;
  Index depth_;
  float scale_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
