/// \file
/// CPU kernels of sums over a divided vocabulary that have the bits of the whole row
/// (problem/vocabulary_tree.h), and of what refused drafts leave of a shard: computed again block
/// by block for each pass, which costs a few operations for each token and draft, and no scratch.
#pragma once

#include "../problem/vocabulary_tree.h"
#include "sampling/speculative.h"
#include "vocabulary_shard.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

static_assert(problem::BlockParts::block == SamplingBlock::size);

/// Writes the parts of a sum. numbers(begin, end, to): those of tokens [begin, end) of the
/// vocabulary, at most a block of them, then 0.
template <typename Numbers>
double* write_parts(const problem::BlockParts& parts, double* out, Numbers&& numbers) {
  constexpr Index size = SamplingBlock::size;
  alignas(64) double block[size];
  const ShardRange& own = parts.shard;
  numbers(own.begin, own.begin + parts.before, block);
  out = std::copy_n(block, parts.before, out);
  for (Index b = parts.first; b < parts.last; ++b) {
    numbers(b * size, (std::min)((b + 1) * size, own.end), block);
    *out++ = block_sum(block);
  }
  numbers(own.end - parts.after, own.end, block);
  return std::copy_n(block, parts.after, out);
}

/// Calls of_token(token, number) for the tokens of blocks that ranks share, in order, and
/// of_block(block, sum, rank) for the other blocks. parts_of(rank): the numbers of a rank.
template <typename PartsOf, typename OfToken, typename OfBlock>
void for_each_part(Index vocab, int ranks, PartsOf&& parts_of, OfToken&& of_token,
                   OfBlock&& of_block) {
  for (int rank = 0; rank < ranks; ++rank) {
    const problem::BlockParts parts(vocab, problem::shard_of(vocab, rank, ranks));
    const double* from = parts_of(rank);
    for (Index i = 0; i < parts.before; ++i) of_token(parts.shard.begin + i, *from++);
    for (Index block = parts.first; block < parts.last; ++block) of_block(block, *from++, rank);
    for (Index i = parts.after; i > 0; --i) of_token(parts.shard.end - i, *from++);
  }
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>&, const problem::JoinParts& p) {
  constexpr Index size = SamplingBlock::size;
  const Index blocks = problem::BlockParts::blocks_of(p.vocab);
  alignas(64) double numbers[size] = {};
  const auto add = [&](Index token, double number) {
    numbers[token % size] = number;
    if ((token + 1) % size != 0 && token + 1 != p.vocab) return;
    p.of_blocks[token / size] = block_sum(numbers);
    std::fill(numbers, numbers + size, 0.0);
  };
  const auto parts_of = [&](int rank) { return p.parts[rank]; };
  for_each_part(p.vocab, p.ranks, parts_of, add,
                [&](Index block, double sum, int) { p.of_blocks[block] = sum; });
  double total = 0;
  for (Index block = 0; block < blocks; ++block) total += p.of_blocks[block];
  p.result = {total, -1, 0.0, p.u * total, -1};
  if (total == 0 || !(total < std::numeric_limits<double>::infinity())) return;
  const BlockFound found = find_block(p.of_blocks, blocks, p.result.target);
  p.result.block = found.block;
  p.result.before = found.before;
  bool is_shared = false;
  const auto take = [&](Index token, double number) {
    if (token / size != found.block) return;
    is_shared = true;
    numbers[token % size] = number;
  };
  for_each_part(p.vocab, p.ranks, parts_of, take, [](Index, double, int) {});
  if (is_shared)
    p.result.token = static_cast<std::int32_t>(
        found.block * size + place_in_block(numbers, found.before, p.result.target));
}

/// What refused drafts leave of the target and of the draft, tokens [begin, end), then 0.
template <typename Draft, typename Target>
void left_of_place(const problem::PlaceInShard<Draft, Target>& place, const ShardRange& shard,
                   Index begin, Index end, double* target, double* draft) {
  constexpr Index size = SamplingBlock::size;
  weights_of_block(begin, end, target, [&](Index token) {
    return static_cast<double>(place.target[token - shard.begin]);
  });
  if (place.draft != nullptr && place.refused_count > 0)
    weights_of_block(begin, end, draft, [&](Index token) {
      return static_cast<double>(place.draft[token - shard.begin]);
    });
  for (Index i = 0; i < place.refused_count; ++i) {
    const problem::RefusedDraft& refused = place.refused[i];
    const bool is_here = refused.token >= begin && refused.token < end;
    if (place.draft == nullptr) {
      if (is_here) target[refused.token - begin] = 0;
      continue;
    }
    for (Index j = 0; j < size; ++j)
      target[j] = (std::max)(0.0, detail::multiply_add(target[j], refused.target_scale,
                                                       -(draft[j] * refused.draft_scale)));
    if (is_here) draft[refused.token - begin] = 0;
  }
}

template <typename D, typename Isa, typename Draft, typename Target>
void execute(const Backend<D, Isa>& on, const problem::WeighPlaces<Draft, Target>& p) {
  const problem::BlockParts parts(p.vocab, p.shard);
  const Cost cost{p.shard.size(), 2 * kComputeCycles};
  parallel_for(on, p.count, cost, [&](Index first, Index last, int) {
    alignas(64) double other[SamplingBlock::size];
    for (Index i = first; i < last; ++i) {
      const auto& place = p.places[i];
      double* out = p.answers[i];
      const auto status_of = [&](const auto* numbers) {
        return numbers == nullptr ? SampleStatus::ok
                                  : status_of_probabilities<Isa>(numbers, p.shard.size());
      };
      *out++ = static_cast<double>(status_of(place.target));
      *out++ = static_cast<double>(status_of(place.draft));
      out = write_parts(parts, out, [&](Index begin, Index end, double* target) {
        left_of_place(place, p.shard, begin, end, target, other);
      });
      if (!p.weighs_draft[i]) continue;
      write_parts(parts, out, [&](Index begin, Index end, double* draft) {
        left_of_place(place, p.shard, begin, end, other, draft);
      });
    }
  });
}

template <typename D, typename Isa, typename Draft, typename Target>
void execute(const Backend<D, Isa>&, const problem::FindInPlaces<Draft, Target>& p) {
  constexpr Index size = SamplingBlock::size;
  alignas(64) double target[size], draft[size];
  for (Index i = 0; i < p.count; ++i) {
    p.tokens[i] = -1;
    if (p.blocks[i] < 0) continue;
    const Index begin = p.blocks[i] * size;
    left_of_place(p.places[i], p.shard, begin, (std::min)(begin + size, p.shard.end), target,
                  draft);
    p.tokens[i] =
        static_cast<std::int32_t>(begin + place_in_block(target, p.before[i], p.targets[i]));
  }
}

/// Tokens [begin, end) of the vocabulary in the compute type, then -infinity; in `to` or where they
/// lie.
template <typename Isa, typename T, typename C>
const C* load_tokens(const T* x, const ShardRange& shard, Index begin, Index end, C* to) {
  const T* const from = x + (begin - shard.begin);
  if constexpr (std::is_same_v<T, C>)
    if (end - begin == SamplingBlock::size) return from;
  std::fill(to, to + SamplingBlock::size, -std::numeric_limits<C>::infinity());
  if (end > begin) convert_line<simd::Vec<C, Isa>>(from, to, end - begin);
  return to;
}

/// The band of tokens from `begin` on, in which the ends are looked for from there: of a block or a
/// part of one.
template <typename C>
problem::Band<C> band_from(problem::Band<C> band, Index begin) {
  band.lo_end = std::clamp<Index>(band.lo_end - begin, 0, SamplingBlock::size);
  band.hi_begin = std::clamp<Index>(band.hi_begin - begin, 0, SamplingBlock::size);
  return band;
}

template <typename Isa, typename T>
void sum_row_of_shard(const problem::SumShard<T>& p, const problem::BlockParts& parts, Index r,
                      double* answer) {
  using C = compute_type<T>;
  constexpr Index size = SamplingBlock::size;
  const problem::ShardRow<C>& asked = p.rows[r];
  const problem::ShardSums at{parts.size(), p.of};
  alignas(64) C x[size];
  alignas(64) double moments[size];
  double tokens = 0, one = -1, beside_one = 0, *of_moments = answer + at.moments_at();
  write_parts(parts, answer, [&](Index begin, Index end, double* weights) {
    if (begin == end) return;
    const C* const logits = load_tokens<Isa>(p.logits + r * p.shard.size(), p.shard, begin, end, x);
    const problem::Band<C> band = band_from(asked.band, begin);
    const BlockBits members = member_bits<Isa>(logits, 0, band, band.lo);
    tokens += members.count();
    if (p.of == problem::ShardSum::deviations || p.of == problem::ShardSum::squares) {
      std::fill(weights, weights + size, 0.0);
      const double best = static_cast<double>(band.hi);
      return members.for_each([&](Index j) {
        const double logit = static_cast<double>(logits[j]);
        weights[j] = p.of == problem::ShardSum::squares ? squared_deviation(logit, best, asked.mean)
                                                        : logit - best;
      });
    }
    member_weights<Isa>(logits, 0, band, asked.inverse_temperature, weights);
    const bool is_whole = begin % size == 0 && parts.holds(begin / size);
    if (p.of == problem::ShardSum::moments) {
      block_moments(logits, static_cast<double>(band.hi), asked.inverse_temperature, weights,
                    moments);
      if (is_whole)
        *of_moments++ = block_sum(moments);
      else
        of_moments = std::copy_n(moments, end - begin, of_moments);
    }
    if (!is_whole || one >= 0) return;
    double* const first = std::find(weights, weights + size, 1.0);
    if (first == weights + size) return;
    one = static_cast<double>(begin / size);
    *first = 0;
    beside_one = block_sum(weights);
    *first = 1;
  });
  answer[at.tokens_at()] = tokens;
  answer[at.one_at()] = one, answer[at.beside_one_at()] = beside_one;
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::SumShard<T>& p) {
  const problem::BlockParts parts(p.vocab, p.shard);
  const Index numbers = problem::ShardSums{parts.size(), p.of}.size();
  parallel_for(on, p.count, Cost{p.shard.size(), kExpCycles}, [&](Index first, Index last, int) {
    for (Index i = first; i < last; ++i)
      sum_row_of_shard<Isa>(p, parts, p.which[i], p.answers + i * numbers);
  });
}

/// Calls of_block(block, sum, numbers, rank) for the blocks of a row, from first to last, with the
/// numbers of one that ranks share, which it may change, or nullptr and the rank that has it.
template <typename PartsOf, typename OfBlock>
void for_each_sum(Index vocab, int ranks, PartsOf&& parts_of, OfBlock&& of_block) {
  constexpr Index size = SamplingBlock::size;
  alignas(64) double numbers[size] = {};
  for_each_part(
      vocab, ranks, parts_of,
      [&](Index token, double number) {
        numbers[token % size] = number;
        if ((token + 1) % size != 0 && token + 1 != vocab) return;
        of_block(token / size, block_sum(numbers), numbers, -1);
        std::fill(numbers, numbers + size, 0.0);
      },
      [&](Index block, double sum, int rank) { of_block(block, sum, nullptr, rank); });
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>&, const problem::JoinSums& p) {
  constexpr Index size = SamplingBlock::size;
  const auto layout_of = [&](int rank) {
    const problem::BlockParts parts(p.vocab, problem::shard_of(p.vocab, rank, p.ranks));
    return problem::ShardSums{parts.size(), p.of};
  };
  double rest = 0;  // all weights but one of 1
  bool has_one = false;
  p.total = p.moment = p.tokens = 0;
  for_each_sum(
      p.vocab, p.ranks, [&](int rank) { return p.answers[rank]; },
      [&](Index block, double sum, double* numbers, int rank) {
        p.total += sum;
        if (!has_one && numbers != nullptr) {
          double* const first = std::find(numbers, numbers + size, 1.0);
          has_one = first != numbers + size;
          if (has_one) *first = 0, sum = block_sum(numbers);
        } else if (!has_one) {
          const auto at = layout_of(rank);
          has_one = p.answers[rank][at.one_at()] == static_cast<double>(block);
          if (has_one) sum = p.answers[rank][at.beside_one_at()];
        }
        rest += sum;
      });
  p.log_total = std::log1p(rest);
  for (int rank = 0; rank < p.ranks; ++rank)
    p.tokens += p.answers[rank][layout_of(rank).tokens_at()];
  if (p.of != problem::ShardSum::moments) return;
  for_each_sum(
      p.vocab, p.ranks, [&](int rank) { return p.answers[rank] + layout_of(rank).moments_at(); },
      [&](Index, double sum, double*, int) { p.moment += sum; });
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>&, const problem::FindInShard<C>& p) {
  constexpr Index size = SamplingBlock::size;
  alignas(64) C x[size];
  alignas(64) double weights[size];
  for (Index i = 0; i < p.count; ++i) {
    const problem::DrawnBlock& drawn = p.drawn[i];
    p.tokens[i] = -1;
    if (drawn.block < 0) continue;
    const Index r = p.which[i], begin = drawn.block * size,
                end = (std::min)(begin + size, p.shard.end);
    const C* const logits = load_tokens<Isa>(p.logits + r * p.shard.size(), p.shard, begin, end, x);
    member_weights<Isa>(logits, 0, band_from(p.rows[r].band, begin), p.rows[r].inverse_temperature,
                        weights);
    p.tokens[i] =
        static_cast<std::int32_t>(begin + place_in_block(weights, drawn.before, drawn.target));
  }
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>& on, const problem::SpreadShard<C>& p) {
  const Index size = p.shard.shard.size();
  parallel_for(on, p.shard.rows, Cost{size, kExpCycles}, [&](Index first, Index last, int) {
    alignas(64) double weights[SamplingBlock::size];
    for (Index r = first; r < last; ++r) {
      if (!p.asked[r]) continue;
      const SamplingRow<C> row = row_of_shard(p.shard, p.rows[r], r);
      float* const out = p.probabilities + r * size;
      for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
        member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
        const Index begin = block * SamplingBlock::size,
                    count = (std::min)(SamplingBlock::size, size - begin);
        for (Index j = 0; j < count; ++j)
          out[begin + j] = static_cast<float>(weights[j] / p.totals[r]);
      });
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
