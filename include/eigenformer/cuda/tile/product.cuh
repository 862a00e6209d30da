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
/// - Few tokens, up to 32 (few_tokens.cuh): reads the weight once: 2 * rows * depth bytes (16-bit),
///   2 * tokens * rows * depth operations; bound by bandwidth. 8192 x 8192 on an H200 out of a cold
///   L2: 45 us of bfloat16 for 1 and for 16 tokens (PyTorch 2.11: 46 and 48), 27 us of int8 for 1.
/// - Many tokens (many_tokens.cuh): tiles of (64 rows, 64 tokens), or (128, 128) where there are
///   enough of them to fill the device. Bound by the tensor cores, of whose 640 TFLOP/s by mma.sync
///   on an H200 43% and 45% were reached of bfloat16 for 512 and 4096 tokens x 8192 x 8192 (252 and
///   1915 us; PyTorch 2.11, by wgmma: 93 and 704), of 1282 TOP/s of int8 44% and 46% (122 and 929),
///   when large tiles had a way for all operands in them still; not measured since. Operands that
///   are not aligned, or are converted on the way, pass through registers, in small tiles.
///
/// end.store(token, row, sums) takes the sum of each matrix.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "few_tokens.cuh"
#include "many_tokens.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
using LargeTiles = TileShape<4, 8, 2, 2, sizeof(T) == 1 ? 3 : 2, 1, true>;
using SmallTiles = TileShape<2, 4, 2, 2, 3, 2, false>;

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
  if (x.rows <= 8) return start(FewTokensKernel<T, 1, Matrices, W, X, End>{weight, x, end});
  if (x.rows <= 16) return start(FewTokensKernel<T, 2, Matrices, W, X, End>{weight, x, end});
  if (x.rows <= 32) return start(FewTokensKernel<T, 4, Matrices, W, X, End>{weight, x, end});
  if constexpr (std::is_same_v<W, T> && std::is_same_v<X, T>)
    if (const auto large = tiles_kernel<LargeTiles<T>>(weight, x, end);
        large.tiles() >= kEnoughTiles && copies_whole(weight) && copies_whole(x))
      return start(large);
  start(tiles_kernel<SmallTiles>(weight, x, end));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
