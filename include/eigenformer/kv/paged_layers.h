/// \file
/// What a page of PagedKvCache holds of each layer, layer behind layer.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "page.h"
#include "paged_config.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A layer's part of a page, `layout` from `offset` on; where the shape is not fixed yet, another
/// layout may take its place that has no more elements and no more than `bytes`.
struct PagedLayer {
  KvPageLayout layout;
  std::size_t offset = 0, bytes = 0;
  bool fixed = false;

  bool has_shape(const KvLayerShape& shape) const {
    return layout.kv_heads == shape.kv_heads && layout.head_dim == shape.head_dim &&
           layout.value_dim == shape.value_dim;
  }
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
    layers[l] = {layout, static_cast<std::size_t>(offset), layout.bytes, fixed};
    const auto bytes = static_cast<Index>(layout.bytes);
    require_that(bytes <= (std::numeric_limits<Index>::max)() - offset, operation, "a page of ",
                 c.layers, " layers overflows");
    offset += bytes;
  }
  return layers;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
