/// \file
/// Sums over divided rows with the bits of the whole row (block_sums.h): where a stage takes the
/// number itself, or where sums of ranks leave something open.
#pragma once

#include "block_sums.h"
#include "divided_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

struct RowSums {
  double total = 0, moment = 0;  // of the weights; of weight * (logit - best) / temperature
  double log_total = 0;          // as log-probabilities have it
  double tokens = 0;             // in play
  double entropy() const { return std::log(total) - moment / total; }
};

/// What all ranks say of their tokens in play, of some rows.
template <typename Rows>
class SummedRows {
 public:
  /// `logits`: (rows, shard of this rank), those given or the rows', of which asked[r] tells what
  /// is in play.
  template <typename D, typename T>
  SummedRows(const D& device, Rows& divided, const T* logits,
             const problem::ShardRow<typename Rows::C>* asked, std::span<const Index> which,
             problem::ShardSum of, Workspace::Frame& frame)
      : blocks_{divided.sampling.vocab, divided.ranks()},
        of_(of),
        workspace_(divided.workspace),
        answers_(blocks_, static_cast<Index>(which.size()),
                 of == problem::ShardSum::moments ? 2 : 1, 3, frame) {
    detail::run(device,
                problem::SumShard<T>{logits, blocks_.vocab, divided.shard.shard, asked,
                                     which.data(), static_cast<Index>(which.size()), of,
                                     answers_.of(divided.communicator.rank(), 0)},
                workspace_);
    answers_.gather(divided.communicator);
  }

  /// Of number i of the rows.
  RowSums sums(Index i) const {
    Workspace::Frame frame(workspace_);
    const auto** const answers = frame.take<const double*>(blocks_.ranks);
    for (int rank = 0; rank < blocks_.ranks; ++rank) answers[rank] = answers_.of(rank, i);
    RowSums result;
    detail::run(Eigen::DefaultDevice{},
                problem::JoinSums{blocks_.vocab, blocks_.ranks, of_, answers, result.total,
                                  result.moment, result.log_total, result.tokens},
                workspace_);
    return result;
  }
  /// Where a draw by u ends.
  problem::DrawnBlock draw(Index i, double u) const {
    return blocks_.join([&](int rank) { return answers_.of(rank, i); }, u, workspace_);
  }
  int holder(Index block) const { return blocks_.holder(block); }

 private:
  DividedBlocks blocks_;
  problem::ShardSum of_;
  Workspace& workspace_;
  RowsOfParts answers_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
