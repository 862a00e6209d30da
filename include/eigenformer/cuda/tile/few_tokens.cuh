/// \file
/// Products of few tokens by the tensor cores, whose order of sums product.cuh states: a block has
/// 16 rows, of which each of its 8 warps takes a segment of k per round. Loads of 16 bytes go
/// straight into fragments; those of a warp's next steps are under way while it multiplies, also
/// from one round to the next, so that bandwidth is the limit, not how long a load takes.
#pragma once

#include "../launch.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T, int TokenTiles, int Matrices, typename W, typename X, typename End>
struct FewTokensKernel {
  using Sum = typename Tile<T>::sum;
  using Chunk = typename Operand<T, W>::Chunk;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  // Steps whose loads are under way; with 4 of 16 tokens of int8 registers spill.
  static constexpr int kAhead = TokenTiles * static_cast<int>(2 / sizeof(T)) <= 2 ? 4 : 2;
  static_assert(kSegment % (kAhead * kStep<T>) == 0);
  static constexpr int kRows = 16 / Matrices, kTokens = 8 * TokenTiles;  // of a block's outputs
  static constexpr int kPartials = kWarps * kTokens * 16;
  static constexpr int kOwn = (kRows * kTokens + kThreads - 1) / kThreads;
  // The compiler would have three blocks of experts, whose pairs of 16 bits spill in 80 registers.
  static constexpr int kBlocksOfExperts =
      TokenTiles == 1 && Matrices == 2 && sizeof(T) == 2 ? 1 : 0;
  Operand<T, W, Matrices> weight;
  Operand<T, X> x;
  End end;

  static constexpr std::size_t shared() { return shared_bytes<Sum>(kPartials); }
  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / kTokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const {
    return ((weight.rows - 1) / kRows + 1) * token_tiles();
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto partials = block.template shared<Sum>(kPartials);
    const bool whole = weight.whole && x.whole;
    for (Index tile = block.index(); tile < tiles(); tile += block.count()) {
      const Index row = tile / token_tiles() * kRows, token = tile % token_tiles() * kTokens;
      if (whole)
        multiply<true>(block, partials, row, token);
      else
        multiply<false>(block, partials, row, token);
    }
  }

 private:
  using Sums = FragmentD<T>[TokenTiles];

  /// What a lane loads from, and its chunks of a step.
  struct Lines {
    const W* rows[2];
    const X* tokens[TokenTiles];
  };
  struct Chunks {
    Chunk rows[2], tokens[TokenTiles];
  };

  /// The outputs from (row, token) on: rounds of a segment for each warp.
  template <bool Whole, typename Block, typename Partials>
  EIGENFORMER_DEVICE void multiply(Block& block, const Partials& partials, Index row,
                                   Index token) const {
    const Lines lines = lines_of(block, row, token);
    Chunks ahead[Whole ? kAhead : 1];
    if constexpr (Whole)
      unroll<kAhead>([&](auto s) {
        load_whole(block, ahead[s], lines, block.warp() * kSegment + s * kStep<T>);
      });
    Sum totals[kOwn][Matrices] = {};
    for (Index first = 0; first < weight.depth; first += kWarps * kSegment) {
      const Index begin = first + block.warp() * kSegment;
      if (begin < weight.depth) {  // the whole warp
        Sums sums = {};
        if constexpr (Whole)
          accumulate_whole(block, sums, ahead, lines, begin);
        else
          accumulate(block, sums, lines, begin);
        unroll<TokenTiles>([&](auto t) {
          unroll<FragmentD<T>::kSize>([&](auto i) {
            partials.store(place(block.warp(), t, i, block.lane()), sums[t].values[i]);
          });
        });
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

  template <typename Block>
  EIGENFORMER_DEVICE Lines lines_of(Block& block, Index row, Index token) const {
    Lines lines;
    unroll<2>([&](auto i) {
      const TileRow place = tile_row<Matrices>(block.lane() / 4 + i * 8);
      lines.rows[i] = weight.line(place.matrix, row + place.row);
    });
    unroll<TokenTiles>(
        [&](auto t) { lines.tokens[t] = x.line(0, token + t * 8 + block.lane() / 4); });
    return lines;
  }

  /// The chain of one segment, out of loads that are under way; those of the warp's next steps,
  /// which may be of the next round, take their place.
  template <typename Block>
  EIGENFORMER_DEVICE void accumulate_whole(Block& block, Sums& sums, Chunks (&ahead)[kAhead],
                                           const Lines& lines, Index begin) const {
    const Index end_k = weight.depth - begin < kSegment ? weight.depth : begin + kSegment;
    for (Index k = begin; k < end_k;) {
      Index next = k + kAhead * kStep<T>;
      if (next == begin + kSegment) next += (kWarps - 1) * kSegment;
      unroll<kAhead>([&](auto s) {
        multiply_chunks(block, sums, ahead[s]);
        load_whole(block, ahead[s], lines, next + s * kStep<T>);
      });
      k = next;
    }
  }
  /// The same where numbers are loaded one by one.
  template <typename Block>
  EIGENFORMER_DEVICE void accumulate(Block& block, Sums& sums, const Lines& lines,
                                     Index begin) const {
    const Index end_k = weight.depth - begin < kSegment ? weight.depth : begin + kSegment;
    for (Index k = begin; k < end_k; k += kStep<T>) {
      const Index own = k + block.lane() % 4 * Operand<T, W>::kEach;
      Chunks chunks;
      for (int i = 0; i < 2; ++i) chunks.rows[i] = weight.template load<false>(lines.rows[i], own);
      for (int t = 0; t < TokenTiles; ++t)
        chunks.tokens[t] = x.template load<false>(lines.tokens[t], own);
      multiply_chunks(block, sums, chunks);
    }
  }

  template <typename Block>
  EIGENFORMER_DEVICE void load_whole(Block& block, Chunks& chunks, const Lines& lines,
                                     Index k) const {
    const Index own = k + block.lane() % 4 * Operand<T, W>::kEach;
    const bool inside = own < weight.depth;
    unroll<2>([&](auto i) {
      chunks.rows[i] = inside ? weight.template load<true>(lines.rows[i], own) : Chunk{};
    });
    unroll<TokenTiles>([&](auto t) {
      chunks.tokens[t] = inside ? x.template load<true>(lines.tokens[t], own) : Chunk{};
    });
  }

  template <typename Block>
  EIGENFORMER_DEVICE static void multiply_chunks(Block& block, Sums& sums, const Chunks& chunks) {
    unroll<2>([&](auto half) {
      const auto rows = rows_of_half<T>(half, chunks.rows[0], chunks.rows[1]);
      unroll<TokenTiles>(
          [&](auto t) { block.mma(sums[t], rows, tokens_of_half<T>(half, chunks.tokens[t])); });
    });
  }

  EIGENFORMER_DEVICE static int place(int warp, int tile, int i, int lane) {
    return ((warp * TokenTiles + tile) * FragmentD<T>::kSize + i) * kWarp + lane;
  }

  /// A warp's sums of this thread's outputs.
  template <typename Partials>
  EIGENFORMER_DEVICE static void add(const Partials& partials, int warp, int thread,
                                     Sum (&totals)[kOwn][Matrices]) {
    unroll<kOwn>([&](auto n) {
      const int own = thread + n * kThreads, token = own / kRows;
      if (own >= kRows * kTokens) return;
      unroll<Matrices>([&](auto m) {
        const int row = tile_place<Matrices>(m, own % kRows);
        totals[n][m] += partials.load(
            place(warp, token / 8, row / 8 * 2 + token % 2, row % 8 * 4 + token % 8 / 2));
      });
    });
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
