/// \file
/// CUDA kernels of embedding. Forward: one coalesced pass over the rows of y, 16 bytes per thread
/// where alignment allows; bytes read and written, no arithmetic: an H200 gave 66% of the bandwidth
/// of copies to 4096 rows of 4096 bfloat16. Of an INT8 table the same pass, with one multiplication
/// per element. A packed weight is rows here, so the same pass serves it.
///
/// Backward: one block per token, of which those go on whose token is the first with its id. Such a
/// block holds its row of the table in registers, walks the tokens that follow and adds those of
/// its id in their order: the additions of the CPU kernel, one by one, without atomics. Bytes: ids
/// and grad_y once, every row that occurs once in and once out; the searches read ids tokens^2 / 2
/// times out of the cache. Not timed yet: what an H200 was timed with added wrong rows. An id that
/// most tokens share is one block's work.
#pragma once

#include <bit>
#include <limits>

#include "../problem/embedding.h"
#include "linear_pack.cuh"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Y, typename T, typename Id>
struct EmbeddingBody {
  using Problem = problem::Embedding<Y, T, Id>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index token, Index column) const {
    // what are the same scalars keeps its bits, NaN's too
    using C = std::conditional_t<std::is_same_v<Y, T>, Y, typename Problem::compute>;
    const Index id = static_cast<Index>(p.ids[token]);
    Y* const y = p.y + token * p.features + column;
    if (id >= 0 && id < p.vocab) {
      store_pack(load_pack<C, W>(p.table + id * p.features + column), y);
    } else {  // the host could not throw in time
      Pack<Y, W> none;
      for (int i = 0; i < W; ++i) none[i] = static_cast<Y>(std::numeric_limits<float>::quiet_NaN());
      store_pack(none, y);
    }
  }
};

template <typename D, typename Y, typename T, typename Id>
void execute(const Backend<D>& on, const problem::Embedding<Y, T, Id>& p) {
  constexpr int width = pack_width<Y, T>;
  launch_for_each_pack<width>(
      on, "embedding", p.tokens, p.features,
      packs_fit<width>(p.y, p.features) && packs_fit<width>(p.table, p.features),
      EmbeddingBody<Y, T, Id>{p});
}

template <typename Y, typename Id>
struct Int8EmbeddingBody {
  using Problem = problem::Int8Embedding<Y, Id>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index token, Index column) const {
    using C = typename Problem::compute;
    const Index id = static_cast<Index>(p.ids[token]);
    const bool known = id >= 0 && id < p.vocab;
    const C scale = known ? static_cast<C>(p.scales[id]) : std::numeric_limits<C>::quiet_NaN();
    auto values = known ? load_pack<C, W>(p.table + id * p.features + column) : Pack<C, W>{};
    for (int i = 0; i < W; ++i) values[i] *= scale;
    store_pack(values, p.y + token * p.features + column);
  }
};

template <typename D, typename Y, typename Id>
void execute(const Backend<D>& on, const problem::Int8Embedding<Y, Id>& p) {
  constexpr int width = pack_width<Y>;
  launch_for_each_pack<width>(
      on, "embedding of INT8", p.tokens, p.features,
      packs_fit<width>(p.y, p.features) && packs_fit<width>(p.table, p.features),
      Int8EmbeddingBody<Y, Id>{p});
}

template <typename Y, typename S, typename Id>
struct PackedEmbeddingBody {
  using Problem = problem::PackedEmbedding<Y, S, Id>;
  static constexpr bool kScaled = std::is_same_v<S, std::int8_t>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index token, Index column) const {
    using C = std::conditional_t<std::is_same_v<Y, S>, Y, typename Problem::compute>;
    const Index id = static_cast<Index>(p.ids[token]), columns = p.table.columns;
    Y* const y = p.y + token * columns + column;
    if (id < 0 || id >= p.table.rows) {
      Pack<Y, W> none;
      for (int i = 0; i < W; ++i) none[i] = static_cast<Y>(std::numeric_limits<float>::quiet_NaN());
      return store_pack(none, y);
    }
    auto values = load_pack<C, W>(p.table.data + id * packed_stride<S>(columns) + column);
    if constexpr (kScaled) {
      const Index group = p.table.group;  // 32 at least: a pack has one scale
      const C scale = static_cast<C>(
          p.table.scales[id * scale_groups(columns, group) + (group == 0 ? 0 : column / group)]);
      for (int i = 0; i < W; ++i) values[i] *= scale;
    }
    store_pack(values, y);
  }
};

template <typename D, typename Y, typename S, typename Id>
void execute(const Backend<D>& on, const problem::PackedEmbedding<Y, S, Id>& p) {
  require_rows(p.table, "embedding");
  constexpr int width = pack_width<Y, S>;
  launch_for_each_pack<width>(
      on, "embedding of a packed weight", p.tokens, p.table.columns,
      packs_fit<width>(p.y, p.table.columns) && packs_fit<width>(p.table.data, p.table.columns),
      PackedEmbeddingBody<Y, S, Id>{p});
}

template <int Width, typename G, typename GY, typename Id>
struct EmbeddingBackwardKernel {
  using Problem = problem::EmbeddingBackward<G, GY, Id>;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  Problem p;

  static constexpr std::size_t shared() { return shared_bytes<unsigned>(kWarps); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto votes = block.template shared<unsigned>(kWarps);
    for (Index token = block.index(); token < p.tokens; token += block.count()) {
      const Index id = static_cast<Index>(p.ids[token]);
      if (id < 0 || id >= p.vocab) continue;  // all threads of the block, or none
      bool before = false;
      for (Index t = block.thread(); t < token; t += block.size())
        before = before || static_cast<Index>(p.ids[t]) == id;
      if (any_of_block(block, votes, before)) continue;
      for (Index first = 0; first < p.features; first += kThreads * Width)
        add_rows(block, votes, token, id, first + block.thread() * Width);
    }
  }

 private:
  template <typename Block, typename Votes>
  EIGENFORMER_DEVICE static bool any_of_block(Block& block, const Votes& votes, bool value) {
    vote(block, votes, value);
    unsigned all = 0;
    for (int warp = 0; warp < kWarps; ++warp) all |= votes.load(warp);
    block.barrier();
    return all != 0;
  }
  /// What every thread says, for all of them: a barrier, and one is due before the next vote.
  template <typename Block, typename Votes>
  EIGENFORMER_DEVICE static void vote(Block& block, const Votes& votes, bool value) {
    const unsigned lanes = block.ballot(value);
    if (block.lane() == 0) votes.store(block.warp(), lanes);
    block.barrier();
  }

  /// Adds all gradients of `id`, whose first token is `token`, to the columns of this thread.
  template <typename Block, typename Votes>
  EIGENFORMER_DEVICE void add_rows(Block& block, const Votes& votes, Index token, Index id,
                                   Index column) const {
    const bool mine = column < p.features;
    G* const row = p.grad_table + id * p.features + column;
    Pack<G, Width> sum{};
    if (mine) sum = load_pack<G, Width>(row);
    for (Index first = token; first < p.tokens; first += kThreads) {
      const Index own = first + block.thread();
      vote(block, votes, own < p.tokens && static_cast<Index>(p.ids[own]) == id);
      for (int warp = 0; warp < kWarps; ++warp)
        for (unsigned lanes = mine ? votes.load(warp) : 0; lanes != 0; lanes &= lanes - 1)
          add(sum, first + warp * kWarp + lowest_bit(lanes), column);
      block.barrier();
    }
    if (mine) store_pack(sum, row);
  }

  /// Where the lowest bit is that is set. nvcc 13 compiles std::countr_zero to 32, always.
  EIGENFORMER_DEVICE static int lowest_bit(unsigned bits) {
    return std::popcount(~bits & (bits - 1));
  }

  EIGENFORMER_DEVICE void add(Pack<G, Width>& sum, Index token, Index column) const {
    using C = typename Problem::compute;
    const auto grad = load_pack<C, Width>(p.grad_y + token * p.features + column);
    for (int i = 0; i < Width; ++i)
      sum[i] = static_cast<G>(static_cast<C>(sum[i]) + grad[i]);  // rounded as if it were stored
  }
};

template <typename D, typename G, typename GY, typename Id>
void execute(const Backend<D>& on, const problem::EmbeddingBackward<G, GY, Id>& p) {
  constexpr int width = static_cast<int>(16 / sizeof(G));
  const auto start = [&](auto chosen) {
    using Kernel = EmbeddingBackwardKernel<decltype(chosen)::value, G, GY, Id>;
    launch_rows(on, "embedding_backward", p.features > 0 ? p.tokens : 0, Kernel::shared(),
                Kernel{p});
  };
  if (packs_fit<width>(p.grad_table, p.features) && packs_fit<width>(p.grad_y, p.features))
    start(WidthOf<width>{});
  else
    start(WidthOf<1>{});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
