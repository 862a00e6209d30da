/// \file
/// CPU kernels of log-softmax of divided rows: the sums of blocks of log_softmax.h, of a rank's
/// blocks, and of those that ranks share once all have their numbers.
#pragma once

#include "../problem/vocabulary_log_softmax.h"
#include "log_softmax.h"
#include "vocabulary_tree.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The sum of exp(x - best) over a block, and what it is without the first token that is the best.
struct BlockExponentials {
  double sum, beside_best;
  bool has_best;
};

template <typename Isa, typename C>
BlockExponentials block_exponentials(const C* x, double best) {
  BlockExponentials of;
  if constexpr (std::is_same_v<C, double>) {
    alignas(64) double weights[SamplingBlock::size];
    const problem::Band<C> all{best, std::numeric_limits<C>::lowest(), SamplingBlock::size};
    member_weights<Isa>(x, 0, all, 1.0, weights);
    of.sum = of.beside_best = block_sum(weights);
    double* const first = std::find(weights, weights + SamplingBlock::size, 1.0);
    of.has_best = first != weights + SamplingBlock::size;
    if (!of.has_best) return of;
    *first = 0;
    of.beside_best = block_sum(weights);
  } else {
    using V = simd::Vec<float, Isa>;
    of.has_best = equal_bits<Isa>(x, static_cast<C>(best)).count() > 0;
    of.sum = sum_block_exponentials(x, V::set1(static_cast<float>(best)));
    of.beside_best = of.has_best ? sum_beside_best(x, best) : of.sum;
  }
  return of;
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::WeighExponentials<T>& p) {
  using C = compute_type<T>;
  constexpr Index size = SamplingBlock::size;
  const problem::BlockParts parts(p.vocab, p.shard);
  const Cost cost{p.shard.size(), kExpCycles};
  parallel_for(on, p.rows, cost, [&](Index first, Index last, int) {
    alignas(64) C x[size];
    for (Index r = first; r < last; ++r) {
      const T* const row = p.x + r * p.shard.size();
      double *out = p.answers + r * (parts.size() + 2), *const of_best = out + parts.size();
      of_best[0] = -1, of_best[1] = 0;
      if (!p.has_softmax[r]) {
        std::fill(out, of_best, 0.0);
        continue;
      }
      const auto give = [&](Index begin, Index end) {
        const C* const logits = load_tokens<Isa>(row, p.shard, begin, end, x);
        for (Index j = 0; j < end - begin; ++j) *out++ = static_cast<double>(logits[j]);
      };
      give(p.shard.begin, p.shard.begin + parts.before);
      for (Index b = parts.first; b < parts.last; ++b) {
        const Index end = (std::min)((b + 1) * size, p.shard.end);
        const BlockExponentials of =
            block_exponentials<Isa>(load_tokens<Isa>(row, p.shard, b * size, end, x), p.best[r]);
        *out++ = of.sum;
        if (!of.has_best || of_best[0] >= 0) continue;
        of_best[0] = static_cast<double>(b);
        of_best[1] = of.beside_best;
      }
      give(p.shard.end - parts.after, p.shard.end);
    }
  });
}

template <typename D, typename Isa, typename C>
void execute(const Backend<D, Isa>&, const problem::JoinExponentials<C>& p) {
  constexpr Index size = SamplingBlock::size;
  constexpr C none = -std::numeric_limits<C>::infinity();
  alignas(64) C shared[size];
  std::fill(shared, shared + size, none);
  double rest = 0;
  bool best_left_out = false;
  const auto add = [&](double sum, double beside_best, bool has_best) {
    rest += has_best && !best_left_out ? beside_best : sum;
    best_left_out = best_left_out || has_best;
  };
  for (int rank = 0; rank < p.ranks; ++rank) {
    const problem::BlockParts parts(p.vocab, problem::shard_of(p.vocab, rank, p.ranks));
    const double* from = p.parts[rank];
    const double* const of_best = from + parts.size();
    const auto take = [&](Index token) {
      shared[token % size] = static_cast<C>(*from++);
      if ((token + 1) % size != 0 && token + 1 != p.vocab) return;
      const BlockExponentials of = block_exponentials<Isa>(shared, p.best);
      add(of.sum, of.beside_best, of.has_best);
      std::fill(shared, shared + size, none);
    };
    for (Index i = 0; i < parts.before; ++i) take(parts.shard.begin + i);
    for (Index b = parts.first; b < parts.last; ++b)
      add(*from++, of_best[1], of_best[0] == static_cast<double>(b));
    for (Index i = parts.after; i > 0; --i) take(parts.shard.end - i);
  }
  p.log_sum = std::log1p(rest);
}

template <typename D, typename Isa, typename Y, typename T>
void execute(const Backend<D, Isa>& on, const problem::SubtractLogSums<Y, T>& p) {
  if (p.columns == 0) return;
  parallel_for(on, p.rows, Cost{p.columns, kMoveCycles}, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      Y* const y = p.y + r * p.columns;
      if (!p.has_softmax[r]) {
        std::fill(y, y + p.columns, std::numeric_limits<Y>::quiet_NaN());
        continue;
      }
      const SamplingRow<T> row{p.x + r * p.columns, p.columns, nullptr, {}, 1.0};
      write_differences<Isa>(row, y, 0, row.blocks(), p.best[r], p.log_sum[r]);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
