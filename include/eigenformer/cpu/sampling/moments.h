/// \file
/// Sums of weights and of weight * logit in float, with bounds on their errors: the mean logit and
/// the entropy of a row, for a seventh of the time of sums in double (weighing.h has the pass).
/// Stages decide by such sums where every number within the bounds decides alike, else by sums in
/// double.
#pragma once

#include <optional>

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

/// Of the tokens in play: the sum of their weights relative to the best and the mean logit under
/// them. `spread`: the standard deviation, right to a percent.
struct BulkMoments {
  Bounded total, mean;
  double spread = 0;
  double log_squares = 0;  // of w (log w)^2 in the units of the pass, or more

  template <typename T, typename V>
  BulkMoments(const SamplingRow<T>& row, const FusedWeights<V>& weights,
              const WeighedRow<float>& sums) {
    constexpr double ln2 = 0.69314718055994530942;
    const double weight = sums.total_above + sums.total_rest, m = weights.zero,
                 away = sums.total_moment / weight / weights.rate;
    // what underflows is less than 2e-38 of each token
    const double squares =
        1.02 * sums.total_square / weight + 2e-38 * static_cast<double>(row.vocab) / weight;
    log_squares = squares * weight * ln2 * ln2;
    // A weight is wrong by a + b |t| of itself, t its logarithm, u = logit - m by 2 roundings and
    // w u by one, their sum by `sum`: all of them times |u|, by Cauchy and Schwarz.
    const double t = std::sqrt(squares), u = t / weights.rate,
                 relative = weights.weight + weights.sum + weights.log_weight * t * ln2,
                 error = (relative + 2e-7) * u + std::abs(away) * relative;
    total = {weight * weights.unit, 1.001 * weight * relative * weights.unit + 1e-30};
    mean = {m + away, 1.001 * error + 1e-15 * (std::abs(m) + std::abs(away))};
    spread = std::sqrt(
        (std::max)(0.0, sums.total_square / weight / (weights.rate * weights.rate) - away * away));
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

/// The moments, about a logit near their mean where the row is long enough for a sample, if the
/// weights about it are finite.
template <typename Isa, typename T>
std::optional<BulkMoments> bulk_moments(const SamplingRow<T>& row,
                                        const SamplingScratch<compute_type<T>>& scratch) {
  using Weights = FusedWeights<simd::Vec<float, Isa>>;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  float middle = row.band.hi;
  if (row.vocab >= SelectionLimits::sampled)
    middle =
        static_cast<float>(estimated_mean(row, NucleusSample<Isa>(row, scratch.candidates)).value);
  if (!Weights::within_range(row, middle)) return std::nullopt;
  const Weights weights(row, middle);
  RowWeighing<Isa, T, ByDistance>{
      row, weights, {0, -1, infinity}, scratch.candidates}(*scratch.weighed);
  return BulkMoments(row, weights, *scratch.weighed);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
