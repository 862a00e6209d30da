/// \file
/// What the stages of a row make of few of its logits, and its token mask. The row stays where it
/// lies: the words of the mask are applied whenever a block is loaded (block_logits), a block that
/// holds changed logits is copied and changed when it is first loaded, or at once where filters
/// will read all blocks, and of the maxima only those are computed again whose token fell.
/// O(history), and nothing the size of the vocabulary is copied, cleared or read again.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>

#include "../../problem/sampling_rules.h"
#include "../../problem/shards.h"
#include "../vector/functions.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::penalized_logit;

struct SamplingBlock {
  static constexpr Index size = 128;  // 512 bytes of float: 1002 maxima for a vocabulary of 128256
};

/// One bit for each of the 128 tokens of a block.
struct BlockBits {
  std::uint64_t word[2] = {0, 0};
  /// The bits of a vector, of which the first token is `at`.
  EIGENFORMER_INLINE void add(Index at, std::uint32_t bits) {
    word[at / 64] |= std::uint64_t{bits} << (at % 64);
  }
  int count() const { return std::popcount(word[0]) + std::popcount(word[1]); }
  bool all() const { return (word[0] & word[1]) == ~std::uint64_t{0}; }
  /// The bits of a vector as its mask.
  template <typename V>
  EIGENFORMER_INLINE auto mask(Index at) const {
    return V::mask_of(static_cast<std::uint32_t>(word[at / 64] >> (at % 64)));
  }

  /// The `n`th set bit, 1 for the first.
  Index nth(int n) const {
    const int low = std::popcount(word[0]);
    std::uint64_t bits = n <= low ? word[0] : word[1];
    const Index base = n <= low ? 0 : 64;
    for (n -= n <= low ? 1 : low + 1; n > 0; --n) bits &= bits - 1;
    return base + std::countr_zero(bits);
  }

  /// Calls f(j) for every set bit, in order.
  template <typename F>
  EIGENFORMER_INLINE void for_each(F&& f) const {
    for (int w = 0; w < 2; ++w)
      for (std::uint64_t bits = word[w]; bits != 0; bits &= bits - 1)
        f(Index{64} * w + std::countr_zero(bits));
  }
};

// Of a block: as the row has it; masked when it is loaded; copied, with its changes.
inline constexpr std::int32_t kNoChange = -1, kMasked = -2, kCopied = -3;

template <typename C>
struct ChangedLogit {
  std::int32_t token;
  std::int32_t next;         // of the same block, or negative
  std::int32_t occurrences;  // in the output that penalties see; -1: not in the history
  C given, value;            // before and after
};

template <typename C>
struct LogitChanges {
  ChangedLogit<C>* list;   // (capacity)
  std::int32_t* places;    // (2 * capacity or more, a power of two) the list by hash of the token
  std::int32_t* first;     // (blocks) the first change of each block, or one of the above
  C* logits;               // (vocab, rounded up to blocks) copied blocks, where the row has them
  std::int32_t* relevant;  // (capacity) tokens of the history (relevant.h)
  Index capacity;
  Index size = 0;
  int hash_shift = 0;
  std::span<const std::uint32_t> mask = {};  // empty: all tokens
  bool copied = false;                       // each block that has changes, and no mask

  /// The places for that many changes: at most half of them are taken.
  static Index places_for(Index capacity) {
    return static_cast<Index>(std::bit_ceil(static_cast<std::uint64_t>(capacity) * 2 + 2));
  }

  void start(Index most_changes) {
    size = 0;
    const Index count = places_for(most_changes);
    hash_shift = 64 - std::countr_zero(static_cast<std::uint64_t>(count));
    std::fill(places, places + count, -1);
  }

  /// The change of a token, a new one where there is none.
  template <typename T>
  EIGENFORMER_INLINE ChangedLogit<C>& of(const T* row, std::int32_t token) {
    const std::uint64_t last = ~std::uint64_t{0} >> hash_shift;
    for (std::uint64_t at = static_cast<std::uint64_t>(token) * 0x9E3779B97F4A7C15u >> hash_shift;;
         at = (at + 1) & last) {
      if (places[at] < 0) {
        const C given = static_cast<C>(row[token]);
        places[at] = static_cast<std::int32_t>(size);
        list[size] = {token, kNoChange, -1, given, given};
        return list[size++];
      }
      if (list[places[at]].token == token) return list[places[at]];
    }
  }

  /// Every distinct token of the history that lies in `own`, where the row begins, once.
  template <typename T>
  void penalize(const T* row, const ShardRange& own, const problem::RowParams& params,
                std::span<const std::int32_t> prompt, std::span<const std::int32_t> output) {
    const auto count = [&](std::span<const std::int32_t> tokens, std::int32_t each) {
      for (const std::int32_t token : tokens) {
        if (token < own.begin || token >= own.end) continue;
        ChangedLogit<C>& change = of(row, static_cast<std::int32_t>(token - own.begin));
        change.occurrences = (std::max)(change.occurrences, 0) + each;
      }
    };
    count(output, 1);
    count(prompt, 0);
    for (ChangedLogit<C>* change = list; change != list + size; ++change)
      if (change->occurrences >= 0)
        change->value = penalized_logit(change->value, change->occurrences, params);
  }

  template <typename T>
  void add(const T* row, const LogitBias& bias) {
    C& value = of(row, bias.token).value;
    value = static_cast<C>(static_cast<double>(value) + static_cast<double>(bias.bias));
  }

  bool allows(Index token) const {
    return mask.empty() || (mask[static_cast<std::size_t>(token / 32)] >> (token % 32) & 1u) != 0;
  }
  BlockBits allowed(Index block) const {
    constexpr Index words = SamplingBlock::size / 32;
    const std::uint32_t* const word = mask.data() + block * words;
    const auto both = [](std::uint32_t low, std::uint32_t high) {
      return std::uint64_t{low} | std::uint64_t{high} << 32;
    };
    if ((block + 1) * words <= static_cast<Index>(mask.size()))
      return {{both(word[0], word[1]), both(word[2], word[3])}};
    BlockBits bits;
    for (Index w = 0; block * words + w < static_cast<Index>(mask.size()); ++w)
      bits.add(32 * w, word[w]);
    return bits;
  }

  /// The logit of one token, of which the row has `given`.
  C logit(Index token, C given) const {
    if (!allows(token)) return -std::numeric_limits<C>::infinity();
    std::int32_t i = first[token / SamplingBlock::size];
    if (i == kCopied) return logits[token];
    while (i >= 0 && list[i].token != token) i = list[i].next;
    return i < 0 ? given : list[i].value;
  }
};

/// `given` where the mask allows, -infinity elsewhere, in `x`.
template <typename Isa, typename C>
void mask_block(const BlockBits& allowed, const C* given, C* x) {
  using V = simd::Vec<C, Isa>;
  const V none = V::set1(-std::numeric_limits<C>::infinity());
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes)
    select(allowed.template mask<V>(i), V::load(given + i), none).store(x + i);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
