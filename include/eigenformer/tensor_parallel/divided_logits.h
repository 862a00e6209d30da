/// \file
/// The stages that change the logits of divided rows (divided_rows.h). Most look at single tokens.
/// Guidance and penalties on log-probabilities see the other ranks' through the log of the sum of
/// exponentials, which has the bits of the whole row.
#pragma once

#include "divided_stages.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// All tokens of logits of which the largest is this.
template <typename C>
problem::ShardRow<C> all_tokens(double best, Index vocab) {
  problem::ShardRow<C> row{};
  row.band = {static_cast<C>(best), std::numeric_limits<C>::lowest(), vocab};
  row.inverse_temperature = 1;
  return row;
}

/// The logits of all rows as given.
template <typename Rows>
const problem::ShardRow<typename Rows::C>* rows_as_given(const Rows& divided,
                                                         Workspace::Frame& frame) {
  using Row = problem::ShardRow<typename Rows::C>;
  Row* const given = frame.take<Row>(divided.shard.rows);
  for (Index r = 0; r < divided.shard.rows; ++r)
    given[r] = all_tokens<typename Rows::C>(divided.rows[static_cast<std::size_t>(r)].given_best,
                                            divided.sampling.vocab);
  return given;
}

/// Runs the stages of rows that have none that looks at all logits, and says what is wrong with a
/// row.
template <typename D, typename Rows>
void scan_shards(const D& device, Rows& divided) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(divided.given)>>;
  using C = typename Rows::C;
  Workspace::Frame frame(divided.workspace);
  const auto& sampling = divided.sampling;
  constexpr Index width = 4;
  double* const own = frame.take<double>(width * sampling.batch);
  detail::run(device,
              problem::ScanShard<T>{divided.given, divided.shard, sampling.params,
                                    sampling.params_stride, own},
              divided.workspace);
  const ShardAnswers answers = divided.exchange(own, width, frame);
  for (Index r = 0; r < sampling.batch; ++r) {
    auto& row = divided.rows[static_cast<std::size_t>(r)];
    row = {};
    double hi = 0;
    row.status = Rows::status_of(answers, r, 0, hi);
    row.given_best = hi;
    row.is_given_good = row.status == SampleStatus::ok;
    if (row.is_given_good) row.status = Rows::status_of(answers, r, 2, hi);
    divided.asked[r] = all_tokens<C>(hi, sampling.vocab);
  }
}

/// The first stage from `begin` on that looks at all logits.
inline std::size_t stage_of_all_logits(const problem::RowParams& params, std::size_t begin) {
  while (begin < params.order.size() && params.order[begin] != SamplingStage::guidance &&
         !(params.order[begin] == SamplingStage::penalties && params.log_probability_penalties))
    ++begin;
  return begin;
}

/// The logs of the sums of exponentials that `changes` begin with; NaN of bad rows.
template <typename D, typename Rows>
void sum_exponentials(const D& device, Rows& divided, std::span<problem::ShardChange> changes) {
  using C = typename Rows::C;
  Workspace::Frame frame(divided.workspace);
  const Index rows = divided.shard.rows;
  Index *const which = frame.take<Index>(rows), *const place = frame.take<Index>(rows);
  double* const log_sums = frame.take<double>(rows);
  // log_sum_of(change): that of row_of(change), where this is not -1
  const auto sum = [&](const auto* logits, const problem::ShardRow<C>* asked, auto row_of,
                       auto log_sum_of) {
    std::fill(place, place + rows, -1);
    Index count = 0;
    for (const auto& change : changes)
      if (const Index row = row_of(change); row >= 0 && place[row] < 0)
        which[place[row] = count++] = row;
    if (count == 0) return;
    Workspace::Frame of_sums(divided.workspace);
    const SummedRows<Rows> summed(device, divided, logits, asked,
                                  {which, static_cast<std::size_t>(count)},
                                  problem::ShardSum::weights, of_sums);
    for (Index i = 0; i < count; ++i)
      log_sums[i] = static_cast<double>(asked[which[i]].band.hi) + std::log(summed.sums(i).total);
    for (auto& change : changes)
      if (const Index row = row_of(change); row >= 0) log_sum_of(change) = log_sums[place[row]];
  };
  for (auto& change : changes)
    change.log_sum = change.log_sum_without = std::numeric_limits<double>::quiet_NaN();
  sum(
      static_cast<const C*>(divided.shard.logits), divided.asked,
      [&](const problem::ShardChange& change) {
        const auto& row = divided.rows[static_cast<std::size_t>(change.row)];
        return row.status == SampleStatus::ok ? change.row : -1;
      },
      [](problem::ShardChange& change) -> double& { return change.log_sum; });
  sum(
      divided.given, rows_as_given(divided, frame),
      [&](const problem::ShardChange& change) -> Index {
        const problem::RowParams& params = divided.params_of(change.row);
        if (params.order[change.begin] != SamplingStage::guidance) return -1;
        const auto guide = static_cast<std::size_t>(params.guidance_row);
        return divided.rows[guide].is_given_good ? params.guidance_row : -1;
      },
      [](problem::ShardChange& change) -> double& { return change.log_sum_without; });
}

/// Runs the stages of rows that have some that look at all logits.
template <typename D, typename Rows>
void change_logits(const D& device, Rows& divided) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(divided.given)>>;
  using C = typename Rows::C;
  const auto& sampling = divided.sampling;
  Workspace::Frame frame(divided.workspace);
  auto* const changes = frame.take<problem::ShardChange>(sampling.batch);
  Index count = 0;
  for (Index r = 0; r < sampling.batch; ++r)
    if (const problem::RowParams& params = divided.params_of(r);
        divided.rows[static_cast<std::size_t>(r)].is_given_good &&
        problem::looks_at_all_logits(params))
      changes[count++] = {r, 0, stage_of_all_logits(params, 0), 0, 0};
  while (count > 0) {
    Workspace::Frame of_round(divided.workspace);
    double* const own = of_round.take<double>(2 * count);
    Index* const begin = of_round.take<Index>(count);
    for (Index i = 0; i < count; ++i) begin[i] = 2 * i;
    detail::run(
        device,
        problem::ChangeShard<T>{divided.given, divided.shard, sampling.params,
                                sampling.params_stride, changes, count, own, sampling.function},
        divided.workspace);
    const ShardAnswers answers = divided.exchange(own, begin, 2 * count, of_round);
    Index left = 0;
    for (Index i = 0; i < count; ++i) {
      problem::ShardChange change = changes[i];
      const problem::RowParams& params = divided.params_of(change.row);
      double hi = 0;
      divided.rows[static_cast<std::size_t>(change.row)].status =
          Rows::status_of(answers, i, 0, hi);
      divided.asked[change.row] = all_tokens<C>(hi, sampling.vocab);
      if (change.end == params.order.size()) continue;
      change.begin = change.end;
      change.end = stage_of_all_logits(params, change.begin + 1);
      changes[left++] = change;
    }
    count = left;
    sum_exponentials(device, divided, {changes, static_cast<std::size_t>(count)});
  }
}

/// The shards of all rows as this rank keeps them. `given` is (rows, shard of this rank), in the
/// host's memory, and changed where nothing needs it as it is.
template <typename D, typename T, typename Comm>
DividedRows<T, Comm> divide_rows(const D& device, const problem::Sampling<T>& sampling, T* given,
                                 Comm& communicator, Workspace& workspace,
                                 Workspace::Frame& frame) {
  using C = compute_type<T>;
  const Index count = sampling.batch;
  DividedRows<T, Comm> divided{sampling, communicator, workspace, given,   {},
                               {},       nullptr,      nullptr,   nullptr, CpuDevice<D>};
  const ShardRange own = divided.shard_of(communicator.rank());
  const Index blocks = (own.size() + problem::ShardLimits::block - 1) / problem::ShardLimits::block;
  bool adjusted = false;
  for (Index i = 0; i < (sampling.params_stride == 0 ? 1 : count); ++i)
    adjusted = adjusted || problem::adjusts_logits(sampling.params[i]);
  C* logits = nullptr;
  if constexpr (std::is_same_v<T, C>)
    if (!adjusted) logits = given;
  if (logits == nullptr) logits = frame.take<C>(count * own.size());
  divided.shard = {
      logits, frame.take<C>(count * blocks), frame.take<double>(count * blocks), count, blocks,
      own};
  divided.rows = {frame.take<DividedRow>(count), static_cast<std::size_t>(count)};
  divided.asked = frame.take<problem::ShardRow<C>>(count);
  divided.counts = frame.take<Index>(count * divided.ranks());
  divided.before = frame.take<problem::Band<C>>(count);
  scan_shards(device, divided);
  change_logits(device, divided);
  for (Index r = 0; r < count; ++r)
    if (divided.rows[static_cast<std::size_t>(r)].status == SampleStatus::ok)
      walk_stages(divided, r);
    else
      end_row(divided, r, RowEnd::bad);
  return divided;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
