/// \file
/// How large a PagedKvCache is, what it says about itself, and the names of its sequences. Its
/// manual is paged_kv_cache.h.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/check.h"
#include "../problem/visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Names a sequence of a PagedKvCache; rises with every sequence made and is never used again.
using SequenceId = std::int64_t;

/// A hash of the tokens of a page, on top of that of the pages before it. Quality matters to speed
/// only: tokens are compared.
using PrefixHash = std::uint64_t (*)(std::uint64_t before, std::span<const std::int32_t> tokens);

/// What keys and values depend on besides the tokens: prefixes are shared within one key only.
struct PrefixKey {
  std::string_view adapter = {};  ///< such as the name of a LoRA
  std::string_view salt = {};     ///< such as a tenant, or the digest of an image in the prompt
};

/// A layer's keys (n, kv_heads, head_dim) and values (n, kv_heads, value_dim).
struct KvLayerShape {
  Index kv_heads = 0, head_dim = 0;
  Index value_dim = 0;  ///< 0: head_dim
  bool operator==(const KvLayerShape&) const = default;
};

struct PagedKvConfig {
  Index layers = 0;
  Index kv_heads = 0;
  Index head_dim = 0;
  Index page_size = 16;  ///< positions in a page
  Index page_count = 0;  ///< pages in the pool
  Index value_dim = 0;   ///< width of values; 0: head_dim
  /// One for each layer, in place of kv_heads, head_dim and value_dim; empty: those for all.
  std::vector<KvLayerShape> layer_shapes = {};
  /// Of the prefix index; nullptr: one of our own, which everybody knows. A server of strangers may
  /// want one that is keyed with a secret, so that nobody makes it slow.
  PrefixHash prefix_hash = nullptr;
};

struct PagedKvStatistics {
  Index sequences = 0;
  Index pages_total = 0, pages_used = 0, pages_peak = 0;
  Index pages_shared = 0;  ///< held by more than one sequence
  Index pages_cached = 0;  ///< held by none, kept by the prefix index; counted as free
  Index tokens = 0;        ///< positions of all sequences, a shared one counted by each
  Index slots_used = 0;  ///< positions of used pages that hold something, a shared one counted once
  double utilisation = 1;  ///< slots_used / (pages_used * page_size); 1 where no page is used
  // Since the cache was made:
  std::int64_t copies = 0;            ///< pages copied because a sharer wrote
  std::int64_t prefix_hits = 0;       ///< pages that share_prefix found
  std::int64_t prefix_misses = 0;     ///< pages that it might have found
  std::int64_t prefix_evictions = 0;  ///< pages of the index that were taken for something else
};

/// Tables that a KvSource of chosen sequences points to: the caller's, so that building one
/// allocates nothing once they have grown.
struct KvSelection {
  std::vector<const std::int32_t*> tables;
  std::vector<Index> lengths;
  std::vector<problem::KeyRange> gone;
};

namespace detail {

/// A key as one text; no two keys have the same.
inline std::string text_of(const PrefixKey& key) {
  if (key.adapter.empty() && key.salt.empty()) return {};
  std::string text = std::to_string(key.adapter.size());
  text += ':';
  text += key.adapter;
  text += key.salt;
  return text;
}

/// Throws std::invalid_argument for sizes below 1 (page_count, value_dim: below 0; page_count: past
/// 32 bits) and shapes of another number of layers.
inline const PagedKvConfig& checked_config(const PagedKvConfig& c, std::string_view operation) {
  const bool shapes = !c.layer_shapes.empty();
  require_that(c.layers >= 1 && c.page_size >= 1 &&
                   (shapes || (c.kv_heads >= 1 && c.head_dim >= 1 && c.value_dim >= 0)),
               operation, "layers, kv_heads, head_dim, value_dim, page_size are ", c.layers, ", ",
               c.kv_heads, ", ", c.head_dim, ", ", c.value_dim, ", ", c.page_size,
               ", expected 1 or more each (value_dim: 0 or more)");
  require_that(!shapes || std::cmp_equal(c.layer_shapes.size(), c.layers), operation,
               "layer_shapes has ", c.layer_shapes.size(), " elements, layers is ", c.layers);
  for (const KvLayerShape& s : c.layer_shapes)
    require_that(s.kv_heads >= 1 && s.head_dim >= 1 && s.value_dim >= 0, operation,
                 "layer_shapes has kv_heads, head_dim, value_dim ", s.kv_heads, ", ", s.head_dim,
                 ", ", s.value_dim, ", expected 1 or more each (value_dim: 0 or more)");
  require_that(c.page_count >= 0 && c.page_count <= (std::numeric_limits<std::int32_t>::max)(),
               operation, "page_count is ", c.page_count, ", expected 0 to 2^31 - 1");
  return c;
}
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
