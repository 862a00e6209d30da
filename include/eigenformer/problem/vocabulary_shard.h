/// \file
/// What a rank is asked about its shard of the logits of a language-model head: numbers, candidates
/// and single tokens, row by row. The ranks' answers travel, the logits stay.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "sampling.h"
#include "sampling_rules.h"
#include "shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// What is asked about a row; beside it the numbers of an answer, sums over the tokens in play.
enum class ShardQuestion : std::uint8_t {
  none,        // nothing
  count,       // tokens; those of logit `sure` or more
  weights,     // weights; weight * (logit - best) / temperature
  masses,      // weights by floats; what they are wrong by at most, 0 where that is not known
  deviations,  // tokens; logit - best; its square
  bins,        // the terms, then the tokens of each of ShardBins
  nucleus,     // not asked so, but as vocabulary_nucleus.h says
  bounds,      // the least and the greatest key of those asked, in halves; of none the reverse
  keys,        // the terms, then the tokens of each of ShardKeys
  listed,      // the logits whose keys are asked, -infinity after the last
  extent,      // of those logits the least, its last token, the largest; of none infinity, -1, less
  best,        // the `most` best logits, -infinity after the last
  place,       // of the tokens of logit `value` number `nth`, from 1 on, plus 1; 0 where nth is 0
  sums         // what SumShard says of `sum`
};

/// What is summed over the tokens in play with the bits of the whole row.
enum class ShardSum : std::uint8_t {
  weights,
  moments,     // weights, and weight * (logit - best) / temperature
  deviations,  // logit - best
  squares      // of (logit - best) - mean
};

/// Tokens are binned by their distance from the best logit, or from the mean, in halves of a nat;
/// the last bin has all that are farther.
struct ShardBins {
  static constexpr Index count = 64;
  EIGENFORMER_INLINE static constexpr double distance(double logit, double best,
                                                      double inverse_temperature) {
    return (best - logit) * inverse_temperature * 2;
  }
};

/// Tokens in the order in which a filter takes them, by a whole number, the least first. Those of
/// an interval fall in bins of equal widths, of logits or distances.
struct ShardKeys {
  static constexpr Index bins = ShardBins::count;
  static constexpr Index listed = 128;  // so many logits of a shard are listed
  static constexpr Index halves = 4;    // numbers of the bounds
};

/// What is summed of tokens.
enum class ShardTerm : std::uint8_t {
  unit,
  weight,
  surprise  // weight * -log(probability), 0 where the weight is
};

/// What kernels of sampling do with a row of `vocab` tokens: so many have a maximum of their own,
/// and so few left by a filter are listed.
struct ShardLimits {
  static constexpr Index block = 128;
  EIGENFORMER_INLINE static constexpr Index few(Index vocab) {
    return vocab < 4096 ? vocab : vocab / 8;
  }
};

/// The candidates that a rank sends of a row.
enum class ShardPick : std::uint8_t {
  none,
  best,    // the `most` best in play, or all of the shard where it has fewer tokens
  in_play  // those in play nearer to the best logit than `reach` bins
};

template <typename C>
struct ShardRow {
  ShardQuestion question;
  ShardPick pick;
  Band<C> band;  // of the whole row: hi is its best logit, lo_end a token of the whole vocabulary
  C sure;
  double inverse_temperature;
  double reach;
  Index most;
  double target, margin, before;  // of a draw: in weights of the shard; `before`: of earlier shards
  // of questions about keys: those from `first` to `last`
  std::uint64_t first, last;
  ShardTerm term;
  bool by_distance;  // to the mean, else the largest logit comes first
  double per_unit;   // bins of keys, of logits or distances
  double mean, log_total;
  ShardSum sum;
  C value;
  Index nth;

  /// (logit - best) / temperature
  EIGENFORMER_INLINE double exponent(C logit) const {
    return (static_cast<double>(logit) - static_cast<double>(band.hi)) * inverse_temperature;
  }
  /// Where by_distance: from the mean.
  EIGENFORMER_INLINE double from_mean(C logit) const {
    return (std::min)(0.0, exponent(logit)) - mean;
  }
  EIGENFORMER_INLINE std::uint64_t key(C logit) const {
    using Key = decltype(order_key(logit));
    if (!by_distance) return (std::numeric_limits<Key>::max)() - order_key(logit);
    return std::bit_cast<std::uint64_t>(std::abs(from_mean(logit)));
  }
  /// In bins.
  EIGENFORMER_INLINE double distance(C logit) const {
    return by_distance ? std::abs(from_mean(logit)) * 2
                       : ShardBins::distance(static_cast<double>(logit),
                                             static_cast<double>(band.hi), inverse_temperature);
  }
  /// From that of the first key asked, never negative.
  EIGENFORMER_INLINE double from_first(C logit) const {
    return by_distance ? std::abs(from_mean(logit)) - std::bit_cast<double>(first)
                       : static_cast<double>(logit_of(first)) - static_cast<double>(logit);
  }
  /// Of a key of the order by logits.
  EIGENFORMER_INLINE C logit_of(std::uint64_t of) const {
    using Key = decltype(order_key(value));
    return number_of_key(static_cast<Key>((std::numeric_limits<Key>::max)() - of));
  }
  EIGENFORMER_INLINE double term_of(C logit, double weight) const {
    if (term == ShardTerm::unit) return 1;
    return term == ShardTerm::weight || weight == 0 ? weight
                                                    : weight * (log_total - exponent(logit));
  }
};

/// The band from the least number whose weight is `least`, which may be wrong by `error` of itself;
/// `sure` is where it begins at the latest. Reads no logits.
template <typename C>
struct NarrowToWeight {
  ShardRow<C>& row;
  Index vocab;
  double least, error;
};

/// The band of top_n_sigma, from the variance of the logits in play. Reads no logits.
template <typename C>
struct NarrowToDeviations {
  ShardRow<C>& row;
  Index vocab;
  double deviations, variance;
};

/// A token that travels.
template <typename C>
struct ShardCandidate {
  // as wide as the logit: no padding
  using Token = std::conditional_t<sizeof(C) == 8, std::int64_t, std::int32_t>;
  static constexpr Token kNone = -1;
  C logit;
  Token token;  // in the whole vocabulary
};

/// A rank's shard of all rows, in its memory, in the compute type of the logits.
template <typename C>
struct ShardLogits {
  C* logits;          // (rows, shard.size()), after the stages that change logits
  C* block_max;       // (rows, blocks)
  double* block_sum;  // (rows, blocks): what `weights` and `masses` leave there
  Index rows, blocks;
  ShardRange shard;
};

/// Runs the stages that change logits, of rows that have none that looks at all of them. An answer
/// is the largest logit, and 1 where there is a NaN: of those given, then of the others.
template <typename T>
struct ScanShard {
  const T* given;  // (rows, shard.size()); may be the logits below, where nothing changes them
  ShardLogits<compute_type<T>> shard;
  const RowParams* params;
  Index params_stride;
  double* answers;  // (rows, 4)
};

/// Stages of a row, [begin, end) of its order, that change logits. The first may be one that looks
/// at all of them: what it sees of those of other ranks is in the logs of the sums of exponentials,
/// of the row and of the one that guides it.
struct ShardChange {
  Index row;
  std::size_t begin, end;
  double log_sum, log_sum_without;
};
template <typename T>
struct ChangeShard {
  const T* given;  // (rows, shard.size())
  ShardLogits<compute_type<T>> shard;
  const RowParams* params;
  Index params_stride;
  const ShardChange* changes;  // (count)
  Index count;
  double* answers;  // (count, 2): as those of ScanShard
  HostLogitFunction<compute_type<T>> function;
};

template <typename C>
struct AskShard {
  ShardLogits<C> shard;
  const ShardRow<C>* rows;
  const Index* begin;  // (rows + 1) of the row's answer
  double* answers;
};

template <typename C>
struct PickFromShard {
  ShardLogits<C> shard;
  const ShardRow<C>* rows;
  const Index* begin;  // (rows) of the row's candidates
  const Index* count;  // (rows) of them; missing ones are kNone
  ShardCandidate<C>* candidates;
};

/// The token of each row at which the running sum of weights passes `target`, where it does so
/// whatever errors up to `margin` the sums have.
template <typename C>
struct DrawFromShard {
  static constexpr std::int32_t kOpen = -1;
  ShardLogits<C> shard;
  const ShardRow<C>* rows;
  const bool* asked;     // (rows)
  std::int32_t* tokens;  // (rows), kOpen where nobody asked too
};

/// A token among the best of a shard by its logit as given.
template <typename C>
struct ShardScore {
  C given, logit;  // `logit`: after the stages that change logits, -infinity for one out of play
  typename ShardCandidate<C>::Token token;
};

/// What log-probabilities of a row are made of.
template <typename T>
struct ScoreShard {
  const T* given;  // (rows, shard.size())
  ShardLogits<compute_type<T>> shard;
  const ShardRow<compute_type<T>>* rows;
  const double* given_best;  // (rows) of all shards; nullptr: of the logits in play alone
  const bool* asked;         // (rows)
  double* answers;  // (rows, 4): the sum of the weights below 1 and the number of those that are 1,
                    // of the logits as given and of those in play
  Index best;       // at most shard.size()
  ShardScore<compute_type<T>>* scores;  // (rows, best), best first, equals by index
};

/// answers[r]: tokens of larger logit than `logits[r]`, as given.
template <typename T>
struct RankInShard {
  const T* given;  // (rows, size)
  Index rows, size;
  const double* logits;  // (rows)
  double* answers;       // (rows)
};

/// A draw, where there are generators, and log-probabilities in the distributions of all rows.
template <typename T>
struct ScoreTokens {
  Sampling<T> sampling;
  const std::int32_t* tokens;  // (batch, count)
  Index count;
  float *drawn, *scores;  // (batch) of the token drawn, (batch, count)
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
