/// \file
/// What the answers of shards make of the tokens in play, stage by stage (divided_stages.h).
#pragma once

#include "divided_stages.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Top-n-sigma from the sums of its question.
template <typename C>
void narrow_to_deviations(problem::ShardRow<C>& row, Index vocab, double deviations,
                          const double (&sums)[3]) {
  const double best = static_cast<double>(row.band.hi), mean = sums[1] / sums[0],
               squares = sums[2] / sums[0], variance = squares - mean * mean,
               error = 4e-12 * squares;
  const auto end_at = [&](double v, double shift) {
    const double least = best - deviations * std::sqrt((std::max)(v, 0.0)) + shift;
    C lo = static_cast<C>(least);
    if (static_cast<double>(lo) < least) lo = std::nextafter(lo, row.band.hi);
    return lo;
  };
  // a row of equals has no deviation and no error
  const double shift = squares == 0 ? 0.0 : 4e-15 * std::abs(best);
  const C lo = end_at(variance + error, -shift);
  row.sure = (std::max)(row.band.lo, end_at(variance - error, shift));
  if (!(lo > row.band.lo)) return;
  row.band.lo = lo;
  row.band.lo_end = vocab;
}

/// The tokens in play that all ranks have counted are candidates.
template <typename Rows>
void pick_in_play(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  asked.pick = problem::ShardPick::in_play;
  asked.reach = std::numeric_limits<double>::infinity();
  for (int rank = 0; rank < divided.ranks(); ++rank)
    divided.counts[r * divided.ranks() + rank] = static_cast<Index>(answers.of(rank, r, 0));
  end_row(divided, r, RowEnd::candidates);
}

/// The stage has narrowed the band: few tokens end the row.
template <typename Rows>
void take_count(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const problem::Band<typename Rows::C>& before = divided.before[r];
  const SamplingStage stage = stage_of(row, divided.params_of(r));
  const double tokens = answers.sum(r, 0);
  if (row.sends_all) return pick_in_play(divided, r, answers);
  if (tokens != answers.sum(r, 1)) {
    asked.band = before;
    if (stage == SamplingStage::top_n_sigma)
      return ask_sums(divided, r, problem::ShardSum::deviations);
    return ask_sums(divided, r, problem::ShardSum::moments);
  }
  if (tokens < static_cast<double>(row.least)) {
    const bool is_cutoff =
        stage == SamplingStage::epsilon_cutoff || stage == SamplingStage::eta_cutoff;
    if (stage == SamplingStage::typical_p) {
      asked.band = before;
      const auto least = static_cast<double>(row.least);
      row.least = 1;
      return start_search(divided, r, problem::ShardTerm::unit, true, least, 0.0);
    }
    if (stage != SamplingStage::xtc)
      return keep_best(divided, r, row.least,
                       is_cutoff ? TopKTies::keep_all : TopKTies::lowest_index);
    asked.band = before;
  }
  const bool is_narrower = !(asked.band.lo == before.lo && asked.band.lo_end == before.lo_end &&
                             asked.band.hi == before.hi && asked.band.hi_begin == before.hi_begin);
  if (!is_narrower ||
      tokens > static_cast<double>(problem::ShardLimits::few(divided.sampling.vocab)))
    return finish_stage(divided, r);
  ++row.stage;
  pick_in_play(divided, r, answers);
}

/// The stage has ended the band at a token. Top-p by sums of floats does not count what it keeps
/// where no stage follows.
template <typename Rows>
void finish_band(Rows& divided, Index r) {
  const auto& row = divided.rows[static_cast<std::size_t>(r)];
  const SamplingOrder& order = divided.params_of(r).order;
  const bool is_last =
      std::all_of(order.begin() + static_cast<std::ptrdiff_t>(row.stage) + 1, order.end(),
                  [](SamplingStage stage) { return stage == SamplingStage::none; });
  if (!row.is_searching && is_last && row.least == 1) return finish_stage(divided, r);
  ask_shards(divided, r, problem::ShardQuestion::count);
}

/// A stage that goes by the tokens of weight `least` or more, which may be wrong by `error` of it.
template <typename Rows>
void cut_at_weight(Rows& divided, Index r, double least, double error) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const auto before = divided.before[r];
  const SamplingStage stage = stage_of(row, divided.params_of(r));
  if (least * (1 - error) > 1) {  // no token
    if (stage == SamplingStage::xtc) return finish_stage(divided, r);
    return keep_best(
        divided, r, row.least,
        stage == SamplingStage::mirostat ? TopKTies::lowest_index : TopKTies::keep_all);
  }
  if (least * (1 + error) > 1) return ask_sums(divided, r, problem::ShardSum::moments);
  narrow_to_weight(divided, r, least, error);
  if (stage == SamplingStage::xtc) {
    asked.by_distance = false;
    asked.first = asked.key(before.hi);
    asked.last = asked.key(asked.band.lo);
    asked.band = before;
    return ask_shards(divided, r, problem::ShardQuestion::extent);
  }
  if (asked.sure == before.lo) return finish_stage(divided, r);
  ask_shards(divided, r, problem::ShardQuestion::count);
}

/// The weight from which on tokens go by the total weight of a row and its entropy, in nats.
template <typename Rows>
double least_weight(const Rows& divided, Index r, double total, double entropy) {
  const problem::RowParams& params = divided.params_of(r);
  switch (stage_of(divided.rows[static_cast<std::size_t>(r)], params)) {
    case SamplingStage::epsilon_cutoff:
      return params.epsilon_cutoff * total;
    case SamplingStage::eta_cutoff:
      return (std::min)(params.eta_cutoff, std::sqrt(params.eta_cutoff) * std::exp(-entropy)) *
             total;
    case SamplingStage::mirostat:
      return std::exp2(-params.mirostat_mu) * total;
    default:
      return params.xtc_threshold * total;
  }
}

template <typename Rows>
void take_weights(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  const double total = row.total = answers.sum(r, 0);
  if (stage_of(row, divided.params_of(r)) == SamplingStage::none)
    return take_draw(divided, r, answers);
  const double entropy = std::log(total) - answers.sum(r, 1) / total;
  cut_at_weight(divided, r, least_weight(divided, r, total, entropy), 1e-10);
}

/// Where the tokens of top_p of the weight end, to a bin.
template <typename Rows>
void take_bins(Rows& divided, Index r, const ShardAnswers& answers) {
  constexpr Index bins = problem::ShardBins::count;
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  if (row.is_searching) return take_distances(divided, r, answers);
  row.total = 0;
  for (Index bin = 0; bin < bins; ++bin) row.total += answers.sum(r, bin);
  const double target = (std::max)(divided.params_of(r).top_p, 0.0) * row.total,
               margin = divided.margin(row.total);
  double above = 0, count = 0;
  Index end = 0;
  for (; end < bins; ++end) {
    const double reached = above + answers.sum(r, end);
    if (reached > target + margin) break;
    above = reached;
  }
  Index last = 0;  // bin of the candidates
  for (; last < bins; ++last) {
    count += answers.sum(r, bins + last);
    if (last >= end && count >= static_cast<double>(row.least)) break;
  }
  if (end == bins || (above > 0 && !(above + margin < target)) ||
      count > static_cast<double>(problem::ShardLimits::few(divided.sampling.vocab))) {
    prepare_search(divided, r, problem::ShardTerm::weight, false, target, row.total);
    return take_distances(divided, r, answers);
  }
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    double own = 0;
    for (Index bin = 0; bin < bins && bin <= last; ++bin) own += answers.of(rank, r, bins + bin);
    divided.counts[r * divided.ranks() + rank] = static_cast<Index>(own);
  }
  const auto reach_of = [&](Index bin) {
    return bin + 1 < bins ? static_cast<double>(bin + 1) : std::numeric_limits<double>::infinity();
  };
  ++row.stage;
  row.end_bin = static_cast<double>(end);
  row.end_reach = reach_of(end);
  row.above = above;
  asked.pick = problem::ShardPick::in_play;
  asked.reach = reach_of(last);
  end_row(divided, r, RowEnd::candidates);
}

/// The band of the tokens as near to the mean as the last one, whose key this is.
template <typename Rows>
void narrow_to_nearest(Rows& divided, Index r, std::uint64_t farthest) {
  using C = typename Rows::C;
  auto& asked = divided.asked[r];
  auto by_logits = asked;
  by_logits.by_distance = false;
  // of the numbers in play the last that is too far below, and the first that is too far above
  const auto far_at = [&](std::uint64_t key, double sign) {
    const C logit = by_logits.logit_of(key);
    return asked.from_mean(logit) * sign > 0 && asked.key(logit) > farthest;
  };
  const std::uint64_t best = by_logits.key(asked.band.hi), least = by_logits.key(asked.band.lo);
  const std::uint64_t below =
                          first_of(best, least, [&](std::uint64_t key) { return far_at(key, -1); }),
                      kept =
                          first_of(best, least, [&](std::uint64_t key) { return !far_at(key, 1); });
  const C lo = by_logits.logit_of(far_at(below, -1) ? below - 1 : least);
  const bool ends_early = kept > best;
  if (lo > asked.band.lo) {
    asked.band.lo = lo;
    asked.band.lo_end = divided.sampling.vocab;
  }
  asked.sure = asked.band.lo;
  if (!ends_early) return ask_shards(divided, r, problem::ShardQuestion::count);
  asked.by_distance = false;
  asked.first = kept;
  asked.last = asked.key(asked.band.lo);
  ask_shards(divided, r, problem::ShardQuestion::extent);
}

template <typename Rows>
void finish_search(Rows& divided, Index r) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const PrefixSearch& search = row.search;
  if (asked.by_distance) return narrow_to_nearest(divided, r, asked.last);
  const Index taken = row.keeps_ties ? search.equals : taken_of(search);
  const SamplingStage stage = stage_of(row, divided.params_of(r));
  if (taken == 0) {
    if (search.tokens > 0 || search.exact) return send_all_in_play(divided, r);
    return ask_sums(divided, r, problem::ShardSum::moments);
  }
  if (stage == SamplingStage::top_h && !row.searches_best) {
    // the last one's term is too much; the best stays
    if (taken > 1 || asked.value == asked.band.hi)
      return end_band_at(divided, r, (std::max)(taken - 1, Index{1}), search.equals);
    --asked.last;
    return ask_shards(divided, r, problem::ShardQuestion::extent);
  }
  if (search.tokens + static_cast<double>(taken) < static_cast<double>(row.least))
    return keep_best(divided, r, row.least, TopKTies::lowest_index);
  end_band_at(divided, r, taken, search.equals);
}

/// The smallest and the largest logit of what the stage looked for.
template <typename Rows>
void take_extent(Rows& divided, Index r, const ShardAnswers& answers) {
  using C = typename Rows::C;
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  constexpr C infinity = std::numeric_limits<C>::infinity();
  C least = infinity, most = -infinity;
  Index last = -1;
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    const C lo = static_cast<C>(answers.of(rank, r, 0));
    most = (std::max)(most, static_cast<C>(answers.of(rank, r, 2)));
    if (answers.of(rank, r, 1) < 0 || lo > least) continue;
    least = lo;
    last = static_cast<Index>(answers.of(rank, r, 1));
  }
  const SamplingStage stage = stage_of(row, divided.params_of(r));
  if (stage == SamplingStage::xtc) {
    if (least < asked.sure) return ask_sums(divided, r, problem::ShardSum::moments);
    if (last < 0) return finish_stage(divided, r);
    asked.band.hi = least;
    asked.band.hi_begin = last;
  } else if (stage == SamplingStage::typical_p) {
    asked.band.hi = most;
    asked.band.hi_begin = 0;
  } else if (least > asked.band.lo) {
    asked.band.lo = least;
    asked.band.lo_end = divided.sampling.vocab;
  }
  asked.sure = asked.band.lo;
  ask_shards(divided, r, problem::ShardQuestion::count);
}

/// The best tokens of a row: mirostat 1 guesses by them how many it keeps, top_k keeps the equals
/// of the last.
template <typename Rows>
void take_best(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  Workspace::Frame frame(divided.workspace);
  double* const x = frame.take<double>(divided.ranks() * asked.most);
  Index n = 0;
  for (int rank = 0; rank < divided.ranks(); ++rank)
    for (Index i = 0; i < asked.most; ++i)
      if (const double logit = answers.of(rank, r, i);
          logit >= std::numeric_limits<double>::lowest())
        x[n++] = logit;
  std::sort(x, x + n, std::greater<>{});
  if (divided.rows[static_cast<std::size_t>(r)].searches_best) {
    if (n < asked.most) return finish_stage(divided, r);
    const auto last = static_cast<typename Rows::C>(x[asked.most - 1]);
    if (last > asked.band.lo) asked.band.lo_end = divided.sampling.vocab;
    asked.band.lo = asked.sure = last;
    return ask_shards(divided, r, problem::ShardQuestion::count);
  }
  const Index most =
      problem::mirostat_count(x, (std::min)(n, asked.most), asked.inverse_temperature,
                              divided.params_of(r).mirostat_mu, divided.sampling.vocab);
  keep_best(divided, r, most, TopKTies::lowest_index);
}

/// Stages that take sums with the bits of the whole row, or need them.
template <typename Rows>
void take_sums(Rows& divided, Index r, const RowSums& sums) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const problem::RowParams& params = divided.params_of(r);
  switch (stage_of(row, params)) {
    case SamplingStage::temperature: {
      if (sums.tokens == 1) return finish_stage(divided, r);
      const double temperature =
          problem::dynamic_temperature(params, sums.entropy(), static_cast<Index>(sums.tokens));
      if (temperature == 0) return pick_best(divided, r, 1);
      row.has_temperature = true;
      row.temperature = temperature;
      asked.inverse_temperature = problem::inverse_temperature(temperature);
      return finish_stage(divided, r);
    }
    case SamplingStage::top_p:
      row.search.target = (std::max)(params.top_p, 0.0) * sums.total;
      row.search.exact = true;
      return finish_search(divided, r);
    case SamplingStage::typical_p:
      asked.mean = sums.moment / sums.total;
      start_search(divided, r, problem::ShardTerm::weight, true, params.typical_p * sums.total,
                   sums.total);
      row.search.exact = true;
      return;
    case SamplingStage::top_h: {
      asked.log_total = std::log(sums.total);
      const double entropy = sums.total * asked.log_total - sums.moment;
      // equal sums may differ by rounding
      const double target = params.top_h * (1 + 1e-12) * entropy;
      if (!(target > 0)) return keep_best(divided, r, 1, TopKTies::lowest_index);
      start_search(divided, r, problem::ShardTerm::surprise, false, target, entropy);
      row.search.exact = true;
      return;
    }
    case SamplingStage::top_n_sigma:
      if (asked.sum == problem::ShardSum::deviations) {
        asked.mean = sums.total / sums.tokens;
        return ask_sums(divided, r, problem::ShardSum::squares);
      }
      detail::run(Eigen::DefaultDevice{},
                  problem::NarrowToDeviations<typename Rows::C>{
                      asked, divided.sampling.vocab, params.top_n_sigma, sums.total / sums.tokens},
                  divided.workspace);
      return ask_shards(divided, r, problem::ShardQuestion::count);
    default:
      cut_at_weight(divided, r, least_weight(divided, r, sums.total, sums.entropy()), 0.0);
  }
}

template <typename Rows>
void take_deviations(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  narrow_to_deviations(asked, divided.sampling.vocab, divided.params_of(r).top_n_sigma,
                       {answers.sum(r, 0), answers.sum(r, 1), answers.sum(r, 2)});
  if (asked.sure == divided.before[r].lo) return finish_stage(divided, r);
  ask_shards(divided, r, problem::ShardQuestion::count);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
