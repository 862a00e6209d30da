/// \file
/// Blocks of four bits as INT4 by groups of 32, exactly: Q4_0 is symmetric, Q4_1 and Q4_K have
/// minimums. What a value stands for has the bits of dequantize.h.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/row_ranges.h"
#include "../linear.h"
#include "dequantize.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

constexpr bool has_int4_blocks(StoredFormat format) {
  return format == StoredFormat::q4_0 || format == StoredFormat::q4_1 ||
         format == StoredFormat::q4_k;
}

/// A matrix (out, in) of such blocks.
class StoredInt4 {
 public:
  template <typename D>
  StoredInt4(const D& device, const StoredTensor& tensor)
      : rows_(tensor.rows()), columns_(tensor.columns()) {
    const auto count = static_cast<std::size_t>(rows_ * columns_);
    const auto block = static_cast<std::size_t>(layout_of(tensor.format).block_elements);
    values_.resize(count);
    scales_.resize(count / 32);
    if (tensor.format != StoredFormat::q4_0) minimums_.resize(count / 32);
    const auto bytes = static_cast<std::size_t>(layout_of(tensor.format).block_bytes);
    for_ranges_of_rows(device, rows_, columns_, [&](Index begin, Index end) {
      for (auto i = static_cast<std::size_t>(begin * columns_);
           i < static_cast<std::size_t>(end * columns_); i += block)
        read(tensor.format, tensor.bytes.data() + i / block * bytes, i);
    });
  }

  bool has_minimums() const { return !minimums_.empty(); }
  /// d (u - 8) is d u + (-8 d), and is rounded as that is.
  void add_minimums() {
    if (has_minimums()) return;
    for (std::int8_t& value : values_) value = static_cast<std::int8_t>(value + 8);
    minimums_ = scales_;
    for (float& minimum : minimums_) minimum *= -8;
  }

  Int4View view() const {
    const Index groups = columns_ / 32;
    Int4View view{{values_.data(), rows_, columns_}, {scales_.data(), rows_, groups}};
    if (has_minimums()) view.minimums.emplace(minimums_.data(), rows_, groups);
    return view;
  }

 private:
  /// The block whose first element is number i of the matrix.
  void read(StoredFormat format, const std::byte* block, std::size_t i) {
    std::int8_t* const values = values_.data() + i;
    if (format == StoredFormat::q4_k) {
      for (int group = 0; group < 8; ++group) {
        const KGroup own(block, group);
        scales_[i / 32 + static_cast<std::size_t>(group)] = own.scale;
        minimums_[i / 32 + static_cast<std::size_t>(group)] = -own.minimum;
        const std::byte* const bits = block + 16 + group / 2 * 32;
        for (int k = 0; k < 32; ++k)
          values[32 * group + k] =
              static_cast<std::int8_t>(load_byte(bits + k) >> group % 2 * 4 & 15);
      }
      return;
    }
    const bool symmetric = format == StoredFormat::q4_0;
    scales_[i / 32] = load_half(block);
    if (!symmetric) minimums_[i / 32] = load_half(block + 2);
    const std::byte* const bits = block + (symmetric ? 2 : 4);
    for (int k = 0; k < 16; ++k) {
      const int two = load_byte(bits + k), zero = symmetric ? 8 : 0;
      values[k] = static_cast<std::int8_t>((two & 15) - zero);
      values[k + 16] = static_cast<std::int8_t>((two >> 4) - zero);
    }
  }

  Index rows_, columns_;
  std::vector<std::int8_t> values_;
  std::vector<float> scales_, minimums_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
