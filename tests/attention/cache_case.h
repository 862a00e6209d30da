// A KvSource of any storage with NaN in all memory that must not be read.
#pragma once

#include "attention_case.h"

namespace eigenformer_test {

/// Keys and values (batch, length, kv_heads, head_dim) as a cache would hold them: every byte that
/// is not a row is NaN (or 0xff).
template <typename S>
class TestCache {
 public:
  /// page_size 0: dense with spare capacity.
  TestCache(Index batch, Index capacity, Index kv_heads, Index head_dim, Index page_size)
      : source_{.batch = batch, .kv_heads = kv_heads, .head_dim = head_dim},
        lengths_(static_cast<std::size_t>(batch), 0) {
    source_.lengths = lengths_.data();
    if (page_size == 0) {
      dense_keys_ = poisoned_tensor<S, 4>({batch, kv_heads, capacity, head_dim});
      dense_values_ = poisoned_tensor<S, 4>({batch, kv_heads, capacity, head_dim});
      source_.keys = dense_keys_.data(), source_.values = dense_values_.data();
      source_.sequence_stride = source_.value_sequence_stride = kv_heads * capacity * head_dim;
      source_.head_stride = source_.value_head_stride = capacity * head_dim;
      source_.row_stride = source_.value_row_stride = head_dim;
      return;
    }
    source_.page_size = page_size;
    const Index pages = (capacity + page_size - 1) / page_size;
    const auto rows = static_cast<std::size_t>(kv_heads * page_size),
               bytes = (rows * static_cast<std::size_t>(head_dim) * sizeof(S) + 3) / 4 * 4;
    source_.layer_offset = 64;
    source_.value_offset = bytes;
    source_.key_scale_offset = 2 * bytes;
    source_.value_scale_offset = 2 * bytes + rows * sizeof(float);
    for (Index i = 0; i < batch * pages; ++i) {
      storage_.emplace_back(64 + 2 * bytes + 2 * rows * sizeof(float), std::byte{0xff});
      pages_.push_back(storage_.back().data());
    }
    for (Index b = 0; b < batch; ++b) {
      table_storage_.emplace_back();
      for (Index i = 0; i < pages; ++i)
        table_storage_.back().push_back(
            static_cast<std::int32_t>((pages - 1 - i) * batch + b));  // out of order
      tables_.push_back(table_storage_.back().data());
    }
    source_.pages = pages_.data();
    source_.tables = tables_.data();
  }

  /// Position j of sequence b, head h; scales are for INT8.
  void set(Index b, Index h, Index j, const S* key, const S* value, float key_scale = 1,
           float value_scale = 1) {
    std::copy_n(key, source_.head_dim, const_cast<S*>(source_.key_row(b, h, j)));
    std::copy_n(value, source_.head_dim, const_cast<S*>(source_.value_row(b, h, j)));
    if constexpr (std::is_same_v<S, std::int8_t>) {
      const Index page = tables_[static_cast<std::size_t>(b)][j / source_.page_size],
                  row = h * source_.page_size + j % source_.page_size;
      auto* base = storage_[static_cast<std::size_t>(page)].data() + source_.layer_offset;
      reinterpret_cast<float*>(base + source_.key_scale_offset)[row] = key_scale;
      reinterpret_cast<float*>(base + source_.value_scale_offset)[row] = value_scale;
    }
  }
  void set_length(Index b, Index length) { lengths_[static_cast<std::size_t>(b)] = length; }

  const ef::KvSource<S>& source(Index) const { return source_; }

 private:
  ef::KvSource<S> source_;
  std::vector<Index> lengths_;
  ef::Tensor<S, 4> dense_keys_, dense_values_;
  std::vector<std::vector<std::byte>> storage_;
  std::vector<const std::byte*> pages_;
  std::vector<std::vector<std::int32_t>> table_storage_;
  std::vector<const std::int32_t*> tables_;
};

template <typename T>
ef::Tensor<T, 4> rows_of(const ef::Tensor<T, 4>& x, Index begin, Index end) {
  return x.slice(
      Eigen::array<Index, 4>{0, begin, 0, 0},
      Eigen::array<Index, 4>{x.dimension(0), end - begin, x.dimension(2), x.dimension(3)});
}

}  // namespace eigenformer_test
