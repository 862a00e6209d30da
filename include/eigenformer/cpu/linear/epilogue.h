/// \file
/// What becomes of finished sums: an epilogue is a type with `store(isa, tile sums)`, called once
/// for each register tile when its sums are complete, `load(isa, tile sums)` before the first where
/// `starts_from_output`, and `finish(isa)` when a thread has stored its last. A fused epilogue
/// reads sums by one type (plain, scaled int8, grouped int8) and passes them through one function,
/// so that every combination is compiled for itself.
#pragma once

#include "../vector/functions.h"
#include "../vector/loop.h"
#include "../vector/streaming.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

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

// ---- reading: columns(...) is what a vector of columns shares in all rows, its
// read(tile, row, sums) is one row of them

/// part of B as the sums' type, zeros where there is no bias.
template <typename V, typename B, typename Part>
EIGENFORMER_INLINE V bias_vector(const B* bias, Index column, Part part) {
  return bias == nullptr ? V::zero() : cpu::load<V>(bias + column, part);
}

/// sum + bias.
template <typename B>
struct PlainSums {
  const B* bias;  // nullptr: none

  template <typename V>
  struct Columns {
    V bias;
    template <typename Sum>
    EIGENFORMER_INLINE V read(const TileSums<Sum>&, int, const Sum* sums) const {
      return V::load(sums) + bias;
    }
  };
  template <typename V, typename Sum, typename Part>
  EIGENFORMER_INLINE Columns<V> columns(const TileSums<Sum>&, Index, Index bias_column,
                                        Part part) const {
    return {bias_vector<V>(bias, bias_column, part)};
  }
};

/// fma(float(sum), activation scale * weight scale, bias): the same bits on every ISA.
template <typename B>
struct ScaledSums {
  const B* bias;
  const float* weight_scales;  // by packed column

  template <typename V>
  struct Columns {
    V scale, bias;
    EIGENFORMER_INLINE V read(const TileSums<std::int32_t>& tile, int r,
                              const std::int32_t* sums) const {
      return simd::fused_multiply_add(V::load_difference(sums, tile.row_offsets[r]),
                                      V::set1(tile.row_scales[r]) * scale, bias);
    }
  };
  template <typename V, typename Part>
  EIGENFORMER_INLINE Columns<V> columns(const TileSums<std::int32_t>& tile, Index c,
                                        Index bias_column, Part part) const {
    return {cpu::load<V>(weight_scales + tile.packed_column + c, part),
            bias_vector<V>(bias, bias_column, part)};
  }
};

/// fma(sum of the scaled groups, activation scale, bias).
template <typename B>
struct GroupedSums {
  const B* bias;

  template <typename V>
  struct Columns {
    V bias;
    EIGENFORMER_INLINE V read(const TileSums<float>& tile, int r, const float* sums) const {
      return simd::fused_multiply_add(V::load(sums), V::set1(tile.row_scales[r]), bias);
    }
  };
  template <typename V, typename Part>
  EIGENFORMER_INLINE Columns<V> columns(const TileSums<float>&, Index, Index bias_column,
                                        Part part) const {
    return {bias_vector<V>(bias, bias_column, part)};
  }
};

// ---- writing ------------------------------------------------------------------------------------

/// y = residual + function(sums), or, gated, residual + function(gate) * up, where a tile holds
/// gate in the first half of its columns and up in the second.
template <typename Sums, typename Function, bool Gated, typename Y, typename R>
struct Finish {
  static constexpr bool starts_from_output = false, gated = Gated;
  Sums sums;
  Y* y;  // (rows, columns)
  Index columns;
  const R* residual;  // (rows, columns) or nullptr
  bool streaming;     // whole lines are written around the caches

  Finish(const Sums& read, Y* to, Index rows, Index row_columns, const R* added)
      : sums(read), y(to), columns(row_columns), residual(added) {
    const Index row_bytes = columns * Index{sizeof(Y)};
    streaming = residual == nullptr &&
                written_around_caches(y, rows * row_bytes, ReadsBeside::operands, 64, {row_bytes});
  }

  template <typename Isa, typename Sum>
  void store(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<std::conditional_t<std::is_same_v<Sum, double>, double, float>, Isa>;
    // parts of a line would wait for each other in too few buffers
    if constexpr (V::lanes * sizeof(Y) == 64)
      if (streaming)
        return store_rows<V>(tile, [](V value, Y* to, auto) { value.store_streaming(to); });
    store_rows<V>(tile, [](V value, Y* to, auto part) { cpu::store(value, to, part); });
  }

  /// After the last tile of a thread.
  template <typename Isa>
  void finish(Isa) const {
    if (streaming) simd::Vec<float, Isa>::fence_streaming();
  }

 private:
  template <typename V, typename Sum, typename Store>
  EIGENFORMER_INLINE void store_rows(const TileSums<Sum> tile, Store&& write) const {
    cpu::for_each_vector<V>(0, tile.columns, [&](Index c, auto part) {
      const Index column = tile.column + c, up = tile.stride / 2;
      const auto columns_of = [&](Index at, Index bias_column) {
        return sums.template columns<V>(tile, at, bias_column, part);
      };
      const auto first = columns_of(c, column);
      const auto second = columns_of(Gated ? up + c : c, Gated ? columns + column : column);
      const Sum* from = tile.sums + c;
      Index at = tile.row * columns + column;
      for (int r = 0; r < tile.rows; ++r, from += tile.stride, at += columns) {
        V value = ActivationFunction<Function>::value(first.read(tile, r, from));
        if constexpr (Gated) value = value * second.read(tile, r, from + up);
        if (residual != nullptr) value = cpu::load<V>(residual + at, part) + value;
        write(value, y + at, part);
      }
    });
  }
};

/// y += sum, as one chain that starts from y: accumulating two parts of k in turn gives the bits of
/// accumulating them at once.
template <typename Y>
struct AddSums {
  static constexpr bool starts_from_output = true, gated = false;
  Y* y;
  Index columns;

  template <typename Isa, typename Sum>
  void load(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<Sum, Isa>;
    for_each_vector<V>(tile, [](Sum* sum, Y* to, auto part) { cpu::load<V>(to, part).store(sum); });
  }
  template <typename Isa, typename Sum>
  void store(Isa, const TileSums<Sum>& tile) const {
    using V = simd::Vec<Sum, Isa>;
    for_each_vector<V>(tile,
                       [](Sum* sum, Y* to, auto part) { cpu::store(V::load(sum), to, part); });
  }
  template <typename Isa>
  void finish(Isa) const {}

 private:
  template <typename V, typename Sum, typename F>
  EIGENFORMER_INLINE void for_each_vector(const TileSums<Sum> tile, F&& f) const {
    for (int r = 0; r < tile.rows; ++r)
      cpu::for_each_vector<V>(0, tile.columns, [&](Index c, auto part) {
        f(tile.sums + r * tile.stride + c, y + (tile.row + r) * columns + tile.column + c, part);
      });
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
