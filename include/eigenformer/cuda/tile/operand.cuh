/// \file
/// Rows of matrices on their way to a product: chunks of 16 bytes of the scalar T that is
/// multiplied, whatever scalar S they are stored in, with zeros where there is no number. And how
/// four lanes multiply a step of four chunks with the tensor cores:
///
///   lane l has chunk l % 4 of rows l / 4 and l / 4 + 8 of A, and of row l / 4 of B (tokens)
///
/// The instruction wants each lane to have neighbours in k that lie apart; since a product of
/// matrices does not mind in which order k comes, as long as A and B agree, each lane's 16 bytes
/// are its parts of two instructions in turn. So a fragment is one load of 16 bytes, from device
/// memory or from shared memory, without a conflict of banks where rows of a step (64 bytes) lie
/// one below the other.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../packs.cuh"
#include "fragment.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// `Matrices` matrices (rows, depth) of one shape; 2 are those of a gated unit.
template <typename T, typename S, int Matrices = 1>
struct Operand {
  static constexpr int kEach = static_cast<int>(16 / sizeof(T)), kMatrices = Matrices;
  // words of narrow numbers, which would else take a register each
  using Chunk = std::conditional_t<sizeof(T) <= 2, Pack<std::uint32_t, 4>, Pack<T, kEach>>;
  const S* data[Matrices];
  Index rows, depth, stride;
  bool whole;  // chunks that begin within depth may be loaded whole: they fit, or zeros follow

  /// A row; past the end the last one, whose products nobody takes: cheaper than a branch.
  EIGENFORMER_DEVICE const S* line(int matrix, Index row) const {
    return (matrix == 0 ? data[0] : data[Matrices - 1]) + (row < rows ? row : rows - 1) * stride;
  }
  /// k is a multiple of kEach; Inside: `whole`, and k within depth, known without a look.
  template <bool Inside>
  EIGENFORMER_DEVICE Chunk load(const S* line, Index k) const {
    if constexpr (Inside) {
      return whole_chunk(line + k);
    } else {
      if (whole && k < depth) return whole_chunk(line + k);
      Pack<T, kEach> numbers;
      for (int i = 0; i < kEach; ++i)
        numbers[i] = static_cast<T>(k + i < depth ? line[k + i] : static_cast<S>(0.0f));
      return chunk_of(numbers);
    }
  }

 private:
  EIGENFORMER_DEVICE static Chunk whole_chunk(const S* from) {
    if constexpr (std::is_same_v<S, T>)
      return *reinterpret_cast<const Chunk*>(from);
    else
      return chunk_of(load_pack<T, kEach>(from));
  }
  EIGENFORMER_DEVICE static Chunk chunk_of(const Pack<T, kEach>& numbers) {
    Chunk chunk;
    std::memcpy(static_cast<void*>(&chunk), &numbers, sizeof chunk);
    return chunk;
  }
};

template <typename T, int Matrices, typename S>
Operand<T, S, Matrices> operand(const S* const (&data)[Matrices], Index rows, Index depth,
                                Index stride) {
  Operand<T, S, Matrices> result{{}, rows, depth, stride, true};
  for (int m = 0; m < Matrices; ++m) {
    result.data[m] = data[m];
    result.whole = result.whole && packs_fit<Operand<T, S>::kEach>(data[m], stride);
  }
  return result;
}

/// f(0), f(1), ...: with indices that are constants, so that arrays stay in registers.
template <int N, typename F>
EIGENFORMER_DEVICE void unroll(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

/// k that four lanes have together.
template <typename T>
inline constexpr int kStep = static_cast<int>(64 / sizeof(T));
/// k whose products are one chain.
inline constexpr Index kSegment = 512;

/// The half 0 or 1 of a step, of A: `low` and `high` are the chunks of rows l / 4 and l / 4 + 8.
template <typename T, typename Chunk>
EIGENFORMER_DEVICE FragmentA<T> rows_of_half(int half, const Chunk& low, const Chunk& high) {
  unsigned l[4], h[4];
  std::memcpy(l, &low, sizeof l);
  std::memcpy(h, &high, sizeof h);
  const unsigned words[4] = {l[2 * half], h[2 * half], l[2 * half + 1], h[2 * half + 1]};
  FragmentA<T> rows;
  std::memcpy(rows.values, words, sizeof words);
  return rows;
}
/// And of B.
template <typename T, typename Chunk>
EIGENFORMER_DEVICE FragmentB<T> tokens_of_half(int half, const Chunk& chunk) {
  unsigned y[4];
  std::memcpy(y, &chunk, sizeof y);
  const unsigned words[2] = {y[2 * half], y[2 * half + 1]};
  FragmentB<T> tokens;
  std::memcpy(tokens.values, words, sizeof words);
  return tokens;
}

/// d += a step of A times one of B.
template <typename T, typename Block, typename Chunk>
EIGENFORMER_DEVICE void multiply_step(Block& block, FragmentD<T>& d, const Chunk& low,
                                      const Chunk& high, const Chunk& b) {
  unroll<2>([&](auto half) {
    block.mma(d, rows_of_half<T>(half, low, high), tokens_of_half<T>(half, b));
  });
}

/// Rows of a tile of A, of one matrix or of a pair: then 8 rows of the first stand above the 8 of
/// the second that meet them in the layer's output, which one lane so has both of.
struct TileRow {
  int matrix, row;
};
template <int Matrices>
EIGENFORMER_DEVICE constexpr TileRow tile_row(int place) {
  if constexpr (Matrices == 1) return {0, place};
  return {place / 8 % 2, place / 16 * 8 + place % 8};
}
template <int Matrices>
EIGENFORMER_DEVICE constexpr int tile_place(int matrix, int row) {
  return Matrices == 1 ? row : row / 8 * 16 + matrix * 8 + row % 8;
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
