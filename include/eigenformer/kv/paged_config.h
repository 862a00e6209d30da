/// \file
/// How large a PagedKvCache is, what it says about itself, and the names of its sequences. Its
/// manual is paged_kv_cache.h.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "../core/check.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Names a sequence of a PagedKvCache; rises with every sequence made and is never used again.
using SequenceId = std::int64_t;

struct PagedKvConfig {
  Index layers = 0;
  Index kv_heads = 0;
  Index head_dim = 0;
  Index page_size = 16;  ///< positions in a page
  Index page_count = 0;  ///< pages in the pool
};

struct PagedKvStatistics {
  Index sequences = 0;
  Index pages_total = 0, pages_used = 0, pages_peak = 0;
  Index pages_shared = 0;  ///< held by more than one sequence
  Index tokens = 0;        ///< positions of all sequences, a shared one counted by each
  Index slots_used = 0;  ///< positions of used pages that hold something, a shared one counted once
  double utilisation = 1;   ///< slots_used / (pages_used * page_size); 1 where no page is used
  std::int64_t copies = 0;  ///< pages copied because a sharer wrote, since the cache was made
};

/// Tables that a KvSource of chosen sequences points to: the caller's, so that building one
/// allocates nothing once they have grown.
struct KvSelection {
  std::vector<const std::int32_t*> tables;
  std::vector<Index> lengths;
};

namespace detail {

/// Throws std::invalid_argument for sizes below 1 (page_count: below 0 or past 32 bits).
inline const PagedKvConfig& checked_config(const PagedKvConfig& c, std::string_view operation) {
  require_that(c.layers >= 1 && c.kv_heads >= 1 && c.head_dim >= 1 && c.page_size >= 1, operation,
               "layers, kv_heads, head_dim, page_size are ", c.layers, ", ", c.kv_heads, ", ",
               c.head_dim, ", ", c.page_size, ", expected 1 or more each");
  require_that(c.page_count >= 0 && c.page_count <= (std::numeric_limits<std::int32_t>::max)(),
               operation, "page_count is ", c.page_count, ", expected 0 to 2^31 - 1");
  return c;
}
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
