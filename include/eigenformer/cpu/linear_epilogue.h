/// \file
/// What becomes of finished sums: an epilogue is a type with `store(isa, tile sums)`, called once for each register tile when its
/// sums are complete, and `load(isa, tile sums)` before the first where `starts_from_output`. A fused epilogue reads sums by one
/// type (plain, scaled int8, grouped int8) and passes them through one function, so that every combination is compiled for itself.
#pragma once

#include <cmath>

#include "activation_functions.h"
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
  Index column;  // of the output
  int columns;
  Index packed_column;              // of the packed weight: where its scales are
  const float* row_scales;          // (rows) of quantized activations
  const std::int32_t* row_offsets;  // (rows) to take off int8 sums
};

/// Calls f(row of the tile, column of the tile, lanes) over whole and partial vectors.
template <typename V, typename Sum, typename F>
void for_each_vector(const TileSums<Sum>& tile, F&& f) {
  for (int r = 0; r < tile.rows; ++r)
    for (int c = 0; c < tile.columns; c += V::lanes) f(r, c, std::min(V::lanes, tile.columns - c));
}

template <typename V, typename T>
EIGENFORMER_INLINE V load_first(const T* p, int n) {
  return n == V::lanes ? V::load(p) : V::load_partial(p, n);
}

/// n of B as the sums' type, zeros where there is no bias.
template <typename V, typename B>
EIGENFORMER_INLINE V bias_vector(const B* bias, Index column, int n) {
  return bias == nullptr ? V::zero() : load_first<V>(bias + column, n);
}

// ---- reading: V read<V>(tile, row, column of the tile, column of the bias, lanes) ----------------------------------------------

/// sum + bias.
template <typename B>
struct PlainSums {
  const B* bias;  // nullptr: none

  template <typename V, typename Sum>
  V read(const TileSums<Sum>& tile, int r, int c, Index bias_column, int n) const {
    return V::load(tile.sums + r * tile.stride + c) + bias_vector<V>(bias, bias_column, n);
  }
};

/// fma(float(sum), activation scale * weight scale, bias): the same bits on every ISA.
template <typename B>
struct ScaledSums {
  const B* bias;
  const float* weight_scales;  // by packed column

  template <typename V>
  V read(const TileSums<std::int32_t>& tile, int r, int c, Index bias_column, int n) const {
    const V scale = V::set1(tile.row_scales[r]) * load_first<V>(weight_scales + tile.packed_column + c, n);
    return simd::fused_multiply_add(V::load_difference(tile.sums + r * tile.stride + c, tile.row_offsets[r]), scale,
                                    bias_vector<V>(bias, bias_column, n));
  }
};

/// fma(sum of the scaled groups, activation scale, bias).
template <typename B>
struct GroupedSums {
  const B* bias;

  template <typename V>
  V read(const TileSums<float>& tile, int r, int c, Index bias_column, int n) const {
    return simd::fused_multiply_add(V::load(tile.sums + r * tile.stride + c), V::set1(tile.row_scales[r]),
                                    bias_vector<V>(bias, bias_column, n));
  }
};

// ---- writing -------------------------------------------------------------------------------------------------------------------

/// y = residual + function(sums), or, gated, residual + function(gate) * up, where a tile holds gate in the first half of its
/// columns and up in the second.
template <typename Sums, typename Function, bool Gated, typename Y, typename R>
struct Finish {
  static constexpr bool starts_from_output = false, gated = Gated;
  Sums sums;
  Y* y;  // (rows, columns)
  Index columns;
  const R* residual;  // (rows, columns) or nullptr

  template <typename Isa, typename Sum>
  void store(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<std::conditional_t<std::is_same_v<Sum, double>, double, float>, Isa>;
    for_each_vector<V>(tile, [&](int r, int c, int n) {
      const Index column = tile.column + c, at = (tile.row + r) * columns + column;
      V value = Function::value(sums.template read<V>(tile, r, c, column, n));
      if constexpr (Gated) value = value * sums.template read<V>(tile, r, tile.stride / 2 + c, columns + column, n);
      if (residual != nullptr) value = load_first<V>(residual + at, n) + value;
      n == V::lanes ? value.store(y + at) : value.store_partial(y + at, n);
    });
  }
};

/// y += sum, as one chain that starts from y: accumulating two parts of k in turn gives the bits of accumulating them at once.
template <typename Y>
struct AddSums {
  static constexpr bool starts_from_output = true, gated = false;
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
