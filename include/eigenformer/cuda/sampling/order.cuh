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

/// Weights are asked for by fours, weights(t, apart) those of t, t + apart, ..., 0 past the
/// vocabulary: an exponential is a chain of some 20 operations, and four fill each other's gaps.
struct FourWeights {
  static constexpr int kCount = 4;
  double values[kCount];
};

/// Of weight(token), where that is no exponential.
template <typename Weight>
struct WeightsOneByOne {
  Index vocab;
  Weight weight;

  EIGENFORMER_DEVICE FourWeights operator()(Index t, Index apart) const {
    FourWeights four;
    for (int k = 0; k < FourWeights::kCount; ++k)
      four.values[k] = t + k * apart < vocab ? weight(t + k * apart) : 0.0;
    return four;
  }
};

/// The shared memory that sums in token order take.
template <typename Block>
struct OrderedSums {
  template <typename V>
  using Shared = decltype(std::declval<Block&>().template shared<V>(1));
  Shared<double> numbers;  // (16 * threads), kTileRuns or more; a selection has it for its masses
  Shared<Index> firsts;    // (warps)
  Shared<Index> token;
};

/// For blocks of so many threads, kRowThreads or more.
template <int Threads>
inline constexpr std::size_t ordered_sums_bytes =
    shared_bytes<double>(16 * Threads) + shared_bytes<Index>(Threads / kWarp) +
    shared_bytes<Index>(1);
inline constexpr std::size_t kOrderedSumsBytes = ordered_sums_bytes<kRowThreads>;

template <int Threads = kRowThreads, typename Block>
EIGENFORMER_DEVICE OrderedSums<Block> ordered_sums(Block& block) {
  const auto numbers = block.template shared<double>(16 * Threads);
  const auto firsts = block.template shared<Index>(Threads / kWarp);
  const auto token = block.template shared<Index>(1);
  return {numbers, firsts, token};
}

EIGENFORMER_DEVICE inline Index runs_of(Index vocab) { return (vocab + kRun - 1) / kRun; }

/// numbers[i] = start and the sums of the weights of the runs [first, first + i].
template <typename Block, typename Weights>
EIGENFORMER_DEVICE void sum_runs(Block& block, const OrderedSums<Block>& sums, Index first,
                                 Index count, double start, const Weights& weights) {
  constexpr int ways = 8;
  const int member = block.thread() % ways;
  const Index group = block.thread() / ways, groups = block.size() / ways;
  for (Index i = 0; i < count; i += groups) {  // as often for every lane: they shuffle
    double sum = 0;
    const Index begin = (first + i + group) * kRun + member,
                end = i + group < count ? begin + kRun : begin;
    for (Index t = begin; t < end; t += ways * FourWeights::kCount) {
      const FourWeights four = weights(t, ways);
      for (int k = 0; k < FourWeights::kCount; ++k) sum += four.values[k];
    }
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

/// The sum of the weights of the vocabulary, for every thread. What the numbers hold then are
/// the sums up to each run of the last tile.
template <typename Block, typename Weights>
EIGENFORMER_DEVICE double sum_in_order(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                       const Weights& weights) {
  const Index runs = runs_of(vocab);
  double total = 0;
  for (Index first = 0; first < runs; first += kTileRuns) {
    const Index count = tile_size(runs, first);
    sum_runs(block, sums, first, count, total, weights);
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
template <typename Block, typename Weights>
EIGENFORMER_DEVICE RunFound find_run(Block& block, const OrderedSums<Block>& sums, Index vocab,
                                     double target, double total, const Weights& weights) {
  const Index runs = runs_of(vocab);
  RunFound found{runs - 1, 0};
  for (Index first = 0; first < runs; first += kTileRuns) {
    const Index count = tile_size(runs, first);
    if (runs > kTileRuns) sum_runs(block, sums, first, count, found.before, weights);
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

/// The token at which the running sum of the weights, none negative, passes u of their total, for
/// every thread; one of the last that have weight where rounding leaves it just below. -1 where
/// the weights sum to 0, -2 where their sum overflows.
template <typename Block, typename Weights>
EIGENFORMER_DEVICE std::int32_t draw_in_order(Block& block, const OrderedSums<Block>& sums,
                                              Index vocab, double u, const Weights& weights) {
  const double total = sum_in_order(block, sums, vocab, weights);
  if (total == 0) return -1;
  if (!(total < std::numeric_limits<double>::infinity())) return -2;
  const double target = u * total;
  const RunFound found = find_run(block, sums, vocab, target, total, weights);
  const Index begin = found.run * kRun;
  constexpr Index apart = kRun / FourWeights::kCount;
  for (Index j = block.thread(); j < apart; j += block.size()) {
    const FourWeights four = weights(begin + j, apart);
    for (int k = 0; k < FourWeights::kCount; ++k) sums.numbers.store(j + k * apart, four.values[k]);
  }
  block.barrier();
  if (block.thread() == 0) {
    double before = found.before;
    Index drawn = begin;
    const Index count = vocab - begin < kRun ? vocab - begin : kRun;
    for (Index j = 0; j < count; ++j) {
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
