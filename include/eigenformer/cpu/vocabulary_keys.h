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

/// Calls f(token of the shard, logit, key) for the tokens in play whose keys are asked, in order;
/// of_block(block, logits) before those of a block.
template <typename Isa, typename C, typename OfBlock, typename F>
void for_each_key(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, OfBlock&& of_block,
                  F&& f) {
  const C least =
      asked.by_distance ? row.band.lo : (std::max)(row.band.lo, asked.logit_of(asked.last));
  for_each_block<Isa>(row, least, [&](Index block, const C* x) {
    of_block(block, x);
    member_bits<Isa>(x, block, row.band, least).for_each([&](Index j) {
      const std::uint64_t key = asked.key(x[j]);
      if (asked.first <= key && key <= asked.last) f(block * SamplingBlock::size + j, x[j], key);
    });
  });
}
template <typename Isa, typename C, typename F>
void for_each_key(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, F&& f) {
  for_each_key<Isa>(
      row, asked, [](Index, const C*) {}, f);
}

template <typename Isa, typename C>
void bound_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  std::uint64_t least = asked.last, most = asked.first;
  for_each_key<Isa>(row, asked, [&](Index, C, std::uint64_t key) {
    least = (std::min)(least, key);
    most = (std::max)(most, key);
  });
  for (const std::uint64_t key : {least, most}) {
    *answer++ = static_cast<double>(key >> 32);
    *answer++ = static_cast<double>(key & 0xFFFFFFFFu);
  }
}

template <typename Isa, typename C>
void bin_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  constexpr Index bins = problem::ShardKeys::bins;
  const int shift = problem::ShardKeys::shift(asked.first, asked.last);
  alignas(64) double weights[SamplingBlock::size] = {};
  const auto weigh = [&](Index block, const C* x) {
    if (asked.term != problem::ShardTerm::unit)
      member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
  };
  for_each_key<Isa>(row, asked, weigh, [&](Index token, C logit, std::uint64_t key) {
    const auto bin = static_cast<Index>((key - asked.first) >> shift);
    answer[bin] += asked.term_of(logit, weights[token % SamplingBlock::size]);
    answer[bins + bin] += 1;
  });
}

template <typename Isa, typename C>
void list_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, double* answer) {
  double* const end =
      std::fill_n(answer, problem::ShardKeys::listed, -std::numeric_limits<double>::infinity());
  for_each_key<Isa>(row, asked, [&](Index, C logit, std::uint64_t) {
    if (answer != end) *answer++ = static_cast<double>(logit);
  });
}

/// `begin`: the first token of the shard.
template <typename Isa, typename C>
void extent_of_keys(const SamplingRow<C>& row, const problem::ShardRow<C>& asked, Index begin,
                    double* answer) {
  C least = std::numeric_limits<C>::infinity(), most = -least;
  Index last = -1;
  for_each_key<Isa>(row, asked, [&](Index token, C logit, std::uint64_t) {
    most = (std::max)(most, logit);
    if (logit > least) return;
    least = logit;
    last = begin + token;
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
