/// \file
/// Products of int8 or int4 weights that have a scale for each group of 32, 64 or 128 inputs, and
/// int8 tokens, by the tensor cores. Each output is one chain over the groups in ascending order,
/// fma(float(the group's exact int32 sum), its scale, .), that starts from 0, of int4 with minimums
/// with fma(float(sum of the group's tokens), its minimum, .) after each: the bits of the CPU
/// kernels, whichever kernel runs. Steps of 64 inputs as in operand.cuh; two groups of 32 share a
/// step, which is then multiplied twice, each time without the tokens of the other half.
///
/// - Few tokens, up to 64: a block per 16 rows and 16 tokens, whose 8 warps take one group after
///   the other (two of 32), loads of 16 bytes straight into fragments, and leave the sums in shared
///   memory, where each output's thread joins them. Streams the weight once, further groups of 16
///   tokens out of L2: rows * depth bytes and 4 / group of them in scales, 2 * tokens * rows *
///   depth operations; bound by bandwidth, of which half is expected on H100 and H200, not measured
///   yet.
/// - Many tokens: tiles of (128 tokens, 128 rows), of experts (64, 128), 64 inputs at a time in
///   three buffers of shared memory. Bound by the chains, which leave the registers of a tensor
///   core's sums for a conversion and a multiply-add each: about a third of the dense int8 peak is
///   expected for groups of 128, a sixth for 32, not measured yet.
///
/// int4 weights (Weight is an Int4Rows) become int8 as they are loaded, into fragments or into the
/// buffers.
///
/// In the place of rows and tokens that are not there stands the last one, again. end.store(token,
/// row, chains) takes the chain of each matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../core/check.h"
#include "../launch.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// A row or a token of a tile, which begins at `first`. Apart, because of the offsets of all that a
/// thread has only those of the tile need 64 bits: it has no registers for more.
struct InTile {
  Index first;
  int own;
};

/// Scales (rows, groups) of each matrix.
template <int Matrices>
struct GroupScales {
  const float* data[Matrices];
  Index groups, group;
  const float* minimums[Matrices] = {};      // the same of int4, or nullptr: there are none
  const std::int32_t* token_sums = nullptr;  // (tokens, groups), which minimums are multiplied by

  /// fma(sum, scale, chain) of a group of matrix Of, and what its minimum adds where weights may
  /// have one. A matrix that is known only when this runs would put a copy's pointers into local
  /// memory.
  template <bool Minimums, int Of>
  EIGENFORMER_DEVICE float join(float chain, std::int32_t sum, InTile row, InTile token,
                                Index at_group) const {
    chain = std::fma(static_cast<float>(sum), of(data[Of], row, at_group), chain);
    if constexpr (Minimums)
      if (minimums[Of] != nullptr)
        chain = std::fma(static_cast<float>(of(token_sums, token, at_group)),
                         of(minimums[Of], row, at_group), chain);
    return chain;
  }
  /// Of a step.
  EIGENFORMER_HOST_DEVICE int parts() const { return group < kStep<std::int8_t> ? 2 : 1; }

 private:
  template <typename T>
  EIGENFORMER_DEVICE T of(const T* all, InTile line, Index at_group) const {
    return (all + (line.first * groups +
                   at_group))[static_cast<unsigned>(line.own) * static_cast<unsigned>(groups)];
  }
};
/// So many groups of 128 lines are counted in 32 bits.
inline constexpr Index kMostGroups = Index{1} << 25;

/// int8 has none: asking for them at run time costs registers that many tokens have no more of.
template <typename Weight>
inline constexpr bool may_have_minimums = true;
template <int Matrices>
inline constexpr bool may_have_minimums<Operand<std::int8_t, std::int8_t, Matrices>> = false;

/// The chunk from k on, of whole rows with zeros behind them.
template <typename Operand, typename Line>
EIGENFORMER_DEVICE auto chunk_at(const Operand& from, const Line& line, Index k) {
  return k < from.depth ? from.template load<true>(line, k) : typename Operand::Chunk{};
}

/// A lane's chunk of a step, or zeros where it is of the other of two groups.
template <typename Chunk>
EIGENFORMER_DEVICE Chunk of_group(const Chunk& chunk, int lane, int parts, int part) {
  return parts == 1 || lane % 4 / 2 == part ? chunk : Chunk{};
}

template <typename Weight, typename End>
struct GroupedFewTokensKernel {
  using Chunk = typename Operand<std::int8_t, std::int8_t>::Chunk;
  static constexpr int Matrices = Weight::kMatrices;
  using D = FragmentD<std::int8_t>;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kPlaces = 16, kRows = kPlaces / Matrices, kTokens = 16;
  static constexpr int kPart = kPlaces * kTokens;  // sums of one group
  Weight weight;
  Operand<std::int8_t, std::int8_t> x;
  GroupScales<Matrices> scales;
  End end;

  EIGENFORMER_HOST_DEVICE int parts() const { return kWarps * scales.parts(); }
  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / kTokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const {
    return ((weight.rows - 1) / kRows + 1) * token_tiles();
  }
  std::size_t shared() const { return shared_bytes<std::int32_t>(parts() * kPart); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto sums = block.template shared<std::int32_t>(parts() * kPart);
    for (Index tile = block.index(); tile < tiles(); tile += block.count())
      multiply(block, sums, tile / token_tiles() * kRows, tile % token_tiles() * kTokens);
  }

 private:
  /// What a lane loads from.
  struct Lines {
    decltype(std::declval<const Weight&>().line(0, Index{0})) rows[2];
    const std::int8_t* tokens[kTokens / 8];
  };

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply(Block& block, const Shared& shared, Index row,
                                   Index token) const {
    const Index own = scales.group * scales.parts();  // inputs of a warp: one group, or two of 32
    const int group = block.lane() / 4;
    const TileRow low = tile_row<Matrices>(group), high = tile_row<Matrices>(group + 8);
    const Lines lines{
        {weight.line(low.matrix, row + low.row), weight.line(high.matrix, row + high.row)},
        {x.line(0, token + group), x.line(0, token + 8 + group)}};
    float chains[Matrices] = {};
    for (Index k = 0; k < weight.depth; k += kWarps * own) {
      const Index begin = k + block.warp() * own;
      D sums[kTokens / 8] = {};
      for (Index at = begin; at < begin + own && at < weight.depth; at += kStep<std::int8_t>)
        multiply_step_of(block, shared, sums, lines, token, at);
      if (scales.parts() == 1) leave(block, shared, block.warp(), sums);
      block.barrier();
      join(block, shared, row, token, k / scales.group, chains);
      block.barrier();
    }
    const Index out = row + block.thread() % kRows, to = token + block.thread() / kRows;
    if (block.thread() < kRows * kTokens && out < weight.rows && to < x.rows)
      end.store(to, out, chains);
  }

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply_step_of(Block& block, const Shared& shared,
                                           D (&sums)[kTokens / 8], const Lines& lines, Index token,
                                           Index at) const {
    const int lane = block.lane(), parts = scales.parts();
    const Index k = at + lane % 4 * 16;
    const Chunk low = chunk_at(weight, lines.rows[0], k), high = chunk_at(weight, lines.rows[1], k);
    Chunk tokens[kTokens / 8];
    for (int n = 0; n < kTokens / 8; ++n) tokens[n] = chunk_at(x, lines.tokens[n], k);
    for (int part = 0; part < parts; ++part) {
      for (int n = 0; n < kTokens / 8; ++n)
        if (token + n * 8 < x.rows)
          multiply_step(block, sums[n], low, high, of_group(tokens[n], lane, parts, part));
      if (parts == 2) leave(block, shared, 2 * block.warp() + part, sums);
    }
  }

  EIGENFORMER_DEVICE static int place(int part, int token, int row) {
    return part * kPart + token * kPlaces + row;
  }

  /// The warp's sums of a group into shared memory; from zero again.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void leave(Block& block, const Shared& shared, int part,
                                       D (&sums)[kTokens / 8]) {
    for (int n = 0; n < kTokens / 8; ++n)
      for (int i = 0; i < D::kSize; ++i) {
        shared.store(place(part, n * 8 + D::column(block.lane(), i), D::row(block.lane(), i)),
                     sums[n].values[i]);
        sums[n].values[i] = 0;
      }
  }

  /// Groups from `first` on, in order.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void join(Block& block, const Shared& shared, Index row, Index first_token,
                               Index first, float (&chains)[Matrices]) const {
    const int own = block.thread() % kRows, token = block.thread() / kRows;
    if (token >= kTokens || row + own >= weight.rows || first_token + token >= x.rows) return;
    for (int part = 0; part < parts() && first + part < scales.groups; ++part)
      unroll<Matrices>([&](auto m) {
        const std::int32_t sum = shared.load(place(part, token, tile_place<Matrices>(m, own)));
        chains[m] = scales.template join<may_have_minimums<Weight>, m>(
            chains[m], sum, {row, own}, {first_token, token}, first + part);
      });
  }
};

/// A warp has 16 * TokenTiles tokens and 32 places of rows.
template <typename Weight, typename End, int TokenTiles>
struct GroupedManyTokensKernel {
  using Chunk = typename Operand<std::int8_t, std::int8_t>::Chunk;
  static constexpr int Matrices = Weight::kMatrices;
  using D = FragmentD<std::int8_t>;
  static constexpr int kTokenTiles = TokenTiles, kRowTiles = 4;  // of a warp: 16 tokens, 8 places
  static constexpr int kThreads = 256, kPlaces = 128, kRows = kPlaces / Matrices,
                       kTokens = 32 * kTokenTiles;
  static constexpr int kDepth = kStep<std::int8_t>, kBuffers = 3;
  static constexpr int kBuffer = (kTokens + kPlaces) * kDepth;
  Weight weight;
  Operand<std::int8_t, std::int8_t> x;
  GroupScales<Matrices> scales;
  End end;

  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / kTokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const {
    return ((weight.rows - 1) / kRows + 1) * token_tiles();
  }
  static std::size_t shared() { return shared_bytes<std::int8_t>(kBuffers * kBuffer); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto buffers = block.template shared<std::int8_t>(kBuffers * kBuffer);
    for (Index tile = block.index(); tile < tiles(); tile += block.count()) {
      multiply(block, buffers, tile / token_tiles() * kRows, tile % token_tiles() * kTokens);
      block.barrier();
    }
  }

 private:
  struct Results {
    D sums[kTokenTiles][kRowTiles];
    float chains[kTokenTiles][kRowTiles][D::kSize];
  };

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply(Block& block, const Shared& buffers, Index row,
                                   Index token) const {
    const Index steps = (weight.depth + kDepth - 1) / kDepth;
    const auto bring = [&](Index step) {
      if (step < steps) load(block, buffers, row, token, step);
      block.commit_async();
    };
    Results results = {};
    for (int step = 0; step < kBuffers - 1; ++step) bring(step);
    for (Index step = 0; step < steps; ++step) {
      block.template wait_async<kBuffers - 2>();
      block.barrier();  // this step is there, and nobody reads the one before it any more
      bring(step + kBuffers - 1);
      multiply_buffer(block, buffers, row, token, step, results);
    }
    store(block, row, token, results);
  }

  /// A buffer: [token or place][64 bytes], tokens first.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void load(Block& block, const Shared& buffers, Index row, Index token,
                               Index step) const {
    for (int i = block.thread(); i < kBuffer / 16; i += kThreads) {
      const Index to = step % kBuffers * kBuffer + i * 16, k = step * kDepth + i % 4 * 16;
      if (k >= weight.depth) {
        buffers.store_pack(to, Chunk{});
      } else if (i / 4 < kTokens) {
        block.copy_async(buffers, to, x.line(0, token + i / 4) + k);
      } else {
        const TileRow place = tile_row<Matrices>(i / 4 - kTokens);
        const auto line = weight.line(place.matrix, row + place.row);
        if constexpr (std::is_same_v<decltype(line), const std::int8_t* const>)
          block.copy_async(buffers, to, line + k);
        else
          buffers.store_pack(to, weight.template load<true>(line, k));
      }
    }
  }

  template <typename Block>
  EIGENFORMER_DEVICE static int first_token(Block& block) {
    return block.warp() / 4 * 16 * kTokenTiles;
  }
  template <typename Block>
  EIGENFORMER_DEVICE static int first_place(Block& block) {
    return block.warp() % 4 * 8 * kRowTiles;
  }

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply_buffer(Block& block, const Shared& buffers, Index row,
                                          Index token, Index step, Results& results) const {
    const int lane = block.lane(), parts = scales.parts();
    const auto chunk = [&](int line) {
      return buffers.template pack<Chunk>(step % kBuffers * kBuffer + (line + lane / 4) * kDepth +
                                          lane % 4 * 16);
    };
    Chunk low[kTokenTiles], high[kTokenTiles];
    for (int t = 0; t < kTokenTiles; ++t) {
      low[t] = chunk(first_token(block) + t * 16);
      high[t] = chunk(first_token(block) + t * 16 + 8);
    }
    for (int part = 0; part < parts; ++part) {
      unroll<kRowTiles>([&](auto r) {
        const Chunk b = of_group(chunk(kTokens + first_place(block) + r * 8), lane, parts, part);
        unroll<kTokenTiles>(
            [&](auto t) { multiply_step(block, results.sums[t][r], low[t], high[t], b); });
      });
      const Index end_k = step * kDepth + (part + 1) * kDepth / parts;
      if (end_k % scales.group == 0 || end_k >= weight.depth)
        join(block, row, token, (end_k - 1) / scales.group, results);
    }
  }

  /// Of `count` lines from a tile's first on; past the end the last one.
  EIGENFORMER_DEVICE static int inside(int at, Index count) {
    return at < count ? at : static_cast<int>(count) - 1;
  }
  /// Joins the sums of a group to the chains; from zero again.
  template <typename Block>
  EIGENFORMER_DEVICE void join(Block& block, Index row, Index token, Index group,
                               Results& results) const {
    if (group >= scales.groups) return;  // the second half of the last step
    unroll<kRowTiles>([&](auto r) {
      unroll<D::kSize>([&](auto i) {
        // a warp's first fragment is of the first matrix
        constexpr int matrix = tile_row<Matrices>(r * 8).matrix;
        const int own =
            inside(tile_row<Matrices>(first_place(block) + r * 8 + D::column(block.lane(), i)).row,
                   weight.rows - row);
        unroll<kTokenTiles>([&](auto t) {
          const int to =
              inside(first_token(block) + t * 16 + D::row(block.lane(), i), x.rows - token);
          std::int32_t& sum = results.sums[t][r].values[i];
          float& chain = results.chains[t][r][i];
          chain = scales.template join<may_have_minimums<Weight>, matrix>(chain, sum, {row, own},
                                                                          {token, to}, group);
          sum = 0;
        });
      });
    });
  }

  /// Of a pair, fragments of rows are the first matrix's and the second's in turn.
  template <typename Block>
  EIGENFORMER_DEVICE void store(Block& block, Index row, Index token,
                                const Results& results) const {
    unroll<kTokenTiles>([&](auto t) {
      unroll<kRowTiles / Matrices>([&](auto pair) {
        unroll<D::kSize>([&](auto i) {
          constexpr int r = pair * Matrices;
          const int place = first_place(block) + r * 8 + D::column(block.lane(), i);
          const Index out = row + tile_row<Matrices>(place).row;
          const Index to = token + first_token(block) + t * 16 + D::row(block.lane(), i);
          if (out >= weight.rows || to >= x.rows) return;
          float chains[Matrices];
          for (int m = 0; m < Matrices; ++m) chains[m] = results.chains[t][r + m][i];
          end.store(to, out, chains);
        });
      });
    });
  }
};

/// Tiles of 16 tokens that a warp has of many tokens.
template <typename D>
inline constexpr int many_token_tiles = 4;

/// end.store(token, row, chains) for all of (x.rows, weight.rows). Rows of both are whole.
template <typename D, typename Weight, typename End>
void multiply_groups(const Backend<D>& on, const char* name, const Weight& weight,
                     const Operand<std::int8_t, std::int8_t>& x,
                     const GroupScales<Weight::kMatrices>& scales, const End& end) {
  if (weight.rows <= 0 || x.rows <= 0) return;
  detail::require_that(scales.groups <= kMostGroups, name, "weight has ", scales.groups,
                       " groups in a row, expected at most ", kMostGroups);
  const auto start = [&](const auto& kernel) {
    launch(on, name, (std::min)(kernel.tiles(), Index{1048576}), kernel.kThreads, kernel.shared(),
           kernel);
  };
  if (x.rows <= 64)
    start(GroupedFewTokensKernel<Weight, End>{weight, x, scales, end});
  else
    start(GroupedManyTokensKernel<Weight, End, many_token_tiles<D>>{weight, x, scales, end});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
