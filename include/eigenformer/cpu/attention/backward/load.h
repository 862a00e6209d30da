/// \file
/// The first phase of attention's backward pass: rows, keys and values to panels.
#pragma once

#include <algorithm>

#include "call.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename T>
class BackwardLoad {
  using Call = BackwardCall<Isa, T>;
  using C = compute_type<T>;
  using Panels = typename Call::Panels;
  using V = typename Panels::V;
  using Band = AttentionBand;
  using Memory = BandMemory<C>;
  static constexpr Index kBlock = kAttentionKeyBlock, kGroup = Call::kGroup;

 public:
  explicit BackwardLoad(const Call& call) : on_(call) {}

  /// Rows [first, first + kGroup) of a band.
  void load_rows(const Band& band, const Memory& m, Index first) const {
    for (Index r = first; r < first + kGroup; ++r) {
      const bool present = r < on_.rows(band);
      const Index of = present ? r : 0;
      if (r + kAhead < on_.rows(band)) {
        prefetch(on_.query(band, r + kAhead), on_.f.head_dim);
        prefetch(on_.grad_output(band, r + kAhead), on_.f.value_dim);
      }
      const bool query =
          load_row(on_.query(band, of), on_.f.scale, present ? on_.f.head_dim : 0, on_.shape.width,
                   r, on_.shape.stride, m.queries, on_.scratch.lines, r - first);
      const bool grad = load_row(on_.grad_output(band, of), C(1), present ? on_.f.value_dim : 0,
                                 on_.shape.value_width, r, on_.shape.stride, m.grad_output,
                                 on_.scratch.value_lines, r - first);
      m.bad_rows[r] = !query || !grad;
      m.rows[r] = on_.score_row_of(band, r);
    }
    if constexpr (Call::kPairs) {
      Call::Pairs::pack_rows(on_.scratch.lines, on_.shape.width, first, on_.shape.rows,
                             m.queries_along, m.queries_across);
      Call::Pairs::pack_rows(on_.scratch.value_lines, on_.shape.value_width, first, on_.shape.rows,
                             m.grad_output_along, m.grad_output_across);
    }
  }

  /// Key block n of a task, all 64 rows of it; no gradients yet.
  void load_keys(const Band& band, const TaskMemory<C>& task, Index n) const {
    const KeyBlock<T> block = on_.key_block(band, n * kBlock);
    const Index at = n * kBlock * on_.shape.width, value_at = n * kBlock * on_.shape.value_width;
    C* const keys = Call::kPairs ? nullptr : task.keys + at;
    KeyBits bad = 0;
    for (Index j = 0; j < kBlock; ++j) {
      const bool present = j < block.count;
      const int of = present ? static_cast<int>(j) : 0;
      if (j + kAhead < block.count) {
        prefetch(block.key(of + kAhead), on_.f.head_dim);
        prefetch(block.value(of + kAhead), on_.f.value_dim);
      }
      const bool key = load_row(block.key(of), C(1), present ? on_.f.head_dim : 0, on_.shape.width,
                                j, Panels::kBlockStride, keys, on_.scratch.lines, j);
      const bool value =
          load_row(block.value(of), C(1), present ? on_.f.value_dim : 0, on_.shape.value_width, j,
                   Panels::kBlockStride, on_.scratch.values, on_.scratch.value_lines, j);
      if (!key || !value) bad |= KeyBits{1} << j;
    }
    task.bad_keys[n] = bad;
    if constexpr (Call::kPairs) {
      Call::Pairs::pack_along(on_.scratch.lines, on_.shape.width, task.keys_along + at);
      Call::Pairs::pack_across(on_.scratch.lines, on_.shape.width, task.keys_across + at);
      Call::Pairs::pack_along(on_.scratch.value_lines, on_.shape.value_width,
                              task.values_along + value_at);
    } else {
      Panels::transpose_block(keys, on_.shape.width, task.key_columns + at);
      Panels::transpose_block(on_.scratch.values, on_.shape.value_width,
                              task.value_columns + value_at);
    }
    fill_line(task.grad_keys + at, kBlock * on_.shape.width, V::zero());
    fill_line(task.grad_values + value_at, kBlock * on_.shape.value_width, V::zero());
  }

  /// Zeros for the rows of a task that are padding.
  void write_padding(const Band& band) const {
    const problem::AttentionSequence& s = *band.sequence;
    for (Index i = s.query_rows; i < s.tensor_rows; ++i)
      for (Index h = 0; h < on_.group; ++h)
        std::fill_n(on_.p.query_gradient(s.query_begin + i, band.kv_head * on_.group + h),
                    on_.f.head_dim, T(0));
    for (Index j = s.key_length; j < on_.p.key_rows; ++j) {
      std::fill_n(on_.key_gradient(band, j), on_.f.head_dim, T(0));
      std::fill_n(on_.value_gradient(band, j), on_.f.value_dim, T(0));
    }
  }

 private:
  /// Row `row` of a matrix in panels, or row `line` of lines.
  static bool load_row(const T* source, C factor, Index width, Index padded_width, Index row,
                       Index stride, C* matrix, bfloat16* lines, Index line) {
    if constexpr (Call::kPairs)
      return Call::Pairs::load_row(source, width, padded_width, lines + line * padded_width);
    else
      return Panels::load_row(source, factor, width, padded_width, row, stride, matrix);
  }

  static constexpr int kAhead = 8;  // rows asked for before they are loaded

  static void prefetch(const T* source, Index width) {
    Panels::Tile::prefetch_row(source, width * static_cast<Index>(sizeof(T)));
  }

  const Call& on_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
