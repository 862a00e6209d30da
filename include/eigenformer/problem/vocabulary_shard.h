/// \file
/// What a rank is asked about its shard of the logits of a language-model head: numbers, candidates
/// and single tokens, row by row. The ranks' answers travel, the logits stay.
#pragma once

#include <type_traits>

#include "sampling.h"
#include "shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// What is asked about a row; beside it the numbers of an answer, sums over the tokens in play.
enum class ShardQuestion : std::uint8_t {
  none,        // nothing
  count,       // tokens; those of logit `sure` or more
  weights,     // weights; weight * (logit - best) / temperature
  deviations,  // tokens; logit - best; its square
  bins,        // the weights, then the tokens of each of ShardBins
  nucleus      // not asked so, but as vocabulary_nucleus.h says
};

/// Weights are binned by their distance from the best one, in halves of a nat; the last bin has all
/// that are farther.
struct ShardBins {
  static constexpr Index count = 64;
  static constexpr double distance(double logit, double best, double inverse_temperature) {
    return (best - logit) * inverse_temperature * 2;
  }
};

/// What kernels of sampling do with a row of `vocab` tokens: so many have a maximum of their own,
/// and so few left by a filter are listed.
struct ShardLimits {
  static constexpr Index block = 128;
  static constexpr Index few(Index vocab) { return vocab < 4096 ? vocab : vocab / 8; }
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
};

/// The band from the least number whose weight is `least`, which may be wrong by `error` of itself;
/// `sure` is where it begins at the latest. Reads no logits.
template <typename C>
struct NarrowToWeight {
  ShardRow<C>& row;
  Index vocab;
  double least, error;
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
  double* block_sum;  // (rows, blocks): what the question `weights` leaves there
  Index rows, blocks;
  ShardRange shard;
};

/// Runs the stages that change the logits of a list or mask of tokens. An answer is the largest
/// logit, and 1 where there is a NaN: of those given, then of the others.
template <typename T>
struct ScanShard {
  const T* given;  // (rows, shard.size()); may be the logits below, where nothing changes them
  ShardLogits<compute_type<T>> shard;
  const RowParams* params;
  Index params_stride;
  double* answers;  // (rows, 4)
};

template <typename C>
struct AskShard {
  ShardLogits<C> shard;
  const ShardRow<C>* rows;
  double* answers;  // (rows, width)
  Index width;
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
