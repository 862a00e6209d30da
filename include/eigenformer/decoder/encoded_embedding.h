/// \file
/// An embedding that stays in the blocks of a model's file: a token's row becomes numbers where it
/// is looked up, so that a table of hundreds of megabytes takes no memory but the pages of its rows
/// that were used. What the blocks are is not known here: who has them says how they are read
/// (model/stored_embedding.h).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "../core/tensor.h"
#include "../cpu/row_ranges.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A table (rows, columns) in blocks, row by row; a row is whole blocks.
struct EncodedEmbedding {
  /// Elements of whole blocks as float. Does not throw where there are as many as the bytes hold.
  using Decode = void (*)(int format, std::span<const std::byte> blocks, std::span<float> values);

  const std::byte* data;
  Index rows, columns;
  Index block_elements, block_bytes;  ///< of elements at most kPiece, of which they are a divisor
  int format;                         ///< what `decode` is told, and files say
  Decode decode;

  static constexpr Index kPiece = 256;

  Index row_bytes() const { return columns / block_elements * block_bytes; }
  Index bytes() const { return rows * row_bytes(); }
};

namespace detail {

/// Row `row` into `to`.
template <typename T>
void decode_row(const EncodedEmbedding& table, Index row, T* to) {
  std::array<float, EncodedEmbedding::kPiece> piece;
  const std::byte* from = table.data + row * table.row_bytes();
  for (Index at = 0; at < table.columns; at += EncodedEmbedding::kPiece) {
    const Index count = (std::min)(EncodedEmbedding::kPiece, table.columns - at),
                bytes = count / table.block_elements * table.block_bytes;
    const std::span<float> values(piece.data(), static_cast<std::size_t>(count));
    table.decode(table.format, {from, static_cast<std::size_t>(bytes)}, values);
    std::transform(values.begin(), values.end(), to + at,
                   [](float x) { return static_cast<T>(x); });
    from += bytes;
  }
}

/// y[t] = row ids[t], on the threads of a device that works on the host's memory. Ids are within
/// the table.
template <typename D, typename T>
void decode_rows_into(const D& device, const TensorView<T, 2>& y, std::span<const std::int32_t> ids,
                      const EncodedEmbedding& table) {
  for_ranges_of_rows(device, y.dimension(0), table.columns, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t)
      decode_row(table, ids[static_cast<std::size_t>(t)], y.data() + t * table.columns);
  });
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
