/// \file
/// The online softmax of a thread's two rows of attention_tiles.cuh, a tile of 64 keys at a time.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The weight of a score s is 2^(unit * s + offset), the greatest about 1.
template <typename T, int Chunks>
struct AttentionTileState {
  using Pairs = PairTile<T>;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kLog2OfE = 1.44269504f;
  /// Weights are multiplied by this: sums of a million finite bfloat16 are finite, and half has
  /// small weights as well.
  static constexpr double kFactor = std::is_same_v<T, half> ? 0x1p10 : 0x1p-20;
  float unit[2], offset[2];
  float weights[2];  // of this lane
  bool seen[2];      // whether this lane has seen a key
  bool wide[2];      // scores are in double, relative to
  double references[2];
  RowTile<T> sums[Chunks];

  EIGENFORMER_DEVICE void clear() {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      offset[k] = kInfinity;
      weights[k] = 0;
      seen[k] = false;
    }
    EIGENFORMER_UNROLL_ALL
    for (auto& chunk : sums) chunk.clear();
  }

  /// Scores of columns that are not seen, whose bits are 0, to -infinity.
  EIGENFORMER_DEVICE static void hide(const unsigned (&seen)[2], Pairs& scores) {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c)
        if ((seen[k] >> c & 1) == 0) scores.at(k, c) = -kInfinity;
    }
  }

  /// Scores of row k to weights times kFactor.
  template <typename Block>
  EIGENFORMER_DEVICE void add_weights(Block& block, int k, Pairs& pairs) {
    float maximum = -kInfinity;  // fmax passes NaN by
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Pairs::kColumns; ++c) maximum = std::fmax(maximum, pairs.at(k, c));
    maximum = std::fmax(maximum, block.shuffle_xor(maximum, 1));
    maximum = std::fmax(maximum, block.shuffle_xor(maximum, 2));
    const float before = offset[k];
    float own = -maximum * unit[k];
    if (own == -kInfinity && maximum < kInfinity) own = -(std::numeric_limits<float>::max)();
    offset[k] = std::fmin(before, own);
    const float reference = offset[k] == kInfinity ? 0.0f : offset[k];
    const float fall = block.exp2(reference - before);
    float sum = 0;
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Pairs::kColumns; ++c) {
      const float weight = block.exp2(std::fma(pairs.at(k, c), unit[k], reference));
      sum += weight;
      pairs.at(k, c) = weight * static_cast<float>(kFactor);
    }
    weights[k] = std::fma(weights[k], fall, sum);
    EIGENFORMER_UNROLL_ALL
    for (auto& chunk : sums) {
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < chunk.kSize; ++i)
        if (i / 2 % 2 == k) chunk.values[i] *= fall;
    }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
