/// \file
/// Rows of logits that are divided among ranks, and how the ranks settle which tokens are in play:
/// what vocabulary_sample.h is made of.
///
/// All ranks hold the same numbers and come to the same decisions, in rounds: each answers a
/// question about its shard of every open row (the largest logit, the number of tokens in play, the
/// sum of their weights), all answers are gathered, and the row goes on through its stages. Sums of
/// ranks are not the bits of the sum of one row, so a decision counts only where no error that any
/// order of summation may have could change it; where one could, by estimate 4 times in 10^12 for
/// each token, the row is gathered. A row ends as
///
///   candidates   once few tokens are left: they are gathered, and every rank runs the stages that
///                follow on a row of these and -infinity. To the kernels it is what the stages
///                before have left, so that all that follows has the same bits
///   drawn        from all tokens in play: one rank finds the token (divided_ends.h)
///   gathered     where a stage looks at all logits, or many tokens are left before one that looks
///                at each of them
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

enum class RowEnd : std::uint8_t { open, bad, candidates, drawn, gathered };

/// What all ranks know of a row, beside what its shards are asked.
struct DividedRow {
  RowEnd end = RowEnd::open;
  SampleStatus status = SampleStatus::ok;
  std::size_t stage = 0;          // place in the order of the first stage that is not done
  bool has_temperature = false;   // done, and of effect on what follows
  double given_best = 0;          // largest logit before any stage
  double total = 0;               // weight in play
  bool ends_in_last_bin = false;  // of those sent is where top_p's set ends
  double above = 0;               // the weight of the other bins
  int drawn_by = 0;               // rank
  std::int32_t token = -1;
};

/// What all ranks have answered.
struct ShardAnswers {
  const double* numbers;  // (ranks, rows, width)
  int ranks;
  Index rows, width;
  double of(int rank, Index row, Index number) const {
    return numbers[(rank * rows + row) * width + number];
  }
  double sum(Index row, Index number) const {
    double total = 0;
    for (int rank = 0; rank < ranks; ++rank) total += of(rank, row, number);
    return total;
  }
};

inline Index numbers_of(problem::ShardQuestion question) {
  using problem::ShardQuestion;
  if (question == ShardQuestion::none) return 0;
  if (question == ShardQuestion::bins) return 2 * problem::ShardBins::count;
  return question == ShardQuestion::deviations ? 3 : 2;
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
  problem::ShardRow<C>* asked;   // (rows)
  Index* counts;                 // (rows, ranks) candidates of each
  bool weighs_in_float = false;  // where floats are as good

  int ranks() const { return communicator.size(); }
  ShardRange shard_of(int rank) const { return problem::shard_of(sampling.vocab, rank, ranks()); }
  const problem::RowParams& params_of(Index row) const { return sampling.params_of(row); }

  /// More than two sums of the weights of a row, in any orders, may differ by.
  double margin(double total) const {
    return total * (2e-12 + 4e-18 * static_cast<double>(sampling.vocab));
  }
  /// Every rank's numbers, `width` of a row, after this rank's.
  ShardAnswers exchange(const double* own, Index width, Workspace::Frame& frame) const {
    const Index count = shard.rows * width;
    double* const all = frame.take<double>(count * ranks());
    communicator.all_gather(std::span<const double>(own, static_cast<std::size_t>(count)),
                            std::span<double>(all, static_cast<std::size_t>(count * ranks())));
    return {all, ranks(), shard.rows, width};
  }
};

template <typename Rows>
bool serves_nucleus(const Rows& divided);
template <typename D, typename Rows>
void settle_nuclei(const D& device, Rows& divided);

// ---- the stages ---------------------------------------------------------------------------------

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

template <typename Rows>
void narrow_to_weight(Rows& divided, Index r, double least, double error) {
  detail::run(Eigen::DefaultDevice{},
              problem::NarrowToWeight<typename Rows::C>{divided.asked[r], divided.sampling.vocab,
                                                        least, error},
              divided.workspace);
}

template <typename Rows>
void end_row(Rows& divided, Index r, RowEnd end) {
  auto& asked = divided.asked[r];
  divided.rows[static_cast<std::size_t>(r)].end = end;
  asked.question = problem::ShardQuestion::none;
}

/// The `most` best tokens decide what the stages from here on look at.
template <typename Rows>
void pick_best(Rows& divided, Index r, Index most) {
  auto& asked = divided.asked[r];
  asked.pick = problem::ShardPick::best;
  asked.most = most;
  for (int rank = 0; rank < divided.ranks(); ++rank)
    divided.counts[r * divided.ranks() + rank] = (std::min)(most, divided.shard_of(rank).size());
  end_row(divided, r, RowEnd::candidates);
}

/// Goes on through the stages of a row until its shards have to be asked, or it ends.
template <typename Rows>
void walk_stages(Rows& divided, Index r) {
  using problem::ShardQuestion;
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const problem::RowParams& params = divided.params_of(r);
  const bool keeps_one = params.min_tokens_to_keep == 1;
  const auto ask = [&](ShardQuestion question) { asked.question = question; };
  for (; row.stage < params.order.size(); ++row.stage) {
    switch (params.order[row.stage]) {
      case SamplingStage::none:
        return ask(ShardQuestion::weights);
      case SamplingStage::temperature:
        if (params.dynatemp_range > 0) return end_row(divided, r, RowEnd::gathered);
        if (params.temperature == 0) return pick_best(divided, r, 1);
        row.has_temperature = true;
        asked.inverse_temperature = problem::inverse_temperature(params.temperature);
        break;
      case SamplingStage::top_k:
        if (params.top_k_ties == TopKTies::keep_all) return end_row(divided, r, RowEnd::gathered);
        return pick_best(divided, r, params.top_k);
      case SamplingStage::top_p:
        if (params.top_p >= 1) break;
        if (!keeps_one) return end_row(divided, r, RowEnd::gathered);
        return ask(serves_nucleus(divided) ? ShardQuestion::nucleus : ShardQuestion::bins);
      case SamplingStage::min_p: {
        if (!keeps_one) return end_row(divided, r, RowEnd::gathered);
        const auto before = asked.band.lo;
        narrow_to_weight(divided, r, params.min_p, 0.0);
        if (asked.band.lo == before) break;
        return ask(ShardQuestion::count);
      }
      case SamplingStage::epsilon_cutoff:
      case SamplingStage::eta_cutoff:
        return keeps_one ? ask(ShardQuestion::weights) : end_row(divided, r, RowEnd::gathered);
      case SamplingStage::mirostat:
        return params.mirostat == 2 ? ask(ShardQuestion::weights)
                                    : end_row(divided, r, RowEnd::gathered);
      case SamplingStage::top_n_sigma:
        return ask(ShardQuestion::deviations);
      case SamplingStage::xtc:
        if (!divided.sampling.excludes(r)) break;
        return end_row(divided, r, RowEnd::gathered);
      default:
        if (params.order[row.stage] > SamplingStage::function)
          return end_row(divided, r, RowEnd::gathered);  // typical_p, top_h
    }
  }
  ask(ShardQuestion::weights);
}

/// The stage has narrowed the band: few tokens end the row.
template <typename Rows>
void take_count(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& asked = divided.asked[r];
  if (answers.sum(r, 0) != answers.sum(r, 1)) return end_row(divided, r, RowEnd::gathered);
  ++divided.rows[static_cast<std::size_t>(r)].stage;
  if (answers.sum(r, 0) > static_cast<double>(problem::ShardLimits::few(divided.sampling.vocab)))
    return walk_stages(divided, r);
  asked.pick = problem::ShardPick::in_play;
  asked.reach = std::numeric_limits<double>::infinity();
  for (int rank = 0; rank < divided.ranks(); ++rank)
    divided.counts[r * divided.ranks() + rank] = static_cast<Index>(answers.of(rank, r, 0));
  end_row(divided, r, RowEnd::candidates);
}

/// Top-p has narrowed the band.
template <typename Rows>
void take_nucleus(Rows& divided, Index r) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const SamplingOrder& order = divided.params_of(r).order;
  const bool is_last =
      std::all_of(order.begin() + static_cast<std::ptrdiff_t>(row.stage) + 1, order.end(),
                  [](SamplingStage stage) { return stage == SamplingStage::none; });
  if (is_last) {
    ++row.stage;
    return walk_stages(divided, r);
  }
  asked.sure = asked.band.lo;
  asked.question = problem::ShardQuestion::count;
}

/// The rank within whose weights the draw of a row lies, and where.
template <typename Rows>
void take_draw(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const bool draws = divided.sampling.generators != nullptr;
  const double target = draws ? divided.sampling.uniform(r) * row.total : 0.0;
  double before = 0;
  int rank = 0;
  for (; rank < divided.ranks() - 1; ++rank) {
    const double weight = answers.of(rank, r, 0);
    if (before + weight > target) break;
    before += weight;
  }
  asked.target = target - before;
  asked.before = before;
  asked.margin = divided.margin(row.total);
  row.drawn_by = rank;
  end_row(divided, r, RowEnd::drawn);
}

/// The band of a stage that keeps tokens from a share of the total weight on.
template <typename Rows>
void take_weights(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const problem::RowParams& params = divided.params_of(r);
  const double total = row.total = answers.sum(r, 0);
  const SamplingStage stage =
      row.stage < params.order.size() ? params.order[row.stage] : SamplingStage::none;
  if (stage == SamplingStage::none) return take_draw(divided, r, answers);
  double least = params.epsilon_cutoff;
  if (stage == SamplingStage::mirostat) least = std::exp2(-params.mirostat_mu);
  if (stage == SamplingStage::eta_cutoff) {
    const double entropy = std::log(total) - answers.sum(r, 1) / total, cutoff = params.eta_cutoff;
    least = (std::min)(cutoff, std::sqrt(cutoff) * std::exp(-entropy));
  }
  constexpr double error = 1e-10;
  // no token reaches it, or perhaps none
  if (least * total > 1 - error) return end_row(divided, r, RowEnd::gathered);
  const auto before = asked.band.lo;
  narrow_to_weight(divided, r, least * total, error);
  if (asked.sure == before) {
    ++row.stage;
    return walk_stages(divided, r);
  }
  asked.question = problem::ShardQuestion::count;
}

/// Where the tokens of top_p of the weight end, to a bin.
template <typename Rows>
void take_bins(Rows& divided, Index r, const ShardAnswers& answers) {
  constexpr Index bins = problem::ShardBins::count;
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  row.total = 0;
  for (Index bin = 0; bin < bins; ++bin) row.total += answers.sum(r, bin);
  const double target = (std::max)(divided.params_of(r).top_p, 0.0) * row.total,
               margin = divided.margin(row.total);
  double above = 0;
  Index last = 0;
  for (; last < bins; ++last) {
    const double reached = above + answers.sum(r, last);
    if (reached > target + margin) break;
    above = reached;
  }
  if (last == bins || (above > 0 && !(above + margin < target)))
    return end_row(divided, r, RowEnd::gathered);
  double count = 0;
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    double own = 0;
    for (Index bin = 0; bin <= last; ++bin) own += answers.of(rank, r, bins + bin);
    divided.counts[r * divided.ranks() + rank] = static_cast<Index>(own);
    count += own;
  }
  if (count > static_cast<double>(problem::ShardLimits::few(divided.sampling.vocab)))
    return end_row(divided, r, RowEnd::gathered);
  ++row.stage;
  row.ends_in_last_bin = true;
  row.above = above;
  asked.pick = problem::ShardPick::in_play;
  asked.reach =
      last + 1 < bins ? static_cast<double>(last + 1) : std::numeric_limits<double>::infinity();
  end_row(divided, r, RowEnd::candidates);
}

template <typename Rows>
void take_answer(Rows& divided, Index r, const ShardAnswers& answers) {
  using problem::ShardQuestion;
  auto& asked = divided.asked[r];
  const ShardQuestion question = asked.question;
  asked.question = ShardQuestion::none;
  if (question == ShardQuestion::count) take_count(divided, r, answers);
  if (question == ShardQuestion::weights) take_weights(divided, r, answers);
  if (question == ShardQuestion::bins) take_bins(divided, r, answers);
  if (question != ShardQuestion::deviations) return;
  const auto before = asked.band.lo;
  narrow_to_deviations(asked, divided.sampling.vocab, divided.params_of(r).top_n_sigma,
                       {answers.sum(r, 0), answers.sum(r, 1), answers.sum(r, 2)});
  if (asked.sure != before) {
    asked.question = ShardQuestion::count;
  } else {
    ++divided.rows[static_cast<std::size_t>(r)].stage;
    walk_stages(divided, r);
  }
}

// ---- the rounds ---------------------------------------------------------------------------------

/// Runs the stages that change logits, and says what is wrong with a row.
template <typename D, typename Rows>
void scan_shards(const D& device, Rows& divided) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(divided.given)>>;
  using C = typename Rows::C;
  Workspace::Frame frame(divided.workspace);
  const auto& sampling = divided.sampling;
  constexpr Index width = 4;
  constexpr double infinity = std::numeric_limits<double>::infinity();
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
    for (Index number = 0; number < width && row.status == SampleStatus::ok; number += 2) {
      hi = -infinity;
      for (int rank = 0; rank < divided.ranks(); ++rank)
        hi = (std::max)(hi, answers.of(rank, r, number));
      if (number == 0) row.given_best = hi;
      row.status = answers.sum(r, number + 1) > 0 ? SampleStatus::nan
                   : hi == infinity               ? SampleStatus::positive_infinity
                   : hi == -infinity              ? SampleStatus::no_token
                                                  : SampleStatus::ok;
    }
    const problem::RowParams& params = divided.params_of(r);
    divided.asked[r] = {};
    auto& asked = divided.asked[r];
    asked.band = {static_cast<C>(hi), std::numeric_limits<C>::lowest(), sampling.vocab};
    asked.inverse_temperature = 1;
    if (row.status != SampleStatus::ok) {
      end_row(divided, r, RowEnd::bad);
    } else if (problem::looks_at_all_logits(params)) {
      end_row(divided, r, RowEnd::gathered);
    } else {
      walk_stages(divided, r);
    }
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
  DividedRows<T, Comm> divided{sampling, communicator, workspace, given, {}, {}, nullptr, nullptr};
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
  divided.weighs_in_float = CpuDevice<D>;
  scan_shards(device, divided);
  return divided;
}

template <typename D, typename Rows>
void settle_rows(const D& device, Rows& divided) {
  using C = typename Rows::C;
  for (;;) {
    settle_nuclei(device, divided);
    Workspace::Frame frame(divided.workspace);
    Index width = 0;
    for (Index r = 0; r < divided.shard.rows; ++r)
      width = (std::max)(width, numbers_of(divided.asked[r].question));
    if (width == 0) return;
    double* const own = frame.take<double>(divided.shard.rows * width);
    detail::run(device, problem::AskShard<C>{divided.shard, divided.asked, own, width},
                divided.workspace);
    const ShardAnswers answers = divided.exchange(own, width, frame);
    for (Index r = 0; r < divided.shard.rows; ++r) take_answer(divided, r, answers);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "divided_nucleus.h"
