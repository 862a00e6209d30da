/// \file
/// CPU kernels of expert routing: a row's scores in vectors, its choice by insertion into the k
/// best so far, which most experts fail at the first comparison. And of the order by expert: a
/// counting sort by one thread, 1.4 ns for each pair (Zen 5).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/workspace.h"
#include "../problem/expert_routing.h"
#include "backend.h"
#include "parallel.h"
#include "vector/copy.h"
#include "vector/functions.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The routing of one token, in scratch of a worker: (experts) each.
template <typename Isa, typename T>
struct RoutingRow {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  const problem::ExpertRouting<T>& p;
  C* logits;
  C* scores;
  C* choice;

  void route(const T* from, std::int32_t* ids, C* weights) const {
    convert_line<V>(from, logits, p.experts);
    C best = -std::numeric_limits<C>::infinity();
    bool ordered = true;
    for (Index e = 0; e < p.experts; ++e) {
      best = logits[e] > best ? logits[e] : best;
      ordered = ordered && logits[e] < std::numeric_limits<C>::infinity();  // NaN is not
    }
    if (!ordered || best == -std::numeric_limits<C>::infinity()) {
      for (Index j = 0; j < p.chosen; ++j) ids[j] = static_cast<std::int32_t>(j);
      std::fill(weights, weights + p.chosen, std::numeric_limits<C>::quiet_NaN());
      return;
    }
    score(best);
    choose(ids);
    weigh(ids, weights);
  }

 private:
  void score(C best) const {
    const C* by = logits;
    if (p.options.scores == ExpertScores::sigmoid) {
      for_each_vector<V>(0, p.experts, [&](Index at, auto part) {
        store(sigmoid(cpu::load<V>(logits + at, part)), scores + at, part);
      });
      by = scores;
    } else if (p.options.scores == ExpertScores::softmax &&
               (p.chooses_by_score() || !p.weighs_by_logit())) {
      exponentials(logits, best, scores, p.experts);
      by = scores;
    }
    if (!p.chooses_by_score()) by = logits;
    for (Index e = 0; e < p.experts; ++e)
      choice[e] = p.bias == nullptr ? by[e] : number(by[e] + static_cast<C>(p.bias[e]));
  }
  static C number(C x) { return x == x ? x : -std::numeric_limits<C>::infinity(); }

  /// softmax of `count` numbers whose largest is `best`. The sum goes from first to last: the same
  /// additions on every ISA.
  static void exponentials(const C* x, C best, C* y, Index count) {
    for_each_vector<V>(0, count, [&](Index at, auto part) {
      store(simd::exp(cpu::load<V>(x + at, part) - V::set1(best)), y + at, part);
    });
    C sum = 0;
    for (Index e = 0; e < count; ++e) sum += y[e];
    for (Index e = 0; e < count; ++e) y[e] /= sum;
  }

  void choose(std::int32_t* ids) const {
    const Index groups = p.options.groups, size = p.experts / groups;
    std::int32_t kept[problem::kMostExpertGroups];
    C sums[problem::kMostExpertGroups];
    Index kept_count = 1;
    kept[0] = 0;
    if (groups > 1) {
      for (Index g = 0; g < groups; ++g) sums[g] = two_best(choice + g * size, size);
      kept_count = 0;
      for (Index g = 0; g < groups; ++g) insert(kept, kept_count, p.options.kept_groups, sums, g);
      std::sort(kept, kept + kept_count);  // equals by lowest index, in whatever group
    }
    Index count = 0;
    for (Index g = 0; g < kept_count; ++g)
      for (Index e = kept[g] * size; e < (kept[g] + 1) * size; ++e)
        insert(ids, count, p.chosen, choice, e);
  }

  static C two_best(const C* x, Index count) {
    C first = -std::numeric_limits<C>::infinity(), second = first;
    for (Index i = 0; i < count; ++i) {
      if (x[i] > first) {
        second = first;
        first = x[i];
      } else if (x[i] > second) {
        second = x[i];
      }
    }
    return number(first + second);
  }

  /// Into the `most` best so far, behind its equals.
  static void insert(std::int32_t* ids, Index& count, Index most, const C* values, Index id) {
    if (count == most) {
      if (!(values[id] > values[ids[count - 1]])) return;
      --count;
    }
    Index at = count++;
    for (; at > 0 && values[id] > values[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = static_cast<std::int32_t>(id);
  }

  void weigh(const std::int32_t* ids, C* weights) const {
    const ExpertRoutingOptions& o = p.options;
    if (p.weighs_by_logit()) {
      C best = -std::numeric_limits<C>::infinity();
      for (Index j = 0; j < p.chosen; ++j) {
        scores[j] = logits[ids[j]];
        best = (std::max)(best, scores[j]);
      }
      if (best == -std::numeric_limits<C>::infinity())  // whom a bias chose
        std::fill_n(scores, p.chosen, C(0));
      else
        exponentials(scores, best, scores, p.chosen);
      std::copy_n(scores, p.chosen, weights);
    } else {
      for (Index j = 0; j < p.chosen; ++j) weights[j] = scores[ids[j]];
    }
    if (o.scores == ExpertScores::sigmoid && o.normalise) {
      C sum = C(1e-20);
      for (Index j = 0; j < p.chosen; ++j) sum += weights[j];
      for (Index j = 0; j < p.chosen; ++j) weights[j] /= sum;
    }
    const C by = static_cast<C>(o.scale);
    for (Index j = 0; j < p.chosen; ++j) weights[j] *= by;
  }
};

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::ExpertRouting<T>& p) {
  if (p.tokens == 0) return;
  using C = compute_type<T>;
  Workspace::Frame frame(on.workspace);
  C* const scratch = frame.take<C>(worker_count(on) * 3 * p.experts);
  parallel_for(on, p.tokens, Cost{p.experts, kExpCycles}, [&](Index first, Index last, int worker) {
    C* const own = scratch + worker * 3 * p.experts;
    const RoutingRow<Isa, T> row{p, own, own + p.experts, own + 2 * p.experts};
    for (Index t = first; t < last; ++t)
      row.route(p.logits + t * p.experts, p.ids + t * p.chosen, p.weights + t * p.chosen);
  });
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>&, const problem::ExpertOrder& p) {
  std::fill(p.offsets, p.offsets + p.experts + 1, 0);
  for (Index i = 0; i < p.pairs; ++i) ++p.offsets[p.ids[i] + 1];
  for (Index e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  // each offset moves to the next one's place as its pairs are put down, and all move back
  for (Index i = 0; i < p.pairs; ++i) {
    const std::int32_t at = p.offsets[p.ids[i]]++;
    p.order[at] = static_cast<std::int32_t>(i);
    p.places[i] = at;
  }
  for (Index e = p.experts; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
