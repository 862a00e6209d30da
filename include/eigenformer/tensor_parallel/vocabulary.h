/// \file
/// Part of tensor_parallel.h, which includes it: tokens of a language-model head whose rows are
/// divided among ranks.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/dispatch.h"
#include "../sampling/params.h"
#include "../tensor_parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// All candidates of a row in rank order: row `row` of part r is (kept_of(r)) long.
template <typename Visit>
void for_each_gathered(const problem::VocabularyCandidate* parts, std::span<const Index> kept,
                       Index rows, Index row, Visit&& visit) {
  for (Index count : kept) {
    for (Index i = 0; i < count; ++i) visit(parts[row * count + i]);
    parts += rows * count;
  }
}

/// Merges the ranks' candidates of one row into `merged`, best first, and counts them. All ranks
/// hold the same candidates, so all come to the same status.
inline SampleStatus merge_candidates(const problem::VocabularyCandidate* parts,
                                     std::span<const Index> kept, Index rows, Index row,
                                     problem::VocabularyCandidate* merged, Index& count) {
  bool nan = false, infinite = false;
  count = 0;
  for_each_gathered(parts, kept, rows, row, [&](const problem::VocabularyCandidate& candidate) {
    nan = nan || candidate.token == problem::VocabularyCandidate::kNan;
    infinite = infinite || candidate.token == problem::VocabularyCandidate::kInfinity;
    if (candidate.token >= 0) merged[count++] = candidate;
  });
  if (nan) return SampleStatus::nan;
  if (infinite) return SampleStatus::positive_infinity;
  std::sort(merged, merged + count,
            [](const problem::VocabularyCandidate& a, const problem::VocabularyCandidate& b) {
              return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
            });
  return merged[0].logit > -std::numeric_limits<double>::infinity() ? SampleStatus::ok
                                                                    : SampleStatus::no_token;
}

/// Index into `candidates` (best first, finite best) of the token that the uniform number u draws
/// from softmax(logit / temperature), by the inverse of the cumulative distribution in token order,
/// which is the rule of sampling.h. Puts the candidates in that order.
inline Index draw_candidate(problem::VocabularyCandidate* candidates, Index count,
                            double temperature, double u) {
  const double best = candidates[0].logit;
  std::sort(candidates, candidates + count,
            [](const problem::VocabularyCandidate& a, const problem::VocabularyCandidate& b) {
              return a.token < b.token;
            });
  const auto weight = [&](Index i) { return std::exp((candidates[i].logit - best) / temperature); };
  double total = 0;
  for (Index i = 0; i < count; ++i) total += weight(i);
  double cumulative = 0;
  Index last = 0;  // rounding may leave u beyond the sum: then the last token of any weight
  for (Index i = 0; i < count; ++i) {
    const double w = weight(i);
    if (w > 0) last = i;
    cumulative += w;
    if (u * total < cumulative) return i;
  }
  return last;
}

/// ids[row] = choose(candidates, count, row) of the k best tokens of the whole vocabulary, -1 where
/// the row is bad.
template <Device D, typename Ids, typename Hidden, typename Weight, typename C, typename Choose>
void vocabulary_parallel_into(std::string_view name, const D& device, Ids& ids,
                              const Hidden& hidden, const Weight& weight, C& communicator, Index k,
                              std::span<SampleStatus> statuses, Workspace& workspace,
                              Choose&& choose) {
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  const auto x = input_view<2>(hidden);
  auto out = output_view<1>(ids);
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  const ParallelShape shape = parallel_shape(name, x.dimension(0), weight, communicator);
  require_that(shape.in == x.dimension(1), name, "weight has ", shape.in, " columns, hidden has ",
               x.dimension(1), " features");
  require_that(shape.out >= 1 && shape.out <= (std::numeric_limits<std::int32_t>::max)(), name,
               "weight has ", shape.out, " rows, expected a vocabulary of 1 to 2^31 - 1 tokens");
  const int ranks = communicator.size();
  const Index rows = shape.tokens, size = shape.columns.size();
  require_that(out.dimension(0) == rows, name, "ids has ", out.dimension(0),
               " elements, hidden has ", rows, " rows");
  require_that(statuses.empty() || static_cast<Index>(statuses.size()) == rows, name,
               "statuses has ", statuses.size(), " elements, hidden has ", rows, " rows");
  Workspace::Frame frame(workspace);
  const std::span<Index> kept(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  Index all_kept = 0;
  for (int r = 0; r < ranks; ++r) {
    const auto at = static_cast<std::size_t>(r);
    // at least 1, which can say that there is none
    kept[at] = std::clamp<Index>(shard_range(shape.out, r, ranks).size(), 1, k);
    counts[at] = rows * kept[at];
    all_kept += kept[at];
  }
  const Index own_kept = kept[static_cast<std::size_t>(communicator.rank())];
  const auto own = std::span(frame.take<problem::VocabularyCandidate>(rows * own_kept),
                             static_cast<std::size_t>(rows * own_kept));
  const auto all = std::span(frame.take<problem::VocabularyCandidate>(rows * all_kept),
                             static_cast<std::size_t>(rows * all_kept));
  {
    Workspace::Frame order_frame(workspace);
    auto logits_frame = tensor_frame(device, workspace);
    T* logits = logits_frame.template take<T>(rows * size);
    auto* order = order_frame.take<std::int32_t>(own_kept > 1 ? worker_count(device) * size : 0);
    shard_product(device, logits, x, weight, shape, communicator, workspace);
    detail::run(device,
                problem::Vocabulary<T>{logits, own.data(), order, rows, own_kept, shape.columns});
  }
  communicator.all_gather(own, all, std::span<const Index>(counts));
  problem::VocabularyCandidate* merged = frame.take<problem::VocabularyCandidate>(all_kept);
  auto* const tokens = frame.take<std::int32_t>(rows);
  for (Index row = 0; row < rows; ++row) {
    Index count = 0;
    const SampleStatus status = merge_candidates(all.data(), kept, rows, row, merged, count);
    tokens[row] = -1;
    if (status == SampleStatus::ok)
      tokens[row] =
          static_cast<std::int32_t>(merged[choose(merged, (std::min)(count, k), row)].token);
    if (!statuses.empty()) statuses[static_cast<std::size_t>(row)] = status;
  }
  memory_of(device).copy_in(out.data(), tokens, static_cast<std::size_t>(rows) * sizeof(*tokens));
}

template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_greedy_into(const D& device, Ids& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator,
                                     std::span<SampleStatus> statuses, Workspace& workspace,
                                     std::string_view name = "vocabulary_parallel_greedy") {
  vocabulary_parallel_into(
      name, device, ids, hidden, weight, communicator, 1, statuses, workspace,
      [](const problem::VocabularyCandidate*, Index, Index) { return Index{0}; });
}

/// Leaves the generator where it is.
template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_top_k_sample_into(const D& device, Ids& ids, const Hidden& hidden,
                                           const Weight& weight, C& communicator, Index k,
                                           float temperature, const Philox& rng,
                                           std::span<SampleStatus> statuses, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_top_k_sample";
  require_that(k >= 1, name, "k is ", k, ", expected 1 or more");
  require_that(std::isfinite(temperature) && temperature >= 0, name, "temperature is ", temperature,
               ", expected 0 (greedy) or more");
  require_that(static_cast<std::uint64_t>(input_view<2>(hidden).dimension(0)) <= Philox::kRows,
               name, "hidden has ", input_view<2>(hidden).dimension(0), " rows, expected at most ",
               Philox::kRows, " for one generator");
  if (temperature == 0)
    return vocabulary_parallel_greedy_into(device, ids, hidden, weight, communicator, statuses,
                                           workspace, name);
  vocabulary_parallel_into(name, device, ids, hidden, weight, communicator, k, statuses, workspace,
                           [&](problem::VocabularyCandidate* candidates, Index count, Index row) {
                             return draw_candidate(candidates, count, temperature,
                                                   rng.uniform(static_cast<std::uint32_t>(row)));
                           });
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

/// A token of each row, drawn from softmax(logits / temperature) over the k largest logits (ties
/// lowest index first): the tokens that top_k_sample draws from linear(hidden, weight), the same on
/// every rank: every rank passes an rng in the same state, which moves on by one position. The draw
/// of a row depends on (seed, position, row) only. Temperature 0 is greedy. k >= vocab keeps all.
/// Sends 16 bytes for each of at most k candidates per row and rank. Throws std::invalid_argument
/// for k < 1, a temperature that is negative or not finite, and rows as vocabulary_parallel_greedy
/// does; rng then stays where it is.
template <CpuDevice D, typename Hidden, typename Weight, Communicator C>
Tensor<std::int32_t, 1> vocabulary_parallel_top_k_sample(const D& device, const Hidden& hidden,
                                                         const Weight& weight, C& communicator,
                                                         Index k, float temperature, Philox& rng) {
  auto tokens = detail::good_vocabulary_tokens(
      "vocabulary_parallel_top_k_sample", hidden, [&](auto& ids, std::span<SampleStatus> statuses) {
        detail::vocabulary_parallel_top_k_sample_into(device, ids, hidden, weight, communicator, k,
                                                      temperature, rng, statuses,
                                                      thread_workspace());
      });
  rng.advance();
  return tokens;
}
template <typename Hidden, typename Weight, Communicator C>
  requires(!Device<Hidden>)
Tensor<std::int32_t, 1> vocabulary_parallel_top_k_sample(const Hidden& hidden, const Weight& weight,
                                                         C& communicator, Index k,
                                                         float temperature, Philox& rng) {
  return vocabulary_parallel_top_k_sample(Eigen::DefaultDevice{}, hidden, weight, communicator, k,
                                          temperature, rng);
}

/// Writes ids and statuses as vocabulary_parallel_greedy_into does; rng moves on by one whatever
/// the rows are.
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C>
void vocabulary_parallel_top_k_sample_into(const D& device, Ids&& ids, const Hidden& hidden,
                                           const Weight& weight, C& communicator, Index k,
                                           float temperature, Philox& rng,
                                           std::span<SampleStatus> statuses = {},
                                           Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_top_k_sample_into(device, ids, hidden, weight, communicator, k,
                                                temperature, rng, statuses, workspace);
  rng.advance();
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
