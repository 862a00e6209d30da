/// \file
/// The filters: each narrows the band of tokens in play (row.h). They share one selection,
/// the shortest prefix of the candidates in a given order whose weights reach a target: weight 1
/// and target k for top-k, the token weights and p of their sum for top-p, the same with the order
/// of typicality for typical-p. It narrows by 11 bits of the sort key at a time with the weight of
/// each of 2048 bins (a radix select), then sorts the last 256 candidates at most: O(vocab)
/// whatever the distribution, and no sort of a flat row.
#pragma once

#include <cmath>
#include <functional>

#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::order_key;

/// Where a prefix of the candidates ends.
template <typename C>
struct PrefixEnd {
  C value;           // logit of the last candidate taken
  Index taken;       // candidates equal to it that are taken, at least 1
  Index candidates;  // candidates equal to it
};

struct SelectionLimits {
  static constexpr int bin_bits = 11;
  static constexpr Index bins = Index{1} << bin_bits;
  // sums of a bin: neighbours fall in one bin, and each addition would wait for the last
  static constexpr Index ways = 4;
  static constexpr Index sort = 256;  // below this a sort costs less than the bins
};

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
  for (Index begin = 0;;) {
    Index end = begin + 1;
    while (end < n && values[end] == values[begin]) ++end;
    double weight = 0;
    weights(values + begin, 1, &weight);
    const Index equals = end - begin;
    const double reached = above + static_cast<double>(equals) * weight;
    if (reached >= target)
      return {values[begin], problem::equals_taken(above, weight, equals, target), equals};
    if (end == n) return {values[begin], equals, equals};
    above = reached;
    begin = end;
  }
}

/// The band now ends at end.value, of whose equals the `taken` of lowest index stay.
template <typename Isa, typename T>
void end_band_at(SamplingRow<T>& row, const PrefixEnd<compute_type<T>>& end) {
  if (end.taken < end.candidates)
    row.band.lo_end = nth_equal<Isa>(row, end.value, end.taken) + 1;
  else if (end.value > row.band.lo)
    row.band.lo_end = row.vocab;
  row.band.lo = end.value;
}

/// A logit that the k-th largest in play reaches: the k-th largest of the maxima of the blocks, for
/// k of them are k different tokens.
template <typename T>
compute_type<T> kth_largest_bound(const SamplingRow<T>& row, Index k, compute_type<T>* maxima) {
  const Index blocks = row.blocks();
  if (k > blocks) return row.band.lo;
  // After typical-p and XTC the largest token of a block may be out of play.
  const auto last = std::copy_if(row.block_max, row.block_max + blocks, maxima, [&](auto m) {
    return m < row.band.hi || (m == row.band.hi && row.band.hi_begin == 0);
  });
  if (last - maxima < k) return row.band.lo;
  std::nth_element(maxima, maxima + (k - 1), last, std::greater<>{});
  return (std::max)(maxima[k - 1], row.band.lo);
}

template <typename Isa, typename T>
void keep_top_k(SamplingRow<T>& row, Index k, TopKTies ties,
                const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  if (k >= row.vocab) return;
  const Index n = gather_candidates<Isa>(row, kth_largest_bound(row, k, scratch.candidates),
                                         scratch.candidates);
  if (n < k) return;
  const auto weights = [](const C*, Index count, double* w) { std::fill(w, w + count, 1.0); };
  auto end = select_prefix(
      scratch.candidates, n, static_cast<double>(k), [](C x) { return order_key(x); }, weights,
      scratch);
  if (ties == TopKTies::keep_all) end.taken = end.candidates;
  end_band_at<Isa>(row, end);
}

/// Weights of any number of candidates up to a block, for select_prefix.
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

/// A logit below which no token can be needed for top-p: tokens lighter than (1 - p) * total /
/// vocab weigh less than (1 - p) * total together, so that the others reach p. Rounded down in
/// every step.
template <typename T>
compute_type<T> top_p_bound(const SamplingRow<T>& row, double p, double total) {
  using C = compute_type<T>;
  const double lightest = 0.999 * (1.0 - p) * total / static_cast<double>(row.vocab);
  const double best = static_cast<double>(row.band.hi);
  const double bound = best + std::log(lightest) / row.inverse_temperature - 1e-12 * std::abs(best);
  if (!(bound > static_cast<double>(row.band.lo))) return row.band.lo;
  return std::nextafter(static_cast<C>(bound), row.band.lo);
}

template <typename Isa, typename T>
void keep_top_p(SamplingRow<T>& row, double p, const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  if (p >= 1.0) return;
  p = (std::max)(p, 0.0);
  const double total = sum_weights<Isa>(row, scratch.block_sum);
  const Index n = gather_candidates<Isa>(row, top_p_bound(row, p, total), scratch.candidates);
  const auto weights =
      candidate_weights<C>(static_cast<double>(row.band.hi), row.inverse_temperature);
  end_band_at<Isa>(row, select_prefix(
                            scratch.candidates, n, p * total, [](C x) { return order_key(x); },
                            weights, scratch));
}

template <typename Isa, typename T>
void keep_min_p(SamplingRow<T>& row, double min_p) {
  using C = compute_type<T>;
  if (min_p <= 0.0) return;
  const double best = static_cast<double>(row.band.hi);
  const auto kept = [&](C x) {
    return token_weight(static_cast<double>(x), best, row.inverse_temperature) >= min_p;
  };
  alignas(64) double weights[SamplingBlock::size];
  C least = row.band.hi;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    if (!kept(row.block_max[block])) return;
    member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
    for (Index j = 0; j < SamplingBlock::size; ++j)
      if (weights[j] >= min_p) least = (std::min)(least, x[j]);
  });
  if (least > row.band.lo) row.band.lo_end = row.vocab;
  row.band.lo = least;
}

/// Keeps the tokens whose information -log(probability) is nearest to the entropy. With d = (logit
/// - best) / temperature both contain the same log of the normaliser, which cancels: the distance
/// is |d - mean of d|.
template <typename Isa, typename T>
void keep_typical_p(SamplingRow<T>& row, double p,
                    const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  if (p >= 1.0) return;
  const double best = static_cast<double>(row.band.hi),
               inverse_temperature = row.inverse_temperature;
  const auto scaled = [=](C x) {
    return (std::min)(0.0, (static_cast<double>(x) - best) * inverse_temperature);
  };
  alignas(64) double weights[SamplingBlock::size];
  double total = 0, moment = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    member_weights<Isa>(x, block, row.band, inverse_temperature, weights);
    total += block_sum(weights);
    for (Index j = 0; j < SamplingBlock::size; ++j)
      weights[j] = weights[j] > 0 ? weights[j] * scaled(x[j]) : 0.0;
    moment += block_sum(weights);
  });
  const double mean = moment / total;
  const auto distance = [=](C x) { return std::abs(scaled(x) - mean); };
  const auto key = [=](C x) {
    return ~std::bit_cast<std::uint64_t>(distance(x));
  };  // near is first
  const Index n = gather_candidates<Isa>(row, row.band.lo, scratch.candidates);
  const auto end = select_prefix(scratch.candidates, n, p * total, key,
                                 candidate_weights<C>(best, inverse_temperature), scratch);
  const double farthest = distance(end.value);
  C lo = row.band.hi, hi = row.band.lo;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    for (Index j = 0; j < SamplingBlock::size; ++j)
      if (row.band.contains(x[j], block * SamplingBlock::size + j) && distance(x[j]) <= farthest) {
        lo = (std::min)(lo, x[j]);
        hi = (std::max)(hi, x[j]);
      }
  });
  row.band = {hi, lo, lo > row.band.lo ? row.vocab : row.band.lo_end,
              hi < row.band.hi ? 0 : row.band.hi_begin};
}

template <typename Isa, typename T>
void set_temperature(SamplingRow<T>& row, double temperature) {
  if (temperature == 0.0) {
    row.band.lo_end = nth_equal<Isa>(row, row.band.hi, 1) + 1;
    row.band.lo = row.band.hi;
  } else {
    row.inverse_temperature = problem::inverse_temperature(temperature);
  }
}

/// The stages of stages.h.
template <typename Isa, typename T>
void apply_rare_filter(SamplingRow<T>& row, SamplingStage stage, const problem::RowParams& params,
                       bool excludes, const SamplingScratch<compute_type<T>>& scratch);

/// Runs the stages that filter on a scanned row. `excludes`: XTC is to exclude tokens.
template <typename Isa, typename T>
void apply_filters(SamplingRow<T>& row, const problem::RowParams& params, bool excludes,
                   const SamplingScratch<compute_type<T>>& scratch) {
  const bool keeps_one = params.min_tokens_to_keep == 1;
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::none) break;
    if (stage == SamplingStage::temperature && params.dynatemp_range == 0)
      set_temperature<Isa>(row, params.temperature);
    else if (stage == SamplingStage::top_k)
      keep_top_k<Isa>(row, params.top_k, params.top_k_ties, scratch);
    else if (stage == SamplingStage::top_p && keeps_one)
      keep_top_p<Isa>(row, params.top_p, scratch);
    else if (stage == SamplingStage::min_p && keeps_one)
      keep_min_p<Isa>(row, params.min_p);
    else if (stage == SamplingStage::typical_p && keeps_one)
      keep_typical_p<Isa>(row, params.typical_p, scratch);
    else if (stage > SamplingStage::function)
      apply_rare_filter<Isa>(row, stage, params, excludes, scratch);
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
