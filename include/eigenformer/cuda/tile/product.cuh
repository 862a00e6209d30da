/// \file
/// Products of weights and tokens by the tensor cores, y^T = w x^T, of bfloat16, half and int8:
/// weights are A, 16 rows of them or 8 of each matrix of a pair, tokens are B, 8 at once.
///
/// Each output is one order of sums, whichever kernel runs: k is cut into segments of 512; within
/// one, steps of 64 bytes in a chain of tensor core instructions that starts from 0; the segments'
/// sums are added to 0 in ascending order. k that is not there multiplies as zero and is not read;
/// in the place of rows and tokens that are not there stands the last one, again. So the bits
/// depend on the row and the token alone.
///
/// - Few tokens, up to 32: a block per 16 rows, whose 8 warps take a segment each, all with loads
///   of 16 bytes straight into fragments, some steps ahead of the products. Reads the weight once:
///   2 * rows * depth bytes (16-bit), 2 * tokens * rows * depth operations; bound by bandwidth, of
///   which about two thirds is expected on H100 and H200, not measured yet.
/// - Many tokens: tiles of (64 rows, 64 tokens), or (128, 128) where there are enough of them to
///   fill the device, brought to shared memory three stages deep by asynchronous copies. Bound by
///   the tensor cores, which mma.sync drives at some 60% on H100: about 40% of the dense peak is
///   expected, not measured yet. Operands that are not aligned, or are converted on the way, pass
///   through registers instead, at about half of that.
///
/// end.store(token, row, sums) takes the sum of each matrix.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// k whose products are one chain.
inline constexpr Index kSegment = 512;

template <typename T, int TokenTiles, int Matrices, typename W, typename X, typename End>
struct FewTokensKernel {
  using Sum = typename Tile<T>::sum;
  using Chunk = typename Operand<T, W>::Chunk;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kAhead = TokenTiles == 1 ? 4 : 2;  // steps whose loads are under way
  static constexpr int kRows = 16 / Matrices, kTokens = 8 * TokenTiles;  // of a block's outputs
  static constexpr int kOwn = (kRows * kTokens + kThreads - 1) / kThreads;
  // The compiler would have three blocks of experts, whose pairs of 16 bits spill in 80 registers.
  static constexpr int kBlocksOfExperts =
      TokenTiles == 1 && Matrices == 2 && sizeof(T) == 2 ? 1 : 0;
  Operand<T, W, Matrices> weight;
  Operand<T, X> x;
  End end;

  static constexpr std::size_t shared() { return shared_bytes<Sum>(kWarps * kTokens * 16); }
  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / kTokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const {
    return ((weight.rows - 1) / kRows + 1) * token_tiles();
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto partials = block.template shared<Sum>(kWarps * kTokens * 16);
    for (Index tile = block.index(); tile < tiles(); tile += block.count())
      multiply(block, partials, tile / token_tiles() * kRows, tile % token_tiles() * kTokens);
  }

 private:
  /// The outputs from (row, token) on: rounds of a segment for each warp.
  template <typename Block, typename Partials>
  EIGENFORMER_DEVICE void multiply(Block& block, const Partials& partials, Index row,
                                   Index token) const {
    Sum totals[kOwn][Matrices] = {};
    for (Index first = 0; first < weight.depth; first += kWarps * kSegment) {
      const Index begin = first + block.warp() * kSegment;
      if (begin < weight.depth) {  // the whole warp
        FragmentD<T> sums[TokenTiles] = {};
        accumulate(block, sums, row, token, begin);
        for (int t = 0; t < TokenTiles; ++t)
          for (int i = 0; i < FragmentD<T>::kSize; ++i)
            partials.store(place(block.warp(), t, i, block.lane()), sums[t].values[i]);
      }
      block.barrier();
      for (int warp = 0; warp < kWarps && first + warp * kSegment < weight.depth; ++warp)
        add(partials, warp, block.thread(), totals);
      block.barrier();
    }
    for (int n = 0; n < kOwn; ++n) {
      const int own = block.thread() + n * kThreads;
      const Index to = token + own / kRows, out = row + own % kRows;
      if (own < kRows * kTokens && to < x.rows && out < weight.rows) end.store(to, out, totals[n]);
    }
  }

  /// The chain of one segment.
  template <typename Block>
  EIGENFORMER_DEVICE void accumulate(Block& block, FragmentD<T> (&sums)[TokenTiles], Index row,
                                     Index token, Index begin) const {
    const int group = block.lane() / 4;
    const TileRow low = tile_row<Matrices>(group), high = tile_row<Matrices>(group + 8);
    const W* const lines[2] = {weight.line(low.matrix, row + low.row),
                               weight.line(high.matrix, row + high.row)};
    const X* tokens[TokenTiles];
    for (int t = 0; t < TokenTiles; ++t) tokens[t] = x.line(0, token + t * 8 + group);
    const Index end_k = weight.depth - begin < kSegment ? weight.depth : begin + kSegment;
    const bool whole = weight.whole && x.whole;
    for (Index k = begin; k < end_k;)
      if (whole && k + kAhead * kStep<T> <= end_k) {
        multiply_steps<kAhead, true>(block, sums, lines, tokens, token, k);
        k += kAhead * kStep<T>;
      } else {
        multiply_steps<1, false>(block, sums, lines, tokens, token, k);
        k += kStep<T>;
      }
  }

  /// So many steps from k on, all of their loads before the first product.
  template <int Steps, bool Inside, typename Block>
  EIGENFORMER_DEVICE void multiply_steps(Block& block, FragmentD<T> (&sums)[TokenTiles],
                                         const W* const (&lines)[2],
                                         const X* const (&tokens)[TokenTiles], Index token,
                                         Index k) const {
    Chunk a[Steps][2], b[Steps][TokenTiles];
    const Index own = k + block.lane() % 4 * Operand<T, W>::kEach;
    unroll<Steps>([&](auto s) {
      const Index at = own + s * kStep<T>;
      unroll<2>([&](auto r) { a[s][r] = weight.template load<Inside>(lines[r], at); });
      unroll<TokenTiles>([&](auto t) { b[s][t] = x.template load<Inside>(tokens[t], at); });
    });
    unroll<Steps>([&](auto s) {
      unroll<TokenTiles>([&](auto t) {
        if (token + t * 8 < x.rows) multiply_step(block, sums[t], a[s][0], a[s][1], b[s][t]);
      });
    });
  }

  EIGENFORMER_DEVICE static int place(int warp, int tile, int i, int lane) {
    return ((warp * TokenTiles + tile) * FragmentD<T>::kSize + i) * kWarp + lane;
  }

  /// A warp's sums of this thread's outputs.
  template <typename Partials>
  EIGENFORMER_DEVICE static void add(const Partials& partials, int warp, int thread,
                                     Sum (&totals)[kOwn][Matrices]) {
    for (int n = 0; n < kOwn; ++n) {
      const int own = thread + n * kThreads, token = own / kRows;
      if (own >= kRows * kTokens) return;
      for (int m = 0; m < Matrices; ++m) {
        const int row = tile_place<Matrices>(m, own % kRows);
        totals[n][m] += partials.load(
            place(warp, token / 8, row / 8 * 2 + token % 2, row % 8 * 4 + token % 8 / 2));
      }
    }
  }
};

/// Shape: tiles of 16 rows and of 8 tokens of a warp, and warps along both.
template <int Rows, int Tokens, int RowWarps, int TokenWarps>
struct TileShape {
  static constexpr int kRowTiles = Rows, kTokenTiles = Tokens, kRowWarps = RowWarps,
                       kTokenWarps = TokenWarps;
};

template <typename T, typename Shape, int Matrices, typename W, typename X, typename End>
struct ManyTokensKernel {
  using Sum = typename Tile<T>::sum;
  using Chunk = typename Operand<T, W>::Chunk;
  static constexpr int kThreads = Shape::kRowWarps * Shape::kTokenWarps * kWarp, kStages = 3;
  static constexpr int kPlaces = 16 * Shape::kRowTiles * Shape::kRowWarps;  // rows of the tile
  static constexpr int kRows = kPlaces / Matrices,
                       kTokens = 8 * Shape::kTokenTiles * Shape::kTokenWarps;
  static constexpr int kSteps = 2, kDepth = kSteps * kStep<T>;  // of a stage
  static constexpr int kLine = kPlaces + 4;  // of sums in shared memory: no conflict of banks
  // In sums of 4 bytes, which take the stages' place in the end: 96 KiB of the 99 of an sm_86.
  static constexpr int kChunk = 4, kChunks = 4 * kChunk;  // of a lane, of a step
  static constexpr int kStage = (kPlaces + kTokens) * kSteps * kChunks,
                       kShared = (std::max)(kStages * kStage, kTokens* kLine);
  static_assert(kSegment % kDepth == 0);
  Operand<T, W, Matrices> weight;
  Operand<T, X> x;
  End end;

  static constexpr std::size_t shared() { return shared_bytes<Sum>(kShared); }
  EIGENFORMER_HOST_DEVICE Index row_tiles() const { return (weight.rows - 1) / kRows + 1; }
  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / kTokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const { return row_tiles() * token_tiles(); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto shared = block.template shared<Sum>(kShared);
    for (Index tile = block.index(); tile < tiles(); tile += block.count()) {
      // 8 tiles of tokens by all rows: what runs at once shares its rows and tokens in L2
      const Index band = tile / (8 * row_tiles()), rest = tile % (8 * row_tiles());
      const Index high = token_tiles() - band * 8 < 8 ? token_tiles() - band * 8 : 8;
      const Index row = rest / high * kRows, token = (band * 8 + rest % high) * kTokens;
      multiply(block, shared, row, token);
      block.barrier();
      finish(block, shared, row, token);
      block.barrier();
    }
  }

 private:
  using Fragments = FragmentD<T>[Shape::kRowTiles][Shape::kTokenTiles];

  /// Sums of the tile into shared memory.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply(Block& block, const Shared& shared, Index row,
                                   Index token) const {
    const Index slices = (weight.depth + kDepth - 1) / kDepth;
    const auto load = [&](Index slice) {
      if (slice < slices) {
        const int stage = static_cast<int>(slice % kStages);
        load_stage<Matrices, kPlaces>(block, shared, stage * kStage, weight, row, slice * kDepth);
        load_stage<1, kTokens>(block, shared, stage * kStage + kSteps * kPlaces * kChunks, x, token,
                               slice * kDepth);
      }
      block.commit_async();
    };
    Fragments chain = {}, totals = {};
    for (int s = 0; s < kStages - 1; ++s) load(s);
    for (Index slice = 0; slice < slices; ++slice) {
      block.template wait_async<kStages - 2>();
      block.barrier();  // this slice is there, and nobody reads the one before it any more
      load(slice + kStages - 1);
      for (int step = 0; step < kSteps; ++step)
        if (slice * kDepth + step * kStep<T> < weight.depth)
          multiply_stage(block, shared, static_cast<int>(slice % kStages) * kStage, step, chain);
      if ((slice + 1) * kDepth % kSegment == 0 || slice + 1 == slices) add_chain(chain, totals);
    }
    block.barrier();  // nobody reads a stage any more
    store_sums(block, shared, totals);
  }

  /// An operand of a stage, from `base` on: [step][place][chunk].
  template <int M, int Places, typename Block, typename Shared, typename S>
  EIGENFORMER_DEVICE static void load_stage(Block& block, const Shared& shared, int base,
                                            const Operand<T, S, M>& from, Index first, Index k) {
    constexpr int each = Operand<T, S>::kEach;
    for (int i = block.thread(); i < Places * kSteps * 4; i += kThreads) {
      const TileRow place = tile_row<M>(i / 4 % Places);
      const S* const line = from.line(place.matrix, first + place.row);
      const Index column = k + i / 4 / Places * kStep<T> + i % 4 * each;
      const int at = base + i * kChunk;
      if constexpr (std::is_same_v<S, T>)
        if (from.whole && column < from.depth) {
          block.copy_async(shared, at, reinterpret_cast<const Sum*>(line + column));
          continue;
        }
      shared.store_pack(at, from.template load<false>(line, column));
    }
  }

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void multiply_stage(Block& block, const Shared& shared, int base,
                                                int step, Fragments& chain) {
    const auto chunk = [&](int first, int place) {
      return shared.template pack<Chunk>(first + (place + block.lane() / 4) * kChunks +
                                         block.lane() % 4 * kChunk);
    };
    const int a = base + step * kPlaces * kChunks,
              b = base + (kSteps * kPlaces + step * kTokens) * kChunks;
    const int row = block.warp() / Shape::kTokenWarps * Shape::kRowTiles * 16,
              token = block.warp() % Shape::kTokenWarps * Shape::kTokenTiles * 8;
    Chunk tokens[Shape::kTokenTiles];
    for (int t = 0; t < Shape::kTokenTiles; ++t) tokens[t] = chunk(b, token + t * 8);
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      const Chunk low = chunk(a, row + r * 16), high = chunk(a, row + r * 16 + 8);
      for (int t = 0; t < Shape::kTokenTiles; ++t)
        multiply_step(block, chain[r][t], low, high, tokens[t]);
    }
  }

  EIGENFORMER_DEVICE static void add_chain(Fragments& chain, Fragments& totals) {
    for (int r = 0; r < Shape::kRowTiles; ++r)
      for (int t = 0; t < Shape::kTokenTiles; ++t)
        for (int i = 0; i < FragmentD<T>::kSize; ++i) {
          totals[r][t].values[i] += chain[r][t].values[i];
          chain[r][t].values[i] = 0;
        }
  }

  /// [token][place]: the last step of finish() reads along places, the first of a row's neighbours.
  template <typename Block, typename Sums>
  EIGENFORMER_DEVICE static void store_sums(Block& block, const Sums& sums,
                                            const Fragments& totals) {
    const int row = block.warp() / Shape::kTokenWarps * Shape::kRowTiles * 16,
              token = block.warp() % Shape::kTokenWarps * Shape::kTokenTiles * 8;
    for (int r = 0; r < Shape::kRowTiles; ++r)
      for (int t = 0; t < Shape::kTokenTiles; ++t)
        for (int i = 0; i < FragmentD<T>::kSize; ++i)
          sums.store((token + t * 8 + FragmentD<T>::column(block.lane(), i)) * kLine + row +
                         r * 16 + FragmentD<T>::row(block.lane(), i),
                     totals[r][t].values[i]);
  }

  /// From shared memory to the output, neighbours by neighbours.
  template <typename Block, typename Sums>
  EIGENFORMER_DEVICE void finish(Block& block, const Sums& sums, Index row, Index token) const {
    for (int i = block.thread(); i < kTokens * kRows; i += kThreads) {
      const Index to = token + i / kRows, out = row + i % kRows;
      if (to >= x.rows || out >= weight.rows) continue;
      Sum values[Matrices];
      for (int m = 0; m < Matrices; ++m)
        values[m] = sums.load(i / kRows * kLine + tile_place<Matrices>(m, i % kRows));
      end.store(to, out, values);
    }
  }
};

using LargeTiles = TileShape<4, 4, 2, 4>;
using SmallTiles = TileShape<2, 4, 2, 2>;

template <typename Shape, typename T, int Matrices, typename W, typename X, typename End>
auto tiles_kernel(const Operand<T, W, Matrices>& weight, const Operand<T, X>& x, const End& end) {
  return ManyTokensKernel<T, Shape, Matrices, W, X, End>{weight, x, end};
}

/// Tiles that fill a device: as many as an H100 has multiprocessors.
inline constexpr Index kEnoughTiles = 132;

/// end.store(token, row, sums) for all of (x.rows, weight.rows).
template <typename T, typename D, int Matrices, typename W, typename X, typename End>
void multiply_by_tiles(const Backend<D>& on, const char* name,
                       const Operand<T, W, Matrices>& weight, const Operand<T, X>& x,
                       const End& end) {
  if (weight.rows <= 0 || x.rows <= 0) return;
  const auto start = [&](const auto& kernel) {
    launch(on, name, (std::min)(kernel.tiles(), Index{1048576}), kernel.kThreads, kernel.shared(),
           kernel);
  };
  if (x.rows <= 8)
    start(FewTokensKernel<T, 1, Matrices, W, X, End>{weight, x, end});
  else if (x.rows <= 32)
    start(FewTokensKernel<T, 4, Matrices, W, X, End>{weight, x, end});
  else if (const auto large = tiles_kernel<LargeTiles>(weight, x, end);
           large.tiles() >= kEnoughTiles)
    start(large);
  else
    start(tiles_kernel<SmallTiles>(weight, x, end));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
