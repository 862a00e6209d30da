/// \file
/// The best tokens of a row in shared memory, sorted, without a second pass over the row. The scan
/// leaves each thread the largest logits of its tokens, up to four groups of them. A number that k
/// groups reach is one that k tokens reach and few more: where tokens come in no order, some 51 for
/// the best 50 of 2048 groups. Only threads that have such a group have tokens to look at again; a
/// warp reads those of a thread at once, out of L2.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "filters.cuh"
#include "row_packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Threads of a block that draws, and tokens that a list holds.
inline constexpr int kDrawThreads = 512, kMostListed = 2 * kDrawThreads;

/// The largest logits of a thread's tokens: those at every width / kCount-th place of its packs.
template <typename T>
struct GroupMaxima {
  using C = compute_type<T>;
  static constexpr int kCount = pack_width<T> < 4 ? pack_width<T> : 4;
  C values[kCount];
};

/// What a list takes of shared memory beside SamplingArrays.
template <typename Block, typename C>
struct BestList {
  static constexpr int kCounters = 32, kHits = kCounters - 2, kFound = kCounters - 1;
  template <typename V>
  using Shared = decltype(std::declval<Block&>().template shared<V>(1));
  Shared<int> counters;
  Shared<std::int32_t> hits;    // (kMostListed) threads; later tokens in their order
  Shared<C> logits;             // (kMostListed) best first, equals by index
  Shared<std::int32_t> tokens;  // (kMostListed) of the logits
  Shared<double> weights;       // (kMostListed) of the tokens in their order
};

template <typename C>
constexpr std::size_t best_list_bytes() {
  return shared_bytes<int>(32) + 2 * shared_bytes<std::int32_t>(kMostListed) +
         shared_bytes<C>(kMostListed) + shared_bytes<double>(kMostListed);
}

template <typename C, typename Block>
EIGENFORMER_DEVICE EIGENFORMER_INLINE BestList<Block, C> best_list(Block& block) {
  const auto counters = block.template shared<int>(BestList<Block, C>::kCounters);
  const auto hits = block.template shared<std::int32_t>(kMostListed);
  const auto logits = block.template shared<C>(kMostListed);
  const auto tokens = block.template shared<std::int32_t>(kMostListed);
  const auto weights = block.template shared<double>(kMostListed);
  return {counters, hits, logits, tokens, weights};
}

/// scan_row, with the maxima of the groups.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE SampleStatus scan_groups(Block& block, const Arrays& arrays,
                                                               SamplingRow<T>& row,
                                                               GroupMaxima<T>& most) {
  using C = compute_type<T>;
  constexpr int width = pack_width<T>, depth = 8, groups = GroupMaxima<T>::kCount;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  bool has_nan = false;
  for (int g = 0; g < groups; ++g) most.values[g] = -infinity;
  for_each_pack_between<depth>(
      row.logits, static_cast<Index>(block.thread()) * width,
      static_cast<Index>(block.size()) * width, row.vocab, [&](Index, const auto& x, int count) {
        for (int i = 0; i < width; ++i) {
          const C logit = i < count ? x[i] : -infinity;
          most.values[i % groups] = std::fmax(most.values[i % groups], logit);
          has_nan = has_nan || logit != logit;
        }
      });
  C best = most.values[0];
  for (int g = 1; g < groups; ++g) best = std::fmax(best, most.values[g]);
  const RowBest<C> own{best, best > -infinity ? 0 : row.vocab,
                       (has_nan ? 1 : 0) | (best == infinity ? 2 : 0)};
  const RowBest<C> all = reduce_block(block, arrays.best, own, BetterRow{});
  row.band = {all.value, std::numeric_limits<C>::lowest(), row.vocab};
  row.inverse_temperature = 1;
  return status_of(all, row.vocab);
}

/// The key of a number that `k` groups reach, nearly the largest; 0 where fewer have a token.
template <typename Block, typename List, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE auto key_of_groups(Block& block, const List& list,
                                                         const GroupMaxima<T>& most, Index k) {
  using C = compute_type<T>;
  using Key = decltype(problem::order_key(C(0)));
  constexpr int groups = GroupMaxima<T>::kCount, bits = 8 * static_cast<int>(sizeof(C));
  constexpr int looked_at = 24;  // sign, exponent and 15 bits of a float
  Key keys[groups];
  for (int g = 0; g < groups; ++g) keys[g] = problem::order_key(most.values[g]);
  for (int i = block.thread(); i < List::kCounters; i += block.size()) list.counters.store(i, 0);
  block.barrier();
  Key reached = 0;
  for (int i = 0; i < looked_at; ++i) {
    const Key next = reached | Key{1} << (bits - 1 - i);
    int count = 0;
    for (int g = 0; g < groups; ++g) count += std::popcount(block.ballot(keys[g] >= next));
    if (block.lane() == 0) list.counters.add(i, count);
    block.barrier();
    if (list.counters.load(i) >= k) reached = next;
  }
  return reached > problem::order_key(std::numeric_limits<C>::lowest()) ? reached : Key{0};
}

template <typename Arrays, typename List, typename C>
EIGENFORMER_DEVICE EIGENFORMER_INLINE void put_gathered(const Arrays& arrays, const List& list,
                                                        C logit, Index token) {
  const Index place = list.counters.add(List::kFound, 1);
  if (place >= kMostListed) return;
  arrays.sums.numbers.store(place, static_cast<double>(logit));
  arrays.sums.numbers.store(kMostListed + place, static_cast<double>(token));
}

/// The tokens whose key is `least` or more into arrays.sums.numbers, logits first, in no order:
/// their number, of which kMostListed at most are there. After key_of_groups.
template <typename Block, typename Arrays, typename List, typename T, typename Key>
EIGENFORMER_DEVICE EIGENFORMER_INLINE Index gather_from(Block& block, const Arrays& arrays,
                                                        const List& list, const SamplingRow<T>& row,
                                                        const GroupMaxima<T>& most, Key least) {
  constexpr int width = pack_width<T>, depth = 4;
  const Index threads = block.size();
  bool hit = false;
  for (int g = 0; g < GroupMaxima<T>::kCount; ++g)
    hit = hit || problem::order_key(most.values[g]) >= least;
  if (hit) list.hits.store(list.counters.add(List::kHits, 1), block.thread());
  block.barrier();
  const int hits = list.counters.load(List::kHits);
  for (int h = block.warp(); h < hits; h += static_cast<int>(threads) / kWarp)
    for_each_pack_between<depth>(row.logits, (list.hits.load(h) + block.lane() * threads) * width,
                                 kWarp * threads * width, row.vocab,
                                 [&](Index t, const auto& x, int count) {
                                   for (int i = 0; i < width; ++i) {
                                     if (i >= count || problem::order_key(x[i]) < least) continue;
                                     put_gathered(arrays, list, x[i], t + i);
                                   }
                                 });
  block.barrier();
  return list.counters.load(List::kFound);
}

/// Sorts what was gathered into the list: each of the `count` counts those before it.
template <typename Block, typename Arrays, typename C>
EIGENFORMER_DEVICE EIGENFORMER_INLINE void sort_gathered(Block& block, const Arrays& arrays,
                                                         const BestList<Block, C>& list,
                                                         Index count) {
  const auto& given = arrays.sums.numbers;
  for (Index i = block.thread(); i < count; i += block.size()) {
    const double own = given.load(i), token = given.load(kMostListed + i);
    Index better = 0;
    for (Index j = 0; j < count; ++j) {
      const double other = given.load(j);
      better += other > own || (other == own && given.load(kMostListed + j) < token) ? 1 : 0;
    }
    list.logits.store(better, static_cast<C>(own));
    list.tokens.store(better, static_cast<std::int32_t>(token));
  }
  block.barrier();
}

/// Lists the `k` best tokens of a row none of which was filtered yet, with the equals of the last
/// where `ties` says so: their number, or 0 where they are no list.
template <typename Block, typename Arrays, typename List, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE Index list_best(Block& block, const Arrays& arrays,
                                                      const List& list, const SamplingRow<T>& row,
                                                      const GroupMaxima<T>& most, Index k,
                                                      TopKTies ties) {
  using C = compute_type<T>;
  if (k > kMostListed) return 0;
  const auto least = key_of_groups(block, list, most, k);
  if (least == 0) return 0;
  const Index count = gather_from(block, arrays, list, row, most, least);
  if (count > kMostListed) return 0;
  sort_gathered(block, arrays, list, count);
  if (ties == TopKTies::lowest_index) return k;
  const C last = list.logits.load(k - 1);
  while (k < count && list.logits.load(k) == last) ++k;
  return k;
}

/// How many of the best `count` top-p keeps.
template <typename Block, typename Arrays, typename List, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE Index listed_top_p(Block& block, const Arrays& arrays,
                                                         const List& list,
                                                         const SamplingRow<T>& row, Index count,
                                                         double p) {
  if (p >= 1.0) return count;
  const auto weight = [&](Index i) { return i < count ? row.weight(list.logits.load(i)) : 0.0; };
  const Index first = 2 * block.thread();
  const double one = weight(first), both = one + weight(first + 1);
  const Scan<double> sum = scan_block(block, arrays.digits, both);
  const double target = (p > 0 ? p : 0.0) * sum.total;
  Index end = count;
  if (first < count) {
    if (sum.before + one >= target)
      end = first + 1;
    else if (first + 1 < count && sum.before + both >= target)
      end = first + 2;
  }
  return reduce_block(block, arrays.counts, end, Smaller{});
}

template <typename Block, typename Arrays, typename List, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE Index listed_min_p(Block& block, const Arrays& arrays,
                                                         const List& list,
                                                         const SamplingRow<T>& row, Index count,
                                                         double min_p) {
  if (min_p <= 0.0) return count;
  Index kept = 0;
  for (Index i = block.thread(); i < count; i += block.size())
    kept += row.weight(list.logits.load(i)) >= min_p ? 1 : 0;
  return reduce_block(block, arrays.counts, kept, Add{});
}

/// Draws from the best `count`, in the order of their tokens.
template <typename Block, typename Arrays, typename List, typename T>
EIGENFORMER_DEVICE EIGENFORMER_INLINE std::int32_t draw_listed(Block& block, const Arrays& arrays,
                                                               const List& list,
                                                               const SamplingRow<T>& row,
                                                               Index count, double u) {
  for (Index i = block.thread(); i < count; i += block.size()) {
    const std::int32_t token = list.tokens.load(i);
    Index place = 0;
    for (Index j = 0; j < count; ++j) place += list.tokens.load(j) < token ? 1 : 0;
    list.weights.store(place, row.weight(list.logits.load(i)));
    list.hits.store(place, token);
  }
  block.barrier();
  const auto weight = [&](Index i) { return list.weights.load(i); };
  const std::int32_t place =
      draw_in_order(block, arrays.sums, count, u, WeightsOneByOne<decltype(weight)>{count, weight});
  return list.hits.load(place);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
