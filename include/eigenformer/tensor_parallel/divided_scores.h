/// \file
/// Log-probabilities of divided rows (divided_rows.h). Each is a float, and counts only where the
/// sums of the ranks, in whatever order they were added, round to it; else, by estimate for two
/// numbers in 10^5, it is of the sums of the whole row.
#pragma once

#include "divided_ends.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// The log of a sum of weights of which the best is 1, and what it may be wrong by.
struct LogTotal {
  double value, error = 0;
  bool is_exact = false;
  /// With the bits of the whole row.
  explicit LogTotal(double log_total) : value(log_total), is_exact(true) {}
  /// `below`: of the weights below 1; `ones`: the number of those that are 1.
  LogTotal(double below, double ones, double relative_error) {
    const double rest = below + (ones - 1.0);
    value = std::log1p(rest);
    error = relative_error * rest / (1.0 + rest) + 4e-16 * value;
  }
  /// The log-probability of a logit; `certain` becomes false where its last bit is open.
  template <typename C>
  float of(C logit, C best, double inverse_temperature, bool& certain) const {
    if (!(logit > -std::numeric_limits<C>::infinity()))
      return -std::numeric_limits<float>::infinity();
    const double log =
        (static_cast<double>(logit) - static_cast<double>(best)) * inverse_temperature - value;
    const double doubt = is_exact ? 0.0 : error + 4e-16 * std::abs(log);
    const float low = static_cast<float>(log - doubt), high = static_cast<float>(log + doubt);
    certain = certain && low == high;
    return low;
  }
};

/// What ranks say of their shards for log-probabilities, gathered.
template <typename C>
struct ShardScores {
  ShardAnswers sums;                   // (ranks, rows, 4)
  const problem::ShardScore<C>* best;  // (rows, count): of the whole row, best first
  Index count;

  LogTotal of_given(Index r, double relative_error) const {
    return {sums.sum(r, 0), sums.sum(r, 1), relative_error};
  }
  LogTotal in_play(Index r, double relative_error) const {
    return {sums.sum(r, 2), sums.sum(r, 3), relative_error};
  }
};

inline bool is_scored(const DividedRow& row) {
  return row.end == RowEnd::drawn || row.end == RowEnd::candidates;
}

/// Asks the shards for sums of weights and their best tokens, of which `count` of the row are kept;
/// count -1: for the weights in play alone.
template <typename D, typename Rows>
ShardScores<typename Rows::C> score_shards(const D& device, Rows& divided, Index count,
                                           Workspace::Frame& frame) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(divided.given)>>;
  using Score = problem::ShardScore<typename Rows::C>;
  const Index rows = divided.shard.rows;
  const int ranks = divided.ranks();
  double *const own = frame.take<double>(4 * rows), *const given_best = frame.take<double>(rows);
  bool* const asked = frame.take<bool>(rows);
  for (Index r = 0; r < rows; ++r) {
    const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    asked[r] = is_scored(row);
    given_best[r] = row.given_best;
  }
  const auto best_of = [&](int rank) {
    return std::clamp<Index>(count, 0, divided.shard_of(rank).size());
  };
  const std::span<Index> sizes(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  Index all = 0;
  for (int rank = 0; rank < ranks; ++rank)
    all += sizes[static_cast<std::size_t>(rank)] = rows * best_of(rank);
  const Index own_best = best_of(divided.communicator.rank());
  Score *const scores = frame.take<Score>(rows * own_best), *const parts = frame.take<Score>(all);
  std::fill(scores, scores + rows * own_best, Score{});
  detail::run(
      device,
      problem::ScoreShard<T>{divided.given, divided.shard, divided.asked,
                             count < 0 ? nullptr : given_best, asked, own, own_best, scores},
      divided.workspace);
  const ShardAnswers sums = divided.exchange(own, 4, frame);
  if (count <= 0) return {sums, nullptr, 0};
  divided.communicator.all_gather(
      std::span<const Score>(scores, static_cast<std::size_t>(rows * own_best)),
      std::span<Score>(parts, static_cast<std::size_t>(all)), std::span<const Index>(sizes));
  Score *const best = frame.take<Score>(rows * count), *const row = frame.take<Score>(all);
  for (Index r = 0; r < rows; ++r) {
    Score* end = row;
    const Score* part = parts;
    for (int rank = 0; rank < ranks; part += rows * best_of(rank++))
      end = std::copy_n(part + r * best_of(rank), best_of(rank), end);
    std::partial_sort(row, row + count, end, [](const Score& a, const Score& b) {
      return a.given > b.given || (a.given == b.given && a.token < b.token);
    });
    std::copy_n(row, count, best + r * count);
  }
  return {sums, best, count};
}

/// write(r, log total of the logits as given, of those in play) writes a row's and says whether all
/// are certain; rows of which some are not are written again.
template <typename D, typename Rows, typename Write>
void write_scores(const D& device, Rows& divided, const ShardScores<typename Rows::C>& scores,
                  Write&& write) {
  using C = typename Rows::C;
  Workspace::Frame frame(divided.workspace);
  const double error = divided.margin(1.0);
  Index* const open = frame.take<Index>(divided.shard.rows);
  Index count = 0;
  for (Index r = 0; r < divided.shard.rows; ++r)
    if (is_scored(divided.rows[static_cast<std::size_t>(r)]) &&
        !write(r, scores.of_given(r, error), scores.in_play(r, error)))
      open[count++] = r;
  if (count == 0) return;
  const std::span<const Index> which(open, static_cast<std::size_t>(count));
  const SummedRows<Rows> of_given(device, divided, divided.given, rows_as_given(divided, frame),
                                  which, problem::ShardSum::weights, frame),
      in_play(device, divided, static_cast<const C*>(divided.shard.logits), divided.asked, which,
              problem::ShardSum::weights, frame);
  for (Index i = 0; i < count; ++i)
    write(open[i], LogTotal(of_given.sums(i).log_total), LogTotal(in_play.sums(i).log_total));
}

/// The logits of one token of each row, `width` numbers of it, from the rank that has it:
/// write(place in the shard, numbers).
template <typename Rows, typename Write>
const double* numbers_of_tokens(Rows& divided, const std::int32_t* tokens, Index width,
                                Workspace::Frame& frame, Write&& write) {
  const Index rows = divided.shard.rows;
  const ShardRange shard = divided.shard.shard;
  double *const own = frame.take<double>(rows * width), *const all =
                                                            frame.take<double>(rows * width);
  std::fill(own, own + rows * width, 0.0);
  for (Index r = 0; r < rows; ++r)
    if (tokens[r] >= shard.begin && tokens[r] < shard.end)
      write(r, tokens[r] - shard.begin, own + r * width);
  const ShardAnswers answers = divided.exchange(own, width, frame);
  std::fill(all, all + rows * width, 0.0);
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    const ShardRange there = divided.shard_of(rank);
    for (Index r = 0; r < rows; ++r)
      if (tokens[r] >= there.begin && tokens[r] < there.end)
        for (Index i = 0; i < width; ++i) all[r * width + i] = answers.of(rank, r, i);
  }
  return all;
}

/// The logit of a token of the shard in play, as a double; -infinity where it is out.
template <typename C>
double logit_in_play(const problem::ShardLogits<C>& shard, const problem::ShardRow<C>& asked,
                     Index r, Index place) {
  const C logit = shard.logits[r * shard.shard.size() + place];
  return asked.band.contains(logit, shard.shard.begin + place)
             ? static_cast<double>(logit)
             : -std::numeric_limits<double>::infinity();
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
