/// \file
/// Sums over a divided vocabulary that have the bits of the whole row, and what ranks are asked
/// about their shards of draft and target probabilities. A sum of a row is made of blocks of 128
/// tokens, added from first to last: ranks send the sums of blocks that lie in their shard, and the
/// numbers of the few tokens whose block another rank shares.
#pragma once

#include <algorithm>

#include "sampling_params.h"
#include "shards.h"
#include "vocabulary_shard.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// What a rank sends of a sum over its shard, in the order of the tokens: numbers of tokens, sums
/// of blocks, numbers of tokens.
struct BlockParts {
  static constexpr Index block = ShardLimits::block;
  ShardRange shard;
  Index first, last;    // whole blocks [first, last) of the vocabulary
  Index before, after;  // tokens of the shard outside of them, fewer than 128 each

  EIGENFORMER_INLINE constexpr BlockParts(Index vocab, const ShardRange& own)
      : shard(own),
        first((own.begin + block - 1) / block),
        last((std::max)(first, own.end == vocab ? blocks_of(vocab) : own.end / block)),
        before((std::min)(own.size(), first * block - own.begin)),
        after(last > first ? (std::max)(Index{0}, own.end - last * block) : own.size() - before) {}

  EIGENFORMER_INLINE static constexpr Index blocks_of(Index vocab) {
    return (vocab + block - 1) / block;
  }
  EIGENFORMER_INLINE constexpr Index size() const { return before + (last - first) + after; }
  EIGENFORMER_INLINE constexpr bool holds(Index of_vocab) const {
    return of_vocab >= first && of_vocab < last;
  }
};

/// The sum of a row from the parts of all ranks, and the block in which a draw ends: u of the sum
/// comes before it or in it.
struct DrawnBlock {
  double total;
  Index block;  // -1 where the sum is 0 or not finite
  double before, target;
  std::int32_t token;  // the token drawn, where ranks share the block, else -1
};
struct JoinParts {
  Index vocab;
  int ranks;
  const double* const* parts;  // (ranks)
  double u;
  double* of_blocks;  // scratch, (blocks)
  DrawnBlock& result;
};

/// What the draft that is refused takes from the distributions of its place:
///
///   target = max(0, target * target_scale - draft * draft_scale), then draft[token] = 0
///
/// and of certain drafts target[token] = 0.
struct RefusedDraft {
  double target_scale, draft_scale;
  std::int32_t token;  // -1: the draft keeps it
};

/// This rank's shard of the distributions of a place, before its refused drafts.
template <typename Draft, typename Target>
struct PlaceInShard {
  const Target* target;  // (shard)
  const Draft* draft;    // (shard), or nullptr
  const RefusedDraft* refused;
  Index refused_count;
};

/// Of each place the status of its target, that of its draft, and the parts of the sum of what is
/// left of the target; where weighs_draft is set, then those of the draft.
template <typename Draft, typename Target>
struct WeighPlaces {
  const PlaceInShard<Draft, Target>* places;  // (count)
  const bool* weighs_draft;                   // (count)
  Index count, vocab;
  ShardRange shard;
  double* const* answers;  // (count)
};

/// The token at which the running sum of what is left of the target passes a limit, in a block that
/// lies in the shard.
template <typename Draft, typename Target>
struct FindInPlaces {
  const PlaceInShard<Draft, Target>* places;  // (count)
  const Index* blocks;                        // (count) -1: in another rank's shard
  const double *before, *targets;             // (count) the sum before the block, the limit
  Index count;
  ShardRange shard;
  std::int32_t* tokens;  // (count), -1 where it is not here
};

/// What a rank sends of a row for the sums over its tokens in play that SumShard is asked for.
struct ShardSums {
  Index parts;  // numbers of BlockParts
  ShardSum of;

  EIGENFORMER_INLINE constexpr Index size() const {
    return moments_at() + (of == ShardSum::moments ? parts : 0);
  }
  // the parts of the weights, or what is summed in their place, then
  EIGENFORMER_INLINE constexpr Index tokens_at() const { return parts; }
  EIGENFORMER_INLINE constexpr Index one_at() const {
    return parts + 1;
  }  // first whole block of a weight 1, or -1
  EIGENFORMER_INLINE constexpr Index beside_one_at() const {
    return parts + 2;
  }  // its sum without that weight
  EIGENFORMER_INLINE constexpr Index moments_at() const { return parts + 3; }
};
template <typename T>
struct SumShard {
  const T* logits;  // (rows, shard.size())
  Index vocab;
  ShardRange shard;
  const ShardRow<compute_type<T>>* rows;
  const Index* which;  // (count) the rows asked
  Index count;
  ShardSum of;
  double* answers;  // (count, ShardSums::size)
};

/// The sums of a row from the answers of all ranks.
struct JoinSums {
  Index vocab;
  int ranks;
  ShardSum of;
  const double* const* answers;  // (ranks)
  double &total, &moment, &log_total, &tokens;
};

/// The token at which the running sum of the weights in play passes the target of a draw, in a
/// block that lies in the shard.
template <typename C>
struct FindInShard {
  const C* logits;  // (rows, shard.size())
  ShardRange shard;
  const ShardRow<C>* rows;
  const Index* which;       // (count) the rows asked
  const DrawnBlock* drawn;  // (count) block -1: in another rank's shard
  Index count;
  std::int32_t* tokens;  // (count), -1 where it is not here
};

/// The probabilities of the rows that are asked, from the sums of their weights.
template <typename C>
struct SpreadShard {
  ShardLogits<C> shard;
  const ShardRow<C>* rows;
  const bool* asked;     // (rows)
  const double* totals;  // (rows)
  float* probabilities;  // (rows, shard.size()), 0 before
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
