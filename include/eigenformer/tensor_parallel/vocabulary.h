/// \file
/// Part of tensor_parallel.h, which includes it: the most likely tokens of a language-model head
/// whose rows are divided among ranks.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../core/dispatch.h"
#include "../sampling/params.h"
#include "../tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Where all is checked, and nothing sent yet.
template <typename Hidden, typename Weight, typename C>
ParallelShape vocabulary_shape(std::string_view name, const Hidden& x, const Weight& weight,
                               C& communicator, Index ids, std::size_t statuses) {
  const ParallelShape shape = parallel_shape(name, x.dimension(0), weight, communicator);
  require_that(shape.in == x.dimension(1), name, "weight has ", shape.in, " columns, hidden has ",
               x.dimension(1), " features");
  require_that(shape.out >= 1 && shape.out <= (std::numeric_limits<std::int32_t>::max)(), name,
               "weight has ", shape.out, " rows, expected a vocabulary of 1 to 2^31 - 1 tokens");
  require_that(ids == shape.tokens, name, "ids has ", ids, " elements, hidden has ", shape.tokens,
               " rows");
  require_that(statuses == 0 || static_cast<Index>(statuses) == shape.tokens, name, "statuses has ",
               statuses, " elements, hidden has ", shape.tokens, " rows");
  return shape;
}

/// The best token of a row, -1 where it is bad, from the best of every rank: `all` is (ranks,
/// rows). All ranks hold the same candidates, so all come to the same status.
inline SampleStatus best_of_ranks(std::span<const problem::VocabularyCandidate> all, Index rows,
                                  Index row, std::int32_t& token) {
  using Candidate = problem::VocabularyCandidate;
  Candidate best{-std::numeric_limits<double>::infinity(), Candidate::kNone};
  bool nan = false, infinite = false;
  for (Index i = row; i < static_cast<Index>(all.size()); i += rows) {
    const Candidate& candidate = all[static_cast<std::size_t>(i)];
    nan = nan || candidate.token == Candidate::kNan;
    infinite = infinite || candidate.token == Candidate::kInfinity;
    if (candidate.logit > best.logit) best = candidate;  // of equals the first: shards are in order
  }
  token = -1;
  if (nan) return SampleStatus::nan;
  if (infinite) return SampleStatus::positive_infinity;
  if (best.token < 0) return SampleStatus::no_token;
  token = static_cast<std::int32_t>(best.token);
  return SampleStatus::ok;
}

/// The best `most` tokens of every rank in all rows, of all its tokens where it has fewer; at least
/// one, which can say what is wrong with a row.
struct CandidatesOfRanks {
  using Candidate = problem::VocabularyCandidate;
  std::span<const Candidate> all;  // rank by rank, (rows, kept_by(rank))
  Index rows, vocab, most;
  int ranks;

  Index kept_by(int rank) const {
    return std::clamp<Index>(problem::shard_of(vocab, rank, ranks).size(), 1, most);
  }
  /// Calls f(candidate) for those of a row.
  template <typename F>
  void for_each(Index row, F&& f) const {
    const Candidate* part = all.data();
    for (int rank = 0; rank < ranks; part += rows * kept_by(rank++))
      std::for_each_n(part + row * kept_by(rank), kept_by(rank), f);
  }
};

/// `logits`: (rows, shard of this rank), where the device has them.
template <typename D, typename T, typename C>
CandidatesOfRanks gather_best_candidates(const D& device, const T* logits, Index rows, Index vocab,
                                         Index most, C& communicator, Workspace::Frame& frame) {
  using Candidate = problem::VocabularyCandidate;
  const int ranks = communicator.size(), own_rank = communicator.rank();
  CandidatesOfRanks gathered{{}, rows, vocab, most, ranks};
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  Index total = 0;
  for (int rank = 0; rank < ranks; ++rank)
    total += counts[static_cast<std::size_t>(rank)] = rows * gathered.kept_by(rank);
  const Index own_kept = gathered.kept_by(own_rank), own_count = rows * own_kept;
  const std::span own(frame.take<Candidate>(own_count), static_cast<std::size_t>(own_count));
  const std::span all(frame.take<Candidate>(total), static_cast<std::size_t>(total));
  detail::run(device, problem::Vocabulary<T>{logits, own.data(), nullptr, rows, own_kept,
                                             problem::shard_of(vocab, own_rank, ranks)});
  communicator.all_gather(std::span<const Candidate>(own), all, std::span<const Index>(counts));
  gathered.all = all;
  return gathered;
}

template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_greedy_into(const D& device, Ids& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator,
                                     std::span<SampleStatus> statuses, Workspace& workspace) {
  using Candidate = problem::VocabularyCandidate;
  constexpr auto name = "vocabulary_parallel_greedy";
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  const auto x = input_view<2>(hidden);
  auto out = output_view<1>(ids);
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  const ParallelShape shape =
      vocabulary_shape(name, x, weight, communicator, out.dimension(0), statuses.size());
  const Index rows = shape.tokens, all_count = rows * communicator.size();
  Workspace::Frame frame(workspace);
  const std::span own(frame.take<Candidate>(rows), static_cast<std::size_t>(rows));
  const std::span all(frame.take<Candidate>(all_count), static_cast<std::size_t>(all_count));
  {
    auto logits_frame = tensor_frame(device, workspace);
    T* const logits = logits_frame.template take<T>(rows * shape.columns.size());
    shard_product(device, logits, x, weight, shape, communicator, workspace);
    detail::run(device,
                problem::Vocabulary<T>{logits, own.data(), nullptr, rows, 1, shape.columns});
  }
  communicator.all_gather(std::span<const Candidate>(own), all);
  auto* const tokens = frame.take<std::int32_t>(rows);
  for (Index row = 0; row < rows; ++row) {
    const SampleStatus status = best_of_ranks(all, rows, row, tokens[row]);
    if (!statuses.empty()) statuses[static_cast<std::size_t>(row)] = status;
  }
  memory_of(device).copy_in(out.data(), tokens, static_cast<std::size_t>(rows) * sizeof(*tokens));
}

/// Tokens of every row, or an exception that names the first bad one; all ranks throw or none does.
template <typename Hidden, typename Fill>
Tensor<std::int32_t, 1> good_vocabulary_tokens(std::string_view name, const Hidden& hidden,
                                               Fill&& fill) {
  const Index rows = input_view<2>(hidden).dimension(0);
  Tensor<std::int32_t, 1> ids(rows);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(rows));
  fill(ids, std::span<SampleStatus>(statuses));
  for (std::size_t r = 0; r < statuses.size(); ++r) {
    require_that(statuses[r] != SampleStatus::nan && statuses[r] != SampleStatus::positive_infinity,
                 name, "the logits of row ", r, " hold NaN or +infinity");
    require_that(statuses[r] == SampleStatus::ok, name, "the logits of row ", r,
                 " are all -infinity");
  }
  return ids;
}

}  // namespace detail

/// The most likely token of each row of hidden states (tokens, in), lowest index among equals, the
/// same on every rank: greedy_sample of linear(hidden, weight), with 16 bytes per row and rank sent
/// instead of the logits. `weight` is the full (vocab, in) head or a PackedColumnShard. A row whose
/// logits hold NaN or +infinity, or are all -infinity, throws std::invalid_argument naming it, on
/// every rank.
///
///   ef::Tensor<std::int32_t, 1> ids = ef::vocabulary_parallel_greedy(hidden, head, communicator);
template <CpuDevice D, typename Hidden, typename Weight, Communicator C>
Tensor<std::int32_t, 1> vocabulary_parallel_greedy(const D& device, const Hidden& hidden,
                                                   const Weight& weight, C& communicator) {
  return detail::good_vocabulary_tokens(
      "vocabulary_parallel_greedy", hidden, [&](auto& ids, std::span<SampleStatus> statuses) {
        detail::vocabulary_parallel_greedy_into(device, ids, hidden, weight, communicator, statuses,
                                                thread_workspace());
      });
}
template <typename Hidden, typename Weight, Communicator C>
  requires(!Device<Hidden>)
Tensor<std::int32_t, 1> vocabulary_parallel_greedy(const Hidden& hidden, const Weight& weight,
                                                   C& communicator) {
  return vocabulary_parallel_greedy(Eigen::DefaultDevice{}, hidden, weight, communicator);
}

/// Writes ids (tokens), -1 where a row is bad, and its status where `statuses`, (tokens), is given
/// (host memory on every device: this waits for the candidates of all ranks). They are the same on
/// every rank, and the other rows are served. Allocates nothing after the first call at a size.
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C>
void vocabulary_parallel_greedy_into(const D& device, Ids&& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator,
                                     std::span<SampleStatus> statuses = {},
                                     Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_greedy_into(device, ids, hidden, weight, communicator, statuses,
                                          workspace);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
