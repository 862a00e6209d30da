/// \file
/// Sums of weights and of weight * logit in float, with bounds on their errors: the mean logit and
/// the entropy of a row, for a seventh of the time of sums in double. The same pass sums the tokens
/// that come first by some key and gathers those behind them. Stages decide by such sums where
/// every number within the bounds decides alike, else by sums in double.
#pragma once

#include <array>

#include "nucleus.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Sums over the tokens in play, of their weights and of weight * (logit - best) / temperature.
struct WeightSums {
  double total, moment;

  double mean() const { return moment / total; }
  /// In nats.
  double entropy() const { return std::log(total) - mean(); }
};

/// weight * (logit - best) / temperature of a block.
template <typename C>
void block_moments(const C* x, double best, double inverse_temperature, const double* weights,
                   double* moments) {
  for (Index j = 0; j < SamplingBlock::size; ++j) {
    // below -708 the weight is 0
    const double exponent = (static_cast<double>(x[j]) - best) * inverse_temperature;
    moments[j] = weights[j] * (exponent > -708.0 ? exponent : -708.0);
  }
}

/// The sums in double. Calls f(block, x, weights, moments, sum) with the logits, the weights and
/// the terms of the moment of each block that may hold a token in play, and the sum of the weights.
template <typename Isa, typename T, typename F>
WeightSums weight_sums_of_blocks(const SamplingRow<T>& row, F&& f) {
  alignas(64) double weights[SamplingBlock::size], moments[SamplingBlock::size];
  WeightSums sums{0, 0};
  const double best = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_weights<Isa>(x, block, row.band, scale, weights);
    block_moments(x, best, scale, weights, moments);
    const double sum = block_sum(weights);
    sums.total += sum;
    sums.moment += block_sum(moments);
    f(block, x, weights, moments, sum);
  });
  return sums;
}
/// Calls f(block, sum).
template <typename Isa, typename T, typename F>
WeightSums weight_sums(const SamplingRow<T>& row, F&& f) {
  return weight_sums_of_blocks<Isa>(
      row, [&](Index block, const auto*, double*, double*, double sum) { f(block, sum); });
}
template <typename Isa, typename T>
WeightSums weight_sums(const SamplingRow<T>& row) {
  return weight_sums<Isa>(row, [](Index, double) {});
}

/// A number that is within `error` of `value`.
struct Bounded {
  double value = 0, error = 0;
  double least() const { return value - error; }
  double most() const { return value + error; }
};

/// Sums in float over the tokens in play, u = logit - middle, w the weight.
struct MomentSums {
  double weight = 0, moment = 0, square = 0;  // of w, w u, w u^2 (the last right to a percent)
  // of w of those before the ring, and of the others: each token is in one of the two, so that
  // weight = first + rest whatever the roundings
  double first_weight = 0, rest_weight = 0;
  Index gathered = 0;  // logits of the ring
  double tree = 0;     // the error of such a sum, of its terms
};

/// Weights and moments of blocks. `first` are the tokens whose distance from `middle` is less than
/// `nearer`; those from there on up to `farther` are chosen.
template <typename V>
struct MomentsOfBlocks {
  BulkWeights<V> weights;
  V middle, nearer, farther;

  // vectors at once; additions in a row that a term goes through, each wrong by 2^-24
  static constexpr int vectors = kVectorsAtOnce<V>,
                       additions = 3 + SamplingBlock::size / V::lanes / vectors;
  static_assert(vectors == 8);
  enum Sum { square, moment, rest, first, count };
  using Sums = std::array<LaneTotals<V>, count>;

  /// Adds the sums of a block. Without kClamp false where one is not finite, and nothing is added.
  template <bool kApart, bool kClamp>
  EIGENFORMER_INLINE bool add(const float* x, BlockBits& chosen, Sums& to) const {
    V sums[count] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (Index at = 0; at < SamplingBlock::size; at += vectors * V::lanes) {
      V w[vectors], moments[4], rests[4], firsts[4];
      EIGENFORMER_UNROLL
      for (int k = 0; k < vectors; ++k) w[k] = V::load(x + at + k * V::lanes);
      weights.template apply<kClamp>(w);
      EIGENFORMER_UNROLL
      for (int k = 0; k < vectors; ++k) {
        V u = V::load(x + at + k * V::lanes) - middle;
        if constexpr (kClamp) u = maximum(V::set1(std::numeric_limits<float>::lowest()), u);
        const V wu = w[k] * u;
        sums[square] = fma(wu, u, sums[square]);
        V& moment_part = moments[k % 4];
        moment_part = k < 4 ? wu : moment_part + wu;
        V& rest_part = rests[k % 4];
        if constexpr (!kApart) {
          rest_part = k < 4 ? w[k] : rest_part + w[k];
        } else {
          const auto is_first = less(abs(u), nearer), is_near = less_equal(abs(u), farther);
          chosen.add(at + k * V::lanes, is_first.bits() ^ is_near.bits());
          V& first_part = firsts[k % 4];
          if (k < 4) first_part = rest_part = V::zero();
          first_part = select(is_first, first_part + w[k], first_part);
          rest_part = select(is_first, rest_part, rest_part + w[k]);
        }
      }
      sums[moment] = sums[moment] + sum_of(moments);
      sums[rest] = sums[rest] + sum_of(rests);
      if constexpr (kApart) sums[first] = sums[first] + sum_of(firsts);
    }
    if constexpr (!kClamp)
      if (less(abs(sums[moment]), V::set1(std::numeric_limits<float>::infinity())).bits() !=
          (std::uint32_t{1} << V::lanes) - 1)
        return false;
    EIGENFORMER_UNROLL
    for (int k = 0; k < count; ++k) to[k].add(sums[k]);
    return true;
  }
};

/// Logits whose distance from `middle` is at least `nearer` and at most `farther`.
struct Ring {
  float middle, nearer, farther;
};

/// One pass over the tokens in play: their moments about the middle of the ring, and the logits in
/// it in `out`, which has room as in SamplingScratch. `out` null: sums alone.
template <typename Isa, typename T>
MomentSums moment_sums(const SamplingRow<T>& row, const Ring& ring, float* out) {
  using V = simd::Vec<float, Isa>;
  using Blocks = MomentsOfBlocks<V>;
  const Blocks blocks{BulkWeights<V>(row), V::set1(ring.middle), V::set1(ring.nearer),
                      V::set1(ring.farther)};
  const float least = ring.middle - ring.farther;
  const RowSlices slices(row.blocks());
  typename Blocks::Sums sums[RowSlices::most];
  float *begins[RowSlices::most], *ends[RowSlices::most];
  for_slices_in_play<Isa>(row, 1.5 * kWeightCycles, [&](Index first_slice, Index last_slice) {
    alignas(64) float buffer[SamplingBlock::size];
    // a range of slices writes side by side
    float* to = out == nullptr ? out
                               : out + slices.begin(first_slice) * SamplingBlock::size +
                                     first_slice * RowSlices::slack;
    for (Index s = first_slice; s < last_slice; ++s) {
      begins[s] = to;
      for_each_block_index<Isa>(
          row, slices.begin(s), slices.begin(s + 1), row.band.lo, [&](Index block) {
            const float* const x = in_play_logits<Isa>(row, block, buffer);
            constexpr bool kScales = BulkWeights<V>::kScales;
            BlockBits chosen;
            if (out == nullptr || row.block_max[block] < least) {
              if (kScales && blocks.template add<false, false>(x, chosen, sums[s])) return;
              blocks.template add<false, true>(x, chosen, sums[s]);
            } else {
              if (!kScales || !blocks.template add<true, false>(x, chosen, sums[s])) {
                chosen = {};
                blocks.template add<true, true>(x, chosen, sums[s]);
              }
              to = store_logits<V>(x, chosen, to);
            }
          });
      ends[s] = to;
    }
  });
  MomentSums all;
  for (Index s = 0; s < slices.count(); ++s) {
    all.square += sums[s][Blocks::square].sum();
    all.moment += sums[s][Blocks::moment].sum();
    all.rest_weight += sums[s][Blocks::rest].sum();
    all.first_weight += sums[s][Blocks::first].sum();
    if (out == nullptr) continue;
    if (begins[s] != out + all.gathered) std::copy(begins[s], ends[s], out + all.gathered);
    all.gathered += ends[s] - begins[s];
  }
  all.weight = all.first_weight + all.rest_weight;
  all.tree = Blocks::additions * 0x1p-24;
  return all;
}

/// Of the tokens in play: the sum of their weights and the mean logit under them. `spread`: the
/// standard deviation, right to a percent.
struct BulkMoments {
  Bounded total, mean;
  double spread = 0;

  template <typename T>
  BulkMoments(const SamplingRow<T>& row, float middle, const MomentSums& sums) {
    const double scale = row.inverse_temperature, m = static_cast<double>(middle),
                 from_best = (m - static_cast<double>(row.band.hi)) * scale;
    // A weight is wrong by a + b |t| of itself, t its logarithm, u and w u by 2^-24 each, their sum
    // by `tree`: all of them times |u|, by Cauchy and Schwarz.
    const double away = sums.moment / sums.weight, uu = 1.02 * sums.square / sums.weight,
                 u = std::sqrt(uu),
                 t = std::sqrt(1.001 *
                               (uu * scale * scale + 2 * std::abs(from_best * away) * scale +
                                from_best * from_best));
    constexpr double a = BulkError::weight, b = BulkError::log_weight;
    const double relative = a + sums.tree + b * t,
                 error = (relative + 1.3e-7) * u + std::abs(away) * relative;
    total = {sums.weight, 1.001 * sums.weight * relative + 1e-30};
    mean = {m + away, 1.001 * error + 1e-15 * (std::abs(m) + std::abs(away))};
    spread = std::sqrt((std::max)(0.0, sums.square / sums.weight - away * away));
  }

  /// Of -log(weight), in nats.
  Bounded entropy(double best, double inverse_temperature) const {
    const double log_total = std::log(total.value);
    return {log_total + (best - mean.value) * inverse_temperature,
            1.01 * total.error / total.value + mean.error * inverse_temperature +
                1e-14 * (1 + log_total)};
  }
};

/// The mean logit of a row by its sample, and three standard errors of it.
template <typename Isa, typename T>
Bounded estimated_mean(const SamplingRow<T>& row, const NucleusSample<Isa>& sample) {
  using V = simd::Vec<float, Isa>;
  const V lowest = V::set1(std::numeric_limits<float>::lowest());
  // the sums of w, w u, (w u)^2 with u from `middle`
  const auto sums = [&](const float* x, const float* w, Index n, float middle, double(&to)[3]) {
    V sum[3] = {V::zero(), V::zero(), V::zero()};
    for_each_vector<V>(0, n, [&](Index at, auto part) {
      const V weight = load<V>(w + at, part),
              moment = weight * maximum(lowest, load<V>(x + at, part) - V::set1(middle));
      sum[0] = sum[0] + weight, sum[1] = sum[1] + moment, sum[2] = fma(moment, moment, sum[2]);
    });
    for (int k = 0; k < 3; ++k) to[k] = static_cast<double>(reduce_add(sum[k]));
  };
  double some[3], best[3];
  sums(sample.x, sample.w, sample.count, row.band.hi, some);
  sums(sample.tops, sample.maxima, sample.blocks, row.band.hi, best);
  const double total = sample.scale * some[0] + best[0],
               mean = static_cast<double>(row.band.hi) + (sample.scale * some[1] + best[1]) / total;
  sums(sample.x, sample.w, sample.count, static_cast<float>(mean), some);
  return {mean, 3 * std::sqrt(sample.scale * (sample.scale - 1) * some[2]) / total};
}

/// The moments, about a logit near their mean where the row is long enough for a sample.
template <typename Isa, typename T>
BulkMoments bulk_moments(const SamplingRow<T>& row,
                         const SamplingScratch<compute_type<T>>& scratch) {
  float middle = row.band.hi;
  if (row.vocab >= SelectionLimits::sampled)
    middle =
        static_cast<float>(estimated_mean(row, NucleusSample<Isa>(row, scratch.candidates)).value);
  return BulkMoments(row, middle, moment_sums<Isa>(row, {middle, 0, 0}, nullptr));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
