/// \file
/// Packing both operands of a product into the order of generic.h: to[unit][row of the panel or
/// tile], a unit being one or more elements along k. Two orientations of the source: rows along k
/// (weights and activations as they are), which are converted into a small stage and transposed in
/// registers; and k along rows (the transposed operands of gradients), which are converted in
/// place.
#pragma once

#include <bit>

#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// An operand of a product in memory: element (row, k) at data[row * row_stride + k *
/// depth_stride]; one of the strides is 1.
template <typename T>
struct MatrixOperand {
  const T* data;
  Index row_stride, depth_stride;
};

/// The rows of weights that make up panels: of one matrix (out, in), or of two whose outputs are
/// paired (a gated unit: the first half of a panel's columns are rows of the first, the second half
/// the same rows of the second).
template <typename W, int Matrices>
struct WeightRows {
  MatrixOperand<W> matrices[Matrices];
  Index rows;  // of each

  /// f(matrix, first row, rows, first column of the panel) for the parts of a panel of `columns`;
  /// matrix counts from 0.
  template <typename F>
  void for_each_part(Index panel, int columns, F&& f) const {
    const int width = columns / Matrices;
    const Index first = panel * width, valid = std::min<Index>(width, rows - first);
    for (int m = 0; m < Matrices; ++m) f(m, first, valid, m * width);
  }
  bool fills(Index panel, int columns) const { return (panel + 1) * (columns / Matrices) <= rows; }
};

/// The rows of several matrices, one below the other, as one weight.
template <typename W>
struct StackedRows {
  const MatrixOperand<W>* matrices;
  const Index* ends;  // ends[m] rows are those of matrices 0 to m
  int count;
  Index rows;  // of all

  template <typename F>
  void for_each_part(Index panel, int columns, F&& f) const {
    const Index first = panel * columns, last = std::min<Index>(first + columns, rows);
    for (int m = 0; m < count; ++m) {
      const Index begin = m == 0 ? 0 : ends[m - 1], from = (std::max)(first, begin),
                  to = (std::min)(last, ends[m]);
      if (from < to) f(m, from - begin, to - from, static_cast<int>(from - first));
    }
  }
  bool fills(Index panel, int columns) const { return (panel + 1) * columns <= rows; }
};

/// count elements of From, converted through vectors to E.
template <typename Isa, typename From, typename E>
void convert_line(const From* from, Index count, E* to) {
  if constexpr (std::is_same_v<From, E>) {
    if (count > 0)
      std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(count) * sizeof(E));
  } else {
    using V =
        simd::Vec<std::conditional_t<std::is_same_v<E, double>, double, compute_type<From>>, Isa>;
    for (Index i = 0; i < count; i += V::lanes) {
      const int n = static_cast<int>(std::min<Index>(V::lanes, count - i));
      if (n == V::lanes)
        V::load(from + i).store(to + i);
      else
        V::load_partial(from + i, n).store_partial(to + i, n);
    }
  }
}

// Units lie over elements of other types: they are written as bytes only.
template <typename Unit>
void clear(Unit* to, Index units) {
  if (units > 0)
    std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(units) * sizeof(Unit));
}

// Rows of a weight are far apart, and no hardware prefetcher follows 32 of them: 512 bytes ahead
// halve the time of packing.
constexpr Index kPrefetchUnits = 128;
template <typename E>
void prefetch_lines(const E* from, Index ahead, Index row_stride, Index rows) {
  for (Index r = 0; r < rows; ++r)
    simd::prefetch_after(from, (ahead + r * row_stride) * Index{sizeof(E)});
}

/// Packs `rows` rows and `count` of k, with zeros up to a whole unit; to[unit * width + row].
/// `convert(r, k, n, stage)` writes elements [k, k + n) of row r as E.
template <typename E, typename Isa, typename Unit, typename Convert>
void pack_lines(Isa isa, Index rows, int width, Index count, Unit* to, Convert&& convert) {
  constexpr int per_unit = sizeof(Unit) / sizeof(E), block = transpose_size(Isa{}),
                stage_units = 64, stage_count = stage_units * per_unit;
  alignas(64) E stage[block * stage_count];
  const Index units = (count + per_unit - 1) / per_unit;
  for (Index first = 0; first < units; first += stage_units) {
    const Index k = first * per_unit;
    const int staged = static_cast<int>(std::min<Index>(stage_units, units - first));
    const int elements = static_cast<int>(std::min<Index>(stage_count, count - k));
    for (int r0 = 0; r0 < rows; r0 += block) {
      const int n = static_cast<int>(std::min<Index>(block, rows - r0));
      for (int r = 0; r < n; ++r) {
        convert(r0 + r, k, elements, stage + r * stage_count);
        std::fill(stage + r * stage_count + elements, stage + r * stage_count + staged * per_unit,
                  E{});
      }
      for (int u = 0; u < staged; u += block)
        transpose(isa, stage + u * per_unit, Index{sizeof(stage)} / block, n,
                  (std::min)(block, staged - u), to + (first + u) * width + r0, width);
    }
  }
}

/// The same without conversion, straight from rows of E.
template <typename E, typename Isa, typename Unit>
void pack_raw_lines(Isa isa, const E* from, Index row_stride, Index rows, int width, Index count,
                    Unit* to) {
  constexpr int per_unit = sizeof(Unit) / sizeof(E), block = transpose_size(Isa{});
  const Index whole = count / per_unit;
  for (Index u = 0; u < whole; u += block) {
    if (u + kPrefetchUnits < whole)
      prefetch_lines(from, (u + kPrefetchUnits) * per_unit, row_stride, rows);
    for (int r = 0; r < rows; r += block)
      transpose(isa, from + r * row_stride + u * per_unit, row_stride * Index{sizeof(E)},
                static_cast<int>(std::min<Index>(block, rows - r)),
                static_cast<int>(std::min<Index>(block, whole - u)), to + u * width + r, width);
  }
  if (whole * per_unit < count)
    pack_lines<E>(isa, rows, width, count - whole * per_unit, to + whole * width,
                  [&](Index r, Index, int n, E* stage) {
                    std::memcpy(static_cast<void*>(stage), from + r * row_stride + whole * per_unit,
                                static_cast<std::size_t>(n) * sizeof(E));
                  });
}

/// Packs a source whose k runs along the rows of memory: k at from + k * depth_stride, `rows`
/// contiguous elements each. One k a unit.
template <typename Isa, typename From, typename E>
void pack_columns(Isa, const From* from, Index depth_stride, Index rows, int width, Index count,
                  E* to) {
  for (Index k = 0; k < count; ++k)
    convert_line<Isa>(from + k * depth_stride, rows, to + k * width);
}

/// Pairs of bfloat16 from the same.
template <typename Isa, typename From>
void pack_column_pairs(Isa isa, const From* from, Index depth_stride, Index rows, int width,
                       Index count, std::uint32_t* to) {
  using V = simd::Vec<float, Isa>;
  for (Index k = 0; k < count; k += 2, to += width) {
    const From* even = from + k * depth_stride;
    const From* odd = k + 1 < count ? even + depth_stride : nullptr;
    if constexpr (std::is_same_v<From, bfloat16>)
      if (odd != nullptr) {
        join_pairs(isa, even, odd, rows, to);
        continue;
      }
    for (Index r = 0; r < rows; r += V::lanes) {
      const int n = static_cast<int>(std::min<Index>(V::lanes, rows - r));
      const auto load = [&](const From* p) {
        return n == V::lanes ? V::load(p + r) : V::load_partial(p + r, n);
      };
      store_pairs(isa, load(even), odd != nullptr ? load(odd) : V::zero(), n, to + r);
    }
  }
}

/// Either orientation, elements of E, `rows` rows from `row` on to the first columns of lines of
/// `width`.
template <typename E, typename Isa, typename From, typename Unit>
void pack_operand(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, int width,
                  Index k, Index count, Unit* to) {
  const From* from = eigenformer::detail::offset_by(
      source.data, row * source.row_stride + k * source.depth_stride);
  if constexpr (sizeof(E) == sizeof(Unit)) {
    if (source.depth_stride != 1)
      return pack_columns(isa, from, source.depth_stride, rows, width, count,
                          reinterpret_cast<E*>(to));
  } else if constexpr (std::is_same_v<E, bfloat16> && !std::is_same_v<From, double>) {
    // the others are weights alone, whose rows lie whole: they have no gradients of their own
    if (source.depth_stride != 1)
      return pack_column_pairs(isa, from, source.depth_stride, rows, width, count, to);
  }
  if constexpr (std::is_same_v<From, E>)
    pack_raw_lines<E>(isa, from, source.row_stride, rows, width, count, to);
  else
    pack_lines<E>(isa, rows, width, count, to, [&](Index r, Index at, int n, E* stage) {
      convert_line<Isa>(from + r * source.row_stride + at, n, stage);
    });
}

// ---- weights ------------------------------------------------------------------------------------

/// The unit of packed weights: 64 bits for double, 32 for everything else.
template <typename Stored>
using WeightUnit = std::conditional_t<std::is_same_v<Stored, double>, double, std::uint32_t>;

/// Whether a dot takes activations quantized per token.
template <typename Dot>
inline constexpr bool quantizes_activations =
    std::is_same_v<typename Dot::Stored, std::int8_t> || is_int4<Dot>;

/// Elements of a panel in one step.
template <typename Dot>
inline constexpr Index panel_step = Index{Dot::vectors} * Dot::fragment;

template <typename Dot>
inline constexpr bool unsigned_weights = false;
template <typename Dot>
  requires std::is_same_v<typename Dot::Stored, std::int8_t>
inline constexpr bool unsigned_weights<Dot> = Dot::unsigned_weights;

/// Steps of `depth` in a packed panel.
template <typename Stored, typename Isa>
constexpr Index packed_steps(Isa isa, Index depth) {
  constexpr int step = Dot<Stored, Stored, Isa>::step, multiple = step_multiple<Stored>(Isa{});
  static_cast<void>(isa);
  return (depth + step * multiple - 1) / (step * multiple) * multiple;
}

/// Half keeps the two k of a step one vector after the other, so that a fragment is two plain
/// loads.
template <typename Dot>
void separate_pairs(typename Dot::Stored* panel, Index steps) {
  constexpr int lanes = Dot::fragment / 2;
  typename Dot::Stored pairs[Dot::fragment];
  for (auto* p = panel; p != panel + steps * Dot::fragment * Dot::vectors; p += Dot::fragment) {
    std::memcpy(static_cast<void*>(pairs), p, sizeof(pairs));
    for (int i = 0; i < lanes; ++i) p[i] = pairs[2 * i], p[lanes + i] = pairs[2 * i + 1];
  }
}

/// The last touch on `steps` steps of a panel, once all its columns are packed.
template <typename Dot>
void finish_panel(typename Dot::Stored* panel, Index steps) {
  if constexpr (std::is_same_v<typename Dot::Stored, half>) separate_pairs<Dot>(panel, steps);
  if constexpr (unsigned_weights<Dot>)
    for (Index i = 0; i < steps * Dot::columns * Dot::step; ++i)
      panel[i] = static_cast<std::int8_t>(panel[i] ^ -128);  // w + 128
}

/// What was packed as k of [k, k + count) of one column of a panel; k is a multiple of the step.
template <typename Dot>
void unpack_column(const typename Dot::Stored* panel, Index column, Index k, Index count,
                   typename Dot::Stored* to) {
  using E = typename Dot::Stored;
  if constexpr (std::is_same_v<E, half>) {
    constexpr Index lanes = Dot::fragment / 2;
    panel += k * Dot::columns + column / lanes * Dot::fragment + column % lanes;
    for (Index at = 0; at < count; ++at) to[at] = panel[at / 2 * 2 * Dot::columns + at % 2 * lanes];
  } else {
    constexpr Index per_unit = sizeof(WeightUnit<E>) / sizeof(E);
    panel += k * Dot::columns + column * per_unit;
    for (Index at = 0; at < count; at += per_unit, panel += per_unit * Dot::columns)
      std::memcpy(static_cast<void*>(to + at), panel,
                  static_cast<std::size_t>((std::min)(per_unit, count - at)) * sizeof(E));
  }
  if constexpr (unsigned_weights<Dot>)
    for (Index at = 0; at < count; ++at) to[at] = static_cast<E>(to[at] ^ -128);
}

/// Packs k of [k, k + count) of one panel, zeros up to `steps` steps; k is a multiple of the step.
template <typename Dot, typename Isa, typename Rows>
void pack_panel(Isa isa, const Rows& weights, Index panel, Index k, Index count, Index steps,
                typename Dot::Stored* to) {
  using E = typename Dot::Stored;
  auto* units = reinterpret_cast<WeightUnit<E>*>(to);
  constexpr int per_unit = sizeof(WeightUnit<E>) / sizeof(E), units_per_step = Dot::step / per_unit;
  const Index filled = (count + per_unit - 1) / per_unit;
  if (weights.fills(panel, Dot::columns))
    clear(units + filled * Dot::columns, (steps * units_per_step - filled) * Dot::columns);
  else
    clear(units, steps * units_per_step * Dot::columns);
  weights.for_each_part(panel, Dot::columns, [&](int m, Index row, Index rows, int column) {
    pack_operand<E>(isa, weights.matrices[m], row, rows, Dot::columns, k, count, units + column);
  });
  finish_panel<Dot>(to, steps);
}

// ---- activations --------------------------------------------------------------------------------

template <typename Dot>
inline constexpr int steps_at_once = 1;
template <typename Dot>
  requires(Dot::steps_at_once > 1)
inline constexpr int steps_at_once<Dot> = Dot::steps_at_once;

/// Steps that a product of Dot goes through for `depth`.
template <typename Dot>
constexpr Index product_steps(Index depth) {
  constexpr Index at_once = Index{Dot::step} * steps_at_once<Dot>;
  return (depth + at_once - 1) / at_once * steps_at_once<Dot>;
}

/// What the tile of activations of a dot holds: pairs of bfloat16 where a unit is 32 raw bits.
template <typename Dot>
using ActivationElement = std::conditional_t<std::is_same_v<typename Dot::Unit, std::uint32_t>,
                                             bfloat16, typename Dot::Unit>;

/// AMX order: [16 steps][row][step], zeros behind the last k.
template <typename Dot, typename Isa, typename From>
void pack_tile_rows(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, int height,
                    Index first, Index end, typename Dot::Unit* to) {
  using E = ActivationElement<Dot>;
  constexpr Index at_once = Index{Dot::step} * steps_at_once<Dot>;
  to += first / at_once * height * steps_at_once<Dot>;
  for (Index k = first; k < end; k += at_once, to += height * steps_at_once<Dot>) {
    const Index n = (std::min)(at_once, end - k);
    const From* from = source.data + row * source.row_stride + k * source.depth_stride;
    if (n < at_once) clear(to, height * steps_at_once<Dot>);
    if (source.depth_stride == 1) {
      for (Index r = 0; r < rows; ++r)
        convert_line<Isa>(from + r * source.row_stride, n,
                          reinterpret_cast<E*>(to + r * steps_at_once<Dot>));
    } else {
      constexpr int block = 16;
      typename Dot::Unit stage[steps_at_once<Dot> * Dot::rows];  // [step][row]
      pack_column_pairs(isa, from, source.depth_stride, rows, Dot::rows, n, stage);
      for (Index r = 0; r < rows; r += block)
        transpose(isa, stage + r, Index{Dot::rows} * Index{sizeof(stage[0])},
                  static_cast<int>((n + 1) / 2), static_cast<int>(std::min<Index>(block, rows - r)),
                  to + r * steps_at_once<Dot>, Index{steps_at_once<Dot>});
    }
  }
}

/// k that are packed at once for all tiles where k runs along columns: a multiple of what any dot
/// takes at once.
constexpr Index kColumnDepth = 64;

/// Packs k of [first, end) of one tile of activations, `rows` valid of `height`, zeros elsewhere;
/// first is a multiple of kColumnDepth, and so is end but at the depth. Plain and widening dots
/// take Unit elements, bfloat16 dots pairs.
template <typename Dot, typename Isa, typename From>
void pack_tile(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, int height,
               Index first, Index end, typename Dot::Unit* to) {
  using E = ActivationElement<Dot>;
  constexpr int per_unit = sizeof(typename Dot::Unit) / sizeof(E);
  if constexpr (steps_at_once<Dot> != 1)
    return pack_tile_rows<Dot>(isa, source, row, rows, height, first, end, to);
  const Index start = first / per_unit, filled = (end + per_unit - 1) / per_unit,
              units = product_steps<Dot>(end) * Dot::units;
  if (rows < height) clear(to + start * height, (filled - start) * height);
  pack_operand<E>(isa, source, row, rows, height, first, end - first, to + start * height);
  clear(to + filled * height, (units - filled) * height);
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
