/// \file
/// CPU kernel that merges partial results of attention: over the states' log_sum_exp of a row for
/// the greatest and the weights, then over their outputs. One read of every output and one write:
/// the bandwidth of the memory is the limit.
#pragma once

#include <cmath>
#include <limits>

#include "../../problem/attention_merge.h"
#include "../backend.h"
#include "../vector/loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// weights[0, count): half of each, -1 where the state has no key. Returns log_sum_exp.
template <typename T>
compute_type<T> find_merge_weights(const problem::AttentionMerge<T>& p, Index at,
                                   compute_type<T>* weights) {
  using C = compute_type<T>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  C maximum = -infinity, sum = 0;
  for (Index i = 0; i < p.count; ++i) {
    const C x = p.states[i].log_sum_exp[at];
    if (x > maximum || x != x) maximum = x;  // NaN stays
  }
  for (Index i = 0; i < p.count; ++i) {
    const C x = p.states[i].log_sum_exp[at];
    weights[i] = x == -infinity ? C(-1) : std::exp(x - maximum);
    if (!(weights[i] < 0)) sum += weights[i];
  }
  for (Index i = 0; i < p.count; ++i)
    if (!(weights[i] < 0)) weights[i] = weights[i] / sum * C(0.5);
  return maximum == -infinity ? maximum : maximum + std::log(sum);
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::AttentionMerge<T>& p) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  Workspace::Frame frame(on.workspace);
  C* const all_weights = frame.take<C>(worker_count(on) * p.count);
  const V infinity = V::set1(std::numeric_limits<C>::infinity()),
          most = V::set1((std::numeric_limits<C>::max)() / 2);
  const auto merge = [&](Index line, C* weights) {
    const Index at = p.log_sum_exp_at(line);
    const C log_sum_exp = find_merge_weights(p, at, weights);
    for_each_vector<V>(line * p.width, (line + 1) * p.width, [&](Index i, auto part) {
      V half_sum = V::zero();
      for (Index k = 0; k < p.count; ++k)
        if (!(weights[k] < 0))
          half_sum = fma(load<V>(p.states[k].output + i, part), V::set1(weights[k]), half_sum);
      // rounding must not take the greatest numbers out of their range
      const V clamped = minimum(most, maximum(V::zero() - most, half_sum));
      half_sum = select(less(abs(half_sum), infinity), clamped, half_sum);
      store(half_sum + half_sum, p.output + i, part);
    });
    if (p.log_sum_exp != nullptr) p.log_sum_exp[at] = log_sum_exp;
  };
  parallel_for(on, p.lines(), Cost{p.count * (p.width + 8), kMoveCycles},
               [&](Index first, Index last, int worker) {
                 for (Index line = first; line < last; ++line)
                   merge(line, all_weights + worker * p.count);
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
