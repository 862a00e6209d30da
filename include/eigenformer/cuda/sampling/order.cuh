/// \file
/// Sums and draws in token order, by a block: the very additions of cpu/sampling, so that a random
/// number gives the same token on both. Tokens come in runs of 128: eight neighbouring threads add
/// every eighth weight of a run, a fixed tree adds the eight, one thread adds the runs from first
/// to last (1002 for a vocabulary of 128256, out of shared memory).
#pragma once

#include <limits>

#include "../collectives.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Tokens of a run, and runs of a tile: what shared memory has sums for at a time.
inline constexpr Index kRun = 128, kTileRuns = 16 * kRowThreads;

/// The shared memory that sums in token order take.
template <typename Block>
struct OrderedSums {
  template <typename V>
  using Shared = decltype(std::declval<Block&>().template shared<V>(1));
  Shared<double> numbers;  // (kTileRuns); a selection has it for its masses
  Shared<double> total;
  Shared<Index> token;
};

inline constexpr std::size_t kOrderedSumsBytes =
    shared_bytes<double>(kTileRuns) + shared_bytes<double>(1) + shared_bytes<Index>(1);

template <typename Block>
EIGENFORMER_DEVICE OrderedSums<Block> ordered_sums(Block& block) {
  const auto numbers = block.template shared<double>(kTileRuns);
  const auto total = block.template shared<double>(1);
  const auto token = block.template shared<Index>(1);
  return {numbers, total, token};
}

/// The sums of the runs [first, first + count) of weight(token); a barrier follows.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE void sum_runs(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                 Index first, Index count, const Weight& weight) {
  constexpr int ways = 8;
  const int member = block.thread() % ways;
  const Index group = block.thread() / ways, groups = block.size() / ways;
  for (Index i = 0; i < count; i += groups) {  // as often for every lane: they shuffle
    double sum = 0;
    const Index begin = (first + i + group) * kRun + member,
                end = i + group < count ? begin + kRun : begin;
    for (Index t = begin; t < end && t < vocab; t += ways) sum += weight(t);
    for (int apart = ways / 2; apart > 0; apart /= 2) sum += block.shuffle_xor(sum, apart);
    if (member == 0 && i + group < count) sums.numbers.store(i + group, sum);
  }
  block.barrier();
}

/// visit(first run, runs), by one thread, for tiles of runs whose sums are in shared memory.
/// `ready`: a sum of the same weights came just before, and what fits the tile is still there.
template <typename Block, typename Weight, typename Visit>
EIGENFORMER_DEVICE void for_each_tile(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                      bool ready, const Weight& weight, Visit visit) {
  const Index runs = (vocab + kRun - 1) / kRun;
  for (Index first = 0; first < runs; first += kTileRuns) {
    const Index count = runs - first < kTileRuns ? runs - first : kTileRuns;
    if (!ready || runs > kTileRuns) sum_runs(block, sums, vocab, first, count, weight);
    if (block.thread() == 0) visit(first, count);
    block.barrier();
  }
}

/// The sum of weight(token) over the vocabulary, for every thread. A barrier lies between it and
/// what came before in the numbers.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE double sum_in_order(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                       const Weight& weight) {
  double total = 0;
  for_each_tile(block, sums, vocab, false, weight, [&](Index, Index count) {
    for (Index i = 0; i < count; ++i) total += sums.numbers.load(i);
    sums.total.store(0, total);
  });
  total = sums.total.load(0);
  block.barrier();
  return total;
}

/// The token at which the running sum of weight(token) >= 0 passes u of their total, for every
/// thread; the last one that has weight where rounding leaves it just below. -1 where the weights
/// sum to 0, -2 where their sum overflows.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE std::int32_t draw_in_order(Block& block, const OrderedSums<Block>& sums,
                                              Index vocab, double u, const Weight& weight) {
  const double total = sum_in_order(block, sums, vocab, weight);
  if (total == 0) return -1;
  if (!(total < std::numeric_limits<double>::infinity())) return -2;
  const double target = u * total;
  double before = 0, last = 0;  // thread 0's: what lies before the run chosen, and its sum
  Index chosen = 0;
  bool passed = false;
  for_each_tile(block, sums, vocab, true, weight, [&](Index first, Index count) {
    for (Index i = 0; i < count && !passed; ++i) {
      const double sum = sums.numbers.load(i);
      if (sum == 0) continue;
      before += last;
      last = sum;
      chosen = first + i;
      passed = before + sum > target;
    }
    sums.token.store(0, chosen);
  });
  const Index begin = sums.token.load(0) * kRun;
  for (Index j = block.thread(); j < kRun; j += block.size())
    sums.numbers.store(j, begin + j < vocab ? weight(begin + j) : 0.0);
  block.barrier();
  if (block.thread() == 0) {
    Index drawn = begin;
    for (Index j = 0; j < kRun; ++j) {
      const double own = sums.numbers.load(j);
      if (own == 0) continue;
      drawn = begin + j;
      before += own;
      if (before > target) break;
    }
    sums.token.store(0, drawn);
  }
  block.barrier();
  const auto result = static_cast<std::int32_t>(sums.token.load(0));
  block.barrier();
  return result;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
