/// \file
/// Sums over a divided vocabulary that have the bits of the whole row, from what every rank says of
/// its shard (problem/vocabulary_tree.h): 8 bytes for each block of 128 tokens travel, and for each
/// token of a block that ranks share.
#pragma once

#include <span>

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

/// Of each of `rows` rows `sums` times the parts of all ranks' blocks, and `more` numbers.
class RowsOfParts {
 public:
  RowsOfParts(const DividedBlocks& blocks, Index rows, Index sums, Index more,
              Workspace::Frame& frame)
      : blocks_(blocks),
        sums_(sums),
        more_(more),
        counts_(frame.take<Index>(blocks.ranks), static_cast<std::size_t>(blocks.ranks)),
        begins_(frame.take<double*>(blocks.ranks)) {
    Index total = 0;
    for (int rank = 0; rank < blocks.ranks; ++rank)
      total += counts_[static_cast<std::size_t>(rank)] = rows * size_of(rank);
    all_ = {frame.take<double>(total), static_cast<std::size_t>(total)};
    double* begin = all_.data();
    for (int rank = 0; rank < blocks.ranks; begin += counts_[static_cast<std::size_t>(rank++)])
      begins_[rank] = begin;
  }

  double* of(int rank, Index row) const { return begins_[rank] + row * size_of(rank); }
  /// The rows of every rank from this one's, which are in their place.
  template <typename C>
  void gather(C& communicator) const {
    const int own = communicator.rank();
    communicator.all_gather(
        std::span<const double>(begins_[own],
                                static_cast<std::size_t>(counts_[static_cast<std::size_t>(own)])),
        all_, std::span<const Index>(counts_));
  }

 private:
  Index size_of(int rank) const { return sums_ * blocks_.of(rank).size() + more_; }

  DividedBlocks blocks_;
  Index sums_, more_;
  std::span<Index> counts_;  // (ranks) numbers of each
  double** begins_;          // (ranks)
  std::span<double> all_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
