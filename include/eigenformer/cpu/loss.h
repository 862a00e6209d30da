/// \file
/// CPU kernel of softmax cross-entropy. A row is read three times, from memory once where it fits
/// the second-level cache: its maximum, the sum of exp(x - maximum), the gradient. Where the
/// gradient has the type of the computation, the second pass leaves the exponentials in it, so that
/// each is computed once; narrower gradients compute them twice. Sums run in four interleaved
/// vectors, whatever the row's neighbours and the threads. Milakov and Gimelshein, "Online
/// normalizer calculation for softmax" (2018), discuss the passes; an online maximum saves nothing
/// here, because the row stays in cache.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../core/values.h"
#include "../problem/loss.h"
#include "backend.h"
#include "vector/copy.h"
#include "vector/row_unit.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename V, typename L>
typename V::scalar row_maximum(const L* logits, Index classes) {
  const L lowest = -std::numeric_limits<L>::infinity();
  const V start = V::set1(-std::numeric_limits<typename V::scalar>::infinity());
  V best[4] = {start, start, start, start};
  for_each_vector_interleaved<V, 4>(classes, [&](Index i, auto part, int k) {
    best[k] = maximum(best[k], load_or<V>(logits + i, lowest, part));
  });
  return reduce_max(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

/// Mean of maximum - x: of distances, because the logits themselves may be large against their
/// spread. Where the sum overflows, the mean may not: then in double, divided first.
template <typename V, typename L>
double mean_below(const L* logits, Index classes, typename V::scalar maximum) {
  const double n = static_cast<double>(classes);
  const auto sum = sum_over_vectors<V>(classes, [&](V total, Index i, auto part) {
    return total + present(V::set1(maximum) - load<V>(logits + i, part), part);
  });
  if (std::isfinite(sum)) [[likely]]
    return static_cast<double>(sum) / n;
  double mean = 0;
  for (Index i = 0; i < classes; ++i)
    mean += static_cast<double>(maximum) / n - static_cast<double>(logits[i]) / n;
  return mean;
}

/// Sum of exp(x - maximum); leaves the exponentials in `keep` where Keep.
template <typename V, bool Keep, typename L, typename G>
typename V::scalar exponential_sum(const L* logits, Index classes, typename V::scalar maximum,
                                   [[maybe_unused]] G* keep) {
  const L lowest = -std::numeric_limits<L>::infinity();
  const V shift = V::set1(maximum);
  return sum_over_vectors<V>(classes, [&](V sum, Index i, auto part) {
    const V e = simd::exp(load_or<V>(logits + i, lowest, part) - shift);
    if constexpr (Keep) store(e, keep + i, part);
    return sum + e;
  });
}

/// The sum of all exponentials but the target's, which are in `kept` where Keep.
template <typename V, bool Keep, typename L, typename G>
typename V::scalar sum_of_others(const L* logits, Index classes, Index target,
                                 typename V::scalar maximum, [[maybe_unused]] const G* kept) {
  const V shift = V::set1(maximum);
  const auto part_sum = [&](Index begin, Index count) {
    return sum_over_vectors<V>(count, [&](V total, Index i, auto part) {
      if constexpr (Keep)
        return total + load<V>(kept + begin + i, part);
      else
        return total + present(simd::exp(load<V>(logits + begin + i, part) - shift), part);
    });
  };
  return part_sum(0, target) + part_sum(target + 1, classes - target - 1);
}

template <typename Isa, typename L, typename G>
void cross_entropy_row(const problem::CrossEntropy<L, G>& p, Index r) {
  using C = compute_type<L>;
  using V = simd::Vec<C, Isa>;
  constexpr bool keep = std::is_same_v<G, C>;
  const L* logits = p.logits + r * p.classes;
  G* gradient = p.gradient == nullptr ? nullptr : p.gradient + r * p.classes;
  const Index target = p.targets[r];
  if (target == p.ignore_index) {
    p.row_loss[r] = 0;
    if (gradient != nullptr) fill_line(gradient, p.classes, V::zero());
    return;
  }

  const C target_logit = static_cast<C>(logits[target]);  // read before the gradient overwrites it
  const double per_class = p.label_smoothing / static_cast<double>(p.classes);
  const C maximum = row_maximum<V>(logits, p.classes);
  const double below = p.label_smoothing > 0 ? mean_below<V>(logits, p.classes, maximum) : 0.0;
  const C sum = gradient != nullptr
                    ? exponential_sum<V, keep>(logits, p.classes, maximum, gradient)
                    : exponential_sum<V, false>(logits, p.classes, maximum, gradient);
  // Where the target holds most of the mass, it is the maximum, and 1 - p would be what rounding
  // leaves of p: the others are summed by themselves.
  const bool sure = sum < 2 && target_logit == maximum;
  double others = 0;
  if (sure)
    others = gradient != nullptr
                 ? sum_of_others<V, keep>(logits, p.classes, target, maximum, gradient)
                 : sum_of_others<V, false>(logits, p.classes, target, maximum, gradient);
  const double log_sum = sure ? std::log1p(others) : std::log(static_cast<double>(sum)),
               log_sum_exp = static_cast<double>(maximum) + log_sum;
  // Each term from the maximum: its own size cancels.
  double loss = log_sum;
  if (p.label_smoothing < 1)
    loss += (1.0 - p.label_smoothing) *
            (static_cast<double>(maximum) - static_cast<double>(target_logit));
  if (p.label_smoothing > 0) loss += p.label_smoothing * below;
  if (p.z_loss > 0) loss += p.z_loss * log_sum_exp * log_sum_exp;
  p.row_loss[r] = loss;
  if (gradient == nullptr) return;

  const double z_factor = p.z_loss > 0 ? 1.0 + 2.0 * p.z_loss * log_sum_exp : 1.0;
  const C factor = static_cast<C>(z_factor * p.gradient_scale / static_cast<double>(sum));
  const C offset = static_cast<C>(-per_class * p.gradient_scale);
  const C hit = static_cast<C>((1.0 - p.label_smoothing) * p.gradient_scale);
  const double target_gradient =
      sure ? p.gradient_scale * (z_factor - 1.0 + p.label_smoothing - per_class -
                                 z_factor * others / (1.0 + others))
           : static_cast<double>(std::exp(target_logit - maximum) * factor + offset - hit);
  const V factors = V::set1(factor), offsets = V::set1(offset), shift = V::set1(maximum);
  if (!std::isfinite(factor)) [[unlikely]] {  // not 0 * infinity where a class has no mass
    for (Index i = 0; i < p.classes; ++i) {
      const double e = keep ? static_cast<double>(gradient[i])
                            : std::exp(static_cast<double>(logits[i]) - maximum);
      gradient[i] = static_cast<G>(
          static_cast<C>((z_factor * e / static_cast<double>(sum) - per_class) * p.gradient_scale));
    }
    const double e = std::exp(static_cast<double>(target_logit) - maximum);
    gradient[target] = static_cast<G>(static_cast<C>(
        sure ? target_gradient
             : (z_factor * e / static_cast<double>(sum) - per_class + p.label_smoothing - 1.0) *
                   p.gradient_scale));
    return;
  }
  for_each_vector<V>(0, p.classes, [&](Index i, auto part) {
    V e;
    if constexpr (keep)
      e = load<V>(gradient + i, part);
    else
      e = simd::exp(load<V>(logits + i, part) - shift);
    store(fma(e, factors, offsets), gradient + i, part);
  });
  gradient[target] = static_cast<G>(static_cast<C>(target_gradient));
}

/// Writes every row's loss and, where asked for, its gradient.
template <typename D, typename Isa, typename L, typename G>
void execute(const Backend<D, Isa>& on, const problem::CrossEntropy<L, G>& p) {
  parallel_for(on, p.rows, Cost{p.classes, kExpCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) cross_entropy_row<Isa>(p, r);
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
