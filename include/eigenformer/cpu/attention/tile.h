/// \file
/// The pieces attention is put together from, forward and backward: keys packed with positions
/// along the lanes, two register-tiled products, and the ranges of a key block that a query sees. A
/// row of a tile is one chain of multiply-adds whatever rows stand beside it, so results do not
/// depend on how rows are grouped.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../../problem/kv_source.h"
#include "../../problem/visibility.h"
#include "../simd/transpose.h"
#include "../vector/copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Keys are processed in blocks at absolute positions 0, 64, 128, ...: the reduction order of a row
/// is a function of its position only. 64 x 128 floats of K and of V are 64 KiB: in L2, and a panel
/// of them in L1.
inline constexpr int kAttentionKeyBlock = 64;

/// The keys of one block that a query sees, relative to the block: [0, prefix_end) and [begin,
/// end), prefix_end < begin or empty.
struct BlockRange {
  int prefix_end, begin, end;
  bool empty() const { return prefix_end == 0 && begin == end; }
  bool full() const { return begin == 0 && end == kAttentionKeyBlock; }
  int first() const { return prefix_end > 0 ? 0 : begin; }
  int last() const { return begin < end ? end : prefix_end; }
  friend bool operator==(const BlockRange&, const BlockRange&) = default;
};

inline BlockRange block_range(const problem::Visibility& visibility, Index position,
                              Index key_length, Index block_begin) {
  const auto inside = [&](Index key) {
    return static_cast<int>(std::clamp<Index>(key - block_begin, 0, kAttentionKeyBlock));
  };
  const problem::KeyRange keys = visibility.keys(position, key_length);
  const int prefix_end = inside((std::min)(visibility.prefix, key_length));
  const int begin = inside(keys.begin), end = (std::max)(inside(keys.end), begin);
  if (begin == end) return {0, 0, prefix_end};
  if (begin <= prefix_end) return {0, prefix_end > 0 ? 0 : begin, (std::max)(end, prefix_end)};
  return {prefix_end, begin, end};
}

struct KeySpan {
  int begin, end;
};

/// From the first key of a block to the last that one of `rows` rows sees.
inline KeySpan seen_by_tile(const BlockRange* ranges, int rows) {
  KeySpan span{kAttentionKeyBlock, 0};
  for (int r = 0; r < rows; ++r) {
    if (ranges[r].empty()) continue;
    span.begin = (std::min)(span.begin, ranges[r].first());
    span.end = (std::max)(span.end, ranges[r].last());
  }
  return span;
}

/// f(begin) for every key block of a sequence that one of the queries at positions [first, first +
/// count) sees, count > 0.
template <typename F>
void for_each_key_block(const problem::Visibility& visibility, Index first, Index count,
                        Index key_length, F&& f) {
  const Index prefix = (std::min)(visibility.prefix, key_length);
  const Index window_begin = visibility.keys(first, key_length).begin;
  const Index end = (std::max)(visibility.keys(first + count - 1, key_length).end, prefix);
  for (Index block = 0; block < end; block += kAttentionKeyBlock) {
    // whole blocks before the window
    if (block >= prefix && block + kAttentionKeyBlock <= window_begin)
      block = window_begin / kAttentionKeyBlock * kAttentionKeyBlock;
    if (block < end) f(block);
  }
}

/// C is the compute type.
template <typename C, typename Isa>
struct AttentionTile {
  using V = simd::Vec<C, Isa>;
  static constexpr int lanes = V::lanes;
  static constexpr int kPanel = 2 * lanes;  // two vectors of each of kRows rows are summed at once
  // 6 x 2 sums, two vectors of a panel and a weight are 15 of AVX2's 16 registers; AVX-512 has 32.
  // On Zen 3 a causal prefill (heads of 64) takes 11.2 ms with 6 rows, 13.2 with 4 (512 tokens, 8
  // heads), or 89 ms instead of 109 (2048 tokens, 4 heads).
  static constexpr int kRows = std::is_base_of_v<isa::avx512, Isa> ? 8
                               : std::is_base_of_v<isa::avx2, Isa> ? 6
                                                                   : 4;
  static_assert(kAttentionKeyBlock % kPanel == 0);

  static Index padded(Index width) { return (width + kPanel - 1) / kPanel * kPanel; }
  /// From one row of values to the next: an odd number of panels, so that those of 64 keys lie in
  /// L1 beside each other and not one over the other.
  static Index value_stride(Index width) { return (padded(width) / kPanel | 1) * kPanel; }

  /// f(std::integral_constant<int, R>, first row) over tiles that cover the rows.
  template <typename F>
  static EIGENFORMER_INLINE void for_row_tiles(Index rows, F&& f) {
    // A row by itself takes nearly as long as four: 8 or 9 rows are two tiles of 4, not one of 6.
    const Index fours = kRows == 6 && rows >= 8 && rows % 6 / 2 == 1 ? 8 : 0;
    Index r = 0;
    for (; r + kRows <= rows - fours; r += kRows) f(std::integral_constant<int, kRows>{}, r);
    if constexpr (kRows > 4)
      for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
    for (; r < rows; ++r) f(std::integral_constant<int, 1>{}, r);
  }

  /// row[0, width) = source * factor, zeros up to padded_width. A loop of its own: the store of the
  /// last vector pads as well.
  template <typename S>
  static void load_row(const S* source, C factor, Index width, Index padded_width, C* row) {
    const V f = V::set1(factor);
    Index d = 0;
    for (; d + lanes <= width; d += lanes) (V::load(source + d) * f).store(row + d);
    if (d < width) {
      (V::load_partial(source + d, static_cast<int>(width - d)) * f)
          .store_partial(row + d, static_cast<int>(std::min<Index>(lanes, padded_width - d)));
      d += lanes;
    }
    for (; d < padded_width; d += lanes)
      V::zero().store_partial(row + d, static_cast<int>(std::min<Index>(lanes, padded_width - d)));
  }

  /// Whether row[0, width) are finite numbers, times a factor too.
  template <typename S>
  static bool all_finite(const S* row, C factor, Index width) {
    // a chain of sums of so little that they overflow by what is no number only: bits of masks
    // would go to and fro between registers for every vector
    const V f = V::set1(factor), tiny = V::set1(C(0x1p-40));
    V sum = V::zero();
    for (Index d = 0; d < width; d += lanes) {
      const int n = static_cast<int>(std::min<Index>(lanes, width - d));
      const V x = n == lanes ? V::load(row + d) : V::load_partial(row + d, n);
      sum = fma(abs(x * f), tiny, sum);
    }
    constexpr std::uint32_t every_lane = ~std::uint32_t{0} >> (32 - lanes);
    const V largest = V::set1((std::numeric_limits<C>::max)());
    return (less_equal(sum, largest).bits() & every_lane) == every_lane;
  }

  /// Asks for a row of `bytes` that is read soon: rows of one head lie a page apart, where no
  /// hardware prefetcher follows.
  static EIGENFORMER_INLINE void prefetch_row(const void* row, Index bytes) {
    for (Index offset = 0; offset < bytes; offset += 64)
      simd::prefetch_after(static_cast<const std::byte*>(row), offset);
  }

  /// Packs up to 64 rows of `width` elements transposed: panel p holds rows [p * kPanel, (p + 1) *
  /// kPanel) as (width, kPanel). row(j) is the address of row j < count and scale(j) its factor;
  /// later rows are zeros.
  template <typename Row, typename Scale>
  static void pack_transposed(int count, Index width, C* packed, Row&& row, Scale&& scale) {
    using S = std::remove_cvref_t<decltype(*row(0))>;
    for (int j = 0; j < kAttentionKeyBlock; j += lanes) {
      const S* rows[lanes];
      V scales[lanes];
      const int present = std::clamp(count - j, 0, lanes);
      for (int i = 0; i < present; ++i) {
        rows[i] = row(j + i);
        scales[i] = V::set1(scale(j + i));
      }
      C* const column = packed + (j / kPanel) * kPanel * width + j % kPanel;
      for (Index d = 0; d < width; d += lanes) {
        const int n = static_cast<int>(std::min<Index>(lanes, width - d));
        V block[lanes];
        if (present == lanes && n == lanes) {
          for (int i = 0; i < lanes; ++i) block[i] = V::load(rows[i] + d) * scales[i];
        } else {
          for (int i = 0; i < lanes; ++i)
            block[i] = i < present ? V::load_partial(rows[i] + d, n) * scales[i] : V::zero();
        }
        transpose(block);
        for (int i = 0; i < n; ++i) block[i].store(column + (d + i) * kPanel);
      }
    }
  }

  /// out[r][0, kPanel) = rows[r] . panel, summed over depth in order.
  template <int R>
  static EIGENFORMER_INLINE void dot_panel(const C* rows, Index row_stride, const C* panel,
                                           Index depth, C* out, Index out_stride) {
    V sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::zero();
    for (Index d = 0; d < depth; ++d, panel += kPanel) {
      const V k0 = V::load(panel), k1 = V::load(panel + lanes);
      for (int r = 0; r < R; ++r) {
        const V q = V::set1(rows[r * row_stride + d]);
        sum[r][0] = fma(q, k0, sum[r][0]);
        sum[r][1] = fma(q, k1, sum[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) {
      sum[r][0].store(out + r * out_stride);
      sum[r][1].store(out + r * out_stride + lanes);
    }
  }

  /// A weight matrix read at (row, inner): weights + row * row_stride + inner * inner_stride.
  struct Weights {
    const C* data;
    Index row_stride, inner_stride;
  };

  /// sum[r] += weights(r, k) * matrix[k][c, c + kPanel) over k in [begin, end), in the order of k.
  template <int R>
  static EIGENFORMER_INLINE void add_products(Weights w, const C* matrix, Index matrix_stride,
                                              int begin, int end, Index c, V (&sum)[R][2]) {
    for (int k = begin; k < end; ++k) {
      const V m0 = V::load(matrix + k * matrix_stride + c),
              m1 = V::load(matrix + k * matrix_stride + c + lanes);
      for (int r = 0; r < R; ++r) {
        const V weight = V::set1(w.data[r * w.row_stride + k * w.inner_stride]);
        sum[r][0] = fma(weight, m0, sum[r][0]);
        sum[r][1] = fma(weight, m1, sum[r][1]);
      }
    }
  }

  /// out[r][0, width) += sum over k in [begin, end) of weights(r, k) * matrix[k], one term after
  /// the other. width is a multiple of kPanel.
  template <int R>
  static void accumulate(Weights w, const C* matrix, Index matrix_stride, int begin, int end,
                         Index width, C* out, Index out_stride) {
    for (Index c = 0; c < width; c += kPanel) {
      V sum[R][2];
      for (int r = 0; r < R; ++r) {
        sum[r][0] = V::load(out + r * out_stride + c);
        sum[r][1] = V::load(out + r * out_stride + c + lanes);
      }
      add_products<R>(w, matrix, matrix_stride, begin, end, c, sum);
      for (int r = 0; r < R; ++r) {
        sum[r][0].store(out + r * out_stride + c);
        sum[r][1].store(out + r * out_stride + c + lanes);
      }
    }
  }

  /// accumulate, row r over ranges[r]. What lies outside a row's range is left out, not multiplied
  /// by 0: it may be NaN. What all R rows have in common is one tile; the order of a row's terms is
  /// the same in any company.
  template <int R>
  static void accumulate_ranges(Weights w, const C* matrix, Index matrix_stride,
                                const BlockRange* ranges, Index width, C* out, Index out_stride) {
    int begin = 0, end = (std::numeric_limits<int>::max)();
    bool one_prefix = true;
    for (int r = 0; r < R; ++r) {
      begin = (std::max)(begin, ranges[r].begin);
      end = (std::min)(end, ranges[r].end);
      one_prefix = one_prefix && ranges[r].prefix_end == ranges[0].prefix_end;
    }
    const auto add_rows = [&](auto count, int r, int from, int to) {
      if (from >= to) return;
      accumulate<decltype(count)::value>({w.data + r * w.row_stride, w.row_stride, w.inner_stride},
                                         matrix, matrix_stride, from, to, width,
                                         out + r * out_stride, out_stride);
    };
    constexpr std::integral_constant<int, R> all{};
    constexpr std::integral_constant<int, 1> one{};
    if (one_prefix) add_rows(all, 0, 0, ranges[0].prefix_end);
    for (int r = 0; r < R; ++r) {
      if (!one_prefix) add_rows(one, r, 0, ranges[r].prefix_end);
      add_rows(one, r, ranges[r].begin, begin < end ? begin : ranges[r].end);
    }
    add_rows(all, 0, begin, end);
    for (int r = 0; r < R && begin < end; ++r) add_rows(one, r, end, ranges[r].end);
  }

  /// Whether all rows see the same keys, all of them between two.
  static bool one_piece(const BlockRange* ranges, Index rows) {
    const BlockRange& range = ranges[0];
    bool one = !range.empty() && (range.prefix_end == 0 || range.begin == range.end);
    for (Index r = 1; r < rows; ++r) one = one && ranges[r] == range;
    return one;
  }

  /// out[r][0, kPanel) = factor[r] * out[r] + (sum of accumulate_ranges from 0): a block is summed
  /// by itself, since one chain over many blocks would lose digits. Rows that see nothing keep what
  /// they have. `one`: whether the ranges are one piece.
  template <int R>
  static void add_panel(Weights w, const C* matrix, Index matrix_stride, const BlockRange* ranges,
                        bool one, const C* factor, C* out, Index out_stride) {
    if (one) {
      V sum[R][2];
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::zero();
      add_products<R>(w, matrix, matrix_stride, ranges[0].first(), ranges[0].last(), 0, sum);
      for (int r = 0; r < R; ++r) {
        C* const to = out + r * out_stride;
        fma(V::load(to), V::set1(factor[r]), sum[r][0]).store(to);
        fma(V::load(to + lanes), V::set1(factor[r]), sum[r][1]).store(to + lanes);
      }
      return;
    }
    alignas(64) C block[R * kPanel];
    fill_line(block, R * kPanel, V::zero());
    accumulate_ranges<R>(w, matrix, matrix_stride, ranges, kPanel, block, kPanel);
    for (int r = 0; r < R; ++r)
      if (!ranges[r].empty())
        add_scaled(out + r * out_stride, V::set1(factor[r]), block + r * kPanel, kPanel);
  }

  /// sums = factor * sums + terms. count is a multiple of the lanes.
  static void add_scaled(C* sums, V factor, const C* terms, Index count) {
    for (Index i = 0; i < count; i += lanes)
      fma(V::load(sums + i), factor, V::load(terms + i)).store(sums + i);
  }

  /// 0, 1, 2, ... lanes - 1, from `first`.
  static EIGENFORMER_INLINE V positions(int first) {
    alignas(64) static constexpr auto table = [] {
      std::array<C, kAttentionKeyBlock> values{};
      for (int i = 0; i < kAttentionKeyBlock; ++i)
        values[static_cast<std::size_t>(i)] = static_cast<C>(i);
      return values;
    }();
    return V::load(table.data() + first);
  }

  static EIGENFORMER_INLINE typename V::mask visible(const BlockRange& range, V position) {
    const auto at_least = [](V a, C b) { return less_equal(V::set1(b), a); };
    const auto below = [](V a, C b) { return less(a, V::set1(b)); };
    return below(position, static_cast<C>(range.prefix_end)) |
           (at_least(position, static_cast<C>(range.begin)) &
            below(position, static_cast<C>(range.end)));
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
