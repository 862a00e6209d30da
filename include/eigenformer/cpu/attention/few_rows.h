/// \file
/// Attention of a few rows (a decode step, a group of heads, drafts): keys and values are read
/// where they lie, each once, converted and transposed in registers. Packing pays where many rows
/// share it; here it would take longer than memory takes to bring the bytes. Each score is the
/// chain of AttentionTile::dot_panel over the elements of a key, each sum that of add_products over
/// the keys: a row has the same bits in few rows and in many.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "row.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Rows up to which keys are read in place: those of 8 heads and one token, or of 4 and two.
inline constexpr Index kAttentionFewRows = 8;

/// Where the rows of a block are. Scales of int8 only.
template <typename TKV>
struct BlockRows {
  const TKV *keys[kAttentionKeyBlock], *values[kAttentionKeyBlock];
  float key_scales[kAttentionKeyBlock] = {}, value_scales[kAttentionKeyBlock] = {};
  Index key_step = 0;  // elements from one row of a page to the next
  Index begin = -1;    // of the block: its position, in the source
  int count = 0;
};

/// Looks a table of pages up once a page, not once a row.
template <typename TKV>
void find_rows(const KeyBlock<TKV>& block, BlockRows<TKV>& rows) {
  const KvSource<TKV>& s = block.source;
  rows.begin = block.begin;
  rows.count = block.count;
  rows.key_step = s.tables != nullptr ? s.head_dim : s.row_stride;
  const bool paged = s.tables != nullptr;
  const Index value_step = paged ? s.value_width() : s.value_row_stride;
  for (int j = 0; j < block.count;) {
    const Index position = block.begin + j;
    const int run = static_cast<int>(
        paged ? (std::min<Index>)(block.count - j, s.page_size - position % s.page_size)
              : block.count - j);
    const TKV *const key = block.key(j), *const value = block.value(j);
    for (int i = 0; i < run; ++i) {
      rows.keys[j + i] = key + i * rows.key_step;
      rows.values[j + i] = value + i * value_step;
    }
    if constexpr (std::is_same_v<TKV, std::int8_t>) {
      const float *const key_scales = s.key_scale_row(block.sequence, block.kv_head, position),
                         *const value_scales =
                             s.value_scale_row(block.sequence, block.kv_head, position);
      std::copy_n(key_scales, run, rows.key_scales + j);
      std::copy_n(value_scales, run, rows.value_scales + j);
    }
    j += run;
  }
}

template <typename C, typename Isa>
struct FewRows {
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  static constexpr int lanes = V::lanes, kPanel = Tile::kPanel;
  /// How many rows ahead of those that are read memory is asked for: 8 KiB of floats.
  static constexpr int kAhead = 16;

  /// f(std::integral_constant<int, R>), R >= rows: the rows beyond are computed for nothing.
  template <typename F>
  static void with_rows(Index rows, F&& f) {
    if (rows == 1) return f(std::integral_constant<int, 1>{});
    if (rows == 2) return f(std::integral_constant<int, 2>{});
    if (rows <= 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 8>{});
  }

  /// The row that is read kAhead rows after row j of `now`, which `then` follow; row j itself where
  /// there is none.
  template <typename TKV>
  static EIGENFORMER_INLINE const TKV* ahead(const TKV* const* now, const TKV* const* then,
                                             int count, int then_count, int j) {
    if (j + kAhead < count) return now[j + kAhead];
    if (j + kAhead - count < then_count) return then[j + kAhead - count];
    return now[(std::min)(j, count - 1)];
  }
  /// Step `step` of `steps` asks for its share of `count` rows: as slowly as they are read, for a
  /// burst would fill the buffers of misses, and row after row, as hardware prefetchers follow. (On
  /// Zen 3 4,096 keys of 8 heads of 128 floats take 2.0 to 2.8 ms so, and 3.0 to 3.9 where all rows
  /// are asked for a line each.)
  template <typename TKV>
  static EIGENFORMER_INLINE void prefetch(const TKV* const* rows, int count, Index bytes,
                                          Index step, Index steps) {
    const Index end = (step + 1) * count / steps;
    for (Index i = step * count / steps; i < end; ++i)
      for (Index offset = 0; offset < bytes; offset += 64)
        simd::prefetch_after<3>(reinterpret_cast<const std::byte*>(rows[i]), offset);
  }

  /// scores[r][j] = queries[r] . key j as it is stored, for the keys [begin, end) of a block and
  /// some beside them.
  template <int R, typename TKV>
  static void score(const C* queries, Index depth, const BlockRows<TKV>& rows, KeySpan keys,
                    C* scores) {
    // Chains at once: 8 hide the latency of a multiply-add.
    constexpr int kVectors = R <= 4 ? 2 : 1, kKeys = kVectors * lanes;
    for (int j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
      const TKV *key[kKeys], *later[kKeys];
      for (int i = 0; i < kKeys; ++i) {  // those past the last are looked at by nobody
        const int k = (std::min)(j + i, rows.count - 1);
        key[i] = rows.keys[k];
        later[i] = ahead(rows.keys, rows.values, rows.count, rows.count, j + i);
      }
      V sum[kVectors][R];
      for (auto& vector : sum)
        for (V& s : vector) s = V::zero();
      Index d = 0;
      for (; d + lanes <= depth; d += lanes) {
        prefetch(later, kKeys, depth * static_cast<Index>(sizeof(TKV)), d / lanes, depth / lanes);
        add_dots<R, kVectors, lanes>(queries + d, depth, key, d, lanes, sum);
      }
      if (d < depth)
        add_dots<R, kVectors, 0>(queries + d, depth, key, d, static_cast<int>(depth - d), sum);
      for (int v = 0; v < kVectors; ++v)
        for (int r = 0; r < R; ++r)
          sum[v][r].store(scores + r * kAttentionKeyBlock + j + v * lanes);
    }
  }

  /// sums[r] = factors[r] * sums[r] + sum over keys [begin, end) of weights[r][j] * value j as it
  /// is stored, whose terms are summed first. `next` are the rows of the block after this one;
  /// `terms` is scratch of (R, padded width).
  template <int R, typename TKV>
  static void add_values(const C* weights, const BlockRows<TKV>& rows, KeySpan keys,
                         const C* factors, Index width, Index padded_width, C* sums, C* terms,
                         const BlockRows<TKV>* next) {
    constexpr int kVectors = R <= 4 ? 2 : 1;
    constexpr int kGroup = 8;  // rows that a step reads: of any stride they fit L1 together
    for (int k = keys.begin; k < keys.end; k += kGroup) {
      const int count = (std::min)(kGroup, keys.end - k);
      const TKV* later[kGroup];
      for (int i = 0; i < kGroup; ++i)
        later[i] = ahead(rows.values, next ? next->keys : nullptr, rows.count,
                         next ? next->count : 0, k + i);
      Index c = 0;
      const bool begins = k == keys.begin;
      for (; c + kVectors * lanes <= width; c += kVectors * lanes) {
        prefetch(later, kGroup, width * static_cast<Index>(sizeof(TKV)), c / (kVectors * lanes),
                 width / (kVectors * lanes));
        if (count == kGroup)
          add_columns<R, kVectors, kGroup>(weights + k, rows, k, kGroup, c, lanes, begins, terms,
                                           padded_width);
        else
          add_columns<R, kVectors, 0>(weights + k, rows, k, count, c, lanes, begins, terms,
                                      padded_width);
      }
      for (; c < width; c += lanes)
        add_columns<R, 1, 0>(weights + k, rows, k, count, c,
                             static_cast<int>((std::min)(Index{lanes}, width - c)), begins, terms,
                             padded_width);
    }
    const Index whole = (width + lanes - 1) / lanes * lanes;
    for (int r = 0; r < R; ++r)
      Tile::add_scaled(sums + r * padded_width, V::set1(factors[r]), terms + r * padded_width,
                       whole);
  }

 private:
  /// sum[v][r] += queries[r] . keys over n elements from d on; n is N where N is not 0. The keys
  /// pass through a corner of L1: two vectors of them and R sums each are more than there are
  /// registers.
  template <int R, int Vectors, int N, typename TKV>
  static EIGENFORMER_INLINE void add_dots(const C* queries, Index stride, const TKV* const* keys,
                                          Index d, int n, V (&sum)[Vectors][R]) {
    alignas(64) C panel[lanes * Vectors * lanes];
    for (int v = 0; v < Vectors; ++v) {
      V block[lanes];
      for (int i = 0; i < lanes; ++i) {
        const int k = v * lanes + i;
        block[i] = N > 0 ? V::load(keys[k] + d) : V::load_partial(keys[k] + d, n);
      }
      transpose(block);
      for (int i = 0; i < lanes; ++i) block[i].store(panel + (i * Vectors + v) * lanes);
    }
    for (int i = 0; i < (N > 0 ? N : n); ++i)
      for (int r = 0; r < R; ++r) {
        const V q = V::set1(queries[r * stride + i]);
        for (int v = 0; v < Vectors; ++v)
          sum[v][r] = fma(q, V::load(panel + (i * Vectors + v) * lanes), sum[v][r]);
      }
  }

  /// terms[r] += weights[r][i] * value first + i, in some columns. count is Count where that is not
  /// 0, n the elements of a vector.
  template <int R, int Vectors, int Count, typename TKV>
  static EIGENFORMER_INLINE void add_columns(const C* weights, const BlockRows<TKV>& rows,
                                             int first, int count, Index c, int n, bool begins,
                                             C* terms, Index stride) {
    V sum[R][Vectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Vectors; ++v)
        sum[r][v] = begins ? V::zero() : V::load(terms + r * stride + c + v * lanes);
    for (int i = 0; i < (Count > 0 ? Count : count); ++i) {
      const TKV* const at = rows.values[first + i] + c;
      V value[Vectors];
      for (int v = 0; v < Vectors; ++v)
        value[v] = n == lanes ? V::load(at + v * lanes) : V::load_partial(at, n);
      for (int r = 0; r < R; ++r) {
        const V weight = V::set1(weights[r * kAttentionKeyBlock + i]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(terms + r * stride + c + v * lanes);
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
