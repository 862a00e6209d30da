/// \file
/// The filters: each narrows the band of tokens in play (row.h). They share one selection
/// (select.h), the shortest prefix of the candidates in a given order whose weights reach a target:
/// weight 1 and target k for top-k, the token weights and p of their sum for top-p, the same with
/// the order of typicality for typical-p.
#pragma once

#include <cmath>

#include "entropy.h"
#include "kept.h"
#include "nearest.h"
#include "peak.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The band now ends at end.value, of whose equals the `taken` of lowest index stay.
template <typename Isa, typename T>
void end_band_at(SamplingRow<T>& row, const PrefixEnd<compute_type<T>>& end) {
  if (end.taken < end.candidates)
    row.band.lo_end = nth_equal<Isa>(row, end.value, end.taken) + 1;
  else if (end.value > row.band.lo)
    row.band.lo_end = row.vocab;
  row.band.lo = end.value;
}

/// A logit that k tokens in play reach, and few more: about the k-th largest of the maxima of the
/// blocks, for k of them are k different tokens.
template <typename Isa, typename T>
compute_type<T> kth_largest_bound(const SamplingRow<T>& row, Index k) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const Index blocks = row.blocks();
  if (k > blocks) return row.band.lo;
  if (k <= row.reached_by && row.reached_by <= 2 * k + 64 && row.band.hi_begin == 0 &&
      row.band.lo == std::numeric_limits<C>::lowest())
    return row.reached;
  // After typical-p and XTC the largest token of a block may be out of play.
  const bool all_of_hi = row.band.hi_begin == 0;
  const auto count_from = [&](C least) {
    const V lo = V::set1(least), hi = V::set1(row.band.hi);
    Index count = 0, at = 0;
    for (; at + V::lanes <= blocks; at += V::lanes) {
      const V v = V::load(row.block_max + at);
      const auto in_play = less_equal(lo, v) & (all_of_hi ? less_equal(v, hi) : less(v, hi));
      count += std::popcount(in_play.bits());
    }
    for (; at < blocks; ++at) {
      const C m = row.block_max[at];
      count += least <= m && (m < row.band.hi || (all_of_hi && m == row.band.hi));
    }
    return count;
  };
  // a mask leaves blocks without a token
  const C infinity = std::numeric_limits<C>::infinity();
  V lowest = V::set1(infinity);
  for_each_vector<V>(0, blocks, [&](Index at, auto part) {
    const V v = load_or<V>(row.block_max + at, infinity, part);
    lowest = select(less(V::set1(-infinity), v), minimum(v, lowest), lowest);
  });
  const C least = reduce_min(lowest);
  C enough = (std::max)(row.band.lo, least), above = row.band.hi;
  if (count_from(above) >= k) return above;
  if (count_from(enough) < k) return row.band.lo;
  for (int step = 0; step < 32; ++step) {
    const C middle = enough / 2 + above / 2;
    if (!(enough < middle && middle < above)) break;
    const Index count = count_from(middle);
    (count >= k ? enough : above) = middle;
    if (count >= k && count <= k + k / 4) break;
  }
  return enough;
}

/// The end of the k largest among n candidates, k <= n. Permutes them.
template <typename Isa, typename C>
PrefixEnd<C> end_of_top_k(C* values, Index n, Index k, const SamplingScratch<C>& scratch) {
  const auto ones = [](const C*, Index count, double* w) { std::fill(w, w + count, 1.0); };
  if constexpr (std::is_same_v<C, float>) {
    using V = simd::Vec<C, Isa>;
    if (n > 1024 && n < Index{1} << 24) {  // counts are exact in float
      double above = 0;
      const Index kept =
          CandidateInterval<V, UnitWeights<V>>{}.narrow(values, n, static_cast<double>(k), above);
      if (kept > 0) return end_of_prefix(values, kept, above, static_cast<double>(k), ones);
    }
  }
  if (n > 1024)
    return select_prefix(
        values, n, static_cast<double>(k), [](C x) { return order_key(x); }, ones, scratch);
  std::nth_element(values, values + (k - 1), values + n, std::greater<>{});
  const C last = values[k - 1];
  Index before = 0, equals = 0;
  for (Index i = 0; i < n; ++i) before += values[i] > last, equals += values[i] == last;
  return {last, k - before, equals};
}

template <typename Isa, typename T>
void keep_top_k(SamplingRow<T>& row, Index k, TopKTies ties,
                const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  if (k >= row.vocab) return;
  const C bound = kth_largest_bound<Isa>(row, k);
  const V least = V::set1(bound), most = V::set1(row.band.hi);
  alignas(64) C buffer[SamplingBlock::size];
  Index n = 0, equals = 0;
  for_each_block_index<Isa>(row, bound, [&](Index block) {
    const C* const x = in_play_logits<Isa>(row, block, buffer);
    BlockBits above, ends;
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      above.add(i, (less(least, v) & less_equal(v, most)).bits());
      ends.add(i, equal(least, v).bits());
    }
    equals += ends.count();
    n = store_logits<V>(x, above, scratch.candidates + n) - scratch.candidates;
  });
  // padding of the last block, where -infinity is a number like others
  if (bound == -std::numeric_limits<C>::infinity()) equals = (std::min)(equals, row.vocab - n);
  if (n + equals < k) return;
  PrefixEnd<C> end = n < k ? PrefixEnd<C>{bound, k - n, equals}
                           : end_of_top_k<Isa>(scratch.candidates, n, k, scratch);
  if (ties == TopKTies::keep_all) end.taken = end.candidates;
  end_band_at<Isa>(row, end);
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
  if constexpr (std::is_same_v<C, float>) {
    PrefixEnd<C> end;
    if (row.vocab >= SelectionLimits::sampled && FusedWeights<simd::Vec<float, Isa>>::serves(row)) {
      if (best_suffices<Isa>(row, p)) return end_band_at<Isa>(row, {row.band.hi, 1, 1});
      if (find_end_of_equals<Isa>(row, p, end)) return end_band_at<Isa>(row, end);
      if (find_nucleus<Isa>(row, p, scratch, end)) {
        end_band_at<Isa>(row, end);
        if (end.taken == end.candidates) keep_sums(row, *scratch.weighed);
        return;
      }
    }
  }
  const double total = sum_weights<Isa>(row, scratch.block_sum);
  const Index n = gather_candidates<Isa>(row, top_p_bound(row, p, total), scratch.candidates);
  const auto weights =
      candidate_weights<C>(static_cast<double>(row.band.hi), row.inverse_temperature);
  end_band_at<Isa>(row, select_prefix(
                            scratch.candidates, n, p * total, [](C x) { return order_key(x); },
                            weights, scratch));
}

/// Reads no token: the smallest number that stays is where the weights, which grow with their
/// logits, reach min_p. The band ends there, at a token or not.
template <typename Isa, typename T>
void keep_min_p(SamplingRow<T>& row, double min_p) {
  using C = compute_type<T>;
  if (min_p <= 0.0) return;
  const double best = static_cast<double>(row.band.hi);
  C least = row.band.hi;
  if (min_p <= 1.0) {
    const double end = best + std::log(min_p) / row.inverse_temperature,
                 margin = 1e-12 * (std::abs(best) + std::abs(end) + 1 / row.inverse_temperature);
    constexpr double lowest = static_cast<double>(std::numeric_limits<C>::lowest());
    const auto key_at = [&](double x) {
      return order_key(static_cast<C>(std::clamp(x, lowest, best)));
    };
    auto below = key_at(end - margin) - 1, reached = key_at(end + margin) + 1;
    reached = (std::min)(reached, order_key(row.band.hi));
    while (reached - below > 1) {
      const auto middle = below + (reached - below) / 2;
      const double x = static_cast<double>(problem::number_of_key(middle));
      (token_weight(x, best, row.inverse_temperature) >= min_p ? reached : below) = middle;
    }
    least = problem::number_of_key(reached);
  }
  if (!(least > row.band.lo)) return;
  row.band.lo_end = row.vocab;
  row.band.lo = least;
}

/// Keeps the tokens whose information -log(probability) is nearest to the entropy, with all as near
/// as the last, until their `weights` sum to `target`. With d = (logit - best) / temperature both
/// contain the same log of the normaliser, which cancels: the distance is |d - mean of d|.
template <typename Isa, typename T, typename Weights>
void keep_nearest(SamplingRow<T>& row, double mean, double target, Weights weights,
                  const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  const double best = static_cast<double>(row.band.hi), scale = row.inverse_temperature;
  const auto distance = [=](C x) {
    return std::abs((std::min)(0.0, (static_cast<double>(x) - best) * scale) - mean);
  };
  const auto key = [=](C x) {
    return ~std::bit_cast<std::uint64_t>(distance(x));  // near is first
  };
  const Index n = gather_candidates<Isa>(row, row.band.lo, scratch.candidates);
  const auto end = select_prefix(scratch.candidates, n, target, key, weights, scratch);
  const double farthest = distance(end.value);
  C lo = row.band.hi, hi = row.band.lo;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    member_bits<Isa>(x, block, row.band, row.band.lo).for_each([&](Index j) {
      if (distance(x[j]) > farthest) return;
      lo = (std::min)(lo, x[j]);
      hi = (std::max)(hi, x[j]);
    });
  });
  row.band = {hi, lo, lo > row.band.lo ? row.vocab : row.band.lo_end,
              hi < row.band.hi ? 0 : row.band.hi_begin};
}

template <typename Isa, typename T>
void keep_typical_p(SamplingRow<T>& row, double p,
                    const SamplingScratch<compute_type<T>>& scratch) {
  if (p >= 1.0 || row.band.lo == row.band.hi) return;
  if constexpr (std::is_same_v<compute_type<T>, float>) {
    PrefixEnd<float> equals;
    if (row.vocab >= SelectionLimits::sort && FusedWeights<simd::Vec<float, Isa>>::serves(row)) {
      if (best_is_nearest<Isa>(row, p)) return end_band_at<Isa>(row, {row.band.hi, 1, 1});
      if (find_end_of_equals<Isa>(row, p, equals)) return;
      if (find_nearest<Isa>(row, p, scratch)) return keep_sums(row, *scratch.weighed);
    }
  }
  const WeightSums sums = weight_sums<Isa>(row);
  keep_nearest<Isa>(
      row, sums.mean(), p * sums.total,
      candidate_weights<compute_type<T>>(static_cast<double>(row.band.hi), row.inverse_temperature),
      scratch);
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

/// Whether a stage narrows the band, if anything, without a look at tokens or scratch.
inline bool reads_no_token(SamplingStage stage, const problem::RowParams& params) {
  return stage == SamplingStage::none ||
         (stage == SamplingStage::min_p && params.min_tokens_to_keep == 1);
}

/// `excludes`: XTC is to exclude tokens.
template <typename Isa, typename T>
void apply_filter(SamplingRow<T>& row, SamplingStage stage, const problem::RowParams& params,
                  bool excludes, const SamplingScratch<compute_type<T>>& scratch) {
  const bool keeps_one = params.min_tokens_to_keep == 1;
  if (!reads_no_token(stage, params)) row.weighed = nullptr;
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
  else if (stage > SamplingStage::function) {
    apply_rare_filter<Isa>(row, stage, params, excludes, scratch);
    row.weighed = nullptr;  // a top-p within may have been the first to use the scratch
  }
}

/// Whether the sums of a row are of its band.
template <typename T>
bool has_sums(const SamplingRow<T>& row) {
  return row.weighed != nullptr && same_band(row.band, row.weighed->band) &&
         row.inverse_temperature == row.weighed->inverse_temperature;
}

/// Runs the stages that filter on a scanned row; after the first that leaves few tokens, on their
/// list. Where sums serve the draw and what follows reads no token, no list is made.
template <typename Isa, typename T>
void apply_filters(SamplingRow<T>& row, const problem::RowParams& params, bool excludes,
                   const SamplingScratch<compute_type<T>>& scratch) {
  const auto last = params.order.end();
  // true: it ran the stages from there on
  const auto run_on_list = [&](auto stage) {
    if (!list_kept_tokens<Isa>(row, scratch)) return false;
    auto& list = scratch.kept->row;
    for (; stage != last; ++stage) apply_filter<Isa>(list, *stage, params, excludes, scratch);
    take_band_of_list<Isa>(row, *scratch.kept);
    return true;
  };
  for (auto stage = params.order.begin(); stage != last; ++stage) {
    if (row.weighed != nullptr && !reads_no_token(*stage, params) && run_on_list(stage)) return;
    const auto before = row.band;
    apply_filter<Isa>(row, *stage, params, excludes, scratch);
    const bool narrower = !same_band(before, row.band) || *stage == problem::kFiltered;
    if (narrower && !has_sums(row) && run_on_list(stage + 1)) return;
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
