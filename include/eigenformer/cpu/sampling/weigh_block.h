/// \file
/// What a pass over a row does with a block of it: weights in float, and their sums, those of
/// tokens that come first by some key apart from the others.
#pragma once

#include "bulk.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Weights in float, times a factor that all of a row share: of 2^(x * scale + offset) the exponent
/// is rounded once, where the difference to the best logit is rounded before its product.
template <typename V>
struct FusedWeights {
  V scale, offset;    // without a fused multiply-add `offset` is the best logit
  double unit;        // times a weight: that relative to the best token
  double log_weight;  // error of a weight, of itself times |log of it|
  double zero, rate;  // the logit of weight 1; what a logit adds to log2 of the weight

  // Of itself: of the polynomial, two roundings, and that of the offset; and of a sum of the
  // weights of a block: additions in a row, 4 of 16 lanes, 10 of 4.
  static constexpr double weight = 2.7e-7, sum = (2 + SamplingBlock::size / V::lanes / 4) * 0x1p-24;

  template <typename T>
  explicit FusedWeights(const SamplingRow<T>& row) : FusedWeights(row, row.band.hi) {}
  /// About `reference` the weights are 1. It is not far below the best logit: within_range().
  template <typename T>
  FusedWeights(const SamplingRow<T>& row, float reference) {
    const double best = static_cast<double>(row.band.hi), from = static_cast<double>(reference),
                 exact = row.inverse_temperature * 1.44269504088896340736;
    const auto rounded = static_cast<float>(exact);
    rate = static_cast<double>(rounded);
    const auto at_zero = static_cast<float>(-from * rate);
    scale = V::set1(rounded);
    offset = V::set1(isa::kHasFma ? at_zero : reference);
    zero = isa::kHasFma ? -static_cast<double>(at_zero) / rate : from;
    unit = std::exp2(isa::kHasFma ? -(static_cast<double>(at_zero) + best * rate)
                                  : (from - best) * rate);
    log_weight = (isa::kHasFma ? 0x1p-24 : 0x1p-23) + std::abs(rate / exact - 1);
  }
  /// Whether weights about a logit are finite, and sums of them.
  template <typename T>
  static bool within_range(const SamplingRow<T>& row, float reference) {
    return (static_cast<double>(row.band.hi) - static_cast<double>(reference)) *
               row.inverse_temperature <
           40;
  }

  /// Whether the exponents of a row are as right as this says: of float or narrower, and the best
  /// logit not far from 0.
  template <typename T>
  static bool serves(const SamplingRow<T>& row) {
    return serves_bulk(row) &&
           std::abs(static_cast<double>(row.band.hi)) * row.inverse_temperature < 1e6;
  }

  /// x[k] = log2 of the weight of x[k].
  template <bool kClamp = true, int N>
  EIGENFORMER_INLINE void exponents(V (&x)[N]) const {
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) {
      x[k] = isa::kHasFma ? fma(x[k], scale, offset) : (x[k] - offset) * scale;
      if constexpr (kClamp)
        x[k] = maximum(V::set1(BulkWeights<V>::kScales ? -160.0f : -127.0f), x[k]);
    }
  }
  /// x[k] = 2^x[k].
  template <int N>
  static EIGENFORMER_INLINE void powers(V (&x)[N]) {
    V n[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) n[k] = round(x[k]);
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) x[k] = n[k] - x[k];
    BulkWeights<V>::template power<N>(x, n);
  }
  /// x[k] = the weight of x[k], as in BulkWeights.
  template <bool kClamp = true, int N>
  EIGENFORMER_INLINE void apply(V (&x)[N]) const {
    exponents<kClamp>(x);
    powers(x);
  }

  /// The error of a sum, in `unit`s like it, of the weights of at most `tokens` tokens: the mean
  /// -log of them relative to the best is log(tokens / sum) at most, where all are equal.
  double error_of(double mass, Index tokens) const {
    if (!(mass > 0)) return 1e-30;
    const double mean = std::log(static_cast<double>(tokens) / (mass * unit) + 1.0);
    return mass * (weight + sum + log_weight * (mean + std::abs(std::log(unit)))) + 1e-30;
  }
  /// Of part - p * (part + rest).
  double error_of_share(double part, double rest, double p, Index tokens) const {
    return (1.0 - p) * error_of(part, tokens) + p * error_of((std::max)(rest, 0.0), tokens) +
           1e-12 * (part + rest);
  }
};

/// The weights of a block, lane by lane.
template <bool kClamp, typename V>
EIGENFORMER_INLINE V weigh_block(const FusedWeights<V>& weights, const float* x) {
  V sum = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += 8 * V::lanes) {
    V w[8];
    EIGENFORMER_UNROLL
    for (int k = 0; k < 8; ++k) w[k] = V::load(x + at + k * V::lanes);
    weights.template apply<kClamp>(w);
    sum = at == 0 ? sum_of(w) : sum + sum_of(w);
  }
  return sum;
}

/// Of a block, lane by lane.
template <typename V>
struct BlockSums {
  V above = V::zero(), rest = V::zero(), moment = V::zero();
};

/// All tokens in play come before.
struct AllInPlay {
  static constexpr bool kGathers = false, kMoments = false;
};

/// The weights of the logits from `least` on.
template <bool kClamp, typename V>
EIGENFORMER_INLINE V weigh_block_from(const FusedWeights<V>& weights, const float* x, V least) {
  V sum = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += 8 * V::lanes) {
    V w[8], parts[2];
    decltype(less(least, least)) is_in[8];
    EIGENFORMER_UNROLL
    for (int k = 0; k < 8; ++k) {
      w[k] = V::load(x + at + k * V::lanes);
      is_in[k] = less_equal(least, w[k]);
    }
    weights.template apply<kClamp>(w);
    EIGENFORMER_UNROLL
    for (int k = 0; k < 2; ++k) parts[k] = select(is_in[k], w[k], V::zero());
    EIGENFORMER_UNROLL
    for (int k = 2; k < 8; ++k) parts[k % 2] = select(is_in[k], parts[k % 2] + w[k], parts[k % 2]);
    sum = at == 0 ? parts[0] + parts[1] : sum + (parts[0] + parts[1]);
  }
  return sum;
}

/// Logits above `most` come before those in [least, most], which are gathered.
struct ByLogit {
  static constexpr bool kGathers = true, kMoments = false;
  float least, most;

  bool reaches(float block_max) const { return block_max >= least; }

  template <bool kClamp, typename V>
  EIGENFORMER_INLINE void weigh(const FusedWeights<V>& weights, const float* x, BlockSums<V>& sums,
                                V& /*square*/, BlockBits& inside) const {
    const V lo = V::set1(least), hi = V::set1(most);
    for (Index at = 0; at < SamplingBlock::size; at += 8 * V::lanes) {
      V w[8], a[2], r[2];
      decltype(less(lo, lo)) is_above[8];
      EIGENFORMER_UNROLL
      for (int k = 0; k < 8; ++k) {
        w[k] = V::load(x + at + k * V::lanes);
        is_above[k] = less(hi, w[k]);
        inside.add(at + k * V::lanes, less_equal(lo, w[k]).bits() ^ is_above[k].bits());
      }
      weights.template apply<kClamp>(w);
      EIGENFORMER_UNROLL
      for (int k = 0; k < 2; ++k) {
        a[k] = select(is_above[k], w[k], V::zero());
        r[k] = select(is_above[k], V::zero(), w[k]);
      }
      EIGENFORMER_UNROLL
      for (int k = 2; k < 8; ++k) {
        a[k % 2] = select(is_above[k], a[k % 2] + w[k], a[k % 2]);
        r[k % 2] = select(is_above[k], r[k % 2], r[k % 2] + w[k]);
      }
      sums.above = at == 0 ? a[0] + a[1] : sums.above + (a[0] + a[1]);
      sums.rest = at == 0 ? r[0] + r[1] : sums.rest + (r[0] + r[1]);
    }
  }
};

/// Tokens whose |log2 of the weight| is less than `nearer` come before those up to `farther`, which
/// are gathered. Logits below `least` are farther.
struct ByDistance {
  static constexpr bool kGathers = true, kMoments = true;
  float nearer, farther, least;

  bool reaches(float block_max) const { return block_max >= least; }

  /// kApart: some may come before or be gathered. A term goes through three additions for each four
  /// vectors and one after each but the first.
  template <bool kClamp, bool kApart = true, typename V>
  EIGENFORMER_INLINE void weigh(const FusedWeights<V>& weights, const float* x, BlockSums<V>& sums,
                                V& square, BlockBits& inside) const {
    const V first = V::set1(nearer), last = V::set1(farther);
    for (Index at = 0; at < SamplingBlock::size; at += 4 * V::lanes) {
      V t[4], w[4];
      EIGENFORMER_UNROLL
      for (int k = 0; k < 4; ++k) t[k] = V::load(x + at + k * V::lanes);
      weights.template exponents<kClamp>(t);
      EIGENFORMER_UNROLL
      for (int k = 0; k < 4; ++k) w[k] = t[k];
      weights.powers(w);
      BlockSums<V> part;
      EIGENFORMER_UNROLL
      for (int k = 0; k < 4; ++k) {
        const V wt = w[k] * t[k];
        square = fma(wt, t[k], square);
        part.moment = k == 0 ? wt : part.moment + wt;
        if constexpr (kApart) {
          const auto is_near = less(abs(t[k]), first);
          inside.add(at + k * V::lanes, less_equal(abs(t[k]), last).bits() ^ is_near.bits());
          part.above = select(is_near, k == 0 ? w[k] : part.above + w[k], part.above);
          part.rest = select(is_near, part.rest, k == 0 ? w[k] : part.rest + w[k]);
        } else {
          part.rest = k == 0 ? w[k] : part.rest + w[k];
        }
      }
      if constexpr (kApart) sums.above = at == 0 ? part.above : sums.above + part.above;
      sums.rest = at == 0 ? part.rest : sums.rest + part.rest;
      sums.moment = at == 0 ? part.moment : sums.moment + part.moment;
    }
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
