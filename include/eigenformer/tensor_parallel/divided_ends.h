/// \file
/// How divided rows end (divided_rows.h): the draw from a shard, or the candidates on every rank.
#pragma once

#include <functional>

#include "divided_logits.h"
#include "divided_rounds.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Draws of rows whose sums over ranks leave the token open, by those of the whole row.
template <typename D, typename Rows>
void draw_by_sums(const D& device, Rows& divided, std::span<const Index> which) {
  using C = typename Rows::C;
  const auto count = static_cast<Index>(which.size());
  if (count == 0) return;
  Workspace::Frame frame(divided.workspace);
  const C* const logits = divided.shard.logits;
  const SummedRows<Rows> summed(device, divided, logits, divided.asked, which,
                                problem::ShardSum::weights, frame);
  auto* const drawn = frame.take<problem::DrawnBlock>(count);
  int* const holders = frame.take<int>(count);
  for (Index i = 0; i < count; ++i) {
    drawn[i] = summed.draw(i, divided.sampling.uniform(which[static_cast<std::size_t>(i)]));
    divided.rows[static_cast<std::size_t>(which[static_cast<std::size_t>(i)])].token =
        drawn[i].token;
    holders[i] = drawn[i].token >= 0 ? -1 : summed.holder(drawn[i].block);
    if (holders[i] != divided.communicator.rank()) drawn[i].block = -1;
  }
  const Index all_count = count * divided.ranks();
  auto *const own = frame.take<std::int32_t>(count), *const all =
                                                         frame.take<std::int32_t>(all_count);
  detail::run(Eigen::DefaultDevice{},
              problem::FindInShard<C>{logits, divided.shard.shard, divided.asked, which.data(),
                                      drawn, count, own},
              divided.workspace);
  divided.communicator.all_gather(
      std::span<const std::int32_t>(own, which.size()),
      std::span<std::int32_t>(all, static_cast<std::size_t>(all_count)));
  for (Index i = 0; i < count; ++i)
    if (holders[i] >= 0)
      divided.rows[static_cast<std::size_t>(which[static_cast<std::size_t>(i)])].token =
          all[holders[i] * count + i];
}

/// The tokens of the rows that are drawn from all tokens in play.
template <typename D, typename Rows>
void draw_from_shards(const D& device, Rows& divided) {
  using Draw = problem::DrawFromShard<typename Rows::C>;
  const Index count = divided.shard.rows;
  const auto is_drawn = [](const DividedRow& row) { return row.end == RowEnd::drawn; };
  if (!std::any_of(divided.rows.begin(), divided.rows.end(), is_drawn)) return;
  Workspace::Frame frame(divided.workspace);
  bool* const asked = frame.take<bool>(count);
  for (Index r = 0; r < count; ++r) {
    const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    asked[r] = is_drawn(row) && row.drawn_by == divided.communicator.rank();
  }
  const Index all_count = count * divided.ranks();
  auto* const own = frame.take<std::int32_t>(count);
  auto* const all = frame.take<std::int32_t>(all_count);
  Index* const open = frame.take<Index>(count);
  std::size_t open_count = 0;
  detail::run(device, Draw{divided.shard, divided.asked, asked, own}, divided.workspace);
  divided.communicator.all_gather(
      std::span<const std::int32_t>(own, static_cast<std::size_t>(count)),
      std::span<std::int32_t>(all, static_cast<std::size_t>(all_count)));
  for (Index r = 0; r < count; ++r) {
    DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (!is_drawn(row)) continue;
    row.token = all[row.drawn_by * count + r];
    if (row.token < 0) open[open_count++] = r;
  }
  draw_by_sums(device, divided, {open, open_count});
}

/// Every rank's candidates of all rows.
template <typename C>
struct GatheredCandidates {
  problem::ShardCandidate<C>* all;
  const Index* begin;   // (rows, ranks) of a row's
  const Index* counts;  // (rows, ranks)
  int ranks;
  /// Of row r from a rank.
  std::span<problem::ShardCandidate<C>> of(Index r, int rank) const {
    return {all + begin[r * ranks + rank], static_cast<std::size_t>(counts[r * ranks + rank])};
  }
};

template <typename D, typename Rows>
GatheredCandidates<typename Rows::C> gather_candidates(const D& device, Rows& divided,
                                                       Workspace::Frame& frame) {
  using C = typename Rows::C;
  using Candidate = problem::ShardCandidate<C>;
  const int ranks = divided.ranks(), own_rank = divided.communicator.rank();
  const Index count = divided.shard.rows;
  Index* const begin = frame.take<Index>(count * ranks);
  Index *const own_begin = frame.take<Index>(count), *const own_count = frame.take<Index>(count);
  const std::span<Index> sizes(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  Index total = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    Index size = 0;
    for (Index r = 0; r < count; ++r) {
      Index& of_row = divided.counts[r * ranks + rank];
      if (divided.rows[static_cast<std::size_t>(r)].end != RowEnd::candidates) of_row = 0;
      begin[r * ranks + rank] = total + size;
      if (rank == own_rank) own_begin[r] = size, own_count[r] = of_row;
      size += of_row;
    }
    sizes[static_cast<std::size_t>(rank)] = size;
    total += size;
  }
  const GatheredCandidates<C> gathered{frame.take<Candidate>(total), begin, divided.counts, ranks};
  if (total == 0) return gathered;
  const Index own_size = sizes[static_cast<std::size_t>(own_rank)];
  Candidate* const own = frame.take<Candidate>(own_size);
  detail::run(device,
              problem::PickFromShard<C>{divided.shard, divided.asked, own_begin, own_count, own},
              divided.workspace);
  divided.communicator.all_gather(
      std::span<const Candidate>(own, static_cast<std::size_t>(own_size)),
      std::span<Candidate>(gathered.all, static_cast<std::size_t>(total)),
      std::span<const Index>(sizes));
  return gathered;
}

/// Leaves the best `most` candidates, of equals those of lowest index; false where there are fewer.
template <typename Rows>
bool cut_best(Rows& divided, Index r, Index most,
              const GatheredCandidates<typename Rows::C>& gathered) {
  using C = typename Rows::C;
  using Candidate = problem::ShardCandidate<C>;
  Workspace::Frame frame(divided.workspace);
  Index n = 0;
  for (int rank = 0; rank < gathered.ranks; ++rank)
    n += static_cast<Index>(gathered.of(r, rank).size());
  C* const values = frame.take<C>(n);
  n = 0;
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (const Candidate& candidate : gathered.of(r, rank))
      if (candidate.token >= 0) values[n++] = candidate.logit;
  if (n < most) return false;
  std::nth_element(values, values + (most - 1), values + n, std::greater<>{});
  const C last = values[most - 1];
  Index left = most - std::count_if(values, values + n, [&](C value) { return value > last; });
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (Candidate& candidate : gathered.of(r, rank))
      if (candidate.logit < last || (candidate.logit == last && left-- <= 0))
        candidate.token = Candidate::kNone;
  return true;
}

/// Takes the candidates out that top_p does not keep; false where that is open.
template <typename Rows>
bool cut_nucleus(Rows& divided, Index r, const GatheredCandidates<typename Rows::C>& gathered) {
  using C = typename Rows::C;
  using Candidate = problem::ShardCandidate<C>;
  const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
  const auto& asked = divided.asked[r];
  const double best = static_cast<double>(asked.band.hi), scale = asked.inverse_temperature;
  Workspace::Frame frame(divided.workspace);
  Index most = 0, n = 0;
  for (int rank = 0; rank < gathered.ranks; ++rank)
    most += static_cast<Index>(gathered.of(r, rank).size());
  C* const values = frame.take<C>(most);
  double above = 0;  // tokens of earlier bins
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (const Candidate& candidate : gathered.of(r, rank)) {
      const double distance =
          problem::ShardBins::distance(static_cast<double>(candidate.logit), best, scale);
      if (row.above > 0 && distance < row.end_bin)
        above += 1;
      else if (distance < row.end_reach)
        values[n++] = candidate.logit;
    }
  std::sort(values, values + n, std::greater<>{});
  const double target = (std::max)(divided.params_of(r).top_p, 0.0) * row.total;
  PrefixSearch search{target, divided.margin(row.total), row.above, above};
  C last{};  // of those kept
  Index taken = 0;
  for (Index begin = 0; begin < n; begin += search.equals) {
    last = values[begin];
    search.equals =
        std::upper_bound(values + begin, values + n, last, std::greater<>{}) - (values + begin);
    search.each = token_weight(static_cast<double>(last), best, scale);
    const double sum = static_cast<double>(search.equals) * search.each;
    bool open = false;
    if (!come_before(search, sum, false, open)) {
      taken = open ? 0 : taken_of(search);
      break;
    }
    search.above += sum;
    search.tokens += static_cast<double>(search.equals);
  }
  if (taken == 0) return false;
  if (search.tokens + static_cast<double>(taken) < static_cast<double>(row.least)) {
    cut_best(divided, r, row.least, gathered);
    return true;
  }
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (Candidate& candidate : gathered.of(r, rank))
      if (candidate.logit < last || (candidate.logit == last && taken-- <= 0))
        candidate.token = Candidate::kNone;
  return true;
}

/// Settles all rows, and gathers and cuts the candidates of those that they decide.
template <typename D, typename Rows>
GatheredCandidates<typename Rows::C> settle_rows_and_gather(const D& device, Rows& divided,
                                                            Workspace::Frame& frame) {
  for (;;) {
    settle_rows(device, divided);
    const auto gathered = gather_candidates(device, divided, frame);
    bool all_settled = true;
    for (Index r = 0; r < divided.shard.rows; ++r) {
      DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
      if (row.end != RowEnd::candidates) continue;
      row.is_filtered = divided.asked[r].pick == problem::ShardPick::in_play && !row.sends_all;
      if (row.keeps > 0) row.is_filtered = cut_best(divided, r, row.keeps, gathered);
      if (row.end_bin < 0 || cut_nucleus(divided, r, gathered)) continue;
      // the sums of bins do not tell; a search goes farther
      all_settled = false;
      row.end = RowEnd::open;
      row.end_bin = -1;
      --row.stage;
      start_search(divided, r, problem::ShardTerm::weight, false,
                   (std::max)(divided.params_of(r).top_p, 0.0) * row.total, row.total);
    }
    if (all_settled) return gathered;
  }
}

/// The parameters of the stages that follow on candidates.
template <typename Rows>
problem::RowParams params_of_candidates(const Rows& divided, Index r) {
  const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
  problem::RowParams params = divided.params_of(r);
  const SamplingOrder order = params.order;
  params.order = {};
  params.prompt_tokens = params.output_tokens = {};
  auto stage = params.order.begin();
  if (row.has_temperature) {
    *stage++ = SamplingStage::temperature;
    params.temperature = row.temperature;
    params.dynatemp_range = 0;
  }
  if (row.is_filtered) *stage++ = problem::kFiltered;
  std::copy(order.begin() + static_cast<std::ptrdiff_t>(row.stage), order.end(), stage);
  return params;
}

/// Calls visit(r, sampling) for every row that candidates decide, a sampling of one row.
template <typename Rows, typename Visit>
void for_each_row_of_candidates(Rows& divided, const GatheredCandidates<typename Rows::C>& gathered,
                                Visit&& visit) {
  using C = typename Rows::C;
  const auto& whole = divided.sampling;
  Workspace::Frame frame(divided.workspace);
  constexpr C none = -std::numeric_limits<C>::infinity();
  C* logits = nullptr;
  for (Index r = 0; r < divided.shard.rows; ++r) {
    if (divided.rows[static_cast<std::size_t>(r)].end != RowEnd::candidates) continue;
    if (logits == nullptr) {
      logits = frame.take<C>(whole.vocab);
      std::fill(logits, logits + whole.vocab, none);
    }
    const auto for_each = [&](auto&& f) {
      for (int rank = 0; rank < gathered.ranks; ++rank)
        for (const auto& candidate : gathered.of(r, rank))
          if (candidate.token >= 0) f(candidate);
    };
    for_each([&](const auto& candidate) { logits[candidate.token] = candidate.logit; });
    const problem::RowParams params = params_of_candidates(divided, r);
    problem::Sampling<C> sampling{
        logits,  1,      whole.vocab, &params, 0, whole.generators, whole.generators_stride,
        nullptr, nullptr};
    sampling.first_row = r;
    visit(r, sampling);
    for_each([&](const auto& candidate) { logits[candidate.token] = none; });
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
