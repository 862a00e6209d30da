/// \file
/// Where a prefix of candidates, sorted by a key, ends: the shortest whose weights reach a target.
/// Two ways to it. select_prefix, for any key and weight, narrows by 11 bits of the key at a time
/// with the weight of each of 2048 bins (a radix select). CandidateInterval, for logits in float,
/// narrows an interval of logits around pivots of a sample, a vector at a time, and wants its sums
/// to be checked. Both sort the last candidates only: O(n) whatever the distribution.
#pragma once

#include <functional>

#include "bulk.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::order_key;

/// Where a prefix of the candidates ends.
template <typename C>
struct PrefixEnd {
  C value;              // logit of the last candidate taken
  Index taken;          // candidates equal to it that are taken, at least 1
  Index candidates;     // candidates equal to it
  bool reached = true;  // false: all candidates together stay below the target
};

struct SelectionLimits {
  static constexpr int bin_bits = 11;
  static constexpr Index bins = Index{1} << bin_bits;
  // sums of a bin: neighbours fall in one bin, and each addition would wait for the last
  static constexpr Index ways = 4;
  static constexpr Index sort = 256;      // below this a sort costs less than the bins
  static constexpr Index sampled = 8192;  // from here on a sample is small beside the row
};

/// Weights of any number of candidates up to a block.
template <typename C>
auto candidate_weights(double best, double inverse_temperature) {
  return [=](const C* x, Index count, double* w) {
    if (count == SamplingBlock::size) {
      block_weights(x, best, inverse_temperature, w);
    } else {
      for (Index j = 0; j < count; ++j)
        w[j] = token_weight(static_cast<double>(x[j]), best, inverse_temperature);
    }
  };
}

/// One radix step: bins the values by the bits of their key at `shift`, finds the bin in which the
/// running weight `above` reaches the target (the last one that weighs anything where none does),
/// keeps its values and returns how many.
template <typename C, typename Key, typename Weights>
Index narrow_to_bin(C* values, Index n, int shift, double target, double& above, Key key,
                    Weights weights, const SamplingScratch<C>& scratch) {
  constexpr std::uint64_t low_bits = SelectionLimits::bins - 1;
  const auto bin_of = [&](C value) {
    return static_cast<Index>((std::uint64_t{key(value)} >> shift) & low_bits);
  };
  constexpr Index ways = SelectionLimits::ways;
  std::fill(scratch.bin_sum, scratch.bin_sum + SelectionLimits::bins * ways, 0.0);
  alignas(64) double w[SamplingBlock::size];
  alignas(64) std::int32_t bins[SamplingBlock::size];
  for (Index i = 0; i < n; i += SamplingBlock::size) {
    const Index count = (std::min)(SamplingBlock::size, n - i);
    weights(values + i, count, w);
    for (Index j = 0; j < count; ++j)
      bins[j] = static_cast<std::int32_t>(bin_of(values[i + j]) * ways + j % ways);
    for (Index j = 0; j < count; ++j) scratch.bin_sum[bins[j]] += w[j];
  }
  Index chosen = 0;
  double before = above;
  for (Index bin = SelectionLimits::bins - 1; bin >= 0; --bin) {
    const double* sums = scratch.bin_sum + bin * ways;
    const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (sum == 0) continue;
    chosen = bin;
    above = before;
    before += sum;
    if (before >= target) break;
  }
  Index kept = 0;
  for (Index i = 0; i < n; ++i) {
    const C value = values[i];
    values[kept] = value;
    kept += bin_of(value) == chosen;
  }
  return kept;
}

/// The end of the prefix among candidates in order, after others of weight `above`.
template <typename C, typename Weights>
PrefixEnd<C> end_of_prefix(const C* values, Index n, double above, double target, Weights weights) {
  for (Index begin = 0;;) {
    Index end = begin + 1;
    while (end < n && values[end] == values[begin]) ++end;
    double weight = 0;
    weights(values + begin, 1, &weight);
    const Index equals = end - begin;
    const double reached = above + static_cast<double>(equals) * weight;
    if (reached >= target)
      return {values[begin], problem::equals_taken(above, weight, equals, target), equals};
    if (end == n) return {values[begin], equals, equals, false};
    above = reached;
    begin = end;
  }
}

/// end_of_prefix in `end`. Whether all targets within `error` lie above `above` and have that end.
template <typename C, typename Weights>
bool tells_end_of_prefix(const C* values, Index n, double above, double target, double error,
                         Weights weights, PrefixEnd<C>& end) {
  end = end_of_prefix(values, n, above, target - error, weights);
  const PrefixEnd<C> late = end_of_prefix(values, n, above, target + error, weights);
  return above + error < target && end.taken == late.taken && end.value == late.value &&
         late.reached;
}

/// The shortest prefix, by descending key, of n >= 1 candidates whose weights sum to at least
/// `target`; never empty, and all of them where the sum stays below. Equal values have equal keys
/// and weights. Permutes `values`.
template <typename C, typename Key, typename Weights>
PrefixEnd<C> select_prefix(C* values, Index n, double target, Key key, Weights weights,
                           const SamplingScratch<C>& scratch) {
  double above = 0;
  int shift = 8 * static_cast<int>(sizeof(key(values[0])));
  while (n > SelectionLimits::sort && shift > 0) {
    shift = (std::max)(0, shift - SelectionLimits::bin_bits);
    n = narrow_to_bin(values, n, shift, target, above, key, weights, scratch);
  }
  // at 0 all keys are equal
  if (shift > 0) std::sort(values, values + n, [&](C a, C b) { return key(a) > key(b); });
  return end_of_prefix(values, n, above, target, weights);
}

/// Weight 1, for top-k.
template <typename V>
struct UnitWeights {
  template <int N>
  EIGENFORMER_INLINE void apply(V (&x)[N]) const {
    for (V& v : x) v = V::set1(1.0f);
  }
};

/// The most likely come first.
template <typename V>
struct LogitKey {
  EIGENFORMER_INLINE V operator()(V x) const { return x; }
  float operator()(float x) const { return x; }
  float margin() const { return 0; }
};

/// The nearest to a logit come first. Keys are rounded, and nearness is known to half of `doubt`:
/// an interval is wider by that.
template <typename V>
struct DistanceKey {
  float center, doubt;
  EIGENFORMER_INLINE V operator()(V x) const { return V::zero() - abs(x - V::set1(center)); }
  float operator()(float x) const { return -std::abs(x - center); }
  float margin() const { return doubt; }
};

/// Narrows candidates, sorted by a key, to those around the end of the prefix. Weights: BulkWeights
/// or UnitWeights.
template <typename V, typename Weights, typename Key = LogitKey<V>>
struct CandidateInterval {
  Weights weights;
  Key key = {};

  struct Masses {
    double above = 0, inside = 0;  // of keys > hi; of keys in [lo, hi]
  };
  Masses masses(const float* x, Index n, float lo, float hi) const {
    constexpr int vectors = SamplingBlock::size / V::lanes, at_once = kVectorsAtOnce<V>;
    const V first = V::set1(lo), last = V::set1(hi);
    alignas(64) float tail[SamplingBlock::size];
    Masses result;
    for (Index begin = 0; begin < n; begin += SamplingBlock::size) {
      const float* block = x + begin;
      if (n - begin < SamplingBlock::size) {
        std::fill(std::copy(block, x + n, tail), tail + SamplingBlock::size,
                  -std::numeric_limits<float>::infinity());
        block = tail;
      }
      V above = V::zero(), inside = V::zero();
      for (int at = 0; at < vectors; at += at_once) {
        V w[at_once], other[at_once];
        for (int k = 0; k < at_once; ++k) w[k] = V::load(block + (at + k) * V::lanes);
        weights.apply(w);
        for (int k = 0; k < at_once; ++k) {
          const V v = key(V::load(block + (at + k) * V::lanes));
          const auto is_above = less(last, v);
          other[k] = select(is_above, w[k], V::zero());
          w[k] = select(is_above, V::zero(), select(less_equal(first, v), w[k], V::zero()));
        }
        above = above + sum_of(other);
        inside = inside + sum_of(w);
      }
      result.above += static_cast<double>(reduce_add(above));
      result.inside += static_cast<double>(reduce_add(inside));
    }
    return result;
  }
  double sum(const float* x, Index n) const {
    return masses(x, n, std::numeric_limits<float>::lowest(),
                  std::numeric_limits<float>::infinity())
        .inside;
  }

  /// Keeps the candidates of keys in [lo, hi], in order; returns how many.
  Index keep(float* x, Index n, float lo, float hi) const {
    const V first = V::set1(lo), last = V::set1(hi);
    Index kept = 0, i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {  // writes behind what was read
      const V v = V::load(x + i), k = key(v);
      kept += store_selected(v, less_equal(first, k) & less_equal(k, last), x + kept);
    }
    for (; i < n; ++i) {
      const float v = x[i], k = key(v);
      x[kept] = v;
      kept += lo <= k && k <= hi;
    }
    return kept;
  }

  static constexpr Index few = 64;

  struct Dropped {
    float above = std::numeric_limits<float>::infinity(), below = -above;
  };
  /// Keeps the candidates of an interval around the one at which `above` and the weights of those
  /// before it reach `target`, and adds to `above` the weights that come before it. Returns how
  /// many are left, sorted, first key first: at most 64, or all of one key. 0: it found no such
  /// interval. Those dropped have keys above `dropped.above` or below `dropped.below`.
  Index narrow(float* x, Index n, double target, double& above, Dropped* dropped = nullptr) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    double mass = n > few ? sum(x, n) : 0.0;
    bool single = false;
    for (int round = 0; n > few; ++round) {
      if (round == 40) return 0;
      constexpr int picks = 32;
      alignas(64) float pivots[picks], w[picks];
      for (Index i = 0; i < picks; ++i) pivots[i] = x[i * n / picks];
      std::sort(pivots, pivots + picks, [&](float a, float b) { return key(a) > key(b); });
      for (int i = 0; i < picks; i += V::lanes) {
        V v[1] = {V::load(pivots + i)};
        weights.apply(v);
        v[0].store(w + i);
      }
      double all = 0, before = 0;
      for (const float each : w) all += static_cast<double>(each);
      int place = 0;
      for (const double wanted = (target - above) / mass * all; place < picks - 1; ++place)
        if ((before += static_cast<double>(w[place])) >= wanted) break;
      const int around = single ? 0 : 3;
      float hi = place < around ? infinity : key(pivots[place - around]) + key.margin(),
            lo = place + around >= picks && !single ? std::numeric_limits<float>::lowest()
                                                    : key(pivots[place + around]) - key.margin();
      const Masses m = masses(x, n, lo, hi);
      if (target <= above + m.above) {
        lo = std::nextafter(hi, infinity), hi = infinity, mass = m.above;
      } else if (target > above + m.above + m.inside) {
        hi = std::nextafter(lo, -infinity), lo = std::numeric_limits<float>::lowest();
        above += m.above + m.inside, mass -= m.above + m.inside;
      } else {
        above += m.above, mass = m.inside;
      }
      const Index kept = keep(x, n, lo, hi);
      if (kept == 0) return 0;
      if (dropped != nullptr)
        *dropped = {(std::min)(dropped->above, hi), (std::max)(dropped->below, lo)};
      single = kept == n;
      n = kept;
      if (single && std::all_of(x, x + n, [&](float each) { return key(each) == key(x[0]); }))
        return n;
    }
    std::sort(x, x + n, [&](float a, float b) { return key(a) > key(b); });
    return n;
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
