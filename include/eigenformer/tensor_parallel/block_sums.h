/// \file
/// Sums over a divided vocabulary that have the bits of the whole row, from what every rank says of
/// its shard (problem/vocabulary_tree.h): 8 bytes for each block of 128 tokens travel, and for each
/// token of a block that ranks share.
#pragma once

#include "../core/dispatch.h"
#include "../core/workspace.h"
#include "../cpu/vocabulary_tree.h"
#include "../problem/vocabulary_tree.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// The blocks of a vocabulary that is divided among ranks.
struct DividedBlocks {
  Index vocab;
  int ranks;

  problem::BlockParts of(int rank) const { return {vocab, problem::shard_of(vocab, rank, ranks)}; }
  Index count() const { return problem::BlockParts::blocks_of(vocab); }
  /// The rank that has the whole of a block, -1 where there is none.
  int holder(Index block) const {
    int rank = 0;
    while (rank < ranks && !of(rank).holds(block)) ++rank;
    return rank < ranks ? rank : -1;
  }
  /// From the parts of all ranks, parts_of(rank).
  template <typename PartsOf>
  problem::DrawnBlock join(PartsOf&& parts_of, double u, Workspace& workspace) const {
    Workspace::Frame frame(workspace);
    const auto** const parts = frame.take<const double*>(ranks);
    for (int rank = 0; rank < ranks; ++rank) parts[rank] = parts_of(rank);
    problem::DrawnBlock result;
    detail::run(Eigen::DefaultDevice{},
                problem::JoinParts{vocab, ranks, parts, u, frame.take<double>(count()), result},
                workspace);
    return result;
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
