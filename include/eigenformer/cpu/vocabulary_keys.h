/// \file
/// CPU kernels of a divided vocabulary: questions about tokens in the order in which a filter takes
/// them (problem/vocabulary_shard.h). Each reads the blocks of 128 that may hold a token asked for,
/// once.
#pragma once

#include "../problem/vocabulary_shard.h"
#include "sampling/sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Two intervals of logits, of which the second may be empty, that hold all whose keys are asked.
template <typename C>
struct LogitsOfKeys {
  C lo[2], hi[2];

  explicit LogitsOfKeys(const problem::ShardRow<C>& asked) {
    constexpr C infinity = std::numeric_limits<C>::infinity();
    if (!asked.by_distance) {
      lo[0] = lo[1] = asked.logit_of(asked.last), hi[0] = asked.logit_of(asked.first);
      hi[1] = -infinity;
      return;
    }
    const double best = static_cast<double>(asked.band.hi), scale = asked.inverse_temperature,
                 nearest = std::bit_cast<double>(asked.first),
                 farthest = std::bit_cast<double>(asked.last);
    const auto logit_at = [&](double exponent, double sign) {
      constexpr double lowest = static_cast<double>(std::numeric_limits<C>::lowest());
      const double from_best = exponent / scale,
                   slack = 1e-12 * sign *
                           (std::abs(best) + std::abs(from_best) + std::abs(asked.mean) / scale);
      const C logit = static_cast<C>((std::clamp)(best + from_best + slack, lowest, best));
      return std::nextafter(logit, static_cast<C>(sign) * infinity);
    };
    lo[0] = logit_at(asked.mean - farthest, -1), hi[0] = logit_at(asked.mean - nearest, 1);
    lo[1] = logit_at(asked.mean + nearest, -1), hi[1] = logit_at(asked.mean + farthest, 1);
  }
  C least() const { return (std::min)(lo[0], lo[1]); }
};

/// Calls f(block, logits, chosen) for the blocks that have tokens in play in these intervals.
template <typename Isa, typename C, typename F>
void for_each_block_of_keys(const SamplingRow<C>& row, const LogitsOfKeys<C>& keys, F&& f) {
  using V = simd::Vec<C, Isa>;
  const V lo[2] = {V::set1(keys.lo[0]), V::set1(keys.lo[1])},
          hi[2] = {V::set1(keys.hi[0]), V::set1(keys.hi[1])};
  for_each_block<Isa>(row, (std::max)(row.band.lo, keys.least()), [&](Index block, const C* x) {
    BlockBits chosen;
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      chosen.add(i, (less_equal(lo[0], v) & less_equal(v, hi[0])).bits() |
                        (less_equal(lo[1], v) & less_equal(v, hi[1])).bits());
    }
    if (chosen.count() == 0) return;
    const BlockBits members = member_bits<Isa>(x, block, row.band, row.band.lo);
    for (int w = 0; w < 2; ++w) chosen.word[w] &= members.word[w];
    f(block, x, chosen);
  });
}

/// Calls f(logit, key) for the tokens in play whose keys are asked, in order.
template <typename Isa, typename C, typename F>
void for_each_key(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, F&& f) {
  for_each_block_of_keys<Isa>(row, LogitsOfKeys<C>(asked),
                              [&](Index, const C* x, const BlockBits& chosen) {
                                chosen.for_each([&](Index j) {
                                  const std::uint64_t key = asked.key(x[j]);
                                  if (asked.first <= key && key <= asked.last) f(x[j], key);
                                });
                              });
}

template <typename Isa, typename C>
void bound_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  std::uint64_t least = asked.last, most = asked.first;
  for_each_key<Isa>(row, asked, [&](C, std::uint64_t key) {
    least = (std::min)(least, key);
    most = (std::max)(most, key);
  });
  for (const std::uint64_t key : {least, most}) {
    *answer++ = static_cast<double>(key >> 32);
    *answer++ = static_cast<double>(key & 0xFFFFFFFFu);
  }
}

/// The terms of a block.
template <typename Isa, typename C>
void block_terms(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, Index block,
                 const C* x, double* terms) {
  if (asked.term == problem::ShardTerm::unit)
    return std::fill(terms, terms + SamplingBlock::size, 1.0);
  member_weights<Isa>(x, block, row.band, row.inverse_temperature, terms);
  if (asked.term == problem::ShardTerm::surprise)
    for (Index j = 0; j < SamplingBlock::size; ++j) terms[j] = asked.term_of(x[j], terms[j]);
}

/// Sums and counts of bins. Neighbours fall in one bin, and each addition would wait for the last.
struct BinSums {
  static constexpr Index bins = problem::ShardBins::count, ways = SelectionLimits::ways;
  double sums[bins * ways] = {};
  Index counts[bins * ways] = {};

  /// Of a number that is trunc'd, in [0, bins).
  static std::int32_t place(double bin, Index j) {
    const double of = bin < bins - 1 ? bin : bins - 1;
    return static_cast<std::int32_t>(of > 0 ? of : 0) * static_cast<std::int32_t>(ways) +
           static_cast<std::int32_t>(j % ways);
  }
  void add(std::int32_t place, double term) {
    sums[place] += term;
    ++counts[place];
  }
  void write(double* answer) const {
    for (Index bin = 0; bin < bins; ++bin) {
      const double* const sum = sums + bin * ways;
      const Index* const count = counts + bin * ways;
      answer[bin] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      answer[bins + bin] = static_cast<double>((count[0] + count[1]) + (count[2] + count[3]));
    }
  }
};

/// The first bins of a search, by distance: all tokens in play are weighed.
template <typename Isa, typename C>
void bin_distances(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  alignas(64) double terms[SamplingBlock::size];
  alignas(64) std::int32_t places[SamplingBlock::size];
  BinSums bins;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const C* x) {
    const BlockBits members = member_bits<Isa>(x, block, row.band, row.band.lo);
    block_terms<Isa>(row, asked, block, x, terms);
    for (Index j = 0; j < SamplingBlock::size; ++j)
      places[j] = BinSums::place(asked.distance(x[j]), j);
    if (members.count() < SamplingBlock::size)
      return members.for_each([&](Index j) { bins.add(places[j], terms[j]); });
    for (Index j = 0; j < SamplingBlock::size; ++j) bins.add(places[j], terms[j]);
  });
  bins.write(answer);
}

template <typename Isa, typename C>
void bin_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  constexpr Index size = SamplingBlock::size;
  constexpr int few = 24;  // as in member_weights
  alignas(64) double terms[size];
  alignas(64) std::int32_t places[size];
  alignas(64) std::uint64_t keys[size];
  BinSums bins;
  const auto add = [&](std::uint64_t key, std::int32_t place, double term) {
    if (asked.first <= key && key <= asked.last) bins.add(place, term);
  };
  for_each_block_of_keys<Isa>(
      row, LogitsOfKeys<C>(asked), [&](Index block, const C* x, const BlockBits& chosen) {
        if (chosen.count() > few) {
          block_terms<Isa>(row, asked, block, x, terms);
          for (Index j = 0; j < size; ++j) keys[j] = asked.key(x[j]);
          for (Index j = 0; j < size; ++j)
            places[j] = BinSums::place(asked.from_first(x[j]) * asked.per_unit, j);
          return chosen.for_each([&](Index j) { add(keys[j], places[j], terms[j]); });
        }
        chosen.for_each([&](Index j) {
          const double weight =
              asked.term == problem::ShardTerm::unit
                  ? 1.0
                  : token_weight(static_cast<double>(x[j]), static_cast<double>(row.band.hi),
                                 row.inverse_temperature);
          add(asked.key(x[j]), BinSums::place(asked.from_first(x[j]) * asked.per_unit, j),
              asked.term_of(x[j], weight));
        });
      });
  bins.write(answer);
}

template <typename Isa, typename C>
void list_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  double* const end =
      std::fill_n(answer, problem::ShardKeys::listed, -std::numeric_limits<double>::infinity());
  for_each_key<Isa>(row, asked, [&](C logit, std::uint64_t) {
    if (answer != end) *answer++ = static_cast<double>(logit);
  });
}

/// Of keys by logits; `begin`: the first token of the shard.
template <typename Isa, typename C>
void extent_of_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, Index begin,
                    double* answer) {
  using V = simd::Vec<C, Isa>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  C least = infinity, most = -infinity;
  Index last = -1;
  const LogitsOfKeys<C> keys(asked);
  for_each_block_of_keys<Isa>(row, keys, [&](Index block, const C* x, const BlockBits& chosen) {
    if (chosen.count() == 0) return;
    V low = V::set1(infinity), high = V::set1(-infinity);
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      const auto is_chosen = chosen.template mask<V>(i);
      low = minimum(select(is_chosen, v, V::set1(infinity)), low);
      high = maximum(select(is_chosen, v, V::set1(-infinity)), high);
    }
    most = (std::max)(most, reduce_max(high));
    const C lowest = reduce_min(low);
    if (lowest > least) return;
    least = lowest;
    BlockBits equals = equal_bits<Isa>(x, lowest);
    for (int w = 0; w < 2; ++w) equals.word[w] &= chosen.word[w];
    equals.for_each([&](Index j) { last = begin + block * SamplingBlock::size + j; });
  });
  answer[0] = static_cast<double>(least), answer[1] = static_cast<double>(last);
  answer[2] = static_cast<double>(most);
}

template <typename Isa, typename C>
void best_of_shard(SamplingRow<C> row, Index most, double* answer,
                   const SamplingScratch<C>& scratch) {
  std::fill_n(answer, most, -std::numeric_limits<double>::infinity());
  keep_top_k<Isa>(row, most, TopKTies::lowest_index, scratch);
  const Index n = gather_candidates<Isa>(row, row.band.lo, scratch.candidates);
  std::copy_n(scratch.candidates, n, answer);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
