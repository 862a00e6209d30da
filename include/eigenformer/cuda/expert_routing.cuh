/// \file
/// CUDA kernels of expert routing. A warp per token: lane l has the experts l, l + 32, ..., whose
/// scores it computes when it needs them, and k rounds of the warp find the best that was not
/// taken. Bytes: the logits once, out of L1 afterwards; k + 2 passes over them, whose exponentials
/// (of choices by score alone) are the cost: an estimated few microseconds for any step, not
/// measured yet.
///
/// The order by expert: a block per expert, which counts the pairs of the experts before its own
/// and then puts down its own in their order. It reads the ids twice, out of L2: 256 experts of
/// 32768 pairs are 64 MB of reads. No atomics, and no block waits for another.
#pragma once

#include <cmath>
#include <limits>

#include "../problem/expert_routing.h"
#include "collectives.cuh"
#include "functions.cuh"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The better value, or of equals the lower index.
template <typename C>
struct RankedExpert {
  C value;
  int index;
};
struct BetterExpert {
  template <typename C>
  EIGENFORMER_DEVICE RankedExpert<C> operator()(const RankedExpert<C>& a,
                                                const RankedExpert<C>& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
  }
};

template <typename T>
struct ExpertRoutingKernel {
  using C = compute_type<T>;
  using Best = RankedExpert<C>;
  static constexpr int kThreads = 128;
  problem::ExpertRouting<T> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, p.tokens, [&](Index token) { route(block, token); });
  }

 private:
  static constexpr C kNone = -std::numeric_limits<C>::infinity();

  /// A token's logits and what softmax needs of all of them.
  struct Row {
    const T* logits;
    C best, sum;
  };

  EIGENFORMER_DEVICE C score(const Row& row, Index e) const {
    const C x = static_cast<C>(row.logits[e]);
    if (p.options.scores == ExpertScores::sigmoid) return sigmoid(x);
    return p.options.scores == ExpertScores::softmax ? std::exp(x - row.best) / row.sum : x;
  }
  EIGENFORMER_DEVICE C choice(const Row& row, Index e) const {
    if (!p.chooses_by_score()) return static_cast<C>(row.logits[e]);
    return number(p.bias == nullptr ? score(row, e) : score(row, e) + static_cast<C>(p.bias[e]));
  }
  /// What a comparison of NaN would say of candidates is no index.
  EIGENFORMER_DEVICE static C number(C x) { return x == x ? x : kNone; }

  template <typename Block>
  EIGENFORMER_DEVICE void route(Block& block, Index token) const {
    Row row{p.logits + token * p.experts, kNone, C(0)};
    bool ordered = true;
    for (Index e = block.lane(); e < p.experts; e += kWarp) {
      const C x = static_cast<C>(row.logits[e]);
      row.best = x > row.best ? x : row.best;
      ordered = ordered && x < std::numeric_limits<C>::infinity();
    }
    row.best = reduce_warp(block, row.best, Larger{});
    ordered = block.all(ordered) && row.best > kNone;
    std::int32_t* const ids = p.ids + token * p.chosen;
    C* const weights = p.weights + token * p.chosen;
    if (!ordered) {  // the whole warp
      for (Index j = block.lane(); j < p.chosen; j += kWarp) {
        ids[j] = static_cast<std::int32_t>(j);
        weights[j] = std::numeric_limits<C>::quiet_NaN();
      }
      return;
    }
    if (p.options.scores == ExpertScores::softmax) {
      for (Index e = block.lane(); e < p.experts; e += kWarp)
        row.sum += std::exp(static_cast<C>(row.logits[e]) - row.best);
      row.sum = reduce_warp(block, row.sum, Add{});
    }
    choose(block, row, ids, weights);
  }

  /// The best of this warp's candidates: candidate(i) for i = lane, lane + 32, ... that are not
  /// among the bits of `taken`.
  template <typename Block, typename Candidate>
  EIGENFORMER_DEVICE static Best best_of(Block& block, Index first, Index last, std::uint64_t taken,
                                         const Candidate& candidate) {
    Best best{kNone, (std::numeric_limits<int>::max)()};
    bool any = false;
    for (Index i = first + block.lane(), bit = 0; i < last; i += kWarp, ++bit) {
      if ((taken >> bit & 1) != 0) continue;
      const Best own{candidate(i), static_cast<int>(i)};
      best = any ? BetterExpert{}(best, own) : own;
      any = true;
    }
    return reduce_warp(block, best, BetterExpert{});
  }

  template <typename Block>
  EIGENFORMER_DEVICE void choose(Block& block, const Row& row, std::int32_t* ids,
                                 C* weights) const {
    const std::uint64_t kept = kept_groups(block, row);
    const Index size = p.experts / p.options.groups;
    std::uint64_t taken = 0;  // of this lane's experts
    for (Index e = block.lane(), bit = 0; e < p.experts; e += kWarp, ++bit)
      if ((kept >> (e / size) & 1) == 0) taken |= std::uint64_t{1} << bit;
    C best = kNone, sum = 0;
    for (Index j = 0; j < p.chosen; ++j) {
      const Best next =
          best_of(block, 0, p.experts, taken, [&](Index e) { return choice(row, e); });
      const Index e = next.index;
      if (e % kWarp == block.lane()) taken |= std::uint64_t{1} << (e / kWarp);
      const C own = p.weighs_by_logit() ? static_cast<C>(row.logits[e]) : score(row, e);
      best = own > best ? own : best;
      sum += own;
      if (block.lane() == 0) {
        ids[j] = next.index;
        weights[j] = own;
      }
    }
    if (block.lane() == 0) weigh(weights, best, sum);
  }

  /// One thread: the chosen are few.
  EIGENFORMER_DEVICE void weigh(C* weights, C best, C sum) const {
    const C scale = static_cast<C>(p.options.scale);
    if (p.weighs_by_logit()) {
      sum = 0;
      for (Index j = 0; j < p.chosen; ++j)  // a bias may choose logits of -infinity alone
        sum += weights[j] = best == kNone ? C(0) : std::exp(weights[j] - best);
    }
    if (p.options.scores == ExpertScores::sigmoid) sum += C(1e-20);
    const bool divides =
        p.options.scores == ExpertScores::sigmoid ? p.options.normalise : p.weighs_by_logit();
    for (Index j = 0; j < p.chosen; ++j)
      weights[j] = (divides && sum > C(0) ? weights[j] / sum : weights[j]) * scale;
  }

  /// Bit g: experts of group g may be chosen.
  template <typename Block>
  EIGENFORMER_DEVICE std::uint64_t kept_groups(Block& block, const Row& row) const {
    if (p.options.groups == 1) return 1;
    const Index size = p.experts / p.options.groups;
    static_assert(problem::kMostExpertGroups <= 2 * kWarp);
    C low = 0, high = 0;  // of groups lane, lane + 32: an array would be in local memory
    const auto by = [&](Index e) { return choice(row, e); };
    for (Index g = 0; g < p.options.groups; ++g) {
      const Index first = g * size;
      const Best best = best_of(block, first, first + size, 0, by);
      const Index at = best.index - first;
      const std::uint64_t taken = at % kWarp == block.lane() ? std::uint64_t{1} << (at / kWarp) : 0;
      const Best second = best_of(block, first, first + size, taken, by);
      const C sum = number(best.value + second.value);
      if (g == block.lane()) low = sum;
      if (g == block.lane() + kWarp) high = sum;
    }
    std::uint64_t kept = 0, own = 0;
    for (Index n = 0; n < p.options.kept_groups; ++n) {
      const Best best =
          best_of(block, 0, p.options.groups, own, [&](Index g) { return g < kWarp ? low : high; });
      kept |= std::uint64_t{1} << best.index;
      if (best.index % kWarp == block.lane()) own |= std::uint64_t{1} << (best.index / kWarp);
    }
    return kept;
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::ExpertRouting<T>& p) {
  launch_warps(on, "expert_routing", p.tokens, ExpertRoutingKernel<T>{p});
}

struct ExpertOrderKernel {
  static constexpr int kThreads = 256;
  problem::ExpertOrder p;

  static constexpr std::size_t shared() { return shared_bytes<int>(kThreads / kWarp); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto sums = block.template shared<int>(kThreads / kWarp);
    for (Index e = block.index(); e < p.experts; e += block.count()) put_down(block, sums, e);
    if (block.index() == 0)
      for (Index i = block.thread(); i < p.pairs; i += kThreads)
        if (p.ids[i] < 0 || p.ids[i] >= p.experts) p.places[i] = -1;
  }

 private:
  template <typename Block, typename Sums>
  EIGENFORMER_DEVICE void put_down(Block& block, const Sums& sums, Index expert) const {
    int before = 0;
    for (Index i = block.thread(); i < p.pairs; i += kThreads)
      before += p.ids[i] >= 0 && p.ids[i] < expert ? 1 : 0;
    int at = reduce_block(block, sums, before, Add{});
    if (block.thread() == 0) p.offsets[expert] = at;
    for (Index first = 0; first < p.pairs; first += kThreads) {
      const Index i = first + block.thread();
      const bool own = i < p.pairs && p.ids[i] == expert;
      const Scan<int> scan = scan_block(block, sums, own ? 1 : 0);
      if (own) {
        p.order[at + scan.before] = static_cast<std::int32_t>(i);
        p.places[i] = at + scan.before;
      }
      at += scan.total;
    }
    if (block.thread() == 0 && expert + 1 == p.experts) p.offsets[p.experts] = at;
  }
};

template <typename D>
void execute(const Backend<D>& on, const problem::ExpertOrder& p) {
  launch_rows(on, "expert_order", p.experts, ExpertOrderKernel::shared(), ExpertOrderKernel{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
