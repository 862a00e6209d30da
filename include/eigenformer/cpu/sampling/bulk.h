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
  static double of(double sum_of_weights, Index tokens) {
    return of_weights(sum_of_weights, tokens) + sum * (std::max)(sum_of_weights, 0.0);
  }
  /// Of part - p * (part + rest), both sums.
  static double of_share(double part, double rest, double p, Index tokens) {
    return (1.0 - p) * of(part, tokens) + p * of((std::max)(rest, 0.0), tokens) +
           1e-12 * (part + rest);
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
    V n[N], p[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) {
      x[k] = x[k] - best;
      if constexpr (kClamp) x[k] = maximum(lowest, x[k]);
    }
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) n[k] = round(x[k] * scale);
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) x[k] = fma(x[k], minus_scale, n[k]);
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

struct BulkSums {
  // of all in play; of those above the interval; of the others: each token is in one of the latter,
  // so that total = above + rest whatever the roundings
  double total = 0, above = 0, rest = 0;
  Index gathered = 0;  // logits in the interval
};

/// The vectors of a block that are worked on side by side.
template <typename V>
inline constexpr int kVectorsAtOnce =
    SamplingBlock::size / V::lanes < 8 ? SamplingBlock::size / V::lanes : 8;

/// The sum of the weights of a block.
template <bool kClamp, typename V>
EIGENFORMER_INLINE float bulk_block_sum(const BulkWeights<V>& weights, const float* x) {
  V sum = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += kVectorsAtOnce<V> * V::lanes) {
    V w[kVectorsAtOnce<V>];
    EIGENFORMER_UNROLL
    for (int k = 0; k < kVectorsAtOnce<V>; ++k) w[k] = V::load(x + at + k * V::lanes);
    weights.template apply<kClamp>(w);
    sum = sum + sum_of(w);
  }
  return reduce_add(sum);
}

/// The same, that of the logits above `most` apart, and the places of those in [least, most].
template <typename V>
EIGENFORMER_INLINE void bulk_block_sums(const BulkWeights<V>& weights, const float* x, V least,
                                        V most, float& above_sum, float& rest_sum,
                                        BlockBits& chosen) {
  constexpr int vectors = kVectorsAtOnce<V>;
  V rest = V::zero(), above = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += vectors * V::lanes) {
    V w[vectors], high[vectors];
    EIGENFORMER_UNROLL
    for (int k = 0; k < vectors; ++k) {
      w[k] = V::load(x + at + k * V::lanes);
      chosen.add(at + k * V::lanes, (less_equal(least, w[k]) & less_equal(w[k], most)).bits());
    }
    weights.apply(w);
    EIGENFORMER_UNROLL
    for (int k = 0; k < vectors; ++k) {
      const auto is_above = less(most, V::load(x + at + k * V::lanes));
      high[k] = select(is_above, w[k], V::zero());
      w[k] = select(is_above, V::zero(), w[k]);
    }
    above = above + sum_of(high);
    rest = rest + sum_of(w);
  }
  above_sum = reduce_add(above);
  rest_sum = reduce_add(rest);
}

/// One pass over the tokens in play: the sums of their weights, that of every block in `sums`
/// (blocks without a token in play: 0) and the logits in [least, most] in `out`, which has room for
/// the vocabulary and a vector more. `out` null: sums alone.
template <typename Isa, typename T>
BulkSums bulk_sums(const SamplingRow<T>& row, double* sums, float* out, float least, float most) {
  using V = simd::Vec<float, Isa>;
  const BulkWeights<V> weights(row);
  const V first = V::set1(least), last = V::set1(most);
  const bool narrowed = row.band.lo != std::numeric_limits<float>::lowest();
  const RowSlices slices(row.blocks());
  BulkSums parts[RowSlices::most];
  float* begins[RowSlices::most];
  std::fill(sums, sums + row.blocks(), 0.0);
  for_slices_in_play<Isa>(row, kWeightCycles, [&](Index first_slice, Index last_slice) {
    alignas(64) float buffer[SamplingBlock::size];
    // a range of slices writes side by side
    float* to = out == nullptr ? out
                               : out + slices.begin(first_slice) * SamplingBlock::size +
                                     first_slice * RowSlices::slack;
    for (Index s = first_slice; s < last_slice; ++s) {
      BulkSums part;
      float* const begin = to;
      for_each_block_index<Isa>(
          row, slices.begin(s), slices.begin(s + 1), row.band.lo, [&](Index block) {
            const float* const x = in_play_logits<Isa>(row, block, buffer);
            float above = 0, rest;
            if (out != nullptr && row.block_max[block] >= least) {
              BlockBits chosen;
              bulk_block_sums(weights, x, first, last, above, rest, chosen);
              to = store_logits<V>(x, chosen, to);
            } else {
              // of a narrowed band or under a mask -infinity is likely, else it shows in a sum that
              // is not finite (by its bits)
              const bool masked = row.changes != nullptr && row.changes->first[block] == kMasked;
              rest = narrowed || masked ? std::numeric_limits<float>::quiet_NaN()
                                        : bulk_block_sum<!BulkWeights<V>::kScales>(weights, x);
              if ((std::bit_cast<std::uint32_t>(rest) & 0x7FFFFFFFu) >= 0x7F800000u)
                rest = bulk_block_sum<true>(weights, x);
            }
            sums[block] = static_cast<double>(above) + static_cast<double>(rest);
            part.above += static_cast<double>(above);
            part.rest += static_cast<double>(rest);
          });
      part.gathered = to - begin;
      parts[s] = part;
      begins[s] = begin;
    }
  });
  BulkSums all;
  for (Index s = 0; s < slices.count(); ++s) {
    all.above += parts[s].above;
    all.rest += parts[s].rest;
    if (parts[s].gathered > 0 && begins[s] != out + all.gathered)
      std::copy(begins[s], begins[s] + parts[s].gathered, out + all.gathered);
    all.gathered += parts[s].gathered;
  }
  all.total = all.above + all.rest;
  return all;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
