/// \file
/// The paged cache without pages: every sequence and layer is a list of rows, a fork copies them, and the pages that a pool would
/// hold are recounted from scratch. What the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

template <typename T>
struct PagedKvCache {
  using Row = std::vector<T>;  // (kv_heads * head_dim)
  struct Layer {
    std::vector<Row> keys, values;
  };
  std::map<std::int64_t, std::vector<Layer>> sequences;  // id -> layers
  std::int64_t next_id = 0;

  std::int64_t add_sequence(Index layers) {
    sequences[next_id].resize(static_cast<std::size_t>(layers));
    return next_id++;
  }

  std::int64_t fork(std::int64_t parent, Index length) {
    sequences[next_id] = sequences.at(parent);
    truncate(next_id, length);
    return next_id++;
  }

  void free(std::int64_t id) { sequences.erase(id); }

  void truncate(std::int64_t id, Index length) {
    for (Layer& layer : sequences.at(id)) {
      layer.keys.resize((std::min)(layer.keys.size(), static_cast<std::size_t>(length)));
      layer.values.resize(layer.keys.size());
    }
  }

  /// keys and values (n, kv_heads, head_dim)
  void append(std::int64_t id, Index layer, const Tensor<T, 3>& keys, const Tensor<T, 3>& values) {
    const Index width = keys.dimension(1) * keys.dimension(2);
    Layer& rows = sequences.at(id)[static_cast<std::size_t>(layer)];
    for (Index i = 0; i < keys.dimension(0); ++i) {
      rows.keys.emplace_back(keys.data() + i * width, keys.data() + (i + 1) * width);
      rows.values.emplace_back(values.data() + i * width, values.data() + (i + 1) * width);
    }
  }

  Index length(std::int64_t id, Index layer) const {
    return static_cast<Index>(sequences.at(id)[static_cast<std::size_t>(layer)].keys.size());
  }

  Index longest(std::int64_t id) const {
    Index result = 0;
    for (const Layer& layer : sequences.at(id))
      result = (std::max)(result, static_cast<Index>(layer.keys.size()));
    return result;
  }
};

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
