/// \file
/// Part of tensor_parallel.h, which includes it: the best tokens of rows whose columns are divided
/// among ranks, and the step of a beam search by them.
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "../beam_search.h"
#include "../top_k.h"
#include "product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Checks that `columns` of an argument are this rank's shard of a vocabulary.
template <typename C>
void check_shard(std::string_view name, std::string_view argument, Index columns, Index vocab,
                 const C& communicator) {
  require_that(vocab >= 1 && vocab <= (std::numeric_limits<std::int32_t>::max)(), name, "vocab is ",
               vocab, ", expected 1 to 2147483647 tokens");
  const Index own = shard_range(vocab, communicator.rank(), communicator.size()).size();
  require_that(columns == own, name, argument, " has ", columns, " columns, the shard of rank ",
               communicator.rank(), " of ", communicator.size(), " has ", own, " of ", vocab,
               " tokens");
}

/// A token among the best of a shard, -1: its row holds NaN.
template <typename T>
struct RankedToken {
  T value;
  std::int32_t token;
};

/// What a rank has of a row: k, or its shard where that is smaller, and where k is 0 one, which can
/// say that the row holds NaN.
inline Index ranked_tokens_of(Index k, Index shard) {
  return (std::min)((std::max)(k, Index{1}), shard);
}

/// The best tokens of this rank's columns of all rows, in memory of the host.
template <Device D, typename T>
void rank_shard(const D& device, const T* x, Index rows, const ShardRange& shard, Index k,
                bool largest, RankedToken<T>* ranked, Workspace& workspace) {
  const Index columns = shard.size(), count = rows * k;
  if (count == 0) return;
  auto there = tensor_frame(device, workspace);
  Workspace::Frame frame(workspace);
  T* values = there.template take<T>(count);
  std::int32_t* ids = there.template take<std::int32_t>(count);
  detail::run(device, problem::TopK<T>{x, values, ids, nullptr, rows, columns, k, largest, true},
              workspace);
  if constexpr (!CpuDevice<D>) {
    T* const host_values = frame.take<T>(count);
    std::int32_t* const host_ids = frame.take<std::int32_t>(count);
    to_host(device, "vocabulary_parallel_top_k", host_values, values, count);
    to_host(device, "vocabulary_parallel_top_k", host_ids, ids, count);
    values = host_values;
    ids = host_ids;
  }
  for (Index i = 0; i < count; ++i)
    ranked[i] = {values[i], ids[i] < 0 ? ids[i] : static_cast<std::int32_t>(shard.begin + ids[i])};
}

/// The k best of a row from those of all ranks, which this sorts.
template <typename T>
SampleStatus best_of_ranked(std::span<RankedToken<T>> row, Index k, const TopKOptions& options,
                            T* values, std::int32_t* ids) {
  using C = compute_type<T>;
  const auto is_bad = [](const RankedToken<T>& each) { return each.token < 0; };
  if (std::any_of(row.begin(), row.end(), is_bad)) {
    std::fill(values, values + k, std::numeric_limits<T>::quiet_NaN());
    std::fill(ids, ids + k, -1);
    return SampleStatus::nan;
  }
  std::partial_sort(row.begin(), row.begin() + k, row.end(),
                    [&](const RankedToken<T>& a, const RankedToken<T>& b) {
                      const C x = static_cast<C>(a.value), y = static_cast<C>(b.value);
                      return x == y ? a.token < b.token : (options.largest ? x > y : x < y);
                    });
  if (!options.sorted)
    std::sort(row.begin(), row.begin() + k,
              [](const RankedToken<T>& a, const RankedToken<T>& b) { return a.token < b.token; });
  for (Index i = 0; i < k; ++i) {
    values[i] = row[static_cast<std::size_t>(i)].value;
    ids[i] = row[static_cast<std::size_t>(i)].token;
  }
  return SampleStatus::ok;
}

/// The k best of all rows into memory of the host; statuses may be nullptr.
template <Device D, typename T, typename C>
void divided_top_k(const D& device, const T* x, Index rows, Index vocab, Index k,
                   const TopKOptions& options, T* values, std::int32_t* ids, SampleStatus* statuses,
                   C& communicator, Workspace& workspace) {
  if (rows == 0) return;
  using Ranked = RankedToken<T>;
  Workspace::Frame frame(workspace);
  const int ranks = communicator.size();
  const auto of_rank = [&](int rank) {
    return ranked_tokens_of(k, problem::shard_of(vocab, rank, ranks).size());
  };
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  Index total = 0;
  for (int rank = 0; rank < ranks; ++rank)
    total += counts[static_cast<std::size_t>(rank)] = rows * of_rank(rank);
  const Index own_count = counts[static_cast<std::size_t>(communicator.rank())];
  Ranked *const own = frame.take<Ranked>(own_count), *const all = frame.take<Ranked>(total),
                *const row = frame.take<Ranked>(total / rows);
  rank_shard(device, x, rows, shard_range(vocab, communicator.rank(), ranks),
             of_rank(communicator.rank()), options.largest, own, workspace);
  communicator.all_gather(std::span<const Ranked>(own, static_cast<std::size_t>(own_count)),
                          std::span<Ranked>(all, static_cast<std::size_t>(total)),
                          std::span<const Index>(counts));
  for (Index r = 0; r < rows; ++r) {
    Ranked* end = row;
    const Ranked* part = all;
    for (int rank = 0; rank < ranks; part += rows * of_rank(rank++))
      end = std::copy_n(part + r * of_rank(rank), of_rank(rank), end);
    const SampleStatus status =
        best_of_ranked(std::span(row, end), k, options, values + r * k, ids + r * k);
    if (statuses != nullptr) statuses[r] = status;
  }
}

}  // namespace detail

/// What top_k (top_k.h) gives for whole rows, bit for bit, the same on every rank: the k largest or
/// smallest of rows of `vocab` tokens and their places there. x is this rank's columns
/// shard_range(vocab, rank, world_size), (rows, shard): what column_parallel_linear with
/// {.gather_output = false} gives for a head. What travels, bytes of a row that every rank holds in
/// the end: 8 (16 of double) for each of the k best of every rank, one where k is 0.
///
/// Options, statuses and rows that hold NaN as for top_k. Throws std::invalid_argument for k
/// outside [0, vocab], columns that are not the shard of `vocab`, and shapes that disagree. On a
/// GPU x, values and ids are its memory, and the candidates are found there; statuses are the
/// host's. The _into form, whose values and ids are (rows, k), allocates nothing after the first
/// call at a size.
///
///   auto logits = ef::column_parallel_linear(hidden, head, communicator,
///                                            {.gather_output = false});
///   auto [values, ids] = ef::vocabulary_parallel_top_k(logits, 8, vocab, communicator);
template <Device D, typename Values, typename Ids, typename X, Communicator C>
void vocabulary_parallel_top_k_into(const D& device, Values&& values, Ids&& ids, const X& x,
                                    Index vocab, C& communicator, const TopKOptions& options = {},
                                    std::span<SampleStatus> statuses = {},
                                    Workspace& workspace = thread_workspace()) {
  constexpr auto name = "vocabulary_parallel_top_k";
  const auto input = input_view<2>(x);
  auto best = output_view<2>(values);
  auto places = output_view<2>(ids);
  using T = scalar_of<decltype(input)>;
  detail::require_floating_scalars<decltype(input)>();
  detail::checked_size(name, "x", input);
  const Index rows = input.dimension(0), k = best.dimension(1), count = rows * k;
  detail::check_shard(name, "x", input.dimension(1), vocab, communicator);
  detail::require_that(k <= vocab, name, "k is ", k, ", expected 0 to ", vocab, ", the vocabulary");
  detail::check_best<T>(name, best, places, rows, statuses);
  Workspace::Frame frame(workspace);
  T* const host_values = CpuDevice<D> ? best.data() : frame.take<T>(count);
  std::int32_t* const host_ids = CpuDevice<D> ? places.data() : frame.take<std::int32_t>(count);
  detail::divided_top_k(device, input.data(), rows, vocab, k, options, host_values, host_ids,
                        statuses.empty() ? nullptr : statuses.data(), communicator, workspace);
  if constexpr (!CpuDevice<D>) {
    const auto give = [&](auto* to, const auto* from) {
      memory_of(device).copy_in(to, from, static_cast<std::size_t>(count) * sizeof(*from));
    };
    give(best.data(), host_values);
    give(places.data(), host_ids);
  }
}

template <CpuDevice D, typename X, Communicator C>
auto vocabulary_parallel_top_k(const D& device, const X& x, Index k, Index vocab, C& communicator,
                               const TopKOptions& options = {}) {
  constexpr auto name = "vocabulary_parallel_top_k";
  const auto input = input_view<2>(x);
  detail::check_shard(name, "x", input.dimension(1), vocab, communicator);
  detail::require_that(k >= 0 && k <= vocab, name, "k is ", k, ", expected 0 to ", vocab,
                       ", the vocabulary");
  return detail::best_in_tensors<scalar_of<X>>(
      name, input.dimension(0), k, [&](auto& values, auto& ids, std::span<SampleStatus> statuses) {
        vocabulary_parallel_top_k_into(device, values, ids, input, vocab, communicator, options,
                                       statuses);
      });
}
template <typename X, Communicator C>
  requires(!Device<X>)
auto vocabulary_parallel_top_k(const X& x, Index k, Index vocab, C& communicator,
                               const TopKOptions& options = {}) {
  return vocabulary_parallel_top_k(Eigen::DefaultDevice{}, x, k, vocab, communicator, options);
}

/// search.step(device, log_probabilities) by this rank's columns of them, (batch * beams, shard):
/// every rank has a BeamSearch of its own, made with the same options, and all of them take the
/// same step. The candidates of every row travel, as for vocabulary_parallel_top_k. Throws what
/// step throws, on every rank and with nothing changed, and for columns that are not the shard of
/// `vocab`. Allocates what step does.
///
///   ef::vocabulary_parallel_beam_search_step(device, search, scores, vocab, communicator);
template <Device D, typename Scores, Communicator C>
void vocabulary_parallel_beam_search_step(const D& device, BeamSearch& search,
                                          const Scores& log_probabilities, Index vocab,
                                          C& communicator,
                                          Workspace& workspace = thread_workspace()) {
  constexpr auto name = "vocabulary_parallel_beam_search_step";
  const auto input = input_view<2>(log_probabilities);
  using T = scalar_of<decltype(input)>;
  detail::require_floating_scalars<decltype(input)>();
  detail::checked_size(name, "log_probabilities", input);
  detail::check_shard(name, "log_probabilities", input.dimension(1), vocab, communicator);
  const Index rows = input.dimension(0), most = (std::min)(search.candidates(), vocab);
  search.check_step(rows, vocab);
  Workspace::Frame frame(workspace);
  T* const values = frame.take<T>(rows * most);
  std::int32_t* const ids = frame.take<std::int32_t>(rows * most);
  detail::divided_top_k(device, input.data(), rows, vocab, most, {}, values, ids, nullptr,
                        communicator, workspace);
  search.step_by_best(TensorView<const T, 2>(values, rows, most),
                      TensorView<const std::int32_t, 2>(ids, rows, most), workspace);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
