/// \file
/// The rule that divides work among ranks.
#pragma once

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// Half-open range of rows, features or elements that one rank owns.
struct ShardRange {
  Index begin, end;
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr Index size() const { return end - begin; }
};

namespace problem {

/// The part of `count` that belongs to a rank: contiguous, in rank order, nothing dropped. The
/// first count % world_size ranks get one more than the others; where world_size > count the last
/// ranks get nothing.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr ShardRange shard_of(Index count, Index rank,
                                                                         Index world_size) {
  const Index share = count / world_size, more = count % world_size;
  const Index begin = rank * share + (rank < more ? rank : more);
  return {begin, begin + share + (rank < more ? 1 : 0)};
}

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
