/// \file
/// Which keys a query sees: the one definition that masks, attention on every device and their
/// references share.
#pragma once

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Half-open range of keys.
struct KeyRange {
  Index begin, end;
};

/// A query at absolute position p sees the keys [p - window + 1, p] (window 0: [0, p]) and,
/// besides, the first `prefix` keys.
struct Visibility {
  bool causal;
  /// most recent keys seen, the query's own included; 0 means no limit. Needs causal.
  Index window;
  Index prefix;  ///< leading keys visible to every query (prefix-LM)

  /// Keys seen by position, of key_length, apart from the prefix. Empty where begin >= end.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr KeyRange keys(Index position,
                                                                     Index key_length) const {
    if (!causal) return {0, key_length};
    const Index end = position + 1 < key_length ? position + 1 : key_length;
    const Index begin = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
    return {begin, end < 0 ? 0 : end};
  }

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool visible(Index position,
                                                                    Index key) const {
    if (!causal || key < prefix) return true;
    return key <= position && (window == 0 || key > position - window);
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
