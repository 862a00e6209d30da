/// \file
/// Rows of logits that are divided among ranks, and how the ranks settle which tokens are in play:
/// what vocabulary_sample.h is made of.
///
/// All ranks hold the same numbers and come to the same decisions, in rounds: each answers a
/// question about its shard of every open row (the largest logit, the number of tokens in play, the
/// sum of their weights), all answers are gathered, and the row goes on through its stages. Sums of
/// ranks are not the bits of the sum of one row, so a decision counts only where no error that any
/// order of summation may have could change it; where one could, by estimate 2 times in 10^11 for
/// each token, and where a stage takes the number itself, the sums are those of the whole row, of
/// blocks of 128 tokens (divided_sums.h). A row ends as
///
///   candidates   once few tokens are left: they are gathered, and every rank runs the stages that
///                follow on a row of these and -infinity. To the kernels it is what the stages
///                before have left, so that all that follows has the same bits
///   drawn        from all tokens in play: one rank finds the token (divided_ends.h)
///
/// One thing is not told by sums: whether that of some tokens, but not all, reaches a target that
/// it comes as near to as its rounding. The whole row decides that by the order in which a radix
/// select adds (cpu/sampling/select.h), so all tokens in play are candidates of top_p, typical_p
/// and top_h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "../cpu/vocabulary_shard.h"
#include "../sampling.h"
#include "product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

enum class RowEnd : std::uint8_t { open, bad, candidates, drawn };

/// Where the prefix of the tokens in play ends whose terms reach a target (divided_search.h): those
/// before the interval that is looked at, and the tokens equal to the last one.
struct PrefixSearch {
  double target = 0, margin = 0;  // of error, of all sums together
  double above = 0, tokens = 0;   // the terms, the number of those before
  bool is_last = false;           // no tokens come after the interval, or the end is within it
  bool exact = false;             // the target has the bits of the whole row
  Index equals = 0;
  double each = 0;  // term of one
};

/// What all ranks know of a row, beside what its shards are asked.
struct DividedRow {
  RowEnd end = RowEnd::open;
  SampleStatus status = SampleStatus::ok;
  std::size_t stage = 0;         // place in the order of the first stage that is not done
  bool has_temperature = false;  // done, and of effect on what follows
  double temperature = 1;
  // of the stage that is being done
  Index least = 1;  // tokens that it leaves
  bool is_searching = false;
  bool searches_best = false, keeps_ties = false;  // for the `least` best tokens, with ties
  bool is_filtered = false;                        // candidates are what a stage has left
  bool sends_all = false;  // sums left it open: all tokens in play are candidates
  PrefixSearch search;
  double given_best = 0;  // largest logit before any stage
  bool is_given_good = false;
  double total = 0;                    // weight in play
  double end_bin = -1, end_reach = 0;  // of candidates: in it is where top_p's set ends
  double above = 0;                    // the weight of the bins before
  Index keeps = 0;                     // the best of the candidates; 0: all
  int drawn_by = 0;                    // rank
  std::int32_t token = -1;
};

/// What all ranks have answered.
struct ShardAnswers {
  const double* numbers;  // (ranks, size)
  int ranks;
  Index size;
  const Index* begin;  // (rows) of a row's
  double of(int rank, Index row, Index number) const {
    return numbers[rank * size + begin[row] + number];
  }
  double sum(Index row, Index number) const {
    double total = 0;
    for (int rank = 0; rank < ranks; ++rank) total += of(rank, row, number);
    return total;
  }
};

/// Every rank's numbers, those of a row from begin[row] on, of `size`, after this rank's.
template <typename Comm>
ShardAnswers gather_answers(Comm& communicator, const double* own, const Index* begin, Index size,
                            Workspace::Frame& frame) {
  const int ranks = communicator.size();
  double* const all = frame.take<double>(size * ranks);
  communicator.all_gather(std::span<const double>(own, static_cast<std::size_t>(size)),
                          std::span<double>(all, static_cast<std::size_t>(size * ranks)));
  return {all, ranks, size, begin};
}
/// The same of `rows` rows of `width` numbers.
template <typename Comm>
ShardAnswers gather_answers(Comm& communicator, const double* own, Index rows, Index width,
                            Workspace::Frame& frame) {
  Index* const begin = frame.take<Index>(rows);
  for (Index r = 0; r < rows; ++r) begin[r] = r * width;
  return gather_answers(communicator, own, begin, rows * width, frame);
}

/// More than two sums of the weights of a row may differ by: each adds at most a quarter of the
/// tokens one after the other.
inline double margin_of_sums(double total, Index vocab) {
  return total * (2e-12 + 6e-17 * static_cast<double>(vocab));
}

/// Of `taken` tokens of one logit, those of lowest index, the last: its number among those of this
/// rank, 0 where it is another's. count_of(rank): how many a rank has.
template <typename CountOf>
Index last_of_rank(Index taken, int rank, CountOf&& count_of) {
  for (int before = 0; before < rank; ++before) taken -= count_of(before);
  return taken > 0 && taken <= count_of(rank) ? taken : 0;
}

template <typename T, typename Comm>
struct DividedRows {
  using C = compute_type<T>;
  using Candidate = problem::ShardCandidate<C>;

  const problem::Sampling<T>& sampling;  // of the whole; its logits are not read
  Comm& communicator;
  Workspace& workspace;
  const T* given;  // (rows, shard of this rank)
  problem::ShardLogits<C> shard;
  std::span<DividedRow> rows;
  problem::ShardRow<C>* asked;  // (rows)
  Index* counts;                // (rows, ranks) candidates of each
  problem::Band<C>* before;     // (rows) in play before the stage that is being done
  bool weighs_in_float;         // where floats are as good

  int ranks() const { return communicator.size(); }
  ShardRange shard_of(int rank) const { return problem::shard_of(sampling.vocab, rank, ranks()); }
  const problem::RowParams& params_of(Index row) const { return sampling.params_of(row); }

  double margin(double total) const { return margin_of_sums(total, sampling.vocab); }
  /// The status of a row of which the ranks have answered their largest logit and whether there is
  /// a NaN; its largest logit in `hi`.
  static SampleStatus status_of(const ShardAnswers& answers, Index row, Index number, double& hi) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    hi = -infinity;
    for (int rank = 0; rank < answers.ranks; ++rank)
      hi = (std::max)(hi, answers.of(rank, row, number));
    return answers.sum(row, number + 1) > 0 ? SampleStatus::nan
           : hi == infinity                 ? SampleStatus::positive_infinity
           : hi == -infinity                ? SampleStatus::no_token
                                            : SampleStatus::ok;
  }
  ShardAnswers exchange(const double* own, const Index* begin, Index size,
                        Workspace::Frame& frame) const {
    return gather_answers(communicator, own, begin, size, frame);
  }
  ShardAnswers exchange(const double* own, Index width, Workspace::Frame& frame) const {
    return gather_answers(communicator, own, shard.rows, width, frame);
  }
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
