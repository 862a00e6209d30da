/// \file
/// Typical-p over many tokens. A sample of the row tells the mean logit and the distance from it at
/// which the set will end to a few percent. One pass in float sums the moments of all weights, with
/// a bound on their error (moments.h), and gathers the logits of about that distance on both sides.
/// Of those the last token is found by narrowing, and tokens near it are added in double. It
/// decides where the kept set is the same for every mean and every sum within the bounds; where the
/// error of the float sums leaves it open, a pass in double has smaller bounds.
#pragma once

#include "moments.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Distances from `middle` between which the nearest tokens likely end that have p of the mass. The
/// sample holds distances afterwards.
template <typename Isa, typename T>
void bracket_distance(const SamplingRow<T>& row, NucleusSample<Isa>& sample, double p, float middle,
                      float& nearer, float& farther) {
  using V = simd::Vec<float, Isa>;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const auto measure = [&](const float* from, float* to, Index n) {
    for_each_vector<V>(0, n, [&](Index at, auto part) {
      store(abs(load<V>(from + at, part) - V::set1(middle)), to + at, part);
    });
  };
  float* const tops = sample.maxima + sample.blocks;
  measure(sample.x, sample.x, sample.count);
  measure(sample.tops, tops, sample.blocks);
  sample.tops = tops;
  double masses[8];
  sample.below({infinity, 0, 0, 0, 0, 0, 0, 0}, masses);
  V sum = V::zero();
  for_each_vector<V>(0, sample.count, [&](Index at, auto part) {
    const V weight = load<V>(sample.w + at, part);
    sum = fma(weight, weight, sum);
  });
  const auto squares = static_cast<double>(reduce_add(sum));
  const double doubt =
      2.5 * sample.scale * std::sqrt(squares * p * (1.0 - p)) + 1e-3 * (1.0 - p) * masses[0];
  nearer = 0, farther = (std::max)(row.band.hi - middle, middle - sample.least);
  const float all = farther;
  sample.close_in(p * masses[0], doubt, 3, nearer, farther);
  if (farther == all) farther = (std::numeric_limits<float>::max)();
}

/// The last token of those nearest to a logit.
struct NearestEnd {
  float value;
  double center;
  double distance() const { return std::abs(static_cast<double>(value) - center); }
};

/// The largest of logits in [least, most], -infinity if there is none.
template <typename Isa>
float largest_in(const float* x, Index n, float least, float most) {
  using V = simd::Vec<float, Isa>;
  const V first = V::set1(least), last = V::set1(most),
          none = V::set1(-std::numeric_limits<float>::infinity());
  V found = none;
  Index i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const V v = V::load(x + i);
    found = maximum(select(less_equal(first, v) & less_equal(v, last), v, none), found);
  }
  float largest = reduce_max(found);
  for (; i < n; ++i)
    if (least <= x[i] && x[i] <= most) largest = (std::max)(largest, x[i]);
  return largest;
}

/// The largest logit in play that is `most` or less; there is one.
template <typename Isa, typename T>
float largest_at_most(const SamplingRow<T>& row, float most) {
  alignas(64) float x[SamplingBlock::size];
  float found = -std::numeric_limits<float>::infinity();
  for (Index block = 0; block < row.blocks(); ++block) {
    if (row.block_max[block] <= found) continue;
    const float* const logits = block_logits<Isa>(row, block, x);
    found = (std::max)(found, row.block_max[block] <= most
                                  ? row.block_max[block]
                                  : largest_in<Isa>(logits, SamplingBlock::size, found, most));
  }
  return found;
}

/// Where the tokens nearest to the mean logit end whose weights sum to p of all.
template <typename Isa, typename T>
struct NearestSearch {
  using V = simd::Vec<float, Isa>;
  using Interval = CandidateInterval<V, FusedWeights<V>, DistanceKey<V>>;
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  const SamplingRow<T>& row;
  double p;
  float* found;          // what a pass gathered
  double center, doubt;  // the mean logit, and its error
  NearestEnd end = {};
  bool outside = false;  // the end may lie outside of the ring

  double distance(float x) const { return std::abs(static_cast<double>(x) - center); }
  /// How wrong a distance in float from `middle` may be, after three roundings.
  double doubt_of(double middle, double distance) const {
    return doubt + std::abs(center - middle) + 2e-7 * distance;
  }

  /// Whether and where n candidates end the set: after tokens of weight `before`, all nearer than
  /// `nearer`, while others are farther than `farther`. `error` is that of `target` - `before`.
  bool decide(float* x, Index n, double before, double target, double error, double nearer,
              double farther) {
    end = {x[0], center};
    if (n <= Interval::few)
      std::sort(x, x + n, [&](float a, float b) {
        const double da = distance(a), db = distance(b);
        return da < db || (da == db && a < b);
      });
    else if (std::count(x, x + n, x[0]) != n)
      return false;
    const auto weights =
        candidate_weights<float>(static_cast<double>(row.band.hi), row.inverse_temperature);
    const PrefixEnd<float> early = end_of_prefix(x, n, before, target - error, weights),
                           late = end_of_prefix(x, n, before, target + error, weights);
    end = {early.value, center};
    if (!(before + error < target) || early.value != late.value || !late.reached) return false;
    if (!(end.distance() > nearer + doubt) || !(end.distance() < farther - doubt)) return false;
    // others as near: on the other side the mean decides, on the same side sums in double might not
    // tell them apart
    const double rounding = 1e-14 * (std::abs(static_cast<double>(row.band.hi)) + std::abs(center));
    const auto below = [&](float each) { return static_cast<double>(each) <= center; };
    return std::none_of(x, x + n, [&](float each) {
      const double margin = below(each) != below(end.value) ? 2 * doubt : rounding;
      return each != end.value && std::abs(distance(each) - end.distance()) <= margin;
    });
  }
};

/// Distances from a logit, those of the tokens that a pass gathers.
struct Ring {
  float middle, nearer, farther;

  /// Farther than this no token has a weight.
  template <typename V>
  static float most(const FusedWeights<V>& weights) {
    return static_cast<float>((std::min)(120 / weights.rate, 1e38));
  }
  template <typename V>
  ByDistance rule(const FusedWeights<V>& weights) const {
    const double reach = static_cast<double>(farther),
                 least = weights.zero - 1.000001 * reach - 1e-6 * std::abs(weights.zero);
    return {static_cast<float>(static_cast<double>(nearer) * weights.rate),
            static_cast<float>(reach * weights.rate), static_cast<float>((std::max)(least, -1e38))};
  }
};

/// Decides of what a pass gathered.
template <typename Isa, typename T>
bool decide_nearest(NearestSearch<Isa, T>& search,
                    const FusedWeights<typename NearestSearch<Isa, T>::V>& weights,
                    const WeighedRow<float>& sums, const BulkMoments& moments, const Ring& ring,
                    float* candidates) {
  using Search = NearestSearch<Isa, T>;
  using V = typename Search::V;
  const auto& row = search.row;
  const double p = search.p, weight = sums.total_above + sums.total_rest;
  const float middle = static_cast<float>(search.center);
  const double reach = (std::min)(static_cast<double>(ring.farther), 1e3 * moments.spread);
  const typename Search::Interval interval{
      weights, {middle, static_cast<float>(4 * search.doubt_of(middle, reach))}};
  double before = sums.total_above;
  typename Search::Interval::Dropped dropped;
  const Index n = interval.narrow(candidates, sums.count, p * weight, before, &dropped);
  if (n == 0) return false;
  const bool has_dropped = dropped.above < Search::infinity;
  const double first_near = ring.nearer > 0 ? static_cast<double>(ring.nearer) : -1e300,
               last_far = static_cast<double>(ring.farther);
  const auto decide = [&](double total, double sum_before, double error) {
    const auto widened = [&](double from, double distance, double sign) {
      return distance < 0 || !(distance < 1e30) ? distance
                                                : distance + sign * search.doubt_of(from, distance);
    };
    double nearer = widened(weights.zero, first_near, 1),
           farther = widened(weights.zero, last_far, -1);
    const double ring_near = nearer + search.doubt, ring_far = farther - search.doubt;
    if (has_dropped)
      nearer = (std::max)(
          nearer, widened(static_cast<double>(middle), -static_cast<double>(dropped.above), 1));
    if (dropped.below > -Search::infinity)
      farther = (std::min)(
          farther, widened(static_cast<double>(middle), -static_cast<double>(dropped.below), -1));
    const bool decided =
        search.decide(candidates, n, sum_before, p * total, error, nearer, farther);
    search.outside =
        !decided && !(ring_near < search.end.distance() && search.end.distance() < ring_far);
    return decided;
  };
  // of sums of 10 additions in a row: what lay before the candidates in the ring
  const auto error_of = [&](double mass) {
    return mass * (weights.weight + weights.sum) +
           weights.log_weight * std::sqrt(mass * moments.log_squares);
  };
  const double error = (1 - p) * error_of(before) + p * error_of(weight - before) +
                       10 * 0x1p-24 * (before - sums.total_above) + 1e-12 * weight;
  if (decide(weight * weights.unit, before * weights.unit, 1.01 * error * weights.unit + 1e-30))
    return true;
  if (search.outside) return false;
  // the tokens before the candidates as one interval, and their weights in double
  const auto doubt_at = [&](double distance) { return search.doubt_of(weights.zero, distance); };
  const double nearest = -static_cast<double>(dropped.above);
  if (has_dropped &&
      (!(first_near + doubt_at(first_near) < nearest) || !(nearest < last_far - doubt_at(nearest))))
    return false;
  const float first = has_dropped ? -dropped.above : ring.rule(weights).nearer;
  double exact_before = 0;
  const WeightSums exact =
      weight_sums_of_blocks<Isa>(row, [&](Index, const float* x, double* w, double*, double) {
        alignas(64) float distances[SamplingBlock::size];
        for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
          V t[1] = {V::load(x + i)};
          if (has_dropped)
            t[0] = t[0] - V::set1(middle);
          else
            weights.exponents(t);
          abs(t[0]).store(distances + i);
        }
        for (Index j = 0; j < SamplingBlock::size; ++j) w[j] = distances[j] < first ? w[j] : 0.0;
        exact_before += block_sum(w);
      });
  const double best = static_cast<double>(row.band.hi);
  search.center = best + exact.mean() / row.inverse_temperature;
  search.doubt =
      1e-12 * std::abs(search.center - best) + 1e-14 * (std::abs(best) + std::abs(search.center));
  return decide(exact.total, exact_before, 1e-12 * exact.total);
}

/// The band of the tokens in play up to the end. `gathered` of `found`: logits of the ring.
template <typename Isa, typename T>
Band<float> band_of_nearest(const SamplingRow<T>& row, const NearestEnd& end, float middle,
                            const float* found, Index gathered) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr auto most = static_cast<double>((std::numeric_limits<float>::max)());
  const double farthest = end.distance();
  float lo = end.value, hi = end.value;  // the other end rounded inwards: no token lies between
  if (static_cast<double>(end.value) <= end.center) {
    hi = static_cast<float>((std::min)(end.center + farthest, most));
    if (static_cast<double>(hi) > end.center + farthest) hi = std::nextafter(hi, -infinity);
  } else {
    lo = static_cast<float>((std::max)(end.center - farthest, -most));
    if (static_cast<double>(lo) < end.center - farthest) lo = std::nextafter(lo, infinity);
  }
  Band<float> band = row.band;
  if (lo > band.lo) band.lo = lo, band.lo_end = row.vocab;
  if (hi < band.hi) {
    // one of the ring, else one nearer
    band.hi = largest_in<Isa>(found, gathered, middle, hi);
    if (!(band.hi > middle)) band.hi = largest_at_most<Isa>(row, hi);
    band.hi_begin = 0;
  }
  return band;
}

/// Narrows the band to the tokens nearest to the mean logit that have p of the mass, if sums in
/// float and double tell. What they are of stays in scratch.weighed, as with find_nucleus.
template <typename Isa, typename T>
bool find_nearest(SamplingRow<T>& row, double p, const SamplingScratch<compute_type<T>>& scratch) {
  constexpr float all = (std::numeric_limits<float>::max)();
  using V = simd::Vec<float, Isa>;
  float* const found = scratch.candidates;
  WeighedRow<float>& sums = *scratch.weighed;
  Ring ring{row.band.hi, 0, all};
  bool sums_alone = true;  // where nothing is known of the mean
  if (row.vocab >= SelectionLimits::sampled) {
    NucleusSample<Isa> sample(row, found);
    const Bounded mean = estimated_mean(row, sample);
    ring.middle = static_cast<float>(mean.value);
    bracket_distance(row, sample, p, ring.middle, ring.nearer, ring.farther);
    ring.nearer -= static_cast<float>(mean.error), ring.farther += static_cast<float>(mean.error);
    ring.nearer = (std::max)(ring.nearer, 0.0f);
    sums_alone = false;
  }
  for (int attempt = 0; attempt < 4; ++attempt) {
    if (!FusedWeights<V>::within_range(row, ring.middle)) return false;
    const FusedWeights<V> weights(row, ring.middle);
    const bool is_all = ring.farther >= Ring::most(weights);
    ring.farther = (std::min)(ring.farther, Ring::most(weights));
    const ByDistance rule = sums_alone ? ByDistance{0, -1, all} : ring.rule(weights);
    RowWeighing<Isa, T, ByDistance>{row, weights, rule, found}(sums);
    const BulkMoments moments(row, weights, sums);
    const double target = p * (sums.total_above + sums.total_rest);
    NearestSearch<Isa, T> search{row, p, found, moments.mean.value, moments.mean.error};
    const auto center = static_cast<float>(search.center);
    const float away = std::abs(center - ring.middle);
    if (sums_alone) {
      sums_alone = false;
    } else if (target <= sums.total_above) {
      ring.farther = 1.000001f * ring.nearer + 2 * away, ring.nearer = 0;
    } else {
      const typename NearestSearch<Isa, T>::Interval interval{weights, {center, 0}};
      if (target <= sums.total_above + interval.sum(found, sums.count)) {
        float* const candidates = sums.candidates(row.vocab);
        if (decide_nearest(search, weights, sums, moments, ring, candidates)) {
          row.band = band_of_nearest<Isa>(row, search.end, ring.middle, found,
                                          sums.gathered == nullptr ? 0 : sums.count);
          sums.reference = ring.middle;
          return true;
        }
        if (!search.outside) return false;
        ring = {center, (std::max)(0.0f, ring.nearer - 4 * away),
                (std::min)(all, ring.farther + 4 * away)};
        continue;
      }
      if (is_all) return false;
      ring.nearer = (std::max)(0.0f, ring.farther - 2 * away), ring.farther = all;
    }
    ring.middle = center;
  }
  return false;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
