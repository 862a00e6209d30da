/// \file
/// A KvCache that does not keep everything: the first positions and the newest ones. Its manual is
/// kv_cache.h.
#pragma once

#include <algorithm>
#include <limits>
#include <string_view>

#include "page.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct KvWindow {
  Index window = 0;   ///< newest positions that a query sees, its own included; 0: keep everything
  Index sinks = 0;    ///< first positions, kept for good
  Index chunk = 256;  ///< most positions of an append whose queries all find what they see
};

/// The positions that a layer holds: [0, prefix) and [begin, end).
struct HeldPositions {
  Index prefix, begin, end;
  bool operator==(const HeldPositions&) const = default;
};

namespace detail {

/// The pages that a sequence of a KvCache keeps.
struct KvRing : problem::PageRing {
  static constexpr Index kPageSize = 64;

  /// How many pages `length` positions take.
  Index pages_of(Index length) const {
    const Index all = pages_for(length, kPageSize);
    return pages == 0 ? all : (std::min)(all, begin + pages);
  }
  /// What is gone once `written` positions have been there. Empty where begin >= end.
  problem::KeyRange gone(Index written) const {
    if (pages == 0) return {0, 0};
    return {begin * kPageSize, (pages_for(written, kPageSize) - pages) * kPageSize};
  }
};

/// Throws std::invalid_argument for sizes below 0 (chunk: below 1) or above 2^60.
inline KvRing checked_ring(const KvWindow& w) {
  constexpr std::string_view name = "KvCache";
  constexpr Index most = (std::numeric_limits<Index>::max)() / 8;
  require_that(w.window >= 0 && w.window <= most && w.sinks >= 0 && w.sinks <= most &&
                   w.chunk >= 1 && w.chunk <= most,
               name, "window, sinks, chunk are ", w.window, ", ", w.sinks, ", ", w.chunk,
               ", expected 0, 0, 1 or more, and ", most, " at most");
  require_that(w.window > 0 || w.sinks == 0, name, "sinks is ", w.sinks,
               " without a window: everything is kept");
  if (w.window == 0) return {};
  // An append of `chunk` positions may end with one in a page of its own, and its first query
  // still sees window - 1 positions before it, the first of them the last of its page.
  return {{pages_for(w.sinks, KvRing::kPageSize),
           pages_for(w.window + w.chunk + KvRing::kPageSize - 2, KvRing::kPageSize)}};
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
