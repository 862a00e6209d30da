/// \file
/// What becomes of finished sums: an epilogue is a type with `store(isa, tile sums)`, called once for each register tile when its
/// sums are complete, and `load(isa, tile sums)` before the first where `starts_from_output`. A fused activation or residual is one
/// more type here.
#pragma once

#include <cmath>

#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A tile of finished (or starting) sums and where it stands in the output.
template <typename Sum>
struct TileSums {
  Sum* sums;  // (rows, stride)
  int stride;
  Index row;
  int rows;
  Index column;
  int columns;
  const float* row_scales;      // (rows) of quantized activations
  const std::int32_t* offsets;  // (columns) to take off int8 sums, or nullptr
};

/// Calls f(row of the tile, column of the tile, lanes) over whole and partial vectors.
template <typename V, typename Sum, typename F>
void for_each_vector(const TileSums<Sum>& tile, F&& f) {
  for (int r = 0; r < tile.rows; ++r)
    for (int c = 0; c < tile.columns; c += V::lanes) f(r, c, std::min(V::lanes, tile.columns - c));
}

/// n of B as the sums' type, zeros where there is no bias.
template <typename V, typename B>
V bias_vector(const B* bias, Index column, int n) {
  return bias == nullptr ? V::zero() : V::load_partial(bias + column, n);
}

/// y = sum + bias.
template <typename Y, typename B>
struct StoreSums {
  static constexpr bool starts_from_output = false;
  Y* y;  // (rows, columns)
  Index columns;
  const B* bias;  // (columns) or nullptr

  template <typename Isa, typename Sum>
  void store(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<Sum, Isa>;
    for_each_vector<V>(tile, [&](int r, int c, int n) {
      const V sum = V::load(tile.sums + r * tile.stride + c) + bias_vector<V>(bias, tile.column + c, n);
      Y* to = y + (tile.row + r) * columns + tile.column + c;
      n == V::lanes ? sum.store(to) : sum.store_partial(to, n);
    });
  }
};

/// y = fma(float(sum), activation scale * weight scale, bias): the same bits on every ISA.
template <typename Y, typename B>
struct StoreScaledSums {
  static constexpr bool starts_from_output = false;
  Y* y;
  Index columns;
  const B* bias;
  const float* weight_scales;  // (columns)

  template <typename Isa>
  void store(Isa, const TileSums<std::int32_t>& tile) const {
    using V = simd::Vec<float, Isa>;
    alignas(64) float line[V::lanes];
    for_each_vector<V>(tile, [&](int r, int c, int n) {
      const std::int32_t* sums = tile.sums + r * tile.stride + c;
      for (int i = 0; i < V::lanes; ++i) {
        // Unsigned, because sums of offset activations may have wrapped.
        const std::uint32_t offset = tile.offsets == nullptr ? 0u : static_cast<std::uint32_t>(tile.offsets[c + i]);
        line[i] = static_cast<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) - offset));
      }
      const V scale = V::set1(tile.row_scales[r]) * V::load_partial(weight_scales + tile.column + c, n);
      const V result = fused(V::load(line), scale, bias_vector<V>(bias, tile.column + c, n));
      Y* to = y + (tile.row + r) * columns + tile.column + c;
      n == V::lanes ? result.store(to) : result.store_partial(to, n);
    });
  }

 private:
  // Once a sum: where the machine has no such instruction the library's fma is slow, but its bits are those of the others.
  template <typename V>
  static V fused(V a, V b, V c) {
    if constexpr (isa::kHasFma) {
      return fma(a, b, c);
    } else {
      float x[V::lanes], y[V::lanes], z[V::lanes];
      a.store(x), b.store(y), c.store(z);
      for (int i = 0; i < V::lanes; ++i) x[i] = std::fma(x[i], y[i], z[i]);
      return V::load(x);
    }
  }
};

/// y += sum, as one chain that starts from y: accumulating two parts of k in turn gives the bits of accumulating them at once.
template <typename Y>
struct AddSums {
  static constexpr bool starts_from_output = true;
  Y* y;
  Index columns;

  template <typename Isa, typename Sum>
  void load(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<Sum, Isa>;
    for_each_vector<V>(tile, [&](int r, int c, int n) {
      V::load_partial(y + (tile.row + r) * columns + tile.column + c, n).store(tile.sums + r * tile.stride + c);
    });
  }
  template <typename Isa, typename Sum>
  void store(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<Sum, Isa>;
    for_each_vector<V>(tile, [&](int r, int c, int n) {
      V::load(tile.sums + r * tile.stride + c).store_partial(y + (tile.row + r) * columns + tile.column + c, n);
    });
  }
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
