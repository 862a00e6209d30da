/// \file
/// Products of weights and tokens in float or double, by multiply-adds. Each output is the sum of
/// 32 chains, one per lane of a warp: lane l takes the chunks of 16 bytes that begin at
/// k = (l + 32 * i) * 16 / sizeof(C), in ascending order, and the lanes' sums meet in the tree of
/// reduce_warp. So the bits depend on the row and the token alone.
///
/// A warp multiplies 4 rows of weights (2 of each matrix of a pair) with 1 or with 8 tokens, out of
/// registers: 512 coalesced bytes of each row at once. Up to 8 tokens stream the weight once:
/// 4 * rows * depth bytes of float, 2 * tokens * rows * depth operations; bound by bandwidth, of
/// which about two thirds is expected on H100 and H200, not measured yet. More tokens run in groups
/// of 8, which read the weight once more each, out of L2 where it fits (50 MB): about a quarter of
/// the rate of multiply-adds is expected. Use bfloat16 or half weights and tokens for speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "../collectives.cuh"
#include "../launch.cuh"
#include "operand.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Weight: an Operand, or one that makes numbers of what is stored (int4_linear.cuh).
template <typename C, int Tokens, typename Weight, typename X, typename End>
struct LaneProductKernel {
  using Chunk = Pack<C, static_cast<int>(16 / sizeof(C))>;
  using Line = decltype(std::declval<const Weight&>().line(0, Index{0}));
  static constexpr int kThreads = 128, kEach = static_cast<int>(16 / sizeof(C)), kPlaces = 4,
                       Matrices = Weight::kMatrices;
  static constexpr int kRows = kPlaces / Matrices;  // of a warp's outputs
  static constexpr int kTilesOfBlock = kThreads / kWarp;
  static_assert(kRows * Tokens <= kWarp);
  Weight weight;
  Operand<C, X> x;
  End end;

  EIGENFORMER_HOST_DEVICE Index token_tiles() const { return (x.rows - 1) / Tokens + 1; }
  EIGENFORMER_HOST_DEVICE Index tiles() const {
    return ((weight.rows - 1) / kRows + 1) * token_tiles();
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    for_each_warp(block, tiles(), [&](Index tile) {
      const Index row = tile / token_tiles() * kRows, token = tile % token_tiles() * Tokens;
      C sums[kPlaces][Tokens] = {};
      accumulate(sums, row, token, block.lane());
      finish(block, sums, row, token);
    });
  }

 private:
  /// The chains of this lane.
  EIGENFORMER_DEVICE void accumulate(C (&sums)[kPlaces][Tokens], Index row, Index token,
                                     int lane) const {
    Line lines[kPlaces];
    const X* tokens[Tokens];
    for (int p = 0; p < kPlaces; ++p) lines[p] = weight.line(p / kRows, row + p % kRows);
    for (int t = 0; t < Tokens; ++t) tokens[t] = x.line(0, token + t);
    const Index first = Index{lane} * kEach;
    if (weight.whole && x.whole)
      for (Index k = first; k < weight.depth; k += kWarp * kEach)
        multiply<true>(sums, lines, tokens, k);
    else
      for (Index k = first; k < weight.depth; k += kWarp * kEach)
        multiply<false>(sums, lines, tokens, k);
  }

  template <bool Inside>
  EIGENFORMER_DEVICE void multiply(C (&sums)[kPlaces][Tokens], const Line (&lines)[kPlaces],
                                   const X* const (&tokens)[Tokens], Index k) const {
    Chunk w[kPlaces], v[Tokens];
    for (int p = 0; p < kPlaces; ++p) w[p] = weight.template load<Inside>(lines[p], k);
    for (int t = 0; t < Tokens; ++t) v[t] = x.template load<Inside>(tokens[t], k);
    for (int p = 0; p < kPlaces; ++p)
      for (int t = 0; t < Tokens; ++t)
        for (int i = 0; i < kEach; ++i) sums[p][t] = std::fma(w[p][i], v[t][i], sums[p][t]);
  }

  /// Output (token t, row r) of the warp is lane t * kRows + r's.
  template <typename Block>
  EIGENFORMER_DEVICE void finish(Block& block, const C (&sums)[kPlaces][Tokens], Index row,
                                 Index token) const {
    C own[Matrices] = {};
    for (int p = 0; p < kPlaces; ++p)
      for (int t = 0; t < Tokens; ++t) {
        const C sum = reduce_warp(block, sums[p][t], Add{});
        if (block.lane() == t * kRows + p % kRows) own[p / kRows] = sum;
      }
    const Index to = token + block.lane() / kRows, out = row + block.lane() % kRows;
    if (block.lane() < kRows * Tokens && to < x.rows && out < weight.rows) end.store(to, out, own);
  }
};

/// end.store(token, row, sums) for all of (x.rows, weight.rows).
template <typename C, typename D, typename Weight, typename X, typename End>
void multiply_by_lanes(const Backend<D>& on, const char* name, const Weight& weight,
                       const Operand<C, X>& x, const End& end) {
  if (weight.rows <= 0 || x.rows <= 0) return;
  const auto start = [&](const auto& kernel) { launch_warps(on, name, kernel.tiles(), kernel); };
  if (x.rows == 1)
    start(LaneProductKernel<C, 1, Weight, X, End>{weight, x, end});
  else
    start(LaneProductKernel<C, 8, Weight, X, End>{weight, x, end});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
