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
  const auto place = [&](int j, int count, const TKV* key, const TKV* value, Index value_step) {
    for (int i = 0; i < count; ++i) {
      rows.keys[j + i] = key + i * rows.key_step;
      rows.values[j + i] = value + i * value_step;
    }
  };
  rows.begin = block.begin;
  rows.count = block.count;
  if (s.tables == nullptr) {
    rows.key_step = s.row_stride;
    place(0, block.count, block.key(0), block.value(0), s.value_row_stride);
  } else {
    rows.key_step = s.head_dim;
    Index page = block.begin / s.page_size, first = block.begin - page * s.page_size;
    for (int j = 0; j < block.count; ++page, first = 0) {
      const int run = static_cast<int>((std::min)(Index{block.count - j}, s.page_size - first));
      const std::byte* const at = s.page(block.sequence, page);
      const Index row = block.kv_head * s.page_size + first;
      place(j, run, reinterpret_cast<const TKV*>(at) + row * s.head_dim,
            reinterpret_cast<const TKV*>(at + s.value_offset) + row * s.value_width(),
            s.value_width());
      if constexpr (std::is_same_v<TKV, std::int8_t>) {
        const auto scales = [&](std::size_t offset) {
          return reinterpret_cast<const float*>(at + offset) + row;
        };
        std::copy_n(scales(s.key_scale_offset), run, rows.key_scales + j);
        std::copy_n(scales(s.value_scale_offset), run, rows.value_scales + j);
      }
      j += run;
    }
  }
  // Rows are read by the vector: those past the last are looked at by nobody.
  for (int j = block.count; j < kAttentionKeyBlock && j > 0; ++j) {
    rows.keys[j] = rows.keys[j - 1];
    rows.values[j] = rows.values[j - 1];
  }
}

template <typename C, typename Isa>
struct FewRows {
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  static constexpr int lanes = V::lanes, kPanel = Tile::kPanel;
  static constexpr int kGroup = 8;  // values that a step reads: of any stride they fit L1 together

  /// f(std::integral_constant<int, R>), R >= rows: the rows beyond are computed for nothing.
  template <typename F>
  static void with_rows(Index rows, F&& f) {
    if (rows == 1) return f(std::integral_constant<int, 1>{});
    if (rows == 2) return f(std::integral_constant<int, 2>{});
    if (rows <= 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 8>{});
  }

  /// to[d][r] = queries[r][d]: so a key's element meets those of all rows side by side.
  static void interleave(const C* queries, Index rows, Index depth, C* to) {
    with_rows(rows, [&](auto tile) {
      for (Index r = 0; r < rows; ++r)
        for (Index d = 0; d < depth; ++d)
          to[d * decltype(tile)::value + r] = queries[r * depth + d];
    });
  }

  /// Asks for rows of `bytes`, a line at a time and row after row: as slowly as they are read, for
  /// a burst would fill the buffers of misses. (On Zen 5 4,096 keys of 8 heads of 128 floats in
  /// pages take 0.92 ms so, 1.08 where two rows are asked for at once.)
  template <typename TKV>
  class Ahead {
   public:
    Ahead(const TKV* const* rows, Index bytes) : row_(rows), bytes_(bytes), left_(0) {}

    EIGENFORMER_INLINE void ask() {
      if (left_ <= 0) {  // foreseen, where a choice would be waited for
        at_ = *row_++;
        left_ = bytes_;
      }
      simd::prefetch_after<3>(reinterpret_cast<const std::byte*>(at_), bytes_ - left_);
      left_ -= 64;
    }

   private:
    const TKV* const* row_;
    const TKV* at_ = nullptr;
    Index bytes_, left_;
  };

  /// `count` rows that are read 8 KiB (of heads of 128) after row j of `now`, which `then` follow,
  /// or some of `now` where that is nullptr.
  template <typename TKV>
  static const TKV* const* after(const TKV* const* now, const TKV* const* then, int j, int count) {
    const int at = j + (std::max)(64 / static_cast<int>(sizeof(TKV)), 16);
    return at + count <= kAttentionKeyBlock
               ? now + at
               : (then == nullptr ? now : then) +
                     std::clamp(at - kAttentionKeyBlock, 0, kAttentionKeyBlock - count);
  }

  /// scores[r][j] = queries[r] . key j as it is stored, for the keys [begin, end) of a block and
  /// some beside them. The queries are interleaved.
  template <int R, typename TKV>
  static void score(const C* queries, Index depth, const BlockRows<TKV>& rows,
                    const TKV* const* then, KeySpan keys, C* scores) {
    // Chains at once: 8 hide the latency of a multiply-add. Of AVX-512 4 do, for 32 floats rows at
    // once keep memory from its order (1.27 ms instead of 0.92).
    constexpr int kVectors = R <= 4 && lanes * sizeof(TKV) < 64 ? 2 : 1, kKeys = kVectors * lanes;
    constexpr int kStep = Columns<TKV>::count;
    const Index bytes = depth * static_cast<Index>(sizeof(TKV));
    for (int j = keys.begin / kKeys * kKeys; j < keys.end; j += kKeys) {
      const TKV* const* const key = rows.keys + j;
      Ahead<TKV> ahead(after(rows.keys, then, j, kKeys), bytes);
      V sum[kVectors][R];
      for (auto& vector : sum)
        for (V& s : vector) s = V::zero();
      const C* query = queries;
      Index d = 0;
      for (; d + kStep <= depth; d += kStep, query += kStep * R)
        add_dots<R>(query, key, d, sum, ahead);
      for (; d < depth; d += lanes, query += lanes * R)
        add_last_dots<R>(query, key, d, static_cast<int>((std::min)(Index{lanes}, depth - d)), sum);
      for (int v = 0; v < kVectors; ++v)
        for (int r = 0; r < R; ++r)
          sum[v][r].store(scores + r * kAttentionKeyBlock + j + v * lanes);
    }
  }

  /// sums[r] = factors[r] * sums[r] + sum over keys [begin, end) of weights[r][j] * value j as it
  /// is stored, whose terms are summed first. `then` are the rows that are read afterwards;
  /// `terms` is scratch of (R, padded width).
  template <int R, typename TKV>
  static void add_values(const C* weights, const BlockRows<TKV>& rows, KeySpan keys,
                         const C* factors, Index width, Index padded_width, C* sums, C* terms,
                         const TKV* const* then) {
    constexpr int kVectors = R <= 4 ? 2 : 1;
    const Index bytes = width * static_cast<Index>(sizeof(TKV));
    for (int k = keys.begin; k < keys.end; k += kGroup) {
      const int count = (std::min)(kGroup, keys.end - k);
      Ahead<TKV> ahead(after(rows.values, then, k, kGroup), bytes);
      Index c = 0;
      const bool begins = k == keys.begin;
      for (; c + kVectors * lanes <= width; c += kVectors * lanes) {
        if (count == kGroup)
          add_columns<R, kVectors, kGroup>(weights + k, rows, k, kGroup, c, lanes, begins, terms,
                                           padded_width, ahead);
        else
          add_columns<R, kVectors, 0>(weights + k, rows, k, count, c, lanes, begins, terms,
                                      padded_width, ahead);
      }
      for (; c < width; c += lanes)
        add_columns<R, 1, 0>(weights + k, rows, k, count, c,
                             static_cast<int>((std::min)(Index{lanes}, width - c)), begins, terms,
                             padded_width, ahead);
    }
    const Index whole = (width + lanes - 1) / lanes * lanes;
    for (int r = 0; r < R; ++r)
      Tile::add_scaled(sums + r * padded_width, V::set1(factors[r]), terms + r * padded_width,
                       whole);
  }

 private:
  /// How elements of `lanes` keys become vectors of C: `count` at once.
  template <typename TKV>
  struct Columns {
    static constexpr int units = std::is_same_v<C, float> && sizeof(TKV) != 1 &&
                                         !std::is_same_v<TKV, half>
                                     ? simd::kUnitsAtOnce<V>
                                     : 0,
                         pair = static_cast<int>(4 / sizeof(TKV)),
                         count = units > 0 ? units *pair : lanes;

    static EIGENFORMER_INLINE void load(const TKV* const* keys, Index d, V (&to)[count]) {
      if constexpr (units == 0) {
        EIGENFORMER_UNROLL
        for (int i = 0; i < lanes; ++i) to[i] = V::load(keys[i] + d);
        transpose(to);
      } else if constexpr (pair == 1) {
        load_units(keys, d, to);  // without a namespace: there are ISAs that have none
      } else {
        V pairs[units];
        load_units(keys, d, pairs);
        for (int i = 0; i < units; ++i) {
          to[2 * i] = first_of_pairs(pairs[i]);
          to[2 * i + 1] = second_of_pairs(pairs[i]);
        }
      }
    }
  };

  /// sum[v][r] += queries[r] . keys over a step of elements from d on.
  template <int R, int Vectors, typename TKV>
  static EIGENFORMER_INLINE void add_dots(const C* queries, const TKV* const* keys, Index d,
                                          V (&sum)[Vectors][R], Ahead<TKV>& ahead) {
    constexpr int kStep = Columns<TKV>::count;
    V columns[Vectors][kStep];
    for (int v = 0; v < Vectors; ++v) Columns<TKV>::load(keys + v * lanes, d, columns[v]);
    constexpr int kLines = Vectors * lanes * static_cast<int>(sizeof(TKV)) * kStep / 64;
    EIGENFORMER_UNROLL
    for (int i = 0; i < kStep; ++i) {
      EIGENFORMER_UNROLL
      for (int line = i * kLines / kStep; line < (i + 1) * kLines / kStep; ++line) ahead.ask();
      EIGENFORMER_UNROLL
      for (int r = 0; r < R; ++r) {
        const V q = V::set1(queries[i * R + r]);
        EIGENFORMER_UNROLL
        for (int v = 0; v < Vectors; ++v) sum[v][r] = fma(q, columns[v][i], sum[v][r]);
      }
    }
  }

  /// The same over n <= lanes elements.
  template <int R, int Vectors, typename TKV>
  static void add_last_dots(const C* queries, const TKV* const* keys, Index d, int n,
                            V (&sum)[Vectors][R]) {
    for (int v = 0; v < Vectors; ++v) {
      V columns[lanes];
      for (int i = 0; i < lanes; ++i) columns[i] = V::load_partial(keys[v * lanes + i] + d, n);
      transpose(columns);
      for (int i = 0; i < n; ++i)
        for (int r = 0; r < R; ++r)
          sum[v][r] = fma(V::set1(queries[i * R + r]), columns[i], sum[v][r]);
    }
  }

  /// terms[r] += weights[r][i] * value first + i, in some columns. count is Count where that is not
  /// 0, n the elements of a vector.
  template <int R, int Vectors, int Count, typename TKV>
  static EIGENFORMER_INLINE void add_columns(const C* weights, const BlockRows<TKV>& rows,
                                             int first, int count, Index c, int n, bool begins,
                                             C* terms, Index stride, Ahead<TKV>& ahead) {
    V sum[R][Vectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < Vectors; ++v)
        sum[r][v] = begins ? V::zero() : V::load(terms + r * stride + c + v * lanes);
    for (int i = 0; i < (Count > 0 ? Count : count); ++i) {
      if constexpr (Count > 0) {
        constexpr int kLines = Vectors * lanes * static_cast<int>(sizeof(TKV)) * Count / 64;
        for (int line = i * kLines / Count; line < (i + 1) * kLines / Count; ++line) ahead.ask();
      }
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
