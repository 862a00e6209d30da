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
  Shared<Index> firsts;    // (warps)
  Shared<Index> token;
};

inline constexpr std::size_t kOrderedSumsBytes = shared_bytes<double>(kTileRuns) +
                                                 shared_bytes<Index>(kRowThreads / kWarp) +
                                                 shared_bytes<Index>(1);

template <typename Block>
EIGENFORMER_DEVICE OrderedSums<Block> ordered_sums(Block& block) {
  const auto numbers = block.template shared<double>(kTileRuns);
  const auto firsts = block.template shared<Index>(kRowThreads / kWarp);
  const auto token = block.template shared<Index>(1);
  return {numbers, firsts, token};
}

EIGENFORMER_DEVICE inline Index runs_of(Index vocab) { return (vocab + kRun - 1) / kRun; }

/// numbers[i] = start and the sums of weight(token) over the runs [first, first + i].
template <typename Block, typename Weight>
EIGENFORMER_DEVICE void sum_runs(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                 Index first, Index count, double start, const Weight& weight) {
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
  if (block.thread() == 0)
    for (Index i = 0; i < count; ++i) {
      start += sums.numbers.load(i);
      sums.numbers.store(i, start);
    }
  block.barrier();
}

EIGENFORMER_DEVICE inline Index tile_size(Index runs, Index first) {
  return runs - first < kTileRuns ? runs - first : kTileRuns;
}

/// The sum of weight(token) over the vocabulary, for every thread. What the numbers hold then are
/// the sums up to each run of the last tile.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE double sum_in_order(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                       const Weight& weight) {
  const Index runs = runs_of(vocab);
  double total = 0;
  for (Index first = 0; first < runs; first += kTileRuns) {
    const Index count = tile_size(runs, first);
    sum_runs(block, sums, vocab, first, count, total, weight);
    total = sums.numbers.load(count - 1);
    block.barrier();
  }
  return total;
}

/// A run of tokens, and the sum of the weights before it.
struct RunFound {
  Index run;
  double before;
};

/// The first run within which the running sum passes `target`, or reaches the total. A
/// sum_in_order of the same weights came just before.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE RunFound find_run(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                     double target, double total, const Weight& weight) {
  const Index runs = runs_of(vocab);
  RunFound found{runs - 1, 0};
  for (Index first = 0; first < runs; first += kTileRuns) {
    const Index count = tile_size(runs, first);
    if (runs > kTileRuns) sum_runs(block, sums, vocab, first, count, found.before, weight);
    Index own = count;
    for (Index i = block.thread(); i < own; i += block.size()) {
      const double sum = sums.numbers.load(i);
      if (sum > target || sum == total) own = i;
    }
    own = reduce_block(block, sums.firsts, own, Smaller{});
    if (own > 0) found.before = sums.numbers.load(own - 1);
    block.barrier();
    if (own == count) continue;
    found.run = first + own;
    break;
  }
  return found;
}

/// The token at which the running sum of weight(token) >= 0 passes u of their total, for every
/// thread; one of the last that have weight where rounding leaves it just below. -1 where the
/// weights sum to 0, -2 where their sum overflows.
template <typename Block, typename Weight>
EIGENFORMER_DEVICE std::int32_t draw_in_order(Block& block, const OrderedSums<Block>& sums,
                                              Index vocab, double u, const Weight& weight) {
  const double total = sum_in_order(block, sums, vocab, weight);
  if (total == 0) return -1;
  if (!(total < std::numeric_limits<double>::infinity())) return -2;
  const double target = u * total;
  const RunFound found = find_run(block, sums, vocab, target, total, weight);
  const Index begin = found.run * kRun;
  for (Index j = block.thread(); j < kRun; j += block.size())
    sums.numbers.store(j, begin + j < vocab ? weight(begin + j) : 0.0);
  block.barrier();
  if (block.thread() == 0) {
    double before = found.before;
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
