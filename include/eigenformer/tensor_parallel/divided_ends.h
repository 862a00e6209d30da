/// \file
/// How divided rows end (divided_rows.h): the draw from a shard, the candidates on every rank, the
/// rows that are gathered.
#pragma once

#include <functional>

#include "divided_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// The tokens of the rows that are drawn from all tokens in play; rows whose sums leave them open
/// are gathered.
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
  detail::run(device, Draw{divided.shard, divided.asked, asked, own}, divided.workspace);
  divided.communicator.all_gather(
      std::span<const std::int32_t>(own, static_cast<std::size_t>(count)),
      std::span<std::int32_t>(all, static_cast<std::size_t>(all_count)));
  for (Index r = 0; r < count; ++r) {
    DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (!is_drawn(row)) continue;
    row.token = all[row.drawn_by * count + r];
    if (row.token < 0) row.end = RowEnd::gathered;
  }
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

template <typename C>
struct NucleusEnd {
  C value;      // logit of the last token kept
  Index taken;  // tokens equal to it that are kept
};

/// Where top_p's set ends among candidates of which `n` in order are those of the last bin; taken 0
/// where errors of the sums leave that open.
template <typename C>
NucleusEnd<C> end_of_nucleus(const C* values, Index n, const DividedRow& row, double best,
                             double inverse_temperature, double target, double margin) {
  double above = row.above;
  for (Index begin = 0; begin < n;) {
    Index end = begin + 1;
    while (end < n && values[end] == values[begin]) ++end;
    const Index equals = end - begin;
    const double weight =
                     token_weight(static_cast<double>(values[begin]), best, inverse_temperature),
                 reached = above + static_cast<double>(equals) * weight;
    if (reached + margin < target) {
      above = reached;
      begin = end;
      continue;
    }
    const Index taken = problem::equals_taken(above, weight, equals, target);
    const bool is_first = above == 0 && taken == 1;  // which stays whatever it weighs
    const bool certain =
        (is_first || above + static_cast<double>(taken - 1) * weight + margin < target) &&
        above + static_cast<double>(taken) * weight > target + margin;
    return {values[begin], certain ? taken : 0};
  }
  return {C{}, 0};
}

/// Takes the candidates out that top_p does not keep; false where that is open.
template <typename Rows>
bool cut_nucleus(Rows& divided, Index r, const GatheredCandidates<typename Rows::C>& gathered) {
  using C = typename Rows::C;
  using Candidate = problem::ShardCandidate<C>;
  const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
  const auto& asked = divided.asked[r];
  const double best = static_cast<double>(asked.band.hi), scale = asked.inverse_temperature;
  const double last_bin =
      row.above == 0 ? 0.0 : (std::min)(asked.reach, double{problem::ShardBins::count}) - 1;
  Workspace::Frame frame(divided.workspace);
  Index most = 0, n = 0;
  for (int rank = 0; rank < gathered.ranks; ++rank)
    most += static_cast<Index>(gathered.of(r, rank).size());
  C* const values = frame.take<C>(most);
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (const Candidate& candidate : gathered.of(r, rank))
      if (problem::ShardBins::distance(static_cast<double>(candidate.logit), best, scale) >=
          last_bin)
        values[n++] = candidate.logit;
  std::sort(values, values + n, std::greater<>{});
  const double target = (std::max)(divided.params_of(r).top_p, 0.0) * row.total;
  const NucleusEnd<C> end =
      end_of_nucleus(values, n, row, best, scale, target, divided.margin(row.total));
  if (end.taken == 0) return false;
  Index left = end.taken;
  for (int rank = 0; rank < gathered.ranks; ++rank)
    for (Candidate& candidate : gathered.of(r, rank))
      if (candidate.logit < end.value || (candidate.logit == end.value && left-- <= 0))
        candidate.token = Candidate::kNone;
  return true;
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
  if (row.has_temperature) *stage++ = SamplingStage::temperature;
  if (divided.asked[r].pick == problem::ShardPick::in_play) *stage++ = problem::kFiltered;
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
    DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (row.end != RowEnd::candidates) continue;
    if (row.ends_in_last_bin && !cut_nucleus(divided, r, gathered)) {
      row.end = RowEnd::gathered;
      continue;
    }
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

/// Calls visit(r, sampling) for the rows that are gathered: once with all rows, where all are, else
/// row by row.
template <typename Rows, typename Visit>
void for_each_gathered_row(Rows& divided, Visit&& visit) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(divided.given)>>;
  auto sampling = divided.sampling;
  const auto is_gathered = [](const DividedRow& row) { return row.end == RowEnd::gathered; };
  Index rows = std::count_if(divided.rows.begin(), divided.rows.end(), is_gathered);
  if (rows == 0) return;
  const int ranks = divided.ranks();
  const Index size = divided.shard.shard.size();
  // another row of the logits guides one
  const bool guided = std::any_of(divided.rows.begin(), divided.rows.end(), [&](const auto& row) {
    const problem::RowParams& params = divided.params_of(&row - divided.rows.data());
    return is_gathered(row) && std::find(params.order.begin(), params.order.end(),
                                         SamplingStage::guidance) != params.order.end();
  });
  if (guided) rows = sampling.batch;
  Workspace::Frame frame(divided.workspace);
  const std::span<Index> sizes(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank)
    sizes[static_cast<std::size_t>(rank)] = rows * divided.shard_of(rank).size();
  const T* own = divided.given;
  if (rows < sampling.batch) {
    T* to = frame.take<T>(rows * size);
    own = to;
    for (Index r = 0; r < sampling.batch; ++r)
      if (is_gathered(divided.rows[static_cast<std::size_t>(r)]))
        to = std::copy_n(divided.given + r * size, size, to);
  }
  T* const parts = frame.take<T>(rows * sampling.vocab);
  divided.communicator.all_gather(
      std::span<const T>(own, static_cast<std::size_t>(rows * size)),
      std::span<T>(parts, static_cast<std::size_t>(rows * sampling.vocab)),
      std::span<const Index>(sizes));
  T* const whole = frame.take<T>(rows * sampling.vocab);
  for (int rank = 0; rank < ranks; ++rank) {
    const ShardRange shard = divided.shard_of(rank);
    for (Index r = 0; r < rows; ++r)
      std::copy_n(parts + rows * shard.begin + r * shard.size(), shard.size(),
                  whole + r * sampling.vocab + shard.begin);
  }
  sampling.logits = whole;
  if (rows == sampling.batch) return visit(Index{0}, sampling);
  sampling.batch = 1;
  for (Index r = 0; r < divided.shard.rows; ++r) {
    if (!is_gathered(divided.rows[static_cast<std::size_t>(r)])) continue;
    sampling.params = &divided.params_of(r);
    sampling.first_row = r;
    visit(r, sampling);
    sampling.logits += sampling.vocab;
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
