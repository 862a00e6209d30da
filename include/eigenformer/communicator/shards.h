/// \file
/// The part of some work that belongs to a rank.
#pragma once

#include "../core/check.h"
#include "../problem/shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The part of `count` that belongs to a rank: contiguous, in rank order, nothing dropped. The
/// first count % world_size ranks get one more than the others; where world_size > count the last
/// ranks get nothing. Throws std::invalid_argument.
inline ShardRange shard_range(Index count, int rank, int world_size) {
  detail::require_that(count >= 0, "shard_range", "count is ", count, ", expected 0 or more");
  detail::require_that(world_size >= 1, "shard_range", "world_size is ", world_size,
                       ", expected 1 or more");
  detail::require_that(rank >= 0 && rank < world_size, "shard_range", "rank is ", rank,
                       ", expected 0 to ", world_size - 1);
  return problem::shard_of(count, rank, world_size);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
