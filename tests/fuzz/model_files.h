/// \file
/// What fuzzers of readers do with a file that was accepted: read all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include <eigenformer/model/dequantize.h>

namespace eigenformer_test {

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline void read_all(const eigenformer::StoredTensors::Map& tensors) {
  std::vector<float> row;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.bytes.empty()) continue;
    row.resize(static_cast<std::size_t>(tensor.columns()));
    for (std::int64_t r = 0; r < tensor.rows(); ++r) eigenformer::dequantize_rows(tensor, r, row);
  }
}

}  // namespace eigenformer_test
