/// \file
/// Products of many tokens by the tensor cores, whose order of sums product.cuh states: a block has
/// a tile of the output, whose rows and tokens come to shared memory by asynchronous copies, some
/// stages ahead. What limits it, for a step of 64 bytes:
///
/// - shared memory: a warp of (64 rows, 64 tokens) reads 8 KiB for 64 products; one of (64, 32) 6
///   for 32, as much time as mma.sync takes. So a warp has 128 sums in registers, and no room for
///   as many totals of the segments, which are kept in shared memory.
/// - instructions: each thread has an offset for each line that it copies, and adds to it.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Shape: tiles of 16 rows and of 8 tokens of a warp, warps along both, and how many stages of how
/// many steps are in shared memory. Whole: of operands alone that are copied as they are, see
/// copies_whole(); what loads others takes registers.
template <int Rows, int Tokens, int RowWarps, int TokenWarps, int Stages, int Steps, bool Whole>
struct TileShape {
  static constexpr int kRowTiles = Rows, kTokenTiles = Tokens, kRowWarps = RowWarps,
                       kTokenWarps = TokenWarps, kStages = Stages, kSteps = Steps;
  static constexpr bool kWhole = Whole;
};

/// The lines of an operand in a stage, in words of 4 bytes: 16 bytes are a chunk, four chunks a
/// step. Of two steps the halves of every other line change places, so that eight lanes find their
/// chunks of one step, of two lines, in all banks.
template <int Steps>
struct StageLines {
  static_assert(Steps == 1 || Steps == 2);
  static constexpr int kChunk = 4, kAcross = 4 * Steps, kLine = kAcross * kChunk;
  EIGENFORMER_DEVICE static constexpr int place(int line, int chunk) {
    return line * kLine + (Steps == 1 ? chunk : chunk ^ line % 2 * 4) * kChunk;
  }
};

/// Whether chunks go to shared memory as they are, from 32 bits of elements after a tile's first.
template <typename T, typename S, int Matrices>
EIGENFORMER_HOST_DEVICE bool copies_whole(const Operand<T, S, Matrices>& from) {
  constexpr Index most_lines = 256;
  return std::is_same_v<S, T> && from.whole && from.stride < (Index{1} << 31) / most_lines;
}

/// What a thread brings to one stage after the other of an operand: a chunk of every kPass-th line.
template <typename T, typename S, int Matrices, int Lines, int Threads, int Steps, bool Whole>
class StageLoader {
  using From = Operand<T, S, Matrices>;
  using Stage = StageLines<Steps>;
  static constexpr int kEach = From::kEach, kPass = Threads / Stage::kAcross, kOwn = Lines / kPass;
  static_assert(Lines % kPass == 0 && kPass % 16 == 0);  // all lines of a thread: one matrix

 public:
  EIGENFORMER_DEVICE StageLoader(const From& from, Index first, int thread)
      : from_(from),
        first_(first),
        line_(thread / Stage::kAcross),
        column_(thread % Stage::kAcross * kEach),
        to_(Stage::place(line_, thread % Stage::kAcross)) {
    data_ = from.line(tile_row<Matrices>(line_).matrix, first);
    copies_ = Whole || copies_whole(from);
    unroll<kOwn>([&](auto i) {
      next_[i] = static_cast<unsigned>(line_of(line_ + i * kPass) - data_ + column_);
    });
  }

  /// The next chunks, to the word `base` and those after it.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void operator()(Block& block, const Shared& shared, int base) {
    using Word = typename Tile<T>::sum;
    if (copies_ && column_ < from_.depth)
      unroll<kOwn>([&](auto i) {
        block.copy_async(shared, base + to_ + i * (kPass * Stage::kLine),
                         reinterpret_cast<const Word*>(data_ + next_[i]));
      });
    else
      for (int line = line_, at = base + to_; line < Lines;
           line += kPass, at += kPass * Stage::kLine)
        shared.store_pack(at, chunk_of(line));
    column_ += Steps * kStep<T>;
    unroll<kOwn>([&](auto i) { next_[i] += Steps * kStep<T>; });
  }

 private:
  EIGENFORMER_DEVICE const S* line_of(int line) const {
    const TileRow place = tile_row<Matrices>(line);
    return from_.line(place.matrix, first_ + place.row);
  }
  EIGENFORMER_DEVICE typename From::Chunk chunk_of(int line) const {
    if constexpr (Whole)
      return {};  // past the end
    else
      return from_.template load<false>(line_of(line), column_);
  }

  const From& from_;
  Index first_;
  int line_;
  Index column_;  // that comes next, in all own lines
  int to_;        // in a stage
  bool copies_;
  const S* data_;
  unsigned next_[kOwn];  // after data_: pointers would take twice as many registers
};

template <typename T, typename Shape, int Matrices, typename W, typename X, typename End>
struct ManyTokensKernel {
  using Sum = typename Tile<T>::sum;
  using Chunk = typename Operand<T, W>::Chunk;
  using Stage = StageLines<Shape::kSteps>;
  static constexpr int kThreads = Shape::kRowWarps * Shape::kTokenWarps * kWarp;
  static constexpr int kPlaces = 16 * Shape::kRowTiles * Shape::kRowWarps;  // rows of the tile
  static constexpr int kRows = kPlaces / Matrices, kWarpTokens = 8 * Shape::kTokenTiles,
                       kTokens = kWarpTokens * Shape::kTokenWarps;
  static constexpr int kDepth = Shape::kSteps * kStep<T>, kStages = Shape::kStages;
  static constexpr int kSums = Shape::kRowTiles * Shape::kTokenTiles * FragmentD<T>::kSize;
  // int32 is exact, and needs no chains; two times more than 64 sums are no longer in registers.
  static constexpr bool kExact = std::is_same_v<Sum, std::int32_t>, kKeeps = !kExact && kSums > 64;
  static constexpr int kLine = kPlaces + 4;  // of sums in shared memory: no conflict of banks
  // In words of 4 bytes: totals of all threads, and stages, whose place sums take in the end.
  static constexpr int kTotals = kKeeps ? kSums * kThreads : 0;
  static constexpr int kStage = (kPlaces + kTokens) * Stage::kLine;
  static constexpr int kShared = kTotals + (std::max)(kStages * kStage, kWarpTokens* kLine);
  static_assert(kSegment % kDepth == 0);
  static_assert(kPlaces <= 256 && kTokens <= 256);
  // The compiler would have four blocks of small tiles, and spill.
  static constexpr int kBlocks = Shape::kWhole ? 0 : 1, kBlocksOfExperts = kBlocks;
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
      Fragments sums = {};
      multiply(block, shared, row, token, sums);
      for (int part = 0; part < Shape::kTokenWarps; ++part) {
        block.barrier();  // nobody reads what was there any more
        if (block.warp() % Shape::kTokenWarps == part) store_sums(block, shared, sums);
        block.barrier();
        finish(block, shared, row, token + part * kWarpTokens);
      }
      block.barrier();
    }
  }

 private:
  using Fragments = FragmentD<T>[Shape::kRowTiles][Shape::kTokenTiles];

  /// The sums of this thread.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void multiply(Block& block, const Shared& shared, Index row, Index token,
                                   Fragments& sums) const {
    StageLoader<T, W, Matrices, kPlaces, kThreads, Shape::kSteps, Shape::kWhole> rows(
        weight, row, block.thread());
    StageLoader<T, X, 1, kTokens, kThreads, Shape::kSteps, Shape::kWhole> tokens(x, token,
                                                                                 block.thread());
    Index coming = 0;  // k of the stage that is brought next
    int to = 0, at = 0;
    const auto bring = [&] {
      if (coming < weight.depth) {
        rows(block, shared, kTotals + to * kStage);
        tokens(block, shared, kTotals + to * kStage + kPlaces * Stage::kLine);
      }
      block.commit_async();
      coming += kDepth;
      to = to + 1 == kStages ? 0 : to + 1;
    };
    for (int s = 0; s < kStages - 1; ++s) bring();
    Fragments totals = {};
    for (Index k = 0; k < weight.depth; k += kDepth) {
      block.template wait_async<kStages - 2>();
      block.barrier();  // this stage is there, and nobody reads the one before it any more
      bring();
      unroll<Shape::kSteps>(
          [&](auto step) { multiply_step_of(block, shared, kTotals + at * kStage, step, sums); });
      at = at + 1 == kStages ? 0 : at + 1;
      if constexpr (!kExact)
        if ((k + kDepth) % kSegment == 0 && k + kDepth < weight.depth)
          add_chain(block, shared, k + kDepth == kSegment, sums, totals);
    }
    if constexpr (!kExact)
      if (weight.depth > kSegment) take_totals(block, shared, sums, totals);
  }

  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void multiply_step_of(Block& block, const Shared& shared, int base,
                                                  int step, Fragments& sums) {
    const int line = block.lane() / 4;
    const int own = base + Stage::place(line, step * 4 + block.lane() % 4);
    const auto chunk = [&](int first) {
      return shared.template pack<Chunk>(own + first * Stage::kLine);
    };
    const int row = block.warp() / Shape::kTokenWarps * Shape::kRowTiles * 16,
              token = kPlaces + block.warp() % Shape::kTokenWarps * kWarpTokens;
    Chunk tokens[Shape::kTokenTiles];
    unroll<Shape::kTokenTiles>([&](auto t) { tokens[t] = chunk(token + t * 8); });
    unroll<Shape::kRowTiles>([&](auto r) {
      const Chunk low = chunk(row + r * 16), high = chunk(row + r * 16 + 8);
      unroll<2>([&](auto half) {
        const auto rows = rows_of_half<T>(half, low, high);
        unroll<Shape::kTokenTiles>(
            [&](auto t) { block.mma(sums[r][t], rows, tokens_of_half<T>(half, tokens[t])); });
      });
    });
  }

  /// f(r, t) for the tiles of the warp.
  template <typename F>
  EIGENFORMER_DEVICE static void for_each_tile(const F& f) {
    unroll<Shape::kRowTiles>(
        [&](auto r) { unroll<Shape::kTokenTiles>([&](auto t) { f(int{r}, int{t}); }); });
  }

  /// The chain of a segment ends: total += chain, which begins again.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void add_chain(Block& block, const Shared& shared, bool first,
                                           Fragments& chain, Fragments& totals) {
    for_each_tile([&](int r, int t) {
      if constexpr (kKeeps) {
        const int place = place_of_total(block, r, t);
        FragmentD<T> total = {};
        if (!first) total = shared.template pack<FragmentD<T>>(place);
        add(total, chain[r][t]);
        shared.store_pack(place, total);
      } else {
        add(totals[r][t], chain[r][t]);
      }
      chain[r][t] = {};
    });
  }
  /// And that of the last segment.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void take_totals(Block& block, const Shared& shared, Fragments& chain,
                                             const Fragments& totals) {
    for_each_tile([&](int r, int t) {
      FragmentD<T> total = totals[r][t];
      if constexpr (kKeeps) total = shared.template pack<FragmentD<T>>(place_of_total(block, r, t));
      add(total, chain[r][t]);
      chain[r][t] = total;
    });
  }
  EIGENFORMER_DEVICE static void add(FragmentD<T>& to, const FragmentD<T>& from) {
    unroll<FragmentD<T>::kSize>([&](auto i) { to.values[i] += from.values[i]; });
  }
  template <typename Block>
  EIGENFORMER_DEVICE static int place_of_total(Block& block, int r, int t) {
    return ((r * Shape::kTokenTiles + t) * kThreads + block.thread()) * FragmentD<T>::kSize;
  }

  /// [token][place]: the last step of finish() reads along places, the first of a row's neighbours.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE static void store_sums(Block& block, const Shared& shared,
                                            const Fragments& sums) {
    const int row = block.warp() / Shape::kTokenWarps * Shape::kRowTiles * 16;
    for_each_tile([&](int r, int t) {
      unroll<FragmentD<T>::kSize>([&](auto i) {
        shared.store(kTotals + (t * 8 + FragmentD<T>::column(block.lane(), i)) * kLine + row +
                         r * 16 + FragmentD<T>::row(block.lane(), i),
                     sums[r][t].values[i]);
      });
    });
  }

  /// From shared memory to the output, neighbours by neighbours.
  template <typename Block, typename Shared>
  EIGENFORMER_DEVICE void finish(Block& block, const Shared& shared, Index row, Index token) const {
    for (int i = block.thread(); i < kWarpTokens * kRows; i += kThreads) {
      const Index to = token + i / kRows, out = row + i % kRows;
      if (to >= x.rows || out >= weight.rows) continue;
      Sum values[Matrices];
      for (int m = 0; m < Matrices; ++m)
        values[m] = shared.load(kTotals + i / kRows * kLine + tile_place<Matrices>(m, i % kRows));
      end.store(to, out, values);
    }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
