/// \file
/// Weights of many tokens in float, with a bound on their error. They decide nothing that is near:
/// what they leave open is computed again in double, so that a row keeps and draws the tokens of
/// the sums in double on every ISA, in a seventh of the time (Zen 5, AVX-512: 9 us instead of 64
/// for 128256 tokens).
#pragma once

#include <cmath>

#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// A weight is wrong by at most (weight + log_weight * |log of it|) of itself, and a sum
/// of the 128 of a block by `sum` of itself more: a polynomial right to 1e-7 and two roundings;
/// two roundings of the exponent, three where products are rounded; eight additions in a tree at
/// most.
struct BulkError {
  static constexpr double weight = 2.5e-7, log_weight = isa::kHasFma ? 1.3e-7 : 2e-7, sum = 4.8e-7;

  /// Of a sum of weights of at most `tokens` tokens, of which none is above 1: their mean
  /// -log(weight) is log(tokens / sum) at most, where all are equal.
  static double of_weights(double sum_of_weights, Index tokens) {
    if (!(sum_of_weights > 0)) return 1e-30;
    return sum_of_weights *
               (weight +
                log_weight * std::log(static_cast<double>(tokens) / sum_of_weights + 1.0)) +
           1e-30;
  }
};

/// Rows whose weights may be computed in float: of float, or narrower. (The range of the scale
/// keeps 0 times it from NaN.)
template <typename T>
bool serves_bulk(const SamplingRow<T>& row) {
  return std::is_same_v<compute_type<T>, float> && row.inverse_temperature > 1e-30 &&
         row.inverse_temperature < 1e30;
}

/// What turns logits into weights in float.
template <typename V>
struct BulkWeights {
  V best, scale, minus_scale, lowest;  // lowest: from where on weights are 0

  template <typename T>
  explicit BulkWeights(const SamplingRow<T>& row) : best(V::set1(row.band.hi)) {
    const auto log2 = static_cast<float>(row.inverse_temperature * 1.44269504088896340736);
    scale = V::set1(log2), minus_scale = V::set1(-log2);
    lowest = V::set1((kScales ? -160.0f : -127.0f) / log2);
  }

  /// x[k] = 2^((x[k] - best) * scale), step by step for all k: a chain of ten operations that each
  /// take 4 cycles needs that many side by side. The polynomial is that of
  /// simd::exp_of_nonpositive, of minus the fraction. Without clamp -infinity gives NaN, and what
  /// is below -1e12 / scale NaN or an infinity, for a seventh of the time less.
  template <bool kClamp = true, int N>
  EIGENFORMER_INLINE void apply(V (&x)[N]) const {
    V n[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) {
      x[k] = x[k] - best;
      if constexpr (kClamp) x[k] = maximum(lowest, x[k]);
    }
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) n[k] = round(x[k] * scale);
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) x[k] = fma(x[k], minus_scale, n[k]);
    power<N>(x, n);
  }
  /// x[k] = 2^(n[k] - x[k]) for |x[k]| <= 0.5.
  template <int N>
  static EIGENFORMER_INLINE void power(V (&x)[N], const V (&n)[N]) {
    V p[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k)
      p[k] = fma(V::set1(-1.3264727308354553e-3f), x[k], V::set1(9.671514830942588e-3f));
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) p[k] = fma(p[k], x[k], V::set1(-5.5507337634946634e-2f));
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) p[k] = fma(p[k], x[k], V::set1(2.4022242050990386e-1f));
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) p[k] = fma(p[k], x[k], V::set1(-6.931469775756578e-1f));
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) {
      p[k] = fma(p[k], x[k], V::set1(1.0f));
      // one instruction on AVX-512, that takes any exponent; four elsewhere
      if constexpr (kScales)
        x[k] = scale_exponent(p[k], n[k]);
      else
        x[k] = p[k] * power_of_two(n[k]);
    }
  }
  static constexpr bool kScales = V::lanes == 16;
};

/// The sum of `N` vectors in a tree: the same depth whatever the lanes.
template <typename V, int N>
EIGENFORMER_INLINE V sum_of(V (&x)[N]) {
  EIGENFORMER_UNROLL
  for (int half = N / 2; half > 0; half /= 2) {
    EIGENFORMER_UNROLL
    for (int k = 0; k < half; ++k) x[k] = x[k] + x[k + half];
  }
  return x[0];
}

/// A block in which tokens that are out of play have the logit -infinity.
template <typename Isa, typename T>
EIGENFORMER_INLINE const compute_type<T>* in_play_logits(const SamplingRow<T>& row, Index block,
                                                         compute_type<T>* x) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const C* const logits = block_logits<Isa>(row, block, x);
  // nothing was filtered yet: what is out of play is -infinity
  if (row.band.lo == std::numeric_limits<C>::lowest() && row.band.lo_end == row.vocab &&
      row.band.hi_begin == 0 && row.block_max[block] <= row.band.hi)
    return logits;
  // equals of an end of the band some of which are out
  const bool has_ends = row.band.lo_end < (block + 1) * SamplingBlock::size ||
                        row.band.hi_begin > block * SamplingBlock::size;
  BlockBits members, inside;
  if (has_ends) members = member_bits<Isa>(logits, block, row.band, row.band.lo);
  const V none = V::set1(-std::numeric_limits<C>::infinity());
  const V lo = V::set1(row.band.lo), hi = V::set1(row.band.hi);
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
    const V v = V::load(logits + i);
    const auto in_band = less_equal(lo, v) & less_equal(v, hi);
    if (has_ends) inside.add(i, in_band.bits());
    select(in_band, v, none).store(x + i);
  }
  if (!has_ends) return x;
  const BlockBits ends{{inside.word[0] & ~members.word[0], inside.word[1] & ~members.word[1]}};
  ends.for_each([&](Index j) { x[j] = -std::numeric_limits<C>::infinity(); });
  return x;
}

/// The vectors of a block that are worked on side by side.
template <typename V>
inline constexpr int kVectorsAtOnce =
    SamplingBlock::size / V::lanes < 8 ? SamplingBlock::size / V::lanes : 8;

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
