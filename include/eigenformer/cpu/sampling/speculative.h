/// \file
/// CPU kernel of speculative verification: rejection sampling along a drafted chain. A row costs
/// two numbers for each accepted token and three passes over one distribution (two at a rejection)
/// for the last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../problem/sampling.h"
#include "../../problem/sampling_rules.h"
#include "../backend.h"
#include "../vector/loop.h"
#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::status_of_probability;

/// The status of the first number that is no probability; ok where all are, which one pass without
/// branches finds out.
template <typename Isa, typename P>
SampleStatus status_of_probabilities(const P* numbers, Index count) {
  using V = simd::Vec<compute_type<P>, Isa>;
  const V most = V::set1((std::numeric_limits<compute_type<P>>::max)());
  std::uint32_t good = ~std::uint32_t{0};
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    const V x = load<V>(numbers + at, part);
    good &= (less_equal(V::zero(), x) & less_equal(x, most)).bits();
  });
  constexpr std::uint32_t every_lane = ~std::uint32_t{0} >> (32 - V::lanes);
  SampleStatus status = SampleStatus::ok;
  if ((good & every_lane) == every_lane) return status;
  for (Index i = 0; i < count && status == SampleStatus::ok; ++i)
    status = status_of_probability(static_cast<double>(numbers[i]));
  return status;
}

/// The weights of the block from `begin` on, 0 past the vocabulary. Of a whole block in a loop of a
/// length that the compiler knows: it makes vectors of it.
template <typename Weight>
EIGENFORMER_INLINE void weights_of_block(Index begin, Index vocab, double* weights,
                                         const Weight& weight) {
  const Index count = (std::min)(SamplingBlock::size, vocab - begin);
  if (count == SamplingBlock::size) {
    for (Index j = 0; j < SamplingBlock::size; ++j) weights[j] = weight(begin + j);
  } else {
    for (Index j = 0; j < count; ++j) weights[j] = weight(begin + j);
    std::fill(weights + count, weights + SamplingBlock::size, 0.0);
  }
}

/// The sum of weight(token) >= 0 as sampling.h adds: in blocks of 128 tokens, then block by block.
template <typename Weight>
double sum_in_blocks(Index vocab, const Weight& weight) {
  alignas(64) double weights[SamplingBlock::size];
  double total = 0;
  for (Index begin = 0; begin < vocab; begin += SamplingBlock::size) {
    weights_of_block(begin, vocab, weights, weight);
    total += block_sum(weights);
  }
  return total;
}

/// The place in a block, which weighs something, at which the sum from `before` on passes `target`;
/// the last one of positive weight where none does.
inline Index place_in_block(const double* weights, double before, double target) {
  Index drawn = -1;
  for (Index j = 0; j < SamplingBlock::size; ++j) {
    if (weights[j] == 0) continue;
    drawn = j;
    before += weights[j];
    if (before > target) break;
  }
  return drawn;
}

/// Draws from weight(token) >= 0 in token order. -1 where the weights sum to 0, -2 where their sum
/// overflows.
template <typename Weight>
std::int32_t draw_from_weights(Index vocab, double u, const Weight& weight) {
  const double total = sum_in_blocks(vocab, weight);
  if (total == 0) return -1;
  if (!(total < std::numeric_limits<double>::infinity())) return -2;
  const double target = u * total;
  alignas(64) double weights[SamplingBlock::size];
  double before = 0, last = 0;
  Index chosen = 0;
  for (Index begin = 0; begin < vocab; begin += SamplingBlock::size) {
    weights_of_block(begin, vocab, weights, weight);
    const double sum = block_sum(weights);
    if (sum == 0) continue;
    before += last;
    last = sum;
    chosen = begin;
    if (before + sum > target) break;
  }
  weights_of_block(chosen, vocab, weights, weight);
  return static_cast<std::int32_t>(chosen + place_in_block(weights, before, target));
}

/// Verifies one row: writes the drafts that are accepted and one token more, and counts the former.
/// Every number that is read is looked at: the two of each draft up to the first refusal, and the
/// distributions that the last token is drawn from.
template <typename Isa, typename Draft, typename Target>
SampleStatus verify_row(const problem::Speculative<Draft, Target>& p, Index r, std::int32_t* tokens,
                        std::int32_t& accepted) {
  const std::int32_t* drafted = p.draft_tokens + r * p.drafts;
  const Index given = p.draft_lengths == nullptr ? p.drafts : p.draft_lengths[r];
  const Index length = std::find(drafted, drafted + given, -1) - drafted;
  const auto target_at = [&](Index i) { return p.target + (r * (p.drafts + 1) + i) * p.vocab; };
  const auto draft_at = [&](Index i) { return p.draft + (r * p.drafts + i) * p.vocab; };
  Index place = 0;
  for (; place < length; ++place) {
    const std::int32_t token = drafted[place];
    const double target = static_cast<double>(target_at(place)[token]),
                 draft = static_cast<double>(draft_at(place)[token]);
    for (const double read : {target, draft})
      if (const SampleStatus status = status_of_probability(read); status != SampleStatus::ok)
        return status;
    if (!(p.uniform(r, place, Philox::Purpose::acceptance) * draft < target)) break;
    tokens[place] = token;
  }
  const Target* target = target_at(place);
  const Draft* draft = place < length ? draft_at(place) : nullptr;
  SampleStatus status = status_of_probabilities<Isa>(target, p.vocab);
  if (status == SampleStatus::ok && draft != nullptr)
    status = status_of_probabilities<Isa>(draft, p.vocab);
  if (status != SampleStatus::ok) return status;
  const double u = p.uniform(r, 0, Philox::Purpose::last_token);
  std::int32_t last = -1;
  if (draft != nullptr)
    last = draw_from_weights(p.vocab, u, [&](Index v) {
      return (std::max)(0.0, static_cast<double>(target[v]) - static_cast<double>(draft[v]));
    });
  // No residual: the two distributions are one up to rounding.
  if (last == -1)
    last = draw_from_weights(p.vocab, u, [&](Index v) { return static_cast<double>(target[v]); });
  if (last < 0) return last == -1 ? SampleStatus::no_token : SampleStatus::positive_infinity;
  tokens[place] = last;
  accepted = static_cast<std::int32_t>(place);
  return SampleStatus::ok;
}

template <typename D, typename Isa, typename Draft, typename Target>
void execute(const Backend<D, Isa>& on, const problem::Speculative<Draft, Target>& p) {
  // Three passes in double.
  parallel_for(on, p.batch, Cost{p.vocab, 3 * kComputeCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      std::int32_t* tokens = p.tokens + r * (p.drafts + 1);
      std::fill(tokens, tokens + p.drafts + 1, -1);
      p.accepted[r] = 0;
      p.statuses[r] = verify_row<Isa>(p, r, tokens, p.accepted[r]);
      if (p.statuses[r] != SampleStatus::ok) std::fill(tokens, tokens + p.drafts + 1, -1);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
