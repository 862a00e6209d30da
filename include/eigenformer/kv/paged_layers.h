/// \file
/// What a page of PagedKvCache holds of each layer, layer behind layer, and what a layer has
/// besides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "page.h"
#include "paged_config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A checksum that notices every changed bit; not one that somebody who wants to could not fool.
class PagedChecksum {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* from = static_cast<const unsigned char*>(data);
    for (; bytes > 0; from += 8, bytes -= (std::min)(bytes, std::size_t{8})) {
      std::uint64_t word = 0;
      std::memcpy(&word, from, (std::min)(bytes, std::size_t{8}));
      sum_ = (sum_ ^ word) * 0x9e3779b97f4a7c15u;
      sum_ ^= sum_ >> 32;
    }
  }
  std::int64_t value() const { return static_cast<std::int64_t>(sum_); }
  static std::int64_t of(const void* data, std::size_t bytes) {
    PagedChecksum sum;
    sum.add(data, bytes);
    return sum.value();
  }

 private:
  std::uint64_t sum_ = 1;
};

/// A layer's part of a page, `layout` from `offset` on; where the shape is not fixed yet, another
/// layout may take its place that has no more elements and no more than `bytes`.
struct PagedLayer {
  KvPageLayout layout;
  std::size_t offset = 0, bytes = 0;
  bool fixed = false, written = false;  // written: positions were appended, now or ever

  KvLayerShape shape() const { return {layout.kv_heads, layout.head_dim, layout.value_dim}; }
  /// In alignment's padding alone nothing fits. Neither overflows: a page of it is in memory.
  bool has_room_for(const KvPageLayout& other) const {
    const auto elements = [](const KvPageLayout& l) {
      return l.kv_heads * (l.head_dim + l.value_dim);
    };
    return other.bytes <= bytes && elements(other) <= elements(layout);
  }
};

template <typename Storage>
KvPageLayout paged_layout(const PagedKvConfig& c, const KvLayerShape& shape,
                          std::string_view operation) {
  return kv_page_layout<Storage>(c.page_size, shape.kv_heads, shape.head_dim,
                                 shape.value_dim == 0 ? shape.head_dim : shape.value_dim,
                                 operation);
}

/// Of a checked config. Throws std::invalid_argument where a page overflows, std::bad_alloc.
template <typename Storage>
std::vector<PagedLayer> paged_layers(const PagedKvConfig& c, std::string_view operation) {
  const KvLayerShape usual{c.kv_heads, c.head_dim, c.value_dim};
  if (c.layer_shapes.empty())  // before so many layers are allocated
    checked_product(c.layers, static_cast<Index>(paged_layout<Storage>(c, usual, operation).bytes),
                    operation, "a page");
  std::vector<PagedLayer> layers(static_cast<std::size_t>(c.layers));
  Index offset = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const bool fixed = !c.layer_shapes.empty();
    const auto layout = paged_layout<Storage>(c, fixed ? c.layer_shapes[l] : usual, operation);
    layers[l] = {layout, static_cast<std::size_t>(offset), layout.bytes, fixed, false};
    const auto bytes = static_cast<Index>(layout.bytes);
    require_that(bytes <= (std::numeric_limits<Index>::max)() - offset, operation, "a page of ",
                 c.layers, " layers overflows");
    offset += bytes;
  }
  return layers;
}

/// A layer as it is once it holds rows of this shape. Throws std::invalid_argument where it cannot.
template <typename Storage>
PagedLayer fitted_layer(const PagedKvConfig& c, const std::vector<PagedLayer>& layers,
                        std::size_t layer, const KvLayerShape& shape, Index tokens,
                        std::string_view operation) {
  PagedLayer result = layers[layer];
  const KvLayerShape own = result.shape();
  if (shape != own) {
    bool fits = !result.fixed && shape.kv_heads >= 1 && shape.head_dim >= 1 && shape.value_dim >= 1;
    if (fits) {
      result.layout = paged_layout<Storage>(c, shape, operation);
      fits = layers[layer].has_room_for(result.layout);
    }
    require_that(fits, operation, "keys (tokens, kv_heads, head_dim) has shape (", tokens, ", ",
                 shape.kv_heads, ", ", shape.head_dim, ") and values a width of ", shape.value_dim,
                 ", the cache has ", own.kv_heads, " heads of ", own.head_dim, " and values of ",
                 own.value_dim, " in layer ", layer);
  }
  result.fixed = result.written = true;
  return result;
}

/// The scales of layers whose INT8 keys are stored by channel, in the pool's memory.
class KeyChannelScales {
 public:
  /// (kv_heads, head_dim) or nullptr.
  const float* of(std::size_t layer) const {
    return layers_.empty() ? nullptr : reinterpret_cast<const float*>(layers_[layer].block.data());
  }
  /// Tells scales apart; 0 where there are none.
  std::int64_t checksum(std::size_t layer) const {
    return layers_.empty() ? 0 : layers_[layer].checksum;
  }
  /// Of a layer that has their shape. Throws std::invalid_argument with nothing changed.
  void set(std::vector<PagedLayer>& layers, std::size_t layer, std::span<const float> scales,
           const Memory& memory, std::string_view operation) {
    for (std::size_t i = 0; i < scales.size(); ++i)
      require_that(scales[i] > 0 && scales[i] <= (std::numeric_limits<float>::max)(), operation,
                   "key scale ", i, " is ", scales[i], ", expected a positive number");
    require_that(!layers[layer].written, operation, "layer ", layer,
                 " has positions, expected key scales before them");
    MemoryBlock block(scales.size_bytes(), memory);
    memory.copy_in(block.data(), scales.data(), scales.size_bytes());
    if (layers_.empty()) layers_.resize(layers.size());
    layers_[layer] = {std::move(block), PagedChecksum::of(scales.data(), scales.size_bytes())};
    layers[layer].fixed = true;
  }

 private:
  struct Layer {
    MemoryBlock block;
    std::int64_t checksum = 0;
  };
  std::vector<Layer> layers_;  // or none
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
