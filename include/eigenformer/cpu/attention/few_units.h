/// \file
/// Products of a few rows with keys and values in units of 32 bits (pairs of bfloat16, four int8)
/// where the instruction set multiplies units: keys are transposed in registers and meet the rows'
/// units one after the other, as packed panels do (packed_scores.h), so sums have the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../tile/tile.h"
#include "few_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Whether a dot takes units out of registers.
template <typename Dot>
inline constexpr bool kTakesUnits = requires { Dot::kTakesUnits; };

template <typename Dot, typename Isa>
class FewUnits {
  using Stored = typename Dot::Stored;
  using V = simd::Vec<float, Isa>;
  using Few = FewRows<float, Isa>;
  static constexpr int lanes = V::lanes, kUnits = simd::kUnitsAtOnce<V>,
                       kStep = kUnits * Dot::step;  // elements of a key at once

 public:
  /// From the weights of one row to those of the next: they stand where scores stood.
  static constexpr Index kWeightStride = kAttentionKeyBlock * Index{sizeof(float) / sizeof(Stored)};

  /// Units of a row of queries, zeros included.
  static constexpr Index query_units(Index depth) { return (depth + kStep - 1) / kStep * kUnits; }

  /// to[u][r] = unit u of row r, `line` of `depth` elements.
  template <int R>
  static void place_query(const Stored* line, Index depth, Index r, std::uint32_t* to) {
    const Index whole = depth / Dot::step;
    for (Index u = 0; u < whole; ++u)
      std::memcpy(to + u * R + r, line + u * Dot::step, sizeof(*to));
    for (Index u = whole; u < query_units(depth); ++u) {
      Stored unit[Dot::step] = {};
      std::copy_n(line + u * Dot::step, (std::max)(Index{0}, depth - u * Dot::step), unit);
      std::memcpy(to + u * R + r, unit, sizeof(*to));
    }
  }

  /// f(row, first key, sums) of the keys [begin, end) of a block and some beside them.
  template <int R, typename F>
  static EIGENFORMER_INLINE void score(const std::uint32_t* queries, Index depth,
                                       const BlockRows<Stored>& rows, const Stored* const* then,
                                       KeySpan keys, F&& f) {
    constexpr int kVectors = R <= 4 ? 2 : 1, kKeys = kVectors * lanes;
    const Index bytes = depth * static_cast<Index>(sizeof(Stored));
    for (int j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
      const Stored* const* const key = rows.keys + j;
      typename Few::template Ahead<Stored> ahead{Few::after(rows.keys, then, j, kKeys), bytes};
      typename Dot::Accumulator sum[kVectors][R];
      for (auto& vector : sum)
        for (auto& s : vector) s = Dot::zero();
      const std::uint32_t* query = queries;
      Index d = 0;
      for (; d + kStep <= depth; d += kStep, query += kUnits * R) add(query, key, d, sum, ahead);
      if (d < depth) {  // the last elements, filled up with zeros
        alignas(64) Stored copied[kKeys][kStep] = {};
        const Stored* last[kKeys];
        for (int i = 0; i < kKeys; ++i)
          last[i] = std::copy_n(key[i] + d, depth - d, copied[i]) - (depth - d);
        add(query, last, 0, sum, ahead);
      }
      for (int v = 0; v < kVectors; ++v)
        for (int r = 0; r < R; ++r) f(r, j + v * lanes, sum[v][r]);
    }
  }

  /// sums[r] = factors[r] * sums[r] + weights[r] by values, over pairs of keys
  /// [begin, end) of the block. `zeros` stand for keys beyond the last; `terms` is scratch of (R,
  /// padded width); rows that see no key keep what they have.
  template <int R>
  static void add_values(Index count, const Stored* weights, const BlockRows<Stored>& rows,
                         const BlockRange* ranges, const float* factors, Index width,
                         Index padded_width, float* sums, float* terms, const Stored* zeros,
                         const Stored* const* then) {
    const KeySpan seen = seen_by_tile(ranges, static_cast<int>(count));
    const int first = seen.begin / 2, last = (seen.end + 1) / 2;
    const Index bytes = width * static_cast<Index>(sizeof(Stored));
    for (int k = first; k < last; k += kPairs) {
      typename Few::template Ahead<Stored> ahead{Few::after(rows.values, then, 2 * k, 2 * kPairs),
                                                 bytes};
      const int pairs = (std::min)(kPairs, last - k);
      const Stored* pair[2 * kPairs];
      std::uint32_t weight[kPairs][R];
      for (int i = 0; i < pairs; ++i) {
        const int j = 2 * (k + i);
        pair[2 * i] = rows.values[j];
        pair[2 * i + 1] = j + 1 < rows.count ? rows.values[j + 1] : zeros;
        for (int r = 0; r < R; ++r)
          std::memcpy(&weight[i][r], weights + r * kWeightStride + j, sizeof(weight[i][r]));
      }
      constexpr int kChunks = R <= 4 ? 2 : 1;
      for (Index c = 0; c < width; c += kChunks * 2 * lanes)
        if (pairs == kPairs)
          add_pairs<R, kChunks>(weight, pair, std::integral_constant<int, kPairs>{}, c, width,
                                padded_width, k == first, terms, ahead);
        else
          add_pairs<R, kChunks>(weight, pair, pairs, c, width, padded_width, k == first, terms,
                                ahead);
    }
    for (Index r = 0; r < count; ++r) {
      if (ranges[r].empty()) continue;
      for (Index c = r * padded_width; c < (r + 1) * padded_width; c += 2 * lanes) {
        V term[2] = {V::load(terms + c), V::load(terms + c + lanes)};
        order_pairs(term);
        for (int i = 0; i < 2; ++i)
          fma(V::load(sums + c + i * lanes), V::set1(factors[r]), term[i])
              .store(sums + c + i * lanes);
      }
    }
  }

 private:
  static constexpr int kPairs = 8;  // that a step reads

  /// terms[r] += weights[.][r] by pairs of values, in some columns. `pairs` may be a constant.
  template <int R, int Chunks, typename Count, typename Ahead>
  static EIGENFORMER_INLINE void add_pairs(const std::uint32_t (&weights)[kPairs][R],
                                           const Stored* const* pair, Count pairs, Index c,
                                           Index width, Index stride, bool begins, float* terms,
                                           Ahead& ahead) {
    constexpr int kLines = Chunks * 2 * lanes * 2 * 2 / 64;  // of a pair
    const int chunks = static_cast<int>((std::min)(Index{Chunks}, (stride - c) / (2 * lanes)));
    V sum[R][Chunks][2];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < Chunks; ++m)
        for (int i = 0; i < 2; ++i)
          sum[r][m][i] = begins || m >= chunks
                             ? V::zero()
                             : V::load(terms + r * stride + c + (2 * m + i) * lanes);
    for (int k = 0; k < pairs; ++k) {
      for (int line = 0; line < kLines; ++line) ahead.ask();
      for (int m = 0; m < Chunks; ++m) {
        const Index at = c + 2 * m * lanes;
        if (m > 0 && at >= width) break;
        V joined[2];
        join_pairs(pair[2 * k] + at, pair[2 * k + 1] + at, width - at, joined);
        for (int r = 0; r < R; ++r) {
          const auto weight = Dot::template factor<1>(&weights[k][r]);
          for (int i = 0; i < 2; ++i)
            sum[r][m][i] = Dot::multiply_add(sum[r][m][i], Dot::weights(joined[i]), weight);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < chunks; ++m)
        for (int i = 0; i < 2; ++i)
          sum[r][m][i].store(terms + r * stride + c + (2 * m + i) * lanes);
  }

  template <int R, int Vectors, typename Ahead>
  static EIGENFORMER_INLINE void add(const std::uint32_t* queries, const Stored* const* keys,
                                     Index d, typename Dot::Accumulator (&sum)[Vectors][R],
                                     Ahead& ahead) {
    constexpr int kLines = Vectors * lanes * kUnits * 4 / 64;
    V columns[Vectors][kUnits];
    for (int v = 0; v < Vectors; ++v) load_units(keys + v * lanes, d, columns[v]);
    EIGENFORMER_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      EIGENFORMER_UNROLL
      for (int line = u * kLines / kUnits; line < (u + 1) * kLines / kUnits; ++line) ahead.ask();
      EIGENFORMER_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto query = Dot::template factor<1>(queries + u * R + r);
        EIGENFORMER_UNROLL
        for (int v = 0; v < Vectors; ++v)
          sum[v][r] = Dot::multiply_add(sum[v][r], Dot::weights(columns[v][u]), query);
      }
    }
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
