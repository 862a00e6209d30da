/// \file
/// How divided rows go through the stages that filter (divided_rows.h): what each asks the shards.
#pragma once

#include "divided_draws.h"
#include "divided_nucleus.h"
#include "divided_search.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline SamplingStage stage_of(const DividedRow& row, const problem::RowParams& params) {
  return row.stage < params.order.size() ? params.order[row.stage] : SamplingStage::none;
}

/// How many tokens a stage leaves, whatever else it does.
inline Index least_of_stage(SamplingStage stage, const problem::RowParams& params) {
  switch (stage) {
    case SamplingStage::top_p:
    case SamplingStage::min_p:
    case SamplingStage::typical_p:
    case SamplingStage::xtc:
    case SamplingStage::epsilon_cutoff:
    case SamplingStage::eta_cutoff:
      return params.min_tokens_to_keep;
    default:
      return 1;
  }
}

/// The band from the smallest number of weight `least`, which may be wrong by `error` of itself.
template <typename Rows>
void narrow_to_weight(Rows& divided, Index r, double least, double error) {
  detail::run(Eigen::DefaultDevice{},
              problem::NarrowToWeight<typename Rows::C>{divided.asked[r], divided.sampling.vocab,
                                                        least, error},
              divided.workspace);
}

template <typename Rows>
void end_row(Rows& divided, Index r, RowEnd end) {
  divided.rows[static_cast<std::size_t>(r)].end = end;
  divided.asked[r].question = problem::ShardQuestion::none;
}

template <typename Rows>
void walk_stages(Rows& divided, Index r);

template <typename Rows>
void finish_stage(Rows& divided, Index r) {
  ++divided.rows[static_cast<std::size_t>(r)].stage;
  walk_stages(divided, r);
}

/// The `most` best tokens decide what the stages from here on look at.
template <typename Rows>
void pick_best(Rows& divided, Index r, Index most) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  asked.pick = problem::ShardPick::best;
  asked.most = most;
  for (int rank = 0; rank < divided.ranks(); ++rank)
    divided.counts[r * divided.ranks() + rank] = (std::min)(most, divided.shard_of(rank).size());
  const SamplingStage stage = stage_of(row, divided.params_of(r));
  const bool runs_again =
      stage == SamplingStage::top_k ||
      (stage == SamplingStage::temperature && divided.params_of(r).dynatemp_range == 0);
  if (!runs_again) {
    row.keeps = most;
    ++row.stage;
  }
  end_row(divided, r, RowEnd::candidates);
}

/// The stage leaves the `most` best tokens that were in play before it, with the equals of the last
/// or those of lowest index.
template <typename Rows>
void keep_best(Rows& divided, Index r, Index most, TopKTies ties) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  asked.band = divided.before[r];
  row.least = 1;
  if (ties == TopKTies::lowest_index &&
      most <= problem::ShardLimits::few(divided.sampling.vocab) / divided.ranks())
    return pick_best(divided, r, most);
  row.searches_best = true;
  row.keeps_ties = ties == TopKTies::keep_all;
  asked.most = most;
  if (row.keeps_ties && most <= problem::ShardKeys::listed)
    return ask_shards(divided, r, problem::ShardQuestion::best);
  start_search(divided, r, problem::ShardTerm::unit, false, static_cast<double>(most), 0.0);
}

/// Goes on through the stages of a row until its shards have to be asked, or it ends.
template <typename Rows>
void walk_stages(Rows& divided, Index r) {
  using problem::ShardQuestion;
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const problem::RowParams& params = divided.params_of(r);
  const auto ask = [&](ShardQuestion question) { ask_shards(divided, r, question); };
  for (; row.stage < params.order.size(); ++row.stage) {
    const SamplingStage stage = params.order[row.stage];
    divided.before[r] = asked.band;
    row.least = least_of_stage(stage, params);
    row.is_searching = row.searches_best = row.keeps_ties = false;
    switch (stage) {
      case SamplingStage::none:
        return ask_draw(divided, r);
      case SamplingStage::temperature:
        if (params.dynatemp_range > 0) return ask_sums(divided, r, problem::ShardSum::moments);
        if (params.temperature == 0) return pick_best(divided, r, 1);
        row.has_temperature = true;
        row.temperature = params.temperature;
        asked.inverse_temperature = problem::inverse_temperature(params.temperature);
        break;
      case SamplingStage::top_k:
        return keep_best(divided, r, params.top_k, params.top_k_ties);
      case SamplingStage::top_p:
        if (params.top_p >= 1) break;
        asked.term = problem::ShardTerm::weight;
        asked.by_distance = false;
        return ask(serves_nucleus(divided) ? ShardQuestion::nucleus : ShardQuestion::bins);
      case SamplingStage::min_p:
        narrow_to_weight(divided, r, params.min_p, 0.0);
        if (asked.band.lo == divided.before[r].lo) break;
        return ask(ShardQuestion::count);
      case SamplingStage::epsilon_cutoff:
      case SamplingStage::eta_cutoff:
        return ask(ShardQuestion::weights);
      case SamplingStage::typical_p:
        if (params.typical_p >= 1 || asked.band.lo == asked.band.hi) break;
        return ask_sums(divided, r, problem::ShardSum::moments);
      case SamplingStage::top_h:
        if (params.top_h * (1 + 1e-12) >= 1) break;
        return ask_sums(divided, r, problem::ShardSum::moments);
      case SamplingStage::mirostat:
        asked.most = problem::kMirostatTokens;
        return ask(params.mirostat == 2 ? ShardQuestion::weights : ShardQuestion::best);
      case SamplingStage::top_n_sigma:
        return ask(ShardQuestion::deviations);
      case SamplingStage::xtc:
        if (!divided.sampling.excludes(r)) break;
        return ask(ShardQuestion::weights);
      default:
        break;
    }
  }
  ask_draw(divided, r);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
