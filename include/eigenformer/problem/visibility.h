/// \file
/// Which keys a query sees by its position: the one definition that masks, attention on every
/// device and their references share.
#pragma once

#include <limits>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Half-open range of keys.
struct KeyRange {
  Index begin, end;
};

/// A query at absolute position p sees the keys [p - left, p + right] and, besides, the first
/// `prefix` keys.
struct Visibility {
  /// As left or right: no limit. Positions are far smaller, so that sums do not overflow.
  static constexpr Index kUnlimited = (std::numeric_limits<Index>::max)() / 4;

  Index left = kUnlimited;
  Index right = kUnlimited;
  Index prefix = 0;  ///< leading keys visible to every query (prefix-LM); 0 where all are

  /// window w: the w most recent keys, the query's own included, where causal; those at a distance
  /// of w at most where not; 0: no window.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE static constexpr Visibility of(bool causal,
                                                                            Index window,
                                                                            Index prefix) {
    if (causal) return {window == 0 ? kUnlimited : window - 1, 0, prefix};
    if (window == 0) return {};
    return {window, window, prefix};
  }

  /// Keys seen by position, of key_length, apart from the prefix. Empty where begin >= end.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr KeyRange keys(Index position,
                                                                     Index key_length) const {
    const Index begin = position - left, end = position + right + 1;
    return {begin > 0 ? begin : 0, end < 0 ? 0 : (end < key_length ? end : key_length)};
  }

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool visible(Index position,
                                                                    Index key) const {
    return key < prefix || (key >= position - left && key <= position + right);
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
