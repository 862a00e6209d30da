/// \file
/// The filters beside those of filters.h, made of the same parts: each narrows the band, after at
/// most a few passes over the blocks that hold tokens in play. Sums of long rows are floats with a
/// bound where every number within it decides alike (moments.h), else doubles, block by block.
#pragma once

#include "deviation.h"
#include "filters.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Sum of value(logit) over the tokens in play.
template <typename Isa, typename T, typename F>
double sum_members(const SamplingRow<T>& row, F value) {
  alignas(64) double numbers[SamplingBlock::size];
  double total = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    std::fill(numbers, numbers + SamplingBlock::size, 0.0);
    member_bits<Isa>(x, block, row.band, row.band.lo).for_each([&](Index j) {
      numbers[j] = value(static_cast<double>(x[j]));
    });
    total += block_sum(numbers);
  });
  return total;
}

/// How many tokens in play have logits of `least` or more.
template <typename Isa, typename T>
Index count_members(const SamplingRow<T>& row, compute_type<T> least) {
  Index count = 0;
  for_each_block<Isa>(row, (std::max)(least, row.band.lo), [&](Index block, const auto* x) {
    count += member_bits<Isa>(x, block, row.band, least).count();
  });
  return count;
}
template <typename Isa, typename T>
Index count_members(const SamplingRow<T>& row) {
  return count_members<Isa>(row, row.band.lo);
}

/// Of two bands that begin alike, the one that ends later.
template <typename C>
void end_at_later(Band<C>& band, const Band<C>& other) {
  if (other.lo < band.lo)
    band.lo = other.lo, band.lo_end = other.lo_end;
  else if (other.lo == band.lo)
    band.lo_end = (std::max)(band.lo_end, other.lo_end);
}

/// Keeps what filter(row) keeps of the most likely tokens, and of those at least `n`.
template <typename Isa, typename T, typename Filter>
void keep_at_least(SamplingRow<T>& row, Index n, TopKTies ties,
                   const SamplingScratch<compute_type<T>>& scratch, Filter filter) {
  SamplingRow<T> best = row;
  filter(row);
  if (n == 1) return;
  keep_top_k<Isa>(best, n, ties, scratch);
  end_at_later(row.band, best.band);
}

template <typename Isa, typename T>
void keep_typical_at_least(SamplingRow<T>& row, double p, Index n,
                           const SamplingScratch<compute_type<T>>& scratch) {
  SamplingRow<T> nearest = row;
  keep_typical_p<Isa>(row, p, scratch);
  if (count_members<Isa>(row) >= n) return;
  const auto ones = [](const auto*, Index count, double* w) { std::fill(w, w + count, 1.0); };
  keep_nearest<Isa>(nearest, weight_sums<Isa>(nearest).mean(), static_cast<double>(n), ones,
                    scratch);
  row.band = nearest.band;
}

/// Whether there is a logit in [least, end) that is in play or of the lower end of the band.
template <typename Isa, typename T>
bool has_logit_in(const SamplingRow<T>& row, compute_type<T> least, compute_type<T> end) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const V first = V::set1(least), last = V::set1(end);
  alignas(64) C buffer[SamplingBlock::size];
  for (Index block = 0; block < row.blocks(); ++block) {
    if (row.block_max[block] < least) continue;
    const C* const x = block_logits<Isa>(row, block, buffer);
    std::uint32_t found = 0;
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      found |= (less_equal(first, v) & less(v, last)).bits();
    }
    if (found != 0) return true;
  }
  return false;
}

/// The smallest number of the logits' type that is `least` or more.
template <typename C>
C rounded_up(double least) {
  const C number = static_cast<C>(least);
  return static_cast<double>(number) < least
             ? std::nextafter(number, std::numeric_limits<C>::infinity())
             : number;
}

/// Of a logit from the mean, which is that of logit - best.
inline double squared_deviation(double logit, double best, double mean) {
  const double d = (logit - best) - mean;
  return d * d;
}

/// The band from the largest logit less `deviations` times the root of the variance on.
template <typename T>
void narrow_to_deviations(SamplingRow<T>& row, double deviations, double variance) {
  using C = compute_type<T>;
  const double least = static_cast<double>(row.band.hi) - deviations * std::sqrt(variance);
  if (!(least > static_cast<double>(row.band.lo))) return;
  row.band.lo = rounded_up<C>(least);
  row.band.lo_end = row.vocab;
}

/// Keeps logits of at least the largest less `deviations` times their standard deviation.
template <typename Isa, typename T>
void keep_top_n_sigma(SamplingRow<T>& row, double deviations) {
  const double best = static_cast<double>(row.band.hi);
  if constexpr (std::is_same_v<compute_type<T>, float>)
    if (row.vocab >= KeptLimits::least_vocab) {
      const Bounded sigma = deviation_of_logits<Isa>(row);
      const double lowest = static_cast<double>(row.band.lo);
      const double least = best - deviations * sigma.most(),
                   most = best - deviations * sigma.least();
      if (most <= lowest) return;  // NaN, of sums that overflow, tells nothing
      if (least > lowest &&
          !has_logit_in<Isa>(row, rounded_up<float>(least), rounded_up<float>(most))) {
        row.band.lo = rounded_up<float>(most);
        row.band.lo_end = row.vocab;
        return;
      }
    }
  const auto count = static_cast<double>(count_members<Isa>(row));
  const double mean = sum_members<Isa>(row, [&](double logit) { return logit - best; }) / count;
  const auto square = [&](double logit) { return squared_deviation(logit, best, mean); };
  narrow_to_deviations(row, deviations, sum_members<Isa>(row, square) / count);
}

/// Narrows the band to the tokens of weight `least` or more, if that is the same whatever `least`
/// is within its error, else to those of weight exact(). False: there is none.
template <typename Isa, typename T, typename Exact>
bool keep_weights(SamplingRow<T>& row, Bounded least, Exact exact) {
  const bool tells = least.error < least.value;
  if (tells && least.least() > 1) return false;
  if (tells && least.most() <= 1) {
    SamplingRow<T> more = row, fewer = row;
    keep_min_p<Isa>(more, least.least());
    keep_min_p<Isa>(fewer, least.most());
    if (same_band(more.band, fewer.band) || !has_logit_in<Isa>(row, more.band.lo, fewer.band.lo)) {
      row.band = fewer.band;
      return true;
    }
  }
  const double weight = exact();
  if (weight > 1) return false;
  keep_min_p<Isa>(row, weight);
  return true;
}

/// `share` of the sum of all weights: in float with a bound, or of an error that says nothing.
template <typename Isa, typename T>
Bounded bulk_share(const SamplingRow<T>& row, double share,
                   const SamplingScratch<compute_type<T>>& scratch) {
  if constexpr (std::is_same_v<compute_type<T>, float>) {
    using Weights = FusedWeights<simd::Vec<float, Isa>>;
    if (Weights::serves(row) && row.vocab >= KeptLimits::least_vocab) {
      const Weights weights(row);
      RowWeighing<Isa, T>{row, weights}(*scratch.weighed);
      const double total = scratch.weighed->total_above,
                   error = weights.error_of(total, row.vocab) + 1e-12 * total;
      return {share * weights.unit * total, share * weights.unit * error};
    }
  }
  return {0, 1};
}

/// Excludes the top choices, the tokens of probability `threshold` or more, but the last of them;
/// does nothing where fewer than `n` tokens would be left.
template <typename Isa, typename T>
void exclude_top_choices(SamplingRow<T>& row, double threshold, Index n,
                         const SamplingScratch<compute_type<T>>& scratch) {
  SamplingRow<T> choices = row;
  const auto exact = [&] { return threshold * sum_weights<Isa>(row, scratch.block_sum); };
  if (!keep_weights<Isa>(choices, bulk_share<Isa>(row, threshold, scratch), exact)) return;
  SamplingRow<T> rest = row;
  rest.band.hi_begin = 0;
  for_each_block<Isa>(choices, choices.band.lo, [&](Index block, const auto* x) {
    member_bits<Isa>(x, block, choices.band, choices.band.lo).for_each([&](Index j) {
      if (x[j] > rest.band.hi) return;
      rest.band.hi = x[j];
      rest.band.hi_begin = block * SamplingBlock::size + j;
    });
  });
  if (n > 1 && count_members<Isa>(rest) < n) return;
  row.band = rest.band;
  row.reached_by = 0;  // the maxima that reached it may be of tokens that are out
}

/// The smallest logit in play above `value`; there is one.
template <typename Isa, typename T>
compute_type<T> smallest_above(const SamplingRow<T>& row, compute_type<T> value) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const V bound = V::set1(value);
  V least = V::set1(row.band.hi);
  alignas(64) C buffer[SamplingBlock::size];
  for_each_block_index<Isa>(row, value, [&](Index block) {
    const C* const x = in_play_logits<Isa>(row, block, buffer);
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      least = minimum(select(less(bound, v), v, least), least);
    }
  });
  return reduce_min(least);
}

/// The band ends before the last token of a prefix, with which its sum is too large; the best
/// stays.
template <typename Isa, typename T>
void end_band_before(SamplingRow<T>& row, PrefixEnd<compute_type<T>> end) {
  if (end.taken > 1 || end.value == row.band.hi) {
    end.taken = (std::max)(end.taken - 1, Index{1});
    return end_band_at<Isa>(row, end);
  }
  row.band.lo = smallest_above<Isa>(row, end.value);
  row.band.lo_end = row.vocab;
}

/// Keeps the longest prefix of the most likely tokens whose terms of the entropy sum to at most
/// `share` of it, and the best token.
template <typename Isa, typename T>
void keep_top_h(SamplingRow<T>& row, double share,
                const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  // equal sums may differ by rounding
  const double part = share * (1 + 1e-12);
  if (part >= 1) return;
  if constexpr (std::is_same_v<C, float>) {
    PrefixEnd<C> end;
    if (row.vocab >= SelectionLimits::sampled && FusedWeights<simd::Vec<float, Isa>>::serves(row) &&
        find_top_h<Isa>(row, part, scratch, end))
      return end_band_before<Isa>(row, end);
  }
  const double best = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
  const WeightSums sums = weight_sums<Isa>(row);
  const double log_total = std::log(sums.total);
  const double target = part * (sums.total * log_total - sums.moment);
  if (!(target > 0)) return set_temperature<Isa>(row, 0.0);  // one token has it all
  const auto weights = candidate_weights<C>(best, scale);
  const auto terms = [=](const C* x, Index count, double* w) {
    weights(x, count, w);
    for (Index j = 0; j < count; ++j) {
      const double term = w[j] * (log_total - (static_cast<double>(x[j]) - best) * scale);
      w[j] = w[j] > 0 ? term : 0.0;
    }
  };
  const Index n = gather_candidates<Isa>(row, row.band.lo, scratch.candidates);
  end_band_before<Isa>(
      row, select_prefix(
               scratch.candidates, n, target, [](C x) { return order_key(x); }, terms, scratch));
}

/// Mirostat 1: top-k, with k from the slope of the probabilities of the best 100.
template <typename Isa, typename T>
void keep_mirostat_1(SamplingRow<T>& row, double mu,
                     const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  SamplingRow<T> best = row;
  keep_top_k<Isa>(best, problem::kMirostatTokens, TopKTies::lowest_index, scratch);
  C* const x = scratch.candidates;
  const Index n = gather_candidates<Isa>(best, best.band.lo, x);
  std::sort(x, x + n, std::greater<>{});
  keep_top_k<Isa>(row, problem::mirostat_count(x, n, row.inverse_temperature, mu, scratch.vocab),
                  TopKTies::lowest_index, scratch);
}

template <typename Isa, typename T>
void set_dynamic_temperature(SamplingRow<T>& row, const problem::RowParams& params) {
  Index count = 0;
  const WeightSums sums =
      weight_sums_of_blocks<Isa>(row, [&](Index block, const auto* x, double*, double*, double) {
        count += member_bits<Isa>(x, block, row.band, row.band.lo).count();
      });
  if (count == 1) return;
  set_temperature<Isa>(row, problem::dynamic_temperature(params, sums.entropy(), count));
}

/// Keeps tokens of weight `least` or more; where there is none, the best, with or without its
/// equals.
template <typename Isa, typename T, typename Exact>
void keep_weights_or_best(SamplingRow<T>& row, Bounded least, TopKTies ties,
                          const SamplingScratch<compute_type<T>>& scratch, Exact exact) {
  if (!keep_weights<Isa>(row, least, exact)) keep_top_k<Isa>(row, 1, ties, scratch);
}

/// Keeps tokens of probability `least` or more.
template <typename Isa, typename T>
void keep_probabilities(SamplingRow<T>& row, double least, TopKTies ties,
                        const SamplingScratch<compute_type<T>>& scratch) {
  keep_weights_or_best<Isa>(row, bulk_share<Isa>(row, least, scratch), ties, scratch,
                            [&] { return least * sum_weights<Isa>(row, scratch.block_sum); });
}

/// Keeps tokens of probability min(cutoff, sqrt(cutoff) exp(-entropy)) or more.
template <typename Isa, typename T>
void keep_eta(SamplingRow<T>& row, double cutoff, const SamplingScratch<compute_type<T>>& scratch) {
  const auto probability = [&](double entropy) {
    return (std::min)(cutoff, std::sqrt(cutoff) * std::exp(-entropy));
  };
  Bounded least{0, 1};
  if constexpr (std::is_same_v<compute_type<T>, float>)
    if (FusedWeights<simd::Vec<float, Isa>>::serves(row) && row.vocab >= KeptLimits::least_vocab)
      if (const auto moments = bulk_moments<Isa>(row, scratch)) {
        const Bounded entropy =
            moments->entropy(static_cast<double>(row.band.hi), row.inverse_temperature);
        const double fewest = probability(entropy.most()) * moments->total.least(),
                     most = probability(entropy.least()) * moments->total.most();
        least = {(fewest + most) / 2, (most - fewest) / 2 + 1e-11 * most};
      }
  keep_weights_or_best<Isa>(row, least, TopKTies::keep_all, scratch, [&] {
    const WeightSums sums = weight_sums<Isa>(row);
    return probability(sums.entropy()) * sums.total;
  });
}

template <typename Isa, typename T>
void apply_rare_filter(SamplingRow<T>& row, SamplingStage stage, const problem::RowParams& params,
                       bool excludes, const SamplingScratch<compute_type<T>>& scratch) {
  const Index n = params.min_tokens_to_keep;
  const auto at_least = [&](auto filter) {
    // as in Hugging Face, ties of the n-th stay at a cutoff
    const bool cutoff =
        stage == SamplingStage::epsilon_cutoff || stage == SamplingStage::eta_cutoff;
    keep_at_least<Isa>(row, n, cutoff ? TopKTies::keep_all : TopKTies::lowest_index, scratch,
                       filter);
  };
  switch (stage) {
    case SamplingStage::temperature:
      return set_dynamic_temperature<Isa>(row, params);
    case SamplingStage::top_p:
      return at_least([&](auto& r) { keep_top_p<Isa>(r, params.top_p, scratch); });
    case SamplingStage::min_p:
      return at_least([&](auto& r) { keep_min_p<Isa>(r, params.min_p); });
    case SamplingStage::typical_p:
      return keep_typical_at_least<Isa>(row, params.typical_p, n, scratch);
    case SamplingStage::top_n_sigma:
      return keep_top_n_sigma<Isa>(row, params.top_n_sigma);
    case SamplingStage::xtc:
      if (excludes) exclude_top_choices<Isa>(row, params.xtc_threshold, n, scratch);
      return;
    case SamplingStage::epsilon_cutoff:
      return at_least([&](auto& r) {
        keep_probabilities<Isa>(r, params.epsilon_cutoff, TopKTies::keep_all, scratch);
      });
    case SamplingStage::eta_cutoff:
      return at_least([&](auto& r) { keep_eta<Isa>(r, params.eta_cutoff, scratch); });
    case SamplingStage::top_h:
      return keep_top_h<Isa>(row, params.top_h, scratch);
    case SamplingStage::mirostat:
      if (params.mirostat == 1) return keep_mirostat_1<Isa>(row, params.mirostat_mu, scratch);
      // no token whose surprise is above mu, unless the best one's is
      return keep_probabilities<Isa>(row, std::exp2(-params.mirostat_mu), TopKTies::lowest_index,
                                     scratch);
    default:
      return;
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
