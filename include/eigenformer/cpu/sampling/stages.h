/// \file
/// The filters beside those of filters.h, made of the same parts: each narrows the band, after at
/// most a few passes over the blocks that hold tokens in play. Sums are doubles, block by block.
#pragma once

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

template <typename Isa, typename T>
Index count_members(const SamplingRow<T>& row) {
  Index count = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    count += member_bits<Isa>(x, block, row.band, row.band.lo).count();
  });
  return count;
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

/// Keeps logits of at least the largest less `deviations` times their standard deviation.
template <typename Isa, typename T>
void keep_top_n_sigma(SamplingRow<T>& row, double deviations) {
  using C = compute_type<T>;
  const double best = static_cast<double>(row.band.hi),
               count = static_cast<double>(count_members<Isa>(row));
  const double mean = sum_members<Isa>(row, [&](double logit) { return logit - best; }) / count;
  const auto square = [&](double logit) {
    const double d = (logit - best) - mean;
    return d * d;
  };
  const double variance = sum_members<Isa>(row, square) / count;
  const double least = best - deviations * std::sqrt(variance);
  if (!(least > static_cast<double>(row.band.lo))) return;
  C lo = static_cast<C>(least);
  if (static_cast<double>(lo) < least) lo = std::nextafter(lo, row.band.hi);
  row.band.lo = lo;
  row.band.lo_end = row.vocab;
}

/// Excludes the top choices, the tokens of probability `threshold` or more, but the last of them;
/// does nothing where fewer than `n` tokens would be left.
template <typename Isa, typename T>
void exclude_top_choices(SamplingRow<T>& row, double threshold, Index n,
                         const SamplingScratch<compute_type<T>>& scratch) {
  const double least_weight = threshold * sum_weights<Isa>(row, scratch.block_sum);
  if (least_weight > 1) return;  // there is none
  SamplingRow<T> choices = row;
  keep_min_p<Isa>(choices, least_weight);
  SamplingRow<T> rest = row;
  rest.band.hi_begin = 0;
  for_each_block<Isa>(choices, choices.band.lo, [&](Index block, const auto* x) {
    member_bits<Isa>(x, block, choices.band, choices.band.lo).for_each([&](Index j) {
      if (x[j] > rest.band.hi) return;
      rest.band.hi = x[j];
      rest.band.hi_begin = block * SamplingBlock::size + j;
    });
  });
  if (n == 1 || count_members<Isa>(rest) >= n) row.band = rest.band;
}

/// Keeps the longest prefix of the most likely tokens whose terms of the entropy sum to at most
/// `share` of it, and the best token.
template <typename Isa, typename T>
void keep_top_h(SamplingRow<T>& row, double share,
                const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  const double best = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
  const WeightSums sums = weight_sums<Isa>(row);
  const double log_total = std::log(sums.total);
  // equal sums may differ by rounding
  const double part = share * (1 + 1e-12);
  if (part >= 1) return;
  const double target = part * (sums.total * log_total - sums.moment);
  const auto weights = candidate_weights<C>(best, scale);
  const auto terms = [=](const C* x, Index count, double* w) {
    weights(x, count, w);
    for (Index j = 0; j < count; ++j) {
      const double term = w[j] * (log_total - (static_cast<double>(x[j]) - best) * scale);
      w[j] = w[j] > 0 ? term : 0.0;
    }
  };
  const Index n = gather_candidates<Isa>(row, row.band.lo, scratch.candidates);
  // with the last of these tokens the sum is too large
  PrefixEnd<C> end = select_prefix(
      scratch.candidates, n, (std::max)(target, 0.0), [](C x) { return order_key(x); }, terms,
      scratch);
  if (end.taken > 1 || end.value == row.band.hi) {
    end.taken = (std::max)(end.taken - 1, Index{1});
    return end_band_at<Isa>(row, end);
  }
  C lo = row.band.hi;
  for_each_block<Isa>(row, end.value, [&](Index block, const C* x) {
    member_bits<Isa>(x, block, row.band, row.band.lo).for_each([&](Index j) {
      if (x[j] > end.value) lo = (std::min)(lo, x[j]);
    });
  });
  row.band.lo = lo;
  row.band.lo_end = row.vocab;
}

/// Mirostat 1: top-k, with k from the slope of the probabilities of the best 100.
template <typename Isa, typename T>
void keep_mirostat_1(SamplingRow<T>& row, double mu,
                     const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  constexpr Index looked_at = 100;
  SamplingRow<T> best = row;
  keep_top_k<Isa>(best, looked_at, TopKTies::lowest_index, scratch);
  C* const x = scratch.candidates;
  const Index n = gather_candidates<Isa>(best, best.band.lo, x);
  std::sort(x, x + n, std::greater<>{});
  double products = 0, squares = 0;
  for (Index i = 0; i + 1 < n; ++i) {
    const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    products +=
        t * (static_cast<double>(x[i]) - static_cast<double>(x[i + 1])) * row.inverse_temperature;
    squares += t * t;
  }
  keep_top_k<Isa>(row, problem::mirostat_count(products, squares, mu, scratch.vocab),
                  TopKTies::lowest_index, scratch);
}

template <typename Isa, typename T>
void set_dynamic_temperature(SamplingRow<T>& row, const problem::RowParams& params) {
  const Index count = count_members<Isa>(row);
  if (count == 1) return;
  const double entropy = weight_sums<Isa>(row).entropy();
  set_temperature<Isa>(row, problem::dynamic_temperature(params, entropy, count));
}

/// Keeps tokens of probability `least` or more; where there is none, the best, with or without its
/// equals.
template <typename Isa, typename T>
void keep_probabilities(SamplingRow<T>& row, double least, double total, TopKTies ties,
                        const SamplingScratch<compute_type<T>>& scratch) {
  if (least * total > 1)
    keep_top_k<Isa>(row, 1, ties, scratch);
  else
    keep_min_p<Isa>(row, least * total);
}

template <typename Isa, typename T>
void apply_rare_filter(SamplingRow<T>& row, SamplingStage stage, const problem::RowParams& params,
                       bool excludes, const SamplingScratch<compute_type<T>>& scratch) {
  const Index n = params.min_tokens_to_keep;
  const auto total = [&] { return sum_weights<Isa>(row, scratch.block_sum); };
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
        keep_probabilities<Isa>(r, params.epsilon_cutoff, total(), TopKTies::keep_all, scratch);
      });
    case SamplingStage::eta_cutoff:
      return at_least([&](auto& r) {
        const WeightSums sums = weight_sums<Isa>(r);
        const double cutoff = params.eta_cutoff,
                     with_entropy = std::sqrt(cutoff) * std::exp(-sums.entropy());
        keep_probabilities<Isa>(r, (std::min)(cutoff, with_entropy), sums.total, TopKTies::keep_all,
                                scratch);
      });
    case SamplingStage::top_h:
      return keep_top_h<Isa>(row, params.top_h, scratch);
    case SamplingStage::mirostat:
      if (params.mirostat == 1) return keep_mirostat_1<Isa>(row, params.mirostat_mu, scratch);
      // no token whose surprise is above mu, unless the best one's is
      return keep_probabilities<Isa>(row, std::exp2(-params.mirostat_mu), total(),
                                     TopKTies::lowest_index, scratch);
    default:
      return;
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
