/// \file
/// Divided rows of logits that stay where they are, on a GPU: temperature, top_k, top_p and min_p
/// in any order, and the draw, from numbers that every rank says of its shard
/// (problem/vocabulary_rows.h), 128 bytes of a row and rank in each round; a filter takes up to 10
/// of 4 bits of a key each, a draw two. As in divided_rows.h a decision counts only where no error
/// that sums of ranks may have could change it. Where one could, or a row has another stage, the
/// caller takes all rows to the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "../core/token_weight.h"
#include "../problem/vocabulary_rows.h"
#include "divided_rows.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Whether every stage of a row is one of these.
inline bool stays_on_device(const problem::RowParams& params) {
  return std::all_of(params.order.begin(), params.order.end(), [&](SamplingStage stage) {
    switch (stage) {
      case SamplingStage::none:
        return true;
      case SamplingStage::temperature:
        return params.dynatemp_range == 0;
      case SamplingStage::top_k:
        return params.top_k_ties == TopKTies::lowest_index;
      case SamplingStage::top_p:
      case SamplingStage::min_p:
        return params.min_tokens_to_keep == 1;
      default:
        return false;
    }
  });
}

/// A row and where it is in its chain, the same on all ranks.
struct DeviceRow {
  SampleStatus status = SampleStatus::ok;
  bool is_open = false;   // errors of sums leave something of it open
  std::size_t stage = 0;  // place in the order
  bool has_total = false;
  // of a filter: the weight that it keeps, that of all tokens, and what comes before its end
  double target = 0, total = 0, above = 0;
  std::int32_t token = -1;
};

template <typename D, typename T, typename Comm>
struct DeviceRows {
  using C = compute_type<T>;
  using Question = problem::RowQuestion;
  static constexpr int digit_bits = 4, digits = 1 << digit_bits;

  const D& device;
  const problem::Sampling<T>& sampling;  // of the whole; its logits are not read
  Comm& communicator;
  Workspace& workspace;
  const T* logits;  // (rows, shard) of the device
  ShardRange shard;
  DeviceRow* rows;
  problem::RowAsked<C>* asked;  // (rows)

  DeviceRows(const D& on, const problem::Sampling<T>& whole, const T* own, Comm& ranks,
             Workspace& memory, Workspace::Frame& frame)
      : device(on),
        sampling(whole),
        communicator(ranks),
        workspace(memory),
        logits(own),
        shard(problem::shard_of(whole.vocab, ranks.rank(), ranks.size())),
        rows(frame.take<DeviceRow>(whole.batch)),
        asked(frame.take<problem::RowAsked<C>>(whole.batch)) {}

  Index count() const { return sampling.batch; }
  double margin(double total) const { return margin_of_sums(total, sampling.vocab); }

  /// The best logit of every row, and what is wrong with it.
  void scan() {
    Workspace::Frame frame(workspace);
    const auto gathered =
        gather_best_candidates(device, logits, count(), sampling.vocab, 1, communicator, frame);
    for (Index r = 0; r < count(); ++r) {
      rows[r] = {};
      asked[r] = {};
      rows[r].status = best_of_ranks(gathered.all, count(), r, rows[r].token);
      double best = -std::numeric_limits<double>::infinity();
      gathered.for_each(r, [&](const auto& each) { best = (std::max)(best, each.logit); });
      asked[r].given_best = static_cast<C>(best) + C(0);
      asked[r].band = {asked[r].given_best, std::numeric_limits<C>::lowest(), sampling.vocab};
      asked[r].inverse_temperature = 1;
      if (rows[r].status == SampleStatus::ok) walk(r);
    }
  }

  void give_up(Index r) {
    rows[r].is_open = true;
    asked[r].question = Question::none;
  }

  /// The end of the shortest prefix by logit and index that weighs so much.
  void select(Index r, bool counts, double share) {
    rows[r].target = share;
    rows[r].has_total = false;
    rows[r].above = 0;
    asked[r].question = Question::digits;
    asked[r].counts = counts;
    asked[r].prefix = 0;
    asked[r].shift = 8 * static_cast<int>(sizeof(C)) - digit_bits;
  }

  /// Goes on until the shards have to be asked, or the row ends.
  void walk(Index r) {
    const problem::RowParams& params = sampling.params_of(r);
    for (; rows[r].stage < params.order.size(); ++rows[r].stage) {
      switch (params.order[rows[r].stage]) {
        case SamplingStage::temperature:
          if (params.temperature == 0) return select(r, true, 1);
          asked[r].inverse_temperature = problem::inverse_temperature(params.temperature);
          break;
        case SamplingStage::top_k:
          return select(r, true, static_cast<double>(params.top_k));
        case SamplingStage::top_p:
          if (params.top_p >= 1) break;
          return select(r, false, (std::max)(params.top_p, 0.0));
        case SamplingStage::min_p:
          narrow_to_weight(r, params.min_p);
          break;
        default:
          break;
      }
    }
    asked[r].question = sampling.generators == nullptr ? Question::none : Question::weight;
  }

  void narrow_to_weight(Index r, double least) {
    problem::ShardRow<C> row{};
    row.band = asked[r].band;
    row.inverse_temperature = asked[r].inverse_temperature;
    detail::run(Eigen::DefaultDevice{}, problem::NarrowToWeight<C>{row, sampling.vocab, least, 0.0},
                workspace);
    asked[r].band = row.band;
  }

  void end_filter(Index r) {
    ++rows[r].stage;
    walk(r);
  }

  void take_digits(Index r, const ShardAnswers& answers) {
    DeviceRow& row = rows[r];
    auto& ask = asked[r];
    if (!row.has_total) {
      row.has_total = true;
      row.total = 0;
      for (Index digit = 0; digit < digits; ++digit) row.total += answers.sum(r, digit);
      if (!ask.counts) row.target *= row.total;
      if (ask.counts && row.target >= row.total) return end_filter(r);  // keeps all
    }
    const double error = ask.counts ? 0.0 : margin(row.total);
    Index digit = digits - 1;
    double reached = row.above;
    for (; digit >= 0; --digit) {
      const double mass = answers.sum(r, digit);
      if (mass == 0) continue;
      row.above = reached;
      reached += mass;
      if (reached >= row.target) break;
    }
    const bool before_it = row.above == 0 || row.above + error < row.target,
               within = ask.counts ? reached >= row.target : reached > row.target + error;
    if (digit < 0 || !before_it || !within) return give_up(r);
    ask.prefix |= static_cast<std::uint64_t>(digit) << ask.shift;
    if (ask.shift == 0)
      ask.question = Question::equals;
    else
      ask.shift -= digit_bits;
  }

  void take_equals(Index r, const ShardAnswers& answers) {
    DeviceRow& row = rows[r];
    auto& ask = asked[r];
    const auto value = static_cast<C>(answers.of(0, r, 1));
    const double best = static_cast<double>(ask.band.hi),
                 each = ask.counts ? 1.0
                                   : token_weight(static_cast<double>(value), best,
                                                  ask.inverse_temperature),
                 error = ask.counts ? 0.0 : margin(row.total);
    const auto equals = static_cast<Index>(answers.sum(r, 0));
    const Index taken = problem::equals_taken(row.above, each, equals, row.target);
    const bool is_first = row.above == 0 && taken == 1;  // which stays whatever it weighs
    const double reached = row.above + static_cast<double>(taken) * each,
                 before = row.above + static_cast<double>(taken - 1) * each;
    if (!ask.counts &&
        (!(is_first || before + error < row.target) || !(reached > row.target + error)))
      return give_up(r);
    const bool is_higher = value > ask.band.lo;
    ask.band.lo = value;
    if (taken == equals) {
      if (is_higher) ask.band.lo_end = sampling.vocab;
      return end_filter(r);
    }
    ask.question = Question::place;
    ask.value = value;
    ask.nth = last_of_rank(taken, communicator.rank(),
                           [&](int rank) { return static_cast<Index>(answers.of(rank, r, 0)); });
  }

  void take_place(Index r, const ShardAnswers& answers) {
    asked[r].band.lo_end = static_cast<Index>(answers.sum(r, 0));
    end_filter(r);
  }

  /// The rank within whose weights the draw lies, and where.
  void take_weight(Index r, const ShardAnswers& answers) {
    auto& ask = asked[r];
    double total = 0, before = 0;
    for (int rank = 0; rank < communicator.size(); ++rank) total += answers.of(rank, r, 0);
    const double target = sampling.uniform(r) * total;
    int rank = 0;
    for (; rank < communicator.size() - 1; before += answers.of(rank++, r, 0))
      if (before + answers.of(rank, r, 0) > target) break;
    ask.question = Question::token;
    ask.nth = rank == communicator.rank() ? 1 : 0;
    ask.target = target - before;
    ask.margin = margin(total);
    ask.is_first = before == 0;
  }

  void take_token(Index r, const ShardAnswers& answers) {
    rows[r].token = static_cast<std::int32_t>(answers.sum(r, 0)) - 1;
    asked[r].question = Question::none;
    if (rows[r].token < 0) give_up(r);
  }

  void take_answer(Index r, const ShardAnswers& answers) {
    switch (asked[r].question) {
      case Question::digits:
        return take_digits(r, answers);
      case Question::equals:
        return take_equals(r, answers);
      case Question::place:
        return take_place(r, answers);
      case Question::weight:
        return take_weight(r, answers);
      case Question::token:
        return take_token(r, answers);
      default:
        return;
    }
  }

  ShardAnswers ask_all(Workspace::Frame& frame) const {
    constexpr Index numbers = problem::AskRows<T>::numbers;
    double* const own = frame.take<double>(count() * numbers);
    detail::run(device, problem::AskRows<T>{logits, count(), shard, asked, own});
    return gather_answers(communicator, own, count(), numbers, frame);
  }

  /// Runs all chains; false where something is left open.
  bool settle() {
    scan();
    const auto is_asked = [](const auto& row) { return row.question != Question::none; };
    while (std::any_of(asked, asked + count(), is_asked)) {
      Workspace::Frame frame(workspace);
      const ShardAnswers answers = ask_all(frame);
      for (Index r = 0; r < count(); ++r) take_answer(r, answers);
    }
    return std::none_of(rows, rows + count(), [](const auto& row) { return row.is_open; });
  }
};

/// Whether all rows of a batch may be served so.
template <typename T>
bool stay_on_device(const problem::Sampling<T>& sampling) {
  for (Index r = 0; r < (sampling.params_stride == 0 ? 1 : sampling.batch); ++r)
    if (!stays_on_device(sampling.params[r])) return false;
  return true;
}

/// The tokens of all rows, whose logits are the device's; false, and nothing written, where they
/// have to be taken to the host.
template <typename D, typename T, typename C>
bool sample_on_device(const D& device, const problem::Sampling<T>& sampling, const T* logits,
                      C& communicator, Workspace& workspace) {
  if (!stay_on_device(sampling)) return false;
  Workspace::Frame frame(workspace);
  DeviceRows<D, T, C> rows(device, sampling, logits, communicator, workspace, frame);
  if (!rows.settle()) return false;
  for (Index r = 0; r < sampling.batch; ++r)
    sampling.finish(r, rows.rows[r].status == SampleStatus::ok ? rows.rows[r].token : -1,
                    rows.rows[r].status);
  return true;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
