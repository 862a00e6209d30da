/// \file
/// CUDA kernels of greedy and top-k sampling, one block per row.
///
/// Greedy: one pass, the largest logit and its lowest index. Top-k: the k-th largest by radix
/// selection (four passes over 8 bits of the ordered keys, from the highest), then two passes in
/// which every thread owns a run of consecutive tokens: one sums the weights of the tokens kept,
/// one finds the token where the cumulative weight passes u. Weights are exp in double; the sum
/// runs in token order by threads. The random number is Philox of (seed, position, row), as on the
/// CPU.
#pragma once

#include <bit>
#include <cmath>

#include "../problem/sampling.h"
#include "collectives.cuh"
#include "launch.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// What one pass finds out about a row.
template <typename C>
struct RowBest {
  C value;
  Index index;
  int flags;  // 1: NaN seen, 2: +infinity seen
};

struct BetterRow {
  template <typename C>
  EIGENFORMER_DEVICE RowBest<C> operator()(const RowBest<C>& a, const RowBest<C>& b) const {
    const bool first = a.value > b.value || (a.value == b.value && a.index <= b.index);
    return {first ? a.value : b.value, first ? a.index : b.index, a.flags | b.flags};
  }
};

template <typename Block, typename Scratch, typename T>
EIGENFORMER_DEVICE auto best_of_row(Block& block, const Scratch& scratch, const T* logits,
                                    Index vocab) {
  using C = compute_type<T>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  RowBest<C> best{-infinity, vocab, 0};
  for (Index t = block.thread(); t < vocab; t += block.size()) {
    const C x = static_cast<C>(logits[t]);
    best.flags |= (x != x ? 1 : 0) | (x == infinity ? 2 : 0);
    if (x > best.value) {
      best.value = x;
      best.index = t;
    }
  }
  return reduce_block(block, scratch, best, BetterRow{});
}

template <typename C>
EIGENFORMER_DEVICE SampleStatus status_of(const RowBest<C>& best, Index vocab) {
  if ((best.flags & 1) != 0) return SampleStatus::nan;
  if ((best.flags & 2) != 0) return SampleStatus::positive_infinity;
  return best.index == vocab ? SampleStatus::no_token : SampleStatus::ok;
}

/// Larger numbers have larger keys; -0 and 0 are equal.
EIGENFORMER_DEVICE inline std::uint64_t ordered_key(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x == 0.0f ? 0.0f : x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
EIGENFORMER_DEVICE inline std::uint64_t ordered_key(double x) {
  const auto bits = std::bit_cast<std::uint64_t>(x == 0.0 ? 0.0 : x);
  return bits >> 63 != 0 ? ~bits : bits | 0x8000000000000000u;
}

template <typename T>
struct SampleKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp, kDigits = 256;
  const T* logits;
  Index rows, vocab, top_k;
  double temperature;
  bool greedy, keep_ties;
  Philox random;
  const Philox* row_random;  // one per row, drawing at row 0; nullptr: `random`, at its row
  std::int32_t* ids;
  SampleStatus* statuses;

  static constexpr std::size_t shared() {
    return shared_bytes<RowBest<C>>(kWarps) + shared_bytes<Index>(kWarps) +
           shared_bytes<unsigned>(kDigits) + shared_bytes<double>(kThreads + 1) +
           shared_bytes<Selection>(1) + shared_bytes<std::int32_t>(1);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto best_scratch = block.template shared<RowBest<C>>(kWarps);
    const Arrays<Block> arrays{
        block.template shared<Index>(kWarps), block.template shared<unsigned>(kDigits),
        block.template shared<double>(kThreads + 1), block.template shared<Selection>(1),
        block.template shared<std::int32_t>(1)};
    for (Index row = block.index(); row < rows; row += block.count()) {
      const T* own = logits + row * vocab;
      const RowBest<C> best = best_of_row(block, best_scratch, own, vocab);
      const SampleStatus status = status_of(best, vocab);
      std::int32_t id = -1;
      if (status == SampleStatus::ok)
        id = greedy ? static_cast<std::int32_t>(best.index)
                    : draw(block, arrays, own, best.value, row);
      if (block.thread() == 0) {
        ids[row] = id;
        if (statuses != nullptr) statuses[row] = status;
      }
    }
  }

 private:
  struct Selection {
    std::uint64_t prefix;  // leading digits of the k-th largest, the others zero
    Index wanted;          // its place among the keys that have them
  };
  struct Threshold {
    std::uint64_t key;  // of the k-th largest
    Index ties;         // how many tokens of that very key are kept, from the lowest index
  };
  template <typename Block>
  struct Arrays {
    template <typename V>
    using Shared = decltype(std::declval<Block&>().template shared<V>(1));
    Shared<Index> scratch;
    Shared<unsigned> histogram;
    Shared<double> sums;  // up to thread i
    Shared<Selection> selection;
    Shared<std::int32_t> chosen;
  };

  // Radix selection: after each pass the leading digits of the k-th largest are known.
  template <typename Block>
  EIGENFORMER_DEVICE Threshold select(Block& block, const Arrays<Block>& arrays,
                                      const T* own) const {
    constexpr int bits = 8 * static_cast<int>(sizeof(C));
    if (block.thread() == 0) arrays.selection.store(0, {0, top_k < vocab ? top_k : vocab});
    for (int shift = bits - 8; shift >= 0; shift -= 8) {
      arrays.histogram.store(block.thread(), 0);
      block.barrier();
      const std::uint64_t prefix = arrays.selection.load(0).prefix;
      for (Index t = block.thread(); t < vocab; t += block.size()) {
        const std::uint64_t key = ordered_key(static_cast<C>(own[t]));
        if (shift + 8 == bits || key >> (shift + 8) == prefix >> (shift + 8))
          arrays.histogram.add(static_cast<Index>(key >> shift & 255), 1u);
      }
      block.barrier();
      if (block.thread() == 0) {
        Index wanted = arrays.selection.load(0).wanted;
        int digit = kDigits - 1;
        for (; digit > 0; --digit) {
          const Index count = arrays.histogram.load(digit);
          if (count >= wanted) break;
          wanted -= count;
        }
        arrays.selection.store(0, {prefix | static_cast<std::uint64_t>(digit) << shift, wanted});
      }
      block.barrier();
    }
    const Selection found = arrays.selection.load(0);
    block.barrier();
    return {found.prefix, keep_ties ? vocab : found.wanted};
  }

  // Calls visit(token, weight) for the kept tokens of [begin, end) in order; `ties_before` tokens
  // of the threshold's key lie before.
  template <typename Visit>
  EIGENFORMER_DEVICE void for_each_kept(const T* own, Index begin, Index end, C largest,
                                        Threshold threshold, Index ties_before, Visit visit) const {
    for (Index t = begin; t < end; ++t) {
      const C x = static_cast<C>(own[t]);
      const std::uint64_t key = ordered_key(x);
      if (key < threshold.key || (key == threshold.key && ties_before++ >= threshold.ties))
        continue;
      visit(t, std::exp((static_cast<double>(x) - static_cast<double>(largest)) / temperature));
    }
  }

  template <typename Block>
  EIGENFORMER_DEVICE std::int32_t draw(Block& block, const Arrays<Block>& arrays, const T* own,
                                       C largest, Index row) const {
    const Threshold threshold = select(block, arrays, own);
    const Index run = (vocab + kThreads - 1) / kThreads;
    const Index begin = block.thread() * run < vocab ? block.thread() * run : vocab,
                end = begin + run < vocab ? begin + run : vocab;
    Index own_ties = 0;
    for (Index t = begin; t < end; ++t)
      own_ties += ordered_key(static_cast<C>(own[t])) == threshold.key ? 1 : 0;
    const Index ties_before = scan_block(block, arrays.scratch, own_ties).before;
    double sum = 0;
    for_each_kept(own, begin, end, largest, threshold, ties_before,
                  [&](Index, double weight) { sum += weight; });
    arrays.sums.store(block.thread() + 1, sum);
    block.barrier();
    if (block.thread() == 0) {
      double total = 0;
      arrays.sums.store(0, total);
      for (int i = 1; i <= kThreads; ++i) {
        total += arrays.sums.load(i);
        arrays.sums.store(i, total);
      }
      arrays.chosen.store(0, -1);
    }
    block.barrier();
    const double total = arrays.sums.load(kThreads), before = arrays.sums.load(block.thread()),
                 after = arrays.sums.load(block.thread() + 1);
    const double target =
        (row_random != nullptr ? row_random[row].uniform(0)
                               : random.uniform(static_cast<std::uint32_t>(row))) *
        total;
    // Exactly one run holds the target: the last one that has weight takes what rounding leaves
    // over.
    if (sum > 0 && target >= before && (target < after || after == total)) {
      double passed = before;
      std::int32_t id = -1;
      bool found = false;
      for_each_kept(own, begin, end, largest, threshold, ties_before, [&](Index t, double weight) {
        if (found || weight == 0) return;
        passed += weight;
        id = static_cast<std::int32_t>(t);
        found = target < passed;
      });
      arrays.chosen.store(0, id);
    }
    block.barrier();
    const std::int32_t result = arrays.chosen.load(0);
    block.barrier();
    return result;
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::GreedySampling<T>& p) {
  using Kernel = SampleKernel<T>;
  launch_rows(on, "greedy_sample", p.batch, Kernel::shared(),
              Kernel{p.logits, p.batch, p.vocab, p.vocab, 0, true, false, Philox(), nullptr, p.ids,
                     p.statuses});
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::TopKSampling<T>& p) {
  const problem::RowParams& params = p.params[0];
  const bool greedy = params.temperature == 0;
  const bool by_row = !greedy && p.generators_stride != 0;
  const auto [row_random] =
      stage(on, "top_k_sample",
            std::span(p.generators, by_row ? static_cast<std::size_t>(p.batch) : std::size_t{0}));
  using Kernel = SampleKernel<T>;
  launch_rows(on, "top_k_sample", p.batch, Kernel::shared(),
              Kernel{p.logits, p.batch, p.vocab, params.top_k, params.temperature, greedy,
                     params.top_k_ties == TopKTies::keep_all,
                     greedy || by_row ? Philox() : p.generators[0], row_random, p.ids, p.statuses});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
