/// \file
/// CUDA kernels of greedy sampling: the largest logit of each row, the lowest token among equals.
/// One pass; several blocks share a row where rows are few, and a second kernel takes the best of
/// theirs. The bandwidth is the limit: it is 513 kB for a row of 128256 floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../stage.cuh"
#include "row.cuh"
#include "row_packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The best of tokens [begin, end) of a row, for every thread; `begin` is a multiple of the width
/// of a pack.
template <typename Block, typename Scratch, typename T>
EIGENFORMER_DEVICE RowBest<compute_type<T>> best_of_tokens(Block& block, const Scratch& scratch,
                                                           const T* logits, Index begin, Index end,
                                                           Index vocab) {
  using C = compute_type<T>;
  constexpr int width = pack_width<T>, depth = 8;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  C most = -infinity;
  Index pack = -1;  // the first that holds it
  bool has_nan = false;
  for_each_pack_between<depth>(logits, begin + static_cast<Index>(block.thread()) * width,
                               static_cast<Index>(block.size()) * width, end,
                               [&](Index t, const auto& x, int count) {
                                 C own = -infinity;
                                 for (int i = 0; i < width; ++i) {
                                   const C logit = i < count ? x[i] : -infinity;
                                   own = std::fmax(own, logit);
                                   has_nan = has_nan || logit != logit;
                                 }
                                 if (own > most) {
                                   most = own;
                                   pack = t;
                                 }
                               });
  RowBest<C> best{most, vocab, (has_nan ? 1 : 0) | (most == infinity ? 2 : 0)};
  if (pack >= 0)
    for (int i = width - 1; i >= 0; --i)
      if (pack + i < end && static_cast<C>(logits[pack + i]) == most) best.index = pack + i;
  return reduce_block(block, scratch, best, BetterRow{});
}

template <typename T>
struct GreedyKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::Sampling<T> p;
  Index parts, part_size;  // of a row, each a block's
  RowBest<C>* bests;       // (batch, parts), where there are several

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<RowBest<C>>(kWarps);
    for (Index i = block.index(); i < p.batch * parts; i += block.count()) {
      const Index r = i / parts, begin = (i - r * parts) * part_size;
      const Index end = begin + part_size < p.vocab ? begin + part_size : p.vocab;
      const RowBest<C> best =
          best_of_tokens(block, scratch, p.logits + r * p.vocab, begin, end, p.vocab);
      if (block.thread() != 0) continue;
      if (parts == 1)
        finish(p, r, best);
      else
        bests[i] = best;
    }
  }

  EIGENFORMER_DEVICE static void finish(const problem::Sampling<T>& p, Index r,
                                        const RowBest<C>& best) {
    const SampleStatus status = status_of(best, p.vocab);
    p.finish(r, status == SampleStatus::ok ? static_cast<std::int32_t>(best.index) : -1, status);
  }
};

/// The best of the parts of each row, by a warp.
template <typename T>
struct GreedyPartsKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = 128;
  problem::Sampling<T> p;
  Index parts;
  const RowBest<C>* bests;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, p.batch, [&](Index r) {
      RowBest<C> best{-std::numeric_limits<C>::infinity(), p.vocab, 0};
      for (Index i = block.lane(); i < parts; i += kWarp)
        best = BetterRow{}(best, bests[r * parts + i]);
      best = reduce_warp(block, best, BetterRow{});
      if (block.lane() == 0) GreedyKernel<T>::finish(p, r, best);
    });
  }
};

/// Blocks that serve all multiprocessors of an H100, four of them each, and the fewest tokens that
/// are worth a block.
inline constexpr Index kGreedyBlocks = 4 * 132, kGreedyTokens = 4096;

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::GreedySampling<T>& p) {
  if (p.batch == 0) return;
  constexpr auto name = "greedy_sample";
  using Kernel = GreedyKernel<T>;
  using Best = RowBest<typename Kernel::C>;
  const Index most_parts = (p.vocab + kGreedyTokens - 1) / kGreedyTokens,
              wanted = (std::max)(kGreedyBlocks / p.batch, Index{1});
  const Index parts = (std::min)({most_parts, wanted, Index{kWarp}});
  constexpr Index width = pack_width<T>;
  const Index size = ((p.vocab + parts - 1) / parts + width - 1) / width * width;
  const auto start = [&](Best* bests) {
    launch_rows(on, name, p.batch * parts, shared_bytes<Best>(Kernel::kWarps),
                Kernel{p, parts, size, bests});
  };
  if (parts == 1) return start(nullptr);
  with_scratch<Best>(on, name, {p.batch * parts}, [&](Best* bests) {
    start(bests);
    launch_warps(on, name, p.batch, GreedyPartsKernel<T>{p, parts, bests});
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
