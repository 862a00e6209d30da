/// \file
/// From the dot products of a row with the keys of a block to its scores, and the keys of a block
/// that masks let it see (problem/score_rule.h).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../../problem/score_rule.h"
#include "../vector/functions.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// A key of a block for each bit, from the lowest on.
using KeyBits = std::uint64_t;
static_assert(kAttentionKeyBlock == 64);

inline KeyBits keys_between(int begin, int end) {
  const auto below = [](int key) { return key == 64 ? ~KeyBits{0} : (KeyBits{1} << key) - 1; };
  return below(end) & ~below(begin);
}

inline KeyBits keys_of(const BlockRange& range) {
  return keys_between(0, range.prefix_end) | keys_between(range.begin, range.end);
}

/// f(begin, end) for every run of keys.
template <typename F>
void for_each_run(KeyBits keys, F&& f) {
  while (keys != 0) {
    const int begin = std::countr_zero(keys), end = begin + std::countr_one(keys >> begin);
    f(begin, end);
    keys &= ~keys_between(begin, end);
  }
}

/// line[j] = the element of key block_begin + j, for j in [begin, end).
template <typename T, typename C>
void load_elements(const problem::ScoreTensor<T>& tensor, const problem::ScoreRow& row,
                   Index block_begin, int begin, int end, C* line) {
  const T* const from = &tensor.at(row, block_begin + begin);
  if (tensor.key_stride == 1) {
    for (int j = begin; j < end; ++j) line[j] = static_cast<C>(from[j - begin]);
  } else {
    for (int j = begin; j < end; ++j)
      line[j] = static_cast<C>(from[(j - begin) * tensor.key_stride]);
  }
}

/// The bytes that are not 0, eight at a time: one by one they would take a third of the time of a
/// row's products (heads of 64).
inline KeyBits bits_of(const std::uint8_t* bytes) {
  static_assert(std::endian::native == std::endian::little);
  KeyBits bits = 0;
  for (int j = 0; j < kAttentionKeyBlock; j += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes + j, 8);
    eight |= eight >> 4;
    eight |= eight >> 2;
    eight |= eight >> 1;  // the lowest bit of each says it
    bits |= ((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << j;
  }
  return bits;
}

/// Leaves of the keys of a block that a row sees by its position, `range`, those that masks and
/// bias let it see: from the first of them to the last. Returns what is hidden between these.
template <typename C>
KeyBits hide_masked(const problem::ScoreRule<C>& rule, const problem::ScoreRow& row,
                    Index block_begin, BlockRange& range) {
  if (range.empty()) return 0;
  KeyBits seen = keys_of(range);
  const int first = range.first(), last = range.last();
  std::uint8_t bytes[kAttentionKeyBlock] = {};
  if (rule.bit_mask.present()) seen &= rule.bit_mask.at(row, block_begin);
  if (rule.mask.present()) {
    load_elements(rule.mask, row, block_begin, first, last, bytes);
    seen &= bits_of(bytes);
  }
  if (rule.bias.present()) {
    float bias[kAttentionKeyBlock];
    load_elements(rule.bias, row, block_begin, first, last, bias);
    for (int j = first; j < last; ++j)
      bytes[j] = bias[j] != -std::numeric_limits<float>::infinity();
    seen &= bits_of(bytes);
  }
  if (seen == keys_of(range)) return 0;
  range = {0, 0, 0};
  if (seen == 0) return 0;
  range = {0, std::countr_zero(seen), 64 - std::countl_zero(seen)};
  return keys_of(range) & ~seen;
}

/// One row of a block. `range` and `hidden`: the keys that it sees and, in between, does not.
template <typename C, typename Isa, typename Function = problem::NoScoreFunction>
class BlockScores {
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;

 public:
  BlockScores(const problem::ScoreRule<C>& rule, const problem::ScoreRow& row, Index block_begin,
              const BlockRange& range, KeyBits hidden, const Function* function = nullptr)
      : rule_(rule),
        row_(row),
        block_begin_(block_begin),
        range_(range),
        hidden_(hidden),
        function_(function) {
    if (rule.alibi_slopes != nullptr) {
      slope_ = static_cast<C>(rule.alibi_slopes[row.head]);
      distance_ = static_cast<C>(block_begin - row.position);
    }
    if (rule.bias.present()) {
      fill_line(bias_, kAttentionKeyBlock, V::zero());
      load_elements(rule.bias, row, block_begin, range.first(), range.last(), bias_);
    }
    if (hidden == 0) return;
    const KeyBits seen = keys_of(range) & ~hidden;
    for (int half = 0; half < 2; ++half) {  // 32 bits each: 64 would need lanes of 64
      const auto bits = static_cast<std::uint32_t>(seen >> 32 * half);
      for (int j = 0; j < 32; ++j)
        seen_[32 * half + j] = static_cast<C>(static_cast<std::int32_t>(bits >> j & 1));
    }
  }

  /// Scores of the lanes from key c of the block on, -infinity where the row does not see it.
  /// `slopes` of the softcap, where wanted. Without a function of scores.
  V operator()(V x, int c, C* slopes = nullptr) const { return hide(rule_score(x, c, slopes), c); }

  /// The same of all lanes, in place, with one.
  void call_function(C* scores) const {
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes)
      rule_score(V::load(scores + c), c).store(scores + c);
    const ScorePosition at = row_.at(block_begin_);
    const Function& function = *function_;
    for_each_run(keys_of(range_) & ~hidden_, [&](int begin, int end) {
      for (int j = begin; j < end; ++j)
        scores[j] = static_cast<C>(
            function(scores[j], ScorePosition{at.batch, at.head, at.query, at.key + j}));
    });
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes)
      hide(V::load(scores + c), c).store(scores + c);
  }

  bool hides_some() const { return !range_.full() || hidden_ != 0; }
  typename V::mask seen(int c) const {
    return hidden_ == 0 ? Tile::visible(range_, Tile::positions(c))
                        : less(V::zero(), V::load(seen_ + c));
  }

 private:
  V rule_score(V x, int c, C* slopes = nullptr) const {
    if (rule_.softcap > 0) {
      const V t = cpu::tanh(x / V::set1(rule_.softcap));
      x = t * V::set1(rule_.softcap);
      if (slopes != nullptr) fma(V::zero() - t, t, V::set1(C(1))).store(slopes);
    }
    if (rule_.alibi_slopes != nullptr)
      x = fma(V::set1(slope_), Tile::positions(c) + V::set1(distance_), x);
    if (rule_.bias.present()) x = x + V::load(bias_ + c);
    return x;
  }
  V hide(V x, int c) const {
    return hides_some() ? select(seen(c), x, V::set1(-std::numeric_limits<C>::infinity())) : x;
  }

  const problem::ScoreRule<C>& rule_;
  problem::ScoreRow row_;
  Index block_begin_;
  BlockRange range_;
  KeyBits hidden_;
  const Function* function_;
  C slope_ = 0, distance_ = 0;
  C bias_[kAttentionKeyBlock], seen_[kAttentionKeyBlock];  // where there is one, or some are hidden
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
