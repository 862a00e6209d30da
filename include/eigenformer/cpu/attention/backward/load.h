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
          Panels::load_row(on_.query(band, of), on_.f.scale, present ? on_.f.head_dim : 0,
                           on_.shape.width, r, on_.shape.stride, m.queries);
      const bool grad =
          Panels::load_row(on_.grad_output(band, of), C(1), present ? on_.f.value_dim : 0,
                           on_.shape.value_width, r, on_.shape.stride, m.grad_output);
      m.bad_rows[r] = !query || !grad;
      m.rows[r] = on_.score_row_of(band, r);
    }
  }

  /// Key block n of a task, all 64 rows of it; no gradients yet.
  void load_keys(const Band& band, const TaskMemory<C>& task, Index n) const {
    const KeyBlock<T> block = on_.key_block(band, n * kBlock);
    C* const keys = task.keys + n * kBlock * on_.shape.width;
    KeyBits bad = 0;
    for (Index j = 0; j < kBlock; ++j) {
      const bool present = j < block.count;
      const int of = present ? static_cast<int>(j) : 0;
      if (j + kAhead < block.count) {
        prefetch(block.key(of + kAhead), on_.f.head_dim);
        prefetch(block.value(of + kAhead), on_.f.value_dim);
      }
      const bool key = Panels::load_row(block.key(of), C(1), present ? on_.f.head_dim : 0,
                                        on_.shape.width, j, Panels::kBlockStride, keys);
      const bool value =
          Panels::load_row(block.value(of), C(1), present ? on_.f.value_dim : 0,
                           on_.shape.value_width, j, Panels::kBlockStride, on_.scratch.values);
      if (!key || !value) bad |= KeyBits{1} << j;
    }
    task.bad_keys[n] = bad;
    Panels::transpose_block(keys, on_.shape.width, task.key_columns + n * kBlock * on_.shape.width);
    Panels::transpose_block(on_.scratch.values, on_.shape.value_width,
                            task.value_columns + n * kBlock * on_.shape.value_width);
    fill_line(task.grad_keys + n * kBlock * on_.shape.width, kBlock * on_.shape.width, V::zero());
    fill_line(task.grad_values + n * kBlock * on_.shape.value_width, kBlock * on_.shape.value_width,
              V::zero());
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
  static constexpr int kAhead = 8;  // rows asked for before they are loaded

  static void prefetch(const T* source, Index width) {
    Panels::Tile::prefetch_row(source, width * static_cast<Index>(sizeof(T)));
  }

  const Call& on_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
