/// \file
/// Top-p over many tokens. A sample of the row tells where the set will end to a few percent; one
/// pass sums all weights in float and gathers the logits of that interval; of those the last token
/// is found by narrowing the interval, and tokens near it are added in double. Where the error of
/// the float sums leaves the token open, a second pass sums in double.
#pragma once

#include "bulk.h"
#include "select.h"
#include "weighing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Some tokens of a row, 32 of every few blocks, and the maxima of its blocks: masses that lie
/// below a logit, estimated. The maxima are all known, and the sample stands for the other tokens.
template <typename Isa>
struct NucleusSample {
  using V = simd::Vec<float, Isa>;
  static constexpr Index piece = 32, pieces = 64;

  float *x, *w, *maxima;  // (count), (count), (blocks): logits, their weights; those of the maxima
  const float* tops;      // (blocks) the maxima
  Index count = 0, blocks = 0;
  double scale = 0;
  float least = 0;

  /// `memory` has room for vocab numbers.
  template <typename T>
  NucleusSample(const SamplingRow<T>& row, float* memory) {
    blocks = row.blocks();
    const Index whole = row.vocab / SamplingBlock::size,
                apart = (std::max)(Index{1}, whole / pieces);
    x = memory, w = x + (whole + apart - 1) / apart * piece;
    maxima = w + (w - x);
    tops = row.block_max;
    alignas(64) float buffer[SamplingBlock::size];
    Index removed = 0;
    V low = V::set1(row.band.hi);
    for (Index block = 0; block < whole; block += apart) {
      const float* const logits =
          in_play_logits<Isa>(row, block, buffer) + block / apart % 4 * piece;
      float* const to = x + count;
      for (Index i = 0; i < piece; i += V::lanes) {
        const V v = V::load(logits + i);
        v.store(to + i);
        low = minimum(low, select(less(v, V::set1(row.band.lo)), low, v));
      }
      // the maximum is counted among the maxima
      for (Index i = 0; i < piece; i += V::lanes)
        if (const auto best = equal(V::load(to + i), V::set1(row.block_max[block])).bits();
            best != 0) {
          to[i + std::countr_zero(best)] = -std::numeric_limits<float>::infinity();
          ++removed;
          break;
        }
      count += piece;
    }
    least = reduce_min(low);
    scale = static_cast<double>(row.vocab - blocks) / static_cast<double>(count - removed);
    weigh(BulkWeights<V>(row));
  }

  template <typename Weights>
  void weigh(const Weights& weights) {
    const auto apply = [&](const float* from, float* to, Index n) {
      for_each_vector<V>(0, n, [&](Index at, auto part) {
        V v[1] = {load<V>(from + at, part)};
        weights.apply(v);
        store(v[0], to + at, part);
      });
    };
    apply(x, w, count);
    apply(tops, maxima, blocks);
  }

  /// The masses below each of 8 logits.
  void below(const float (&ends)[8], double (&masses)[8]) const {
    const auto add = [&](const float* logits, const float* weights, Index n, double factor) {
      V sums[8], bounds[8];
      for (int k = 0; k < 8; ++k) sums[k] = V::zero(), bounds[k] = V::set1(ends[k]);
      for_each_vector<V>(0, n, [&](Index at, auto part) {
        const V v = load<V>(logits + at, part), weight = load<V>(weights + at, part);
        EIGENFORMER_UNROLL
        for (int k = 0; k < 8; ++k)
          sums[k] = sums[k] + select(less(v, bounds[k]), weight, V::zero());
      });
      for (int k = 0; k < 8; ++k) masses[k] += factor * static_cast<double>(reduce_add(sums[k]));
    };
    for (double& mass : masses) mass = 0;
    add(x, w, count, scale);
    add(tops, maxima, blocks, 1.0);
  }

  /// Narrows [lo, hi], within which `wanted` likely is the mass below, by 9 in each of `rounds`.
  void close_in(double wanted, double doubt, int rounds, float& lo, float& hi) const {
    float ends[8];
    double masses[8];
    for (int round = 0; round < rounds && lo < hi; ++round) {
      const float step = (hi - lo) / 9;
      for (int k = 0; k < 8; ++k) ends[k] = lo + step * static_cast<float>(k + 1);
      below(ends, masses);
      for (int k = 0; k < 8; ++k)
        if (masses[k] <= wanted - doubt) lo = (std::max)(lo, ends[k]);
      for (int k = 7; k >= 0; --k)
        if (masses[k] >= wanted + doubt) hi = (std::min)(hi, ends[k]);
    }
  }

  /// An interval of logits in which the tokens of p of the mass likely end.
  template <typename T>
  void bracket(const SamplingRow<T>& row, double p, float& lo, float& hi) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    double masses[8];
    lo = (std::max)(row.band.lo, least), hi = row.band.hi;
    float ends[8] = {infinity, hi, hi, hi, hi, hi, hi, hi};
    below(ends, masses);
    const double rest = (1.0 - p) * masses[0];
    const double doubt =
        masses[0] * (2.0 * std::sqrt(p * (1.0 - p) / static_cast<double>(count)) + 0.1 * (1.0 - p));
    // 40 units below the best all tokens together weigh nothing
    lo = (std::max)(lo, static_cast<float>(static_cast<double>(hi) - 40 / row.inverse_temperature));
    if (masses[1] <= rest - doubt) lo = hi;
    close_in(rest, doubt, 3, lo, hi);
  }
};

struct ExactSums {
  double total = 0, above = 0;  // of the tokens in play; of those above a logit
};

/// The sums in double.
template <typename Isa, typename T>
ExactSums exact_sums(const SamplingRow<T>& row, compute_type<T> value) {
  alignas(64) double weights[SamplingBlock::size];
  ExactSums result;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
    const double sum = block_sum(weights);
    result.total += sum;
    if (row.block_max[block] <= value) return;
    for (Index j = 0; j < SamplingBlock::size; ++j) weights[j] = x[j] > value ? weights[j] : 0.0;
    result.above += block_sum(weights);
  });
  return result;
}

/// Where the tokens of p of the mass end, if the row is one of equals: their weights are 1, and the
/// sum of these is exact.
template <typename Isa, typename T>
bool find_end_of_equals(const SamplingRow<T>& row, double p, PrefixEnd<compute_type<T>>& end) {
  using C = compute_type<T>;
  if (row.band.lo != std::numeric_limits<C>::lowest() || row.band.lo_end != row.vocab ||
      row.band.hi_begin != 0)
    return false;
  alignas(64) C x[SamplingBlock::size];
  for (Index block = 0; block < row.blocks(); ++block)
    if (row.block_max[block] != row.band.hi) return false;
  for (Index block = 0; block < row.blocks(); ++block) {
    const Index tokens = (std::min)(SamplingBlock::size, row.vocab - block * SamplingBlock::size);
    if (equal_bits<Isa>(block_logits<Isa>(row, block, x), row.band.hi).count() < tokens)
      return false;
  }
  const auto all = static_cast<double>(row.vocab);
  end = {row.band.hi, problem::equals_taken(0.0, 1.0, row.vocab, p * all), row.vocab};
  return true;
}

/// Narrows candidates of [lo, hi] to those around the end of the prefix, as CandidateInterval does,
/// by the masses from eight logits on: a ninth of them is left of each pass.
template <typename V>
Index narrow_by_ends(const CandidateInterval<V, FusedWeights<V>>& interval, float* x, Index n,
                     float lo, float hi, double target, double& above) {
  constexpr int count = 8, vectors = 8;  // of V, after which floats are added to doubles
  for (int round = 0; round < 3 && n > interval.few; ++round) {
    const float step = (hi - lo) / (count + 1);
    if (!(lo + step > lo && hi - step < hi)) break;
    V bounds[count];
    for (int k = 0; k < count; ++k) bounds[k] = V::set1(lo + step * static_cast<float>(k + 1));
    LaneTotals<V> masses[count];
    for (Index begin = 0; begin < n; begin += vectors * V::lanes) {
      V sums[count];
      for (V& sum : sums) sum = V::zero();
      for_each_vector<V>(
          begin, (std::min)(n, begin + vectors * V::lanes), [&](Index at, auto part) {
            V w[1] = {load_or<V>(x + at, std::numeric_limits<float>::lowest(), part)};
            const V logits = w[0];
            interval.weights.apply(w);
            EIGENFORMER_UNROLL
            for (int k = 0; k < count; ++k) {
              const auto is_above = less_equal(bounds[k], logits);
              sums[k] = select(is_above, sums[k] + w[0], sums[k]);
            }
          });
      for (int k = 0; k < count; ++k) masses[k].add(sums[k]);
    }
    const float first = lo;
    double before = 0;
    for (int k = count - 1; k >= 0; --k) {  // the highest end whose tokens reach the target
      const double mass = masses[k].sum();
      const float end = first + step * static_cast<float>(k + 1);
      if (above + mass >= target) {
        lo = end;
        break;
      }
      hi = std::nextafter(end, lo);
      before = mass;
    }
    above += before;
    const Index kept = interval.keep(x, n, lo, hi);
    if (kept == n) break;  // equals, likely
    n = kept;
  }
  return n;
}

/// Where the tokens of p of the mass end, if float and double sums tell. What they are of stays in
/// scratch.weighed, its gathered tokens those of the row where they are at most half of all.
template <typename Isa, typename T>
bool find_nucleus(const SamplingRow<T>& row, double p,
                  const SamplingScratch<compute_type<T>>& scratch, PrefixEnd<float>& end) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  using V = simd::Vec<float, Isa>;
  WeighedRow<float>& sums = *scratch.weighed;
  float lo, hi;
  NucleusSample<Isa>(row, scratch.candidates).bracket(row, p, lo, hi);
  const CandidateInterval<V, FusedWeights<V>> interval{FusedWeights<V>(row)};
  const FusedWeights<V>& weights = interval.weights;
  double total = 0;
  for (int attempt = 0;; ++attempt) {
    if (attempt == 3) return false;
    RowWeighing<Isa, T, ByLogit>{row, weights, {lo, hi}, scratch.candidates}(sums);
    total = sums.total_above + sums.total_rest;
    if (p * total <= sums.total_above) {
      lo = std::nextafter(hi, infinity), hi = infinity;
    } else if (p * total > sums.total_above + interval.sum(sums.gathered, sums.count)) {
      if (!(lo > row.band.lo)) return false;
      hi = std::nextafter(lo, -infinity), lo = row.band.lo;
    } else {
      break;
    }
  }
  sums.reference = row.band.hi;
  float* const found = sums.candidates(row.vocab);
  double above = sums.total_above;
  Index n = sums.count;
  if (hi < infinity && lo > std::numeric_limits<float>::lowest())
    n = narrow_by_ends(interval, found, n, lo, hi, p * total, above);
  n = interval.narrow(found, n, p * total, above);
  if (n == 0) return false;
  const double narrowed = above - sums.total_above;  // of sums of 18 additions in a row at most
  const double error =
      weights.error_of_share(above, total - above, p, row.vocab) + 18 * 0x1p-24 * narrowed;
  above *= weights.unit, total *= weights.unit;
  const auto exact_weights =
      candidate_weights<float>(static_cast<double>(row.band.hi), row.inverse_temperature);
  const auto decide = [&](double before, double all, double error_of_before) {
    return tells_end_of_prefix(found, n, before, p * all, error_of_before, exact_weights, end);
  };
  if (decide(above, total, error * weights.unit)) return true;
  const ExactSums exact = exact_sums<Isa>(row, found[0]);
  return decide(exact.above, exact.total, 1e-12 * exact.total);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
