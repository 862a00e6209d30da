/// \file
/// Top-h over many tokens: the most likely ones whose terms of the entropy, w (log total - log w)
/// with w the weight, reach a share of all. As top-p finds its end (nucleus.h): total and entropy
/// come from sums in float with a bound on their error (moments.h), a sample tells where the set
/// ends to a few percent, a pass over the blocks that reach so far sums the terms above and gathers
/// the logits there. Where the bounds leave the last token open, a pass in double has smaller ones.
#pragma once

#include "moments.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Turns logits into terms of the entropy in float.
template <typename V>
struct EntropyTerms {
  BulkWeights<V> weights;
  V log_total, rate;

  template <typename T>
  EntropyTerms(const SamplingRow<T>& row, double log_of_total)
      : weights(row),
        log_total(V::set1(static_cast<float>(log_of_total))),
        rate(V::set1(static_cast<float>(row.inverse_temperature))) {}

  template <int N>
  EIGENFORMER_INLINE void apply(V (&x)[N]) const {
    V surprise[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k)
      surprise[k] =
          fma(weights.best - maximum(x[k], weights.best + weights.lowest), rate, log_total);
    weights.apply(x);
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) x[k] = x[k] * surprise[k];
  }
};

/// How wrong such terms may be of logits of `least` or more, and their sums, of themselves: w, of
/// which the bound grows with its logarithm; the surprise; the product.
template <typename T>
double term_error(const SamplingRow<T>& row, double least) {
  const double deepest = (static_cast<double>(row.band.hi) - least) * row.inverse_temperature;
  return BulkError::weight + BulkError::sum + 5e-7 + BulkError::log_weight * deepest;
}

/// The sum of the terms of the logits of a block above `most`, and the places of those in [least,
/// most].
template <typename V>
EIGENFORMER_INLINE float block_terms(const EntropyTerms<V>& terms, const float* x, V least, V most,
                                     BlockBits& inside) {
  constexpr int vectors = kVectorsAtOnce<V>;
  V above = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += vectors * V::lanes) {
    V w[vectors];
    EIGENFORMER_UNROLL
    for (int k = 0; k < vectors; ++k) w[k] = V::load(x + at + k * V::lanes);
    terms.apply(w);
    EIGENFORMER_UNROLL
    for (int k = 0; k < vectors; ++k) {
      const V v = V::load(x + at + k * V::lanes);
      inside.add(at + k * V::lanes, (less_equal(least, v) & less_equal(v, most)).bits());
      w[k] = select(less(most, v), w[k], V::zero());
    }
    above = above + sum_of(w);
  }
  return reduce_add(above);
}

struct PrefixSums {
  double above = 0;    // of the logits above the interval
  Index gathered = 0;  // logits in the interval
};

/// Sums the terms of the logits in play above `most` and gathers those in [least, most]; reads the
/// blocks that reach `least`.
template <typename Isa, typename T, typename V>
PrefixSums prefix_sums(const SamplingRow<T>& row, const EntropyTerms<V>& terms, float* out,
                       float least, float most) {
  const V first = V::set1(least), last = V::set1(most);
  alignas(64) float buffer[SamplingBlock::size];
  PrefixSums sums;
  float* to = out;
  for_each_block_index<Isa>(row, (std::max)(least, row.band.lo), [&](Index block) {
    const float* const x = in_play_logits<Isa>(row, block, buffer);
    BlockBits inside;
    sums.above += static_cast<double>(block_terms(terms, x, first, last, inside));
    to = store_logits<V>(x, inside, to);
  });
  sums.gathered = to - out;
  return sums;
}

/// Where the tokens end whose terms reach `part` of the entropy, if sums in float and double tell.
template <typename Isa, typename T>
bool find_top_h(const SamplingRow<T>& row, double part,
                const SamplingScratch<compute_type<T>>& scratch, PrefixEnd<float>& end) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  using V = simd::Vec<float, Isa>;
  float* const found = scratch.candidates;
  const double best = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
  NucleusSample<Isa> sample(row, found);
  const auto middle = static_cast<float>(estimated_mean(row, sample).value);
  if (!FusedWeights<V>::within_range(row, middle)) return false;
  const FusedWeights<V> about_mean(row, middle);
  RowWeighing<Isa, T, ByDistance>{row, about_mean, {0, -1, infinity}, found}(*scratch.weighed);
  const BulkMoments moments(row, about_mean, *scratch.weighed);
  const double total = moments.total.value, log_total = std::log(total);
  const Bounded entropy = moments.entropy(best, scale);
  if (!(entropy.least() > 0)) return false;
  const EntropyTerms<V> terms(row, log_total);
  float lo, hi;
  sample.weigh(terms);
  sample.bracket(row, part, lo, hi);
  const CandidateInterval<V, EntropyTerms<V>> interval{terms};
  double target = part * total * entropy.value;
  PrefixSums sums;
  for (int attempt = 0;; ++attempt) {
    if (attempt == 3) return false;
    sums = prefix_sums<Isa>(row, terms, found, lo, hi);
    if (target <= sums.above) {
      lo = std::nextafter(hi, infinity), hi = infinity;
    } else if (target > sums.above + interval.sum(found, sums.gathered)) {
      if (!(lo > row.band.lo)) return false;
      hi = std::nextafter(lo, -infinity), lo = row.band.lo;
    } else {
      break;
    }
  }
  double above = sums.above;
  const Index n = interval.narrow(found, sums.gathered, target, above);
  if (n == 0) return false;
  const auto weights = candidate_weights<float>(best, scale);
  const auto decide = [&](double before, double log_of_total, double error) {
    const auto exact_terms = [&](const float* x, Index count, double* w) {
      weights(x, count, w);
      for (Index j = 0; j < count; ++j)
        w[j] *= log_of_total - (static_cast<double>(x[j]) - best) * scale;
    };
    return tells_end_of_prefix(found, n, before, target, error, exact_terms, end);
  };
  const double log_error = 1.01 * moments.total.error / total;
  const double error =
      1.01 * (part * (entropy.value * moments.total.error + total * entropy.error) +
              above * term_error(row, static_cast<double>(found[0])) + total * log_error);
  if (decide(above, log_total, error)) return true;
  double weight_above = 0, moment_above = 0;
  const WeightSums exact = weight_sums_of_blocks<Isa>(
      row, [&](Index block, const float* x, double* weight, double* moment, double) {
        if (row.block_max[block] <= found[0]) return;
        for (Index j = 0; j < SamplingBlock::size; ++j) {
          const bool is_above = x[j] > found[0];
          weight[j] = is_above ? weight[j] : 0.0, moment[j] = is_above ? moment[j] : 0.0;
        }
        weight_above += block_sum(weight), moment_above += block_sum(moment);
      });
  const double exact_log = std::log(exact.total);
  target = part * (exact.total * exact_log - exact.moment);
  return decide(weight_above * exact_log - moment_above, exact_log,
                2e-12 * (exact.total * (exact_log + 1) - exact.moment));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
