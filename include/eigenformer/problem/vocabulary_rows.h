/// \file
/// What a backend is asked about a rank's shard of rows of logits that it keeps: numbers, and no
/// logits but single ones. A filter's end is found by the digits of keys, 4 bits at a time, as in
/// cuda/sampling/filters.cuh, with the masses of all ranks in between.
#pragma once

#include "sampling_rules.h"
#include "shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Of the tokens in play unless said otherwise; beside it the numbers of an answer.
enum class RowQuestion : std::uint8_t {
  none,
  digits,  // the weights by the next digit of their key, of keys that begin with `prefix`
  equals,  // tokens whose key is `prefix`; that logit
  place,   // of all tokens of logit `value` number `nth`, from 1 on: it plus 1, 0 where nth is 0
  weight,  // their weight
  token,   // the one at which the running sum of weights passes `target`, plus 1; 0 where errors of
           // `margin` leave it open or nth is 0
  scores,  // the weights below 1 and the number of those that are 1: of all, of those in play
  logit,   // of `token`, and 1; 0 and 0 where it is not of the shard
  above    // all tokens of a logit above `value`
};

template <typename C>
struct RowAsked {
  RowQuestion question;
  Band<C> band;  // of the whole row
  double inverse_temperature;
  std::uint64_t prefix;  // of a key, its digits from `shift` on; below them 0
  int shift;
  bool counts;  // each token weighs 1
  C value, given_best;
  Index nth, token;       // token: of the whole vocabulary
  double target, margin;  // of the shard's weights
  bool is_first;          // no other weights come before them
};

template <typename T>
struct AskRows {
  static constexpr Index numbers = 16;
  const T* logits;  // (rows, shard.size())
  Index rows;
  ShardRange shard;
  const RowAsked<compute_type<T>>* asked;  // (rows)
  double* answers;                         // (rows, numbers), of the host
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
