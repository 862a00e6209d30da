/// \file
/// What tensor-parallel layers ask for, apart from their products.
#pragma once

#include <cstdint>

#include "shards.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// Gathered parts: part r is (tokens, size of shard r), parts follow each other in rank order.
template <typename T>
struct Interleave {
  const T* parts;
  T* rows;  // (tokens, features)
  Index tokens, features;
  int ranks;
};

/// A token that may be drawn. No padding: candidates travel between ranks as bytes.
struct VocabularyCandidate {
  static constexpr std::int64_t kNone = -1;      ///< the shard has no further token
  static constexpr std::int64_t kNan = -2;       ///< the shard's row holds NaN
  static constexpr std::int64_t kInfinity = -3;  ///< the shard's row holds +infinity and no NaN
  double logit;
  std::int64_t token;  // in the whole vocabulary
};

/// The best candidates of this rank's shard of the logits, best first, ties lowest token first:
/// into host memory, from where they travel to the other ranks.
template <typename T>
struct Vocabulary {
  const T* logits;                  // (rows, shard.size())
  VocabularyCandidate* candidates;  // (rows, kept)
  std::int32_t* order;              // scratch, (workers, shard.size()); unused where kept is 1
  Index rows, kept;                 // kept >= 1: missing ones are kNone
  ShardRange shard;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
