/// \file
/// From the dot products of a row with the keys of a block to its scores (problem/score_rule.h).
#pragma once

#include <limits>

#include "../../problem/score_rule.h"
#include "../vector/functions.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// One row of a block, that of a head and a position. `range`: the keys of the block that it sees.
template <typename C, typename Isa>
class BlockScores {
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;

 public:
  BlockScores(const problem::ScoreRule<C>& rule, Index head, Index position, Index block_begin,
              const BlockRange& range)
      : rule_(rule), range_(range) {
    if (rule.alibi_slopes == nullptr) return;
    slope_ = static_cast<C>(rule.alibi_slopes[head]);
    distance_ = static_cast<C>(block_begin - position);
  }

  /// Scores of the lanes from key c of the block on, -infinity where the row does not see it.
  /// `slopes` of the softcap, where wanted.
  V operator()(V x, int c, C* slopes = nullptr) const {
    if (rule_.softcap > 0) {
      const V t = cpu::tanh(x / V::set1(rule_.softcap));
      x = t * V::set1(rule_.softcap);
      if (slopes != nullptr) fma(V::zero() - t, t, V::set1(C(1))).store(slopes);
    }
    if (rule_.alibi_slopes != nullptr)
      x = fma(V::set1(slope_), Tile::positions(c) + V::set1(distance_), x);
    if (hides_some()) x = select(seen(c), x, V::set1(-std::numeric_limits<C>::infinity()));
    return x;
  }

  bool hides_some() const { return !range_.full(); }
  typename V::mask seen(int c) const { return Tile::visible(range_, Tile::positions(c)); }

 private:
  const problem::ScoreRule<C>& rule_;
  BlockRange range_;
  C slope_ = 0, distance_ = 0;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
