/// \file
/// Elements of stored tensors as float.
///
///   std::vector<float> row(static_cast<std::size_t>(tensor.columns()));
///   ef::dequantize_rows(tensor, 3, row);   // row 3; more rows where there is place for more
///
/// Floating formats are converted (F16 and BF16 exactly, F64 rounded), integers too. Blocks are
/// those of GGUF (github.com/ggml-org/ggml, docs/gguf.md): d and m are halves of the block, s and t
/// small integers of a part of it, q is the element's 4 to 8 bits:
///
///   Q8_0   d q               32 elements; q is signed
///   Q5_0   d (q - 16)        32; their fifth bits lie together
///   Q5_1   d q + m           32
///   Q4_0   d (q - 8)         32; byte i holds elements i (low bits) and i + 16
///   Q4_1   d q + m           32
///   Q6_K   (d s) (q - 32)    256; s of 8 bits for 16 elements
///   Q5_K   (d s) q - (m t)   256; s and t of 6 bits for 32 elements
///   Q4_K   (d s) q - (m t)   256
///   MXFP4  d k               32; d a power of two in 8 bits, k one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
///                            and their negatives in 4
///
/// Every product is exact in float (11 bits of a half times at most 7 and 6), so a result is
/// rounded once at most and has ggml's bits, whichever instructions fuse. Costs O(elements) on the
/// calling thread: 1 to 4 elements per ns on Zen 5 at -O2.
#pragma once

#include <cmath>
#include <cstring>

#include "../core/check.h"
#include "../core/tensor.h"
#include "error.h"
#include "stored_tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename T>
T load_unaligned(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}
inline float load_half(const std::byte* bytes) {
  return static_cast<float>(Eigen::numext::bit_cast<half>(load_unaligned<std::uint16_t>(bytes)));
}
inline int load_byte(const std::byte* bytes) { return std::to_integer<int>(*bytes); }
inline int load_signed(const std::byte* bytes) { return load_unaligned<std::int8_t>(bytes); }

template <typename T>
void numbers_to_float(const std::byte* from, float* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    to[i] = static_cast<float>(load_unaligned<T>(from + i * sizeof(T)));
}

inline void dequantize_q8_0(const std::byte* block, float* to) {
  const float d = load_half(block);
  for (int i = 0; i < 32; ++i) to[i] = d * static_cast<float>(load_signed(block + 2 + i));
}

/// 16 bytes have the low four bits: byte i those of elements i and i + 16. The fifth bit of element
/// i is bit i of `fifth`. Elements are d (q - zero) + m, where m = -0 adds nothing, not even to -0.
inline void dequantize_32(const std::byte* bytes, std::uint32_t fifth, float d, int zero, float m,
                          float* to) {
  for (int i = 0; i < 16; ++i) {
    const int q = load_byte(bytes + i);
    const int low = static_cast<int>(fifth >> i & 1) << 4,
              high = static_cast<int>(fifth >> (i + 16) & 1) << 4;
    to[i] = d * static_cast<float>(((q & 15) | low) - zero) + m;
    to[i + 16] = d * static_cast<float>((q >> 4 | high) - zero) + m;
  }
}
inline void dequantize_q4_0(const std::byte* block, float* to) {
  dequantize_32(block + 2, 0, load_half(block), 8, -0.0f, to);
}
inline void dequantize_q4_1(const std::byte* block, float* to) {
  dequantize_32(block + 4, 0, load_half(block), 0, load_half(block + 2), to);
}
inline void dequantize_q5_0(const std::byte* block, float* to) {
  const auto fifth = load_unaligned<std::uint32_t>(block + 2);
  dequantize_32(block + 6, fifth, load_half(block), 16, -0.0f, to);
}
inline void dequantize_q5_1(const std::byte* block, float* to) {
  const auto fifth = load_unaligned<std::uint32_t>(block + 4);
  dequantize_32(block + 8, fifth, load_half(block), 0, load_half(block + 2), to);
}

/// Scale and minimum of one of the eight groups of Q4_K and Q5_K, elements are scale q - minimum.
/// Twelve bytes hold eight pairs: of the first four the low 6 bits of bytes 0-3 (scale) and 4-7
/// (minimum); of the others the low and high halves of bytes 8-11, with the two bits left over
/// above.
struct KGroup {
  float scale, minimum;

  KGroup(const std::byte* block, int group) {
    const std::byte* const pairs = block + 4;
    int s = 0, t = 0;
    if (group < 4) {
      s = load_byte(pairs + group) & 63;
      t = load_byte(pairs + group + 4) & 63;
    } else {
      const int halves = load_byte(pairs + group + 4);
      s = (halves & 15) | (load_byte(pairs + group - 4) >> 6 << 4);
      t = (halves >> 4) | (load_byte(pairs + group) >> 6 << 4);
    }
    scale = load_half(block) * static_cast<float>(s);
    minimum = load_half(block + 2) * static_cast<float>(t);
  }
};

template <bool Fifth>
void dequantize_k(const std::byte* block, float* to) {
  for (int group = 0; group < 8; ++group) {
    const auto [scale, minimum] = KGroup(block, group);
    // Two neighbouring groups share 32 bytes: the first has the low bits.
    const std::byte* const bits = block + (Fifth ? 48 : 16) + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      int q = load_byte(bits + i) >> shift & 15;
      if constexpr (Fifth) q |= (load_byte(block + 16 + i) >> group & 1) << 4;
      to[32 * group + i] = scale * static_cast<float>(q) - minimum;
    }
  }
}

/// Of each half of 128 elements 64 bytes hold low bits, 32 bytes the two high bits of elements i,
/// i + 32, i + 64 and i + 96.
inline void dequantize_q6_k(const std::byte* block, float* to) {
  const float d = load_half(block + 208);
  for (int group = 0; group < 8; ++group) {
    const int half_of_block = group / 4, quarter = group % 4;
    const std::byte* const low = block + half_of_block * 64 + quarter % 2 * 32;
    const std::byte* const high = block + 128 + half_of_block * 32;
    for (int i = 0; i < 32; ++i) {
      const int q = (load_byte(low + i) >> quarter / 2 * 4 & 15) |
                    (load_byte(high + i) >> quarter * 2 & 3) << 4;
      const int s = load_signed(block + 192 + group * 2 + i / 16);
      to[32 * group + i] = d * static_cast<float>(s) * static_cast<float>(q - 32);
    }
  }
}

/// A power of two, then codes of elements i and i + 16 in a byte each. (OCP Microscaling Formats,
/// 2023, but that a scale of 255 is 2^128 and code 8 is 0: as ggml has it.)
inline void dequantize_mxfp4_block(const std::byte* block, float* to) {
  constexpr float halves[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const float d = std::ldexp(1.0f, load_byte(block) - 128);
  for (int i = 0; i < 16; ++i) {
    const int two = load_byte(block + 1 + i);
    to[i] = d * halves[two & 15];
    to[i + 16] = d * halves[two >> 4];
  }
}

template <typename Block>
void blocks_to_float(StoredLayout layout, const std::byte* from, float* to, std::size_t count,
                     Block block) {
  const auto elements = static_cast<std::size_t>(layout.block_elements);
  for (std::size_t i = 0; i < count; i += elements, from += layout.block_bytes) block(from, to + i);
}

}  // namespace detail

/// Elements of one or more whole rows that lie in `bytes`. Throws std::invalid_argument where these
/// are not as many as `values` takes.
inline void dequantize_row(StoredFormat format, std::span<const std::byte> bytes,
                           std::span<float> values) {
  const StoredLayout layout = layout_of(format);
  const std::int64_t size = static_cast<std::int64_t>(values.size());
  const std::int64_t needed = detail::stored_bytes(format, {&size, 1});
  detail::require_that(needed >= 0, "dequantize_row", "values has ", size,
                       " elements, expected a multiple of ", layout.block_elements);
  detail::require_that(needed == static_cast<std::int64_t>(bytes.size()), "dequantize_row",
                       "bytes has ", bytes.size(), " bytes, ", size, " elements of ", layout.name,
                       " are ", needed);
  const std::byte* const from = bytes.data();
  float* const to = values.data();
  const std::size_t count = values.size();
  using namespace detail;
  switch (format) {
    case StoredFormat::f64:
      return numbers_to_float<double>(from, to, count);
    case StoredFormat::f32:
      if (count > 0) std::memcpy(to, from, count * sizeof(float));
      return;
    case StoredFormat::f16:
      for (std::size_t i = 0; i < count; ++i) to[i] = load_half(from + 2 * i);
      return;
    case StoredFormat::bf16:
      for (std::size_t i = 0; i < count; ++i)
        to[i] =
            std::bit_cast<float>(std::uint32_t{load_unaligned<std::uint16_t>(from + 2 * i)} << 16);
      return;
    case StoredFormat::i64:
      return numbers_to_float<std::int64_t>(from, to, count);
    case StoredFormat::i32:
      return numbers_to_float<std::int32_t>(from, to, count);
    case StoredFormat::i16:
      return numbers_to_float<std::int16_t>(from, to, count);
    case StoredFormat::i8:
      return numbers_to_float<std::int8_t>(from, to, count);
    case StoredFormat::u64:
      return numbers_to_float<std::uint64_t>(from, to, count);
    case StoredFormat::u32:
      return numbers_to_float<std::uint32_t>(from, to, count);
    case StoredFormat::u16:
      return numbers_to_float<std::uint16_t>(from, to, count);
    case StoredFormat::u8:
    case StoredFormat::boolean:
      return numbers_to_float<std::uint8_t>(from, to, count);
    case StoredFormat::q8_0:
      return blocks_to_float(layout, from, to, count, dequantize_q8_0);
    case StoredFormat::q5_0:
      return blocks_to_float(layout, from, to, count, dequantize_q5_0);
    case StoredFormat::q5_1:
      return blocks_to_float(layout, from, to, count, dequantize_q5_1);
    case StoredFormat::q4_0:
      return blocks_to_float(layout, from, to, count, dequantize_q4_0);
    case StoredFormat::q4_1:
      return blocks_to_float(layout, from, to, count, dequantize_q4_1);
    case StoredFormat::q5_k:
      return blocks_to_float(layout, from, to, count, dequantize_k<true>);
    case StoredFormat::q4_k:
      return blocks_to_float(layout, from, to, count, dequantize_k<false>);
    case StoredFormat::q6_k:
      return blocks_to_float(layout, from, to, count, dequantize_q6_k);
    case StoredFormat::mxfp4:
      return blocks_to_float(layout, from, to, count, dequantize_mxfp4_block);
  }
}

/// As many rows of a tensor as `values` has place for, from `first` on. Throws
/// std::invalid_argument where it has place for a part of a row, or the tensor has not so many.
inline void dequantize_rows(const StoredTensor& tensor, std::int64_t first,
                            std::span<float> values) {
  constexpr auto name = "dequantize_rows";
  const std::int64_t columns = tensor.columns(), rows = tensor.rows();
  const auto size = static_cast<std::int64_t>(values.size());
  detail::require_that(columns > 0 ? size % columns == 0 : size == 0, name, "values has ", size,
                       " elements, expected a multiple of ", columns);
  const std::int64_t count = columns > 0 ? size / columns : 0;
  detail::require_that(first >= 0 && first <= rows && count <= rows - first, name, count,
                       " rows from ", first, " on are asked for, ", detail::printable(tensor.name),
                       " has ", rows);
  if (count == 0) return;
  const std::size_t row_bytes = tensor.bytes.size() / static_cast<std::size_t>(rows);
  dequantize_row(tensor.format,
                 tensor.bytes.subspan(static_cast<std::size_t>(first) * row_bytes,
                                      static_cast<std::size_t>(count) * row_bytes),
                 values);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
