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
/// of_block(block, sum) for the other blocks.
template <typename OfToken, typename OfBlock>
void for_each_part(const problem::JoinParts& p, OfToken&& of_token, OfBlock&& of_block) {
  for (int rank = 0; rank < p.ranks; ++rank) {
    const problem::BlockParts parts(p.vocab, problem::shard_of(p.vocab, rank, p.ranks));
    const double* from = p.parts[rank];
    for (Index i = 0; i < parts.before; ++i) of_token(parts.shard.begin + i, *from++);
    for (Index block = parts.first; block < parts.last; ++block) of_block(block, *from++);
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
  for_each_part(p, add, [&](Index block, double sum) { p.of_blocks[block] = sum; });
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
  for_each_part(p, take, [](Index, double) {});
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

/// The weights of the tokens [begin, end) of the vocabulary that are in play, then 0.
template <typename Isa, typename C>
void weights_in_play(const problem::ShardLogits<C>& shard, const problem::ShardRow<C>& asked,
                     Index r, Index begin, Index end, double* weights) {
  constexpr Index size = SamplingBlock::size;
  alignas(64) C x[size];
  const Index at = begin - shard.shard.begin, count = end - begin;
  std::fill(weights, weights + size, 0.0);
  if (count <= 0) return;
  const C* const most = shard.block_max + r * shard.blocks + at / size;
  if (most[0] < asked.band.lo && most[(at + count - 1) / size - at / size] < asked.band.lo) return;
  const C* logits = shard.logits + r * shard.shard.size() + at;
  if (count < size || begin % size != 0) {
    std::copy_n(logits, count, x);
    std::fill(x + count, x + size, -std::numeric_limits<C>::infinity());
    logits = x;
  }
  // of a part of a block the band's ends are looked for from its begin
  Band<C> band = asked.band;
  band.lo_end = std::clamp<Index>(band.lo_end - begin, 0, size);
  member_weights<Isa>(logits, 0, band, asked.inverse_temperature, weights);
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>& on, const problem::WeighShard<C>& p) {
  const problem::BlockParts parts(p.vocab, p.shard.shard);
  parallel_for(on, p.shard.rows, Cost{p.shard.shard.size(), kExpCycles},
               [&](Index first, Index last, int) {
                 for (Index r = first; r < last; ++r) {
                   double* const out = p.answers + r * parts.size();
                   if (!p.asked[r]) {
                     std::fill(out, out + parts.size(), 0.0);
                     continue;
                   }
                   write_parts(parts, out, [&](Index begin, Index end, double* weights) {
                     weights_in_play<Isa>(p.shard, p.rows[r], r, begin, end, weights);
                   });
                 }
               });
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
