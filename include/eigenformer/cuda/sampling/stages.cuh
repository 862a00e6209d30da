/// \file
/// The filters beside those of filters.cuh, by a block, as in cpu/sampling/stages.h: each is a few
/// passes over the row.
#pragma once

#include <cmath>

#include "filters.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE Index count_members(Block& block, const Arrays& arrays,
                                       const SamplingRow<T>& row) {
  return count_tokens(block, arrays, row, [&](Index t, auto x) { return row.band.contains(x, t); });
}

/// Sum of value(logit) over the tokens in play.
template <typename Block, typename Arrays, typename T, typename Value>
EIGENFORMER_DEVICE double sum_members(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                      Value value) {
  const auto of_token = [&](Index t) {
    const auto x = row.at(t);
    return row.band.contains(x, t) ? value(static_cast<double>(x)) : 0.0;
  };
  return sum_in_order(block, arrays.sums, row.vocab,
                      WeightsOneByOne<decltype(of_token)>{row.vocab, of_token});
}

/// Keeps what filter(row) keeps of the most likely tokens, and of those at least `n`.
template <typename Block, typename Arrays, typename T, typename Filter>
EIGENFORMER_DEVICE void keep_at_least(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                      Index n, TopKTies ties, Filter filter) {
  SamplingRow<T> best = row;
  filter(row);
  if (n == 1) return;
  keep_top_k(block, arrays, best, n, ties);
  if (best.band.lo < row.band.lo) {
    row.band.lo = best.band.lo;
    row.band.lo_end = best.band.lo_end;
  } else if (best.band.lo == row.band.lo && best.band.lo_end > row.band.lo_end) {
    row.band.lo_end = best.band.lo_end;
  }
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_typical_at_least(Block& block, const Arrays& arrays,
                                              SamplingRow<T>& row, double p, Index n) {
  SamplingRow<T> nearest = row;
  keep_typical_p(block, arrays, row, p);
  if (count_members(block, arrays, row) >= n) return;
  const WeightSums sums = weight_sums(block, arrays, nearest);
  keep_nearest(block, arrays, nearest, sums.mean(), static_cast<double>(n),
               [](auto) { return 1.0; });
  row.band = nearest.band;
}

/// Keeps logits of at least the largest less `deviations` times their standard deviation.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_top_n_sigma(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                         double deviations) {
  using C = compute_type<T>;
  const double best = static_cast<double>(row.band.hi),
               count = static_cast<double>(count_members(block, arrays, row));
  const double mean =
      sum_members(block, arrays, row, [&](double logit) { return logit - best; }) / count;
  const double variance = sum_members(block, arrays, row,
                                      [&](double logit) {
                                        const double d = (logit - best) - mean;
                                        return d * d;
                                      }) /
                          count;
  const double least = best - deviations * std::sqrt(variance);
  if (!(least > static_cast<double>(row.band.lo))) return;
  // the smallest logit in play that is not below it
  const C lo =
      range_of(block, arrays, row, [&](C x) { return static_cast<double>(x) >= least; }).lo;
  row.band.lo = lo;
  row.band.lo_end = row.vocab;
}

/// Excludes the top choices, the tokens of probability `threshold` or more, but the last of them;
/// does nothing where fewer than `n` tokens would be left.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void exclude_top_choices(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                            double threshold, Index n) {
  const double least_weight =
      threshold * sum_in_order(block, arrays.sums, row.vocab, weights_of(row));
  if (least_weight > 1) return;  // there is none
  SamplingRow<T> choices = row;
  keep_min_p(block, arrays, choices, least_weight);
  Index last = 0;
  for_each_logit(block, choices, [&](Index t, auto x) {
    if (x == choices.band.lo && choices.band.contains(x, t)) last = t > last ? t : last;
  });
  SamplingRow<T> rest = row;
  rest.band.hi = choices.band.lo;
  rest.band.hi_begin = reduce_block(block, arrays.counts, last, Larger{});
  if (n == 1 || count_members(block, arrays, rest) >= n) row.band = rest.band;
}

/// Keeps the longest prefix of the most likely tokens whose terms of the entropy sum to at most
/// `share` of it, and the best token.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_top_h(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                   double share) {
  using C = compute_type<T>;
  const WeightSums sums = weight_sums(block, arrays, row);
  const double log_total = std::log(sums.total);
  const double part = share * (1 + 1e-12);  // equal sums may differ by rounding
  if (part >= 1) return;
  const double target = part * (sums.total * log_total - sums.moment);
  if (!(target > 0)) return set_temperature(block, arrays, row, 0.0);  // one token has it all
  const SamplingRow<T> all = row;
  // with the last of these tokens the sum is too large
  LastTaken<C> end = last_of_prefix(block, arrays, row, target, [&all, log_total](C x) {
    const double w = all.weight(x);
    return w > 0 ? w * (log_total - all.scaled(x)) : 0.0;
  });
  if (end.taken > 1 || end.value == row.band.hi) {
    end.taken = end.taken > 2 ? end.taken - 1 : 1;
    return end_band_at(block, arrays, row, end);
  }
  row.band.lo = range_of(block, arrays, row, [&](C x) { return x > end.value; }).lo;
  row.band.lo_end = row.vocab;
}

/// Mirostat 1: top-k, with k from the slope of the probabilities of the best 100.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_mirostat_1(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                        double mu) {
  constexpr Index looked_at = 100;
  SamplingRow<T> best = row;
  keep_top_k(block, arrays, best, looked_at, TopKTies::lowest_index);
  const auto& logits = arrays.sums.numbers;
  if (block.thread() == 0) arrays.place.store(0, 0);
  block.barrier();
  for_each_logit(block, best, [&](Index t, auto x) {
    if (best.band.contains(x, t))
      logits.store(static_cast<Index>(arrays.place.add(0, 1u)), static_cast<double>(x));
  });
  block.barrier();
  const auto n = static_cast<Index>(arrays.place.load(0));
  // sorted by one thread: of 100 that is 2500 steps
  if (block.thread() == 0)
    for (Index i = 1; i < n; ++i) {
      const double x = logits.load(i);
      Index at = i;
      for (; at > 0 && logits.load(at - 1) < x; --at) logits.store(at, logits.load(at - 1));
      logits.store(at, x);
    }
  block.barrier();
  double products = 0, squares = 0;
  for (Index i = 0; i + 1 < n; ++i) {
    const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    products += t * (logits.load(i) - logits.load(i + 1)) * row.inverse_temperature;
    squares += t * t;
  }
  block.barrier();
  keep_top_k(block, arrays, row, problem::mirostat_count(products, squares, mu, row.vocab),
             TopKTies::lowest_index);
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void set_dynamic_temperature(Block& block, const Arrays& arrays,
                                                SamplingRow<T>& row,
                                                const problem::RowParams& params) {
  const Index count = count_members(block, arrays, row);
  if (count == 1) return;
  const double entropy = weight_sums(block, arrays, row).entropy();
  set_temperature(block, arrays, row, problem::dynamic_temperature(params, entropy, count));
}

/// Keeps tokens of probability `least` or more; where there is none, the best, with or without its
/// equals.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_probabilities(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                           double least, double total, TopKTies ties) {
  if (least * total > 1)
    keep_top_k(block, arrays, row, 1, ties);
  else
    keep_min_p(block, arrays, row, least * total);
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_eta(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                 double cutoff) {
  const WeightSums sums = weight_sums(block, arrays, row);
  const double with_entropy = std::sqrt(cutoff) * std::exp(-sums.entropy());
  keep_probabilities(block, arrays, row, with_entropy < cutoff ? with_entropy : cutoff, sums.total,
                     TopKTies::keep_all);
}

/// Runs the stages that filter on a scanned row. `excludes`: XTC is to exclude tokens.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void apply_filters(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                      const problem::RowParams& params, bool excludes) {
  const Index n = params.min_tokens_to_keep;
  const auto total = [&](const auto& of) {
    return sum_in_order(block, arrays.sums, of.vocab, weights_of(of));
  };
  const auto at_least = [&](TopKTies ties, auto filter) {
    keep_at_least(block, arrays, row, n, ties, filter);
  };
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::temperature) {
      if (params.dynatemp_range == 0)
        set_temperature(block, arrays, row, params.temperature);
      else
        set_dynamic_temperature(block, arrays, row, params);
    }
    if (stage == SamplingStage::top_k)
      keep_top_k(block, arrays, row, params.top_k, params.top_k_ties);
    if (stage == SamplingStage::top_p)
      at_least(TopKTies::lowest_index,
               [&](auto& r) { keep_top_p(block, arrays, r, params.top_p); });
    if (stage == SamplingStage::min_p)
      at_least(TopKTies::lowest_index,
               [&](auto& r) { keep_min_p(block, arrays, r, params.min_p); });
    if (stage == SamplingStage::typical_p) {
      if (n == 1)
        keep_typical_p(block, arrays, row, params.typical_p);
      else
        keep_typical_at_least(block, arrays, row, params.typical_p, n);
    }
    if (stage == SamplingStage::top_n_sigma)
      keep_top_n_sigma(block, arrays, row, params.top_n_sigma);
    if (stage == SamplingStage::xtc && excludes)
      exclude_top_choices(block, arrays, row, params.xtc_threshold, n);
    // as in Hugging Face, ties of the n-th stay at a cutoff
    if (stage == SamplingStage::epsilon_cutoff)
      at_least(TopKTies::keep_all, [&](auto& r) {
        keep_probabilities(block, arrays, r, params.epsilon_cutoff, total(r), TopKTies::keep_all);
      });
    if (stage == SamplingStage::eta_cutoff)
      at_least(TopKTies::keep_all, [&](auto& r) { keep_eta(block, arrays, r, params.eta_cutoff); });
    if (stage == SamplingStage::top_h) keep_top_h(block, arrays, row, params.top_h);
    if (stage == SamplingStage::mirostat) {
      if (params.mirostat == 1)
        keep_mirostat_1(block, arrays, row, params.mirostat_mu);
      else  // no token whose surprise is above mu, unless the best one's is
        keep_probabilities(block, arrays, row, std::exp2(-params.mirostat_mu), total(row),
                           TopKTies::lowest_index);
    }
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
