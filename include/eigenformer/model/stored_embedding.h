/// \file
/// An embedding in whatever format a file has it, read row by row as dequantize.h says.
#pragma once

#include "../decoder/encoded_embedding.h"
#include "dequantize.h"
#include "stored_tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Rows (rows, columns) in that format from `data` on.
inline EncodedEmbedding encoded_embedding(StoredFormat format, const std::byte* data, Index rows,
                                          Index columns) {
  const StoredLayout layout = layout_of(format);
  const auto decode = [](int as, std::span<const std::byte> blocks, std::span<float> values) {
    dequantize_row(static_cast<StoredFormat>(as), blocks, values);
  };
  return {data,  rows, columns, layout.block_elements, layout.block_bytes, static_cast<int>(format),
          decode};
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
