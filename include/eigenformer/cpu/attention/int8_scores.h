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

#include "../../core/check.h"
#include "../../core/workspace.h"
#include "../linear/activations.h"
#include "../vector/quantize_line.h"
#include "few_rows.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// All nullptr where scores are float.
struct Int8ScoreScratch {
  float* scales;          // (rows) of the queries, times the scale of the scores
  std::int32_t* offsets;  // (rows) to take off the sums
  std::uint32_t* tiles;   // queries of many rows, as tile/generic.h packs them
  void* lines;            // those of a few: (kAttentionFewRows, parts, width of a line dot)
  std::int8_t* panels;    // a block of keys, packed
  std::int32_t* sums;     // of a tile with a block
};

template <typename Isa>
class Int8Scores {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  using Line = tile::LineDot<Isa>;
  using Activation = typename Line::Activation;
  using V = simd::Vec<float, Isa>;
  static constexpr int kPanels = kAttentionKeyBlock / Dot::columns;
  static_assert(kAttentionKeyBlock % Dot::columns == 0 && V::lanes == Line::lanes);

 public:
  static Int8ScoreScratch take_scratch(Index rows, Index depth, Workspace::Frame& frame) {
    const auto product = [](Index a, Index b) {
      return detail::checked_product(a, b, "attention", "scratch");
    };
    const Index padded_rows = Tiles<Dot>::padded_rows(rows),
                steps = tile::product_steps<Dot>(depth);
    const Index lines = product(kAttentionFewRows, parts(depth) * Line::width);
    Int8ScoreScratch s{frame.take<float>(padded_rows),
                       frame.take<std::int32_t>(padded_rows),
                       frame.take<std::uint32_t>(product(padded_rows, steps * Dot::units)),
                       frame.take<Activation>(lines),
                       frame.take<std::int8_t>(product(steps * Dot::step, kAttentionKeyBlock)),
                       frame.take<std::int32_t>(Index{Dot::rows} * kAttentionKeyBlock)};
    // rows beyond the few are computed with and thrown away
    std::fill_n(static_cast<Activation*>(s.lines), lines, Activation{0});
    return s;
  }

  Int8Scores(const Int8ScoreScratch& scratch, Index depth, float scale)
      : s_(scratch), depth_(depth), scale_(scale) {}

  /// Row r of the queries starts at row(r).
  template <typename Row>
  void load_queries(Index rows, Row&& row) {
    if (rows <= kAttentionFewRows)
      for (Index r = 0; r < rows; ++r) load_line(row(r), r);
    else
      load_tiles(rows, row);
    for (Index r = 0; r < rows; ++r) s_.scales[r] *= scale_;
  }

  /// scores[r][j], at least of the keys between the first and the last in ranges[r].
  void score(Index rows, const BlockRows<std::int8_t>& block, const BlockRange* ranges,
             float* scores) {
    const KeySpan seen = seen_by_tile(ranges, static_cast<int>(rows));
    if (rows > kAttentionFewRows) return score_tiles(rows, block, seen, ranges, scores);
    FewRows<float, Isa>::with_rows(
        rows, [&](auto tile) { score_lines<decltype(tile)::value>(rows, block, seen, scores); });
  }

 private:
  /// Loads that a row takes.
  static Index parts(Index depth) { return (depth + Line::width - 1) / Line::width; }

  /// Where part `part` of a row starts, and how many of its k are its own, the last of the vector:
  /// the last part ends with the row, so that nothing beyond is read, and repeats k as zeros.
  struct Part {
    Index begin, own;
  };
  Part part(Index part) const {
    const Index begin = part * Line::width, own = (std::min)(Index{Line::width}, depth_ - begin);
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

  template <typename Row>
  void load_tiles(Index rows, Row&& row) {
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      pack_quantized_rows<Dot>(Isa{}, tiles.valid(t), depth_, tiles.height(t), tile_queries(first),
                               {s_.scales, s_.offsets, depth_, 1}, first,
                               [&](Index i) { return row(first + i); });
    }
  }

  std::uint32_t* tile_queries(Index first) const {
    return s_.tiles + first * tile::product_steps<Dot>(depth_) * Dot::units;
  }

  /// scores[0, lanes) of keys whose scales are at `key_scales`.
  static EIGENFORMER_INLINE void store(const std::int32_t* sums, std::int32_t offset, float scale,
                                       const float* key_scales, float* scores) {
    (V::load_difference(sums, offset) * (V::set1(scale) * V::load(key_scales))).store(scores);
  }

  template <int R>
  void score_lines(Index rows, const BlockRows<std::int8_t>& block, KeySpan seen, float* scores) {
    constexpr int lanes = Line::lanes;
    for (int j = seen.begin / lanes * lanes; j < seen.end; j += lanes) {
      typename Line::Accumulator sums[R][lanes];
      for (int i = 0; i < lanes; ++i) {
        AttentionTile<float, Isa>::prefetch_row(
            FewRows<float, Isa>::ahead(block.keys, block.values, block.count, block.count, j + i),
            depth_);
        // those past the last are looked at by nobody
        dot_lines<R>(block.keys[(std::min)(j + i, block.count - 1)],
                     [&](int r, auto sum) { sums[r][i] = sum; });
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

  void score_tiles(Index rows, const BlockRows<std::int8_t>& block, KeySpan seen,
                   const BlockRange* ranges, float* scores) {
    const Index steps = tile::product_steps<Dot>(depth_),
                panel_bytes = steps * Dot::step * Dot::columns;
    pack_keys(block, seen, steps, panel_bytes);
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      const int height = tiles.height(t), valid = static_cast<int>(tiles.valid(t));
      const KeySpan keys = seen_by_tile(ranges + first, valid);
      const int begin = keys.begin / Dot::columns,
                panels = (keys.end + Dot::columns - 1) / Dot::columns - begin;
      if (panels <= 0) continue;
      const std::int8_t* const from = s_.panels + begin * panel_bytes;
      const Index sums_stride = Index{height} * Dot::columns;
      tile::tile_products<Dot>(
          height,
          {tile_queries(first), from, panel_bytes, reinterpret_cast<std::uintptr_t>(from), 0},
          steps, s_.sums, sums_stride, panels, true);
      for (int r = 0; r < valid; ++r)
        for (int p = 0; p < panels; ++p)
          for (int c = 0; c < Dot::columns; c += V::lanes) {
            const int key = (begin + p) * Dot::columns + c;
            store(s_.sums + p * sums_stride + r * Dot::columns + c, s_.offsets[first + r],
                  s_.scales[first + r], block.key_scales + key,
                  scores + (first + r) * kAttentionKeyBlock + key);
          }
    }
  }

  /// The panels of a block that hold seen keys. Keys of a page lie one after the other.
  void pack_keys(const BlockRows<std::int8_t>& block, KeySpan seen, Index steps,
                 Index panel_bytes) {
    tile::MatrixOperand<std::int8_t> runs[kAttentionKeyBlock];
    Index ends[kAttentionKeyBlock];
    int count = 0;
    for (int j = 0; j < block.count; ++j) {
      if (j == 0 || block.keys[j] != block.keys[j - 1] + block.key_step)
        runs[count++] = {block.keys[j], block.key_step, 1};
      ends[count - 1] = j + 1;
    }
    const tile::StackedRows<std::int8_t> keys{runs, ends, count, block.count};
    for (int p = seen.begin / Dot::columns; p * Dot::columns < seen.end; ++p)
      tile::pack_panel<Dot>(Isa{}, keys, p, 0, depth_, steps, s_.panels + p * panel_bytes);
  }

  const Int8ScoreScratch& s_;
  Index depth_;
  float scale_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
