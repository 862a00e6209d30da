/// \file
/// CUDA kernels of the gradients of linear layers: products of matrices, of which one or both have
/// k as their rows in memory, and a sum over tokens.
///
/// Products: a block of 256 threads takes a tile of the result and walks along k, which is never
/// shared out: every element is one chain in ascending order, from 0 or from what the gradient
/// holds, whatever the grid. While it multiplies one step out of shared memory the loads of the
/// next are under way in registers; two buffers, one barrier per step. 16-bit pairs go through the
/// tensor cores, tiles of 128 x 128, 32 of k at a time: shared memory keeps the pairs along k that
/// fragments are made of, so that a matrix is transposed on its way in. A link of the chain is 16
/// of k. All others are multiply-adds of float or double, tiles of 64 x 64, 16 of k at a time; a
/// link is one.
///
/// 2 * tokens * in * out operations against tokens * (in + out) + in * out numbers: from some
/// hundred tokens on arithmetic is the limit, of which a quarter (tensor cores, dense) and a half
/// (multiply-adds) is expected: reading shared memory takes as long. A matrix of few tokens leaves
/// most of its tile idle. Biases: see below.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../problem/linear.h"
#include "linear.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// A factor of a product, (rows, depth). RowsAdjacent: rows lie side by side in memory, a k is
/// `stride` after the one before; else k lie side by side.
template <typename T, bool RowsAdjacent>
struct Factor {
  const T* data;
  Index rows, depth, stride;

  EIGENFORMER_DEVICE const T* at(Index row, Index k) const {
    return RowsAdjacent ? data + k * stride + row : data + row * stride + k;
  }
};

/// A thread's part of a step of a factor, and its way through registers into shared memory, where
/// units of Tile::kEach neighbours in k stand as (depth / kEach, rows).
template <typename Tile, typename T, bool RowsAdjacent>
struct Part {
  using M = typename Tile::Scalar;
  using Unit = Pack<M, Tile::kEach>;
  static constexpr int kCount = Tile::kRows * Tile::kDepth / Tile::kThreads;
  // the part: as many rows by as many lines of k, or one row and all of its k
  static constexpr int kWidth = RowsAdjacent ? kCount / Tile::kEach : kCount;
  static constexpr int kLines = kCount / kWidth;
  static constexpr int kAcross = (RowsAdjacent ? Tile::kRows : Tile::kDepth) / kWidth;
  Factor<T, RowsAdjacent> factor;
  Index row, depth;  // first of the part; depth within a step
  bool packs;
  Pack<M, kWidth> values[kLines];

  EIGENFORMER_DEVICE Part(const Factor<T, RowsAdjacent>& from, Index row0, int thread)
      : factor(from), packs(packs_fit<kWidth>(from.data, from.stride)) {
    const int along = thread % kAcross * kWidth, line = thread / kAcross;
    row = row0 + (RowsAdjacent ? along : line);
    depth = RowsAdjacent ? line * kLines : along;
  }

  EIGENFORMER_DEVICE void load(Index step) {
    for (int line = 0; line < kLines; ++line) {
      const Index k = step * Tile::kDepth + depth + line;
      const Index room = RowsAdjacent ? factor.rows - row : factor.depth - k;
      const bool inside = RowsAdjacent ? k < factor.depth : row < factor.rows;
      if (inside && packs && room >= kWidth) {
        values[line] = load_pack<M, kWidth>(factor.at(row, k));
        continue;
      }
      const Index valid = inside ? room : 0;
      for (int i = 0; i < kWidth; ++i)
        values[line][i] = i < valid ? static_cast<M>(*factor.at(row + (RowsAdjacent ? i : 0),
                                                                k + (RowsAdjacent ? 0 : i)))
                                    : M(0);
    }
  }

  template <typename Shared>
  EIGENFORMER_DEVICE void store(const Shared& to, Index buffer, Index row0) const {
    constexpr int each = Tile::kEach;
    const Index first = buffer * Tile::kBuffer + depth / each * Tile::kStride + row - row0;
    if constexpr (RowsAdjacent) {
      constexpr int at_once = static_cast<int>(16 / sizeof(Unit));
      for (int i = 0; i < kWidth; i += at_once) {
        Pack<Unit, at_once> units;
        for (int j = 0; j < at_once; ++j)
          for (int e = 0; e < each; ++e) units[j][e] = values[e][i + j];
        to.store_pack(first + i, units);
      }
    } else {
      for (int i = 0; i < kWidth; i += each) {
        Unit unit;
        for (int e = 0; e < each; ++e) unit[e] = values[0][i + e];
        to.store(first + i / each * Tile::kStride, unit);
      }
    }
  }
};

/// A tile of the result by tensor cores: a warp has 64 rows of one factor, 32 of the other.
template <typename M>
struct TensorCoreTile {
  using Scalar = M;
  static constexpr int kThreads = 256, kRows = 128, kDepth = 32, kEach = 2;
  static constexpr int kStride = kRows + 8;  // units; the lanes of a fragment read all banks
  static constexpr int kBuffer = kDepth / kEach * kStride;
  using D = FragmentD<M>;
  using Sums = D[4][4];

  template <typename Block, typename Shared>
  static EIGENFORMER_DEVICE void multiply(Block& block, const Shared& a, const Shared& b,
                                          Index buffer, Index depth, Sums& sums) {
    using Unit = Pack<M, kEach>;
    const int row0 = block.warp() / 4 * 64 + block.lane() / 4,
              column0 = block.warp() % 4 * 32 + block.lane() / 4;
    for (int k = 0; k < kDepth && k < depth; k += 16) {
      const auto line = [&](int half) {
        return buffer * kBuffer + (k / kEach + half * 4 + block.lane() % 4) * kStride;
      };
      FragmentB<M> columns[4];
      for (int n = 0; n < 4; ++n) {
        const Pack<Unit, 2> units{
            {b.load(line(0) + column0 + n * 8), b.load(line(1) + column0 + n * 8)}};
        std::memcpy(static_cast<void*>(columns[n].values), &units, sizeof(units));
      }
      for (int m = 0; m < 4; ++m) {
        Pack<Unit, 4> units;
        for (int i = 0; i < 4; ++i) units[i] = a.load(line(i / 2) + row0 + m * 16 + i % 2 * 8);
        FragmentA<M> rows;
        std::memcpy(static_cast<void*>(rows.values), &units, sizeof(units));
        for (int n = 0; n < 4; ++n) block.mma(sums[m][n], rows, columns[n]);
      }
    }
  }

  /// body(row of the tile, column, sum).
  template <typename Block, typename Body>
  static EIGENFORMER_DEVICE void for_each(Block& block, Sums& sums, const Body& body) {
    // Unrolled, or the sums are in local memory.
    EIGENFORMER_UNROLL_ALL
    for (int m = 0; m < 4; ++m) {
      EIGENFORMER_UNROLL_ALL
      for (int n = 0; n < 4; ++n) {
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < D::kSize; ++i)
          body(block.warp() / 4 * 64 + m * 16 + D::row(block.lane(), i),
               block.warp() % 4 * 32 + n * 8 + D::column(block.lane(), i), sums[m][n].values[i]);
      }
    }
  }
};

/// A tile of the result by multiply-adds, 4 x 4 of each thread.
template <typename C>
struct MultiplyAddTile {
  using Scalar = C;
  static constexpr int kThreads = 256, kRows = 64, kDepth = 16, kEach = 1, kOwn = 4;
  static constexpr int kAtOnce = static_cast<int>(16 / sizeof(C));
  static constexpr int kStride = kRows + kAtOnce, kBuffer = kDepth * kStride;
  using Sums = C[kOwn][kOwn];

  template <typename Block, typename Shared>
  static EIGENFORMER_DEVICE void multiply(Block& block, const Shared& a, const Shared& b,
                                          Index buffer, Index depth, Sums& sums) {
    using Units = Pack<Pack<C, 1>, kAtOnce>;
    for (int k = 0; k < kDepth && k < depth; ++k) {
      const Index line = buffer * kBuffer + k * kStride;
      Units rows[kOwn / kAtOnce], columns[kOwn / kAtOnce];
      for (int i = 0; i < kOwn / kAtOnce; ++i) {
        rows[i] = a.template pack<Units>(line + block.thread() / 16 * kOwn + i * kAtOnce);
        columns[i] = b.template pack<Units>(line + block.thread() % 16 * kOwn + i * kAtOnce);
      }
      for (int m = 0; m < kOwn; ++m)
        for (int n = 0; n < kOwn; ++n)
          sums[m][n] = std::fma(rows[m / kAtOnce][m % kAtOnce][0],
                                columns[n / kAtOnce][n % kAtOnce][0], sums[m][n]);
    }
  }

  template <typename Block, typename Body>
  static EIGENFORMER_DEVICE void for_each(Block& block, Sums& sums, const Body& body) {
    for (int m = 0; m < kOwn; ++m)
      for (int n = 0; n < kOwn; ++n)
        body(block.thread() / 16 * kOwn + m, block.thread() % 16 * kOwn + n, sums[m][n]);
  }
};

template <typename M>
using ProductTile = std::conditional_t<is_16_bit<M>, TensorCoreTile<M>, MultiplyAddTile<M>>;

/// result (rows of a, rows of b) = the sums over k, or += them. M: what is multiplied.
template <typename M, bool Adds, typename R, typename A, typename B>
struct ProductKernel {
  using Tile = ProductTile<M>;
  using Unit = Pack<M, Tile::kEach>;
  static constexpr int kThreads = Tile::kThreads;
  R* result;
  A a;
  B b;

  static constexpr std::size_t shared() { return 2 * shared_bytes<Unit>(2 * Tile::kBuffer); }
  Index blocks() const { return tiles(a.rows) * tiles(b.rows); }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto shared_a = block.template shared<Unit>(2 * Tile::kBuffer);
    const auto shared_b = block.template shared<Unit>(2 * Tile::kBuffer);
    const Index row0 = block.index() % tiles(a.rows) * Tile::kRows,
                column0 = block.index() / tiles(a.rows) * Tile::kRows;
    const auto for_each = [&](typename Tile::Sums& sums, const auto& body) {
      Tile::for_each(block, sums, [&](int i, int j, auto& sum) {
        const Index row = row0 + i, column = column0 + j;
        if (row < a.rows && column < b.rows) body(result[row * b.rows + column], sum);
      });
    };
    typename Tile::Sums sums = {};
    if constexpr (Adds) for_each(sums, [](const R& from, auto& sum) { sum = from; });
    auto part_a = part(a, row0, block.thread());
    auto part_b = part(b, column0, block.thread());
    part_a.load(0);
    part_b.load(0);
    for (Index step = 0; step * Tile::kDepth < a.depth; ++step) {
      part_a.store(shared_a, step % 2, row0);
      part_b.store(shared_b, step % 2, column0);
      block.barrier();  // all have multiplied the step before, and the other buffer is free
      part_a.load(step + 1);
      part_b.load(step + 1);
      Tile::multiply(block, shared_a, shared_b, step % 2, a.depth - step * Tile::kDepth, sums);
    }
    for_each(sums, [](R& to, const auto& sum) { to = static_cast<R>(sum); });
  }

 private:
  EIGENFORMER_HOST_DEVICE static Index tiles(Index rows) {
    return (rows + Tile::kRows - 1) / Tile::kRows;
  }
  template <typename T, bool RowsAdjacent>
  EIGENFORMER_DEVICE static auto part(const Factor<T, RowsAdjacent>& factor, Index row0,
                                      int thread) {
    return Part<Tile, T, RowsAdjacent>(factor, row0, thread);
  }
};

template <typename M, bool Adds, typename D, typename R, typename A, typename B>
void product(const Backend<D>& on, const char* name, R* result, const A& a, const B& b) {
  if (a.rows == 0 || b.rows == 0) return;
  const ProductKernel<M, Adds, R, A, B> kernel{result, a, b};
  launch(on, name, kernel.blocks(), kernel.kThreads, kernel.shared(), kernel);
}

template <typename D, typename X, typename Y, typename W>
void execute(const Backend<D>& on, const problem::LinearBackwardInput<X, Y, W>& p) {
  constexpr auto name = "linear_backward_input";
  if constexpr (takes_gemm<Y, W> && (std::is_same_v<X, Y> || std::is_same_v<X, float>))
    if (const GemmShape shape{p.tokens, p.in, p.out, p.out, p.in, false, true, false};
        p.tokens >= kGemmTokens && multiply_by_gemm(on, name, shape, p.grad_x, p.grad_y, p.weight))
      return;
  product<plain_factor_type<Y, W>, false>(on, name, p.grad_x,
                                          Factor<Y, false>{p.grad_y, p.tokens, p.out, p.out},
                                          Factor<W, true>{p.weight, p.in, p.out, p.in});
}

/// Pairs of one 16-bit scalar through the tensor cores, all others in the gradient's.
template <typename D, typename G, typename Y, typename X>
void execute(const Backend<D>& on, const problem::LinearBackwardWeight<G, Y, X>& p) {
  constexpr auto name = "linear_backward_weight";
  if (p.tokens == 0) return;
  if constexpr (takes_gemm<Y, X> && std::is_same_v<G, float>)
    if (const GemmShape shape{p.out, p.in, p.tokens, p.out, p.in, true, true, true};
        p.tokens >= kGemmTokens && multiply_by_gemm(on, name, shape, p.grad_weight, p.grad_y, p.x))
      return;
  constexpr bool narrow = is_16_bit<Y> && std::is_same_v<Y, X> && std::is_same_v<G, float>;
  product<std::conditional_t<narrow, Y, G>, true>(on, name, p.grad_weight,
                                                  Factor<Y, true>{p.grad_y, p.out, p.tokens, p.out},
                                                  Factor<X, true>{p.x, p.in, p.tokens, p.in});
}

/// One chain for each of a block's 32 columns: 8 warps bring 128 tokens at a time into shared
/// memory, of which the first adds one after the other while the next are under way. grad_y is read
/// once; 8 KiB of 16-bit numbers in flight for each block, and chains of some 4 cycles per token,
/// both near the memory's pace where there are as many blocks as multiprocessors: half of it and
/// more is expected from 4096 outputs on.
template <typename G, typename Y>
struct BiasGradientKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kTokens = 128;
  problem::LinearBackwardBias<G, Y> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto numbers = block.template shared<Y>(kTokens * kWarp);
    const Index column = block.index() * kWarp + block.lane();
    const bool mine = column < p.out;
    Y next[kTokens / kWarps];
    const auto load = [&](Index first) {
      for (int i = 0; i < kTokens / kWarps; ++i) {
        const Index token = first + i * kWarps + block.warp();
        next[i] = mine && token < p.tokens ? p.grad_y[token * p.out + column] : Y(0);
      }
    };
    const bool adds = mine && block.warp() == 0;
    G sum = adds ? p.grad_bias[column] : G(0);
    load(0);
    for (Index first = 0; first < p.tokens; first += kTokens) {
      for (int i = 0; i < kTokens / kWarps; ++i)
        numbers.store((i * kWarps + block.warp()) * kWarp + block.lane(), next[i]);
      block.barrier();
      load(first + kTokens);
      for (int i = 0; adds && i < kTokens && first + i < p.tokens; ++i)
        sum += static_cast<G>(numbers.load(i * kWarp + block.lane()));
      block.barrier();
    }
    if (adds) p.grad_bias[column] = sum;
  }
};

template <typename D, typename G, typename Y>
void execute(const Backend<D>& on, const problem::LinearBackwardBias<G, Y>& p) {
  if (p.tokens == 0 || p.out == 0) return;
  using Kernel = BiasGradientKernel<G, Y>;
  launch(on, "linear_backward_bias", (p.out - 1) / kWarp + 1, Kernel::kThreads,
         shared_bytes<Y>(Kernel::kTokens * kWarp), Kernel{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
