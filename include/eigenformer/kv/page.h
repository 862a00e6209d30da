/// \file
/// How a page of keys and values lies in memory: what the caches write and KvSource reads. One page
/// holds `page_size` positions of one sequence; a layer's part of it is
///
///   keys (kv_heads, page_size, head_dim) | values (kv_heads, page_size, value_dim) | INT8 only: key scales (kv_heads, page_size) of float | value scales
///
/// each part aligned to 64 bytes, so that no two parts share a cache line and vector loads of a
/// head's rows do not split lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include "../core/check.h"
#include "../core/memory.h"
#include "../problem/kv_source.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What a cache of T may store: T itself, a narrower floating-point scalar, or INT8 with one scale
/// per position and head.
template <typename Storage, typename T>
concept KvStorage =
    FloatingScalar<T> && (std::same_as<Storage, T> || std::same_as<Storage, std::int8_t> ||
                          (FloatingScalar<Storage> && sizeof(Storage) < sizeof(T)));

namespace detail {

/// Pages of `page_size` positions that hold `length` positions.
inline Index pages_for(Index length, Index page_size) {
  return length / page_size + (length % page_size != 0 ? 1 : 0);
}

/// Offsets in bytes within one layer's part of a page, and the size of that part.
struct KvPageLayout {
  Index page_size = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  std::size_t value_offset = 0, key_scale_offset = 0, value_scale_offset = 0, bytes = 0;
};

/// Throws std::invalid_argument where a size is negative or the page overflows.
template <typename Storage>
KvPageLayout kv_page_layout(Index page_size, Index kv_heads, Index head_dim, Index value_dim,
                            std::string_view operation) {
  const auto aligned = [](Index bytes) { return (static_cast<std::size_t>(bytes) + 63) / 64 * 64; };
  const Index cells = checked_product(kv_heads, page_size, operation, "a page");
  const auto rows = [&](Index width) {
    const Index row_bytes = checked_product(width, Index{sizeof(Storage)}, operation, "a row");
    return aligned(checked_product(cells, row_bytes, operation, "a page"));
  };
  const std::size_t keys = rows(head_dim), values = rows(value_dim);
  const std::size_t scales =
      std::is_same_v<Storage, std::int8_t>
          ? aligned(checked_product(cells, sizeof(float), operation, "a page"))
          : 0;
  constexpr std::size_t most = static_cast<std::size_t>((std::numeric_limits<Index>::max)()) / 8;
  require_that(keys < most && values < most && scales < most, operation, "a page of ", page_size,
               " positions x ", kv_heads, " heads x (", head_dim, " + ", value_dim, ") overflows");
  const std::size_t both = keys + values;
  return {page_size, kv_heads, head_dim, value_dim, keys, both, both + scales, both + 2 * scales};
}

/// The source that reads one layer of `batch` sequences out of such pages.
template <typename Storage>
KvSource<Storage> paged_source(const KvPageLayout& layout, Index batch, const Index* lengths,
                               const std::byte* const* pages, const std::int32_t* const* tables,
                               std::size_t layer_offset) {
  KvSource<Storage> source{};
  source.batch = batch;
  source.kv_heads = layout.kv_heads;
  source.head_dim = layout.head_dim;
  source.value_dim = layout.value_dim;
  source.lengths = lengths;
  source.pages = pages;
  source.tables = tables;
  source.page_size = layout.page_size;
  source.layer_offset = layer_offset;
  source.value_offset = layout.value_offset;
  source.key_scale_offset = layout.key_scale_offset;
  source.value_scale_offset = layout.value_scale_offset;
  return source;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
