/// \file
/// Packing both operands of a product into the order of generic.h: to[unit][row of the panel or tile], a unit being one or more
/// elements along k. Two orientations of the source: rows along k (weights and activations as they are), which are converted into a
/// small stage and transposed in registers; and k along rows (the transposed operands of gradients), which are converted in place.
#pragma once

#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// An operand of a product in memory: element (row, k) at data[row * row_stride + k * depth_stride]; one of the strides is 1.
template <typename T>
struct MatrixOperand {
  const T* data;
  Index row_stride, depth_stride;
};

namespace tile {

/// count elements of From, converted through vectors to E.
template <typename Isa, typename From, typename E>
void convert_line(const From* from, Index count, E* to) {
  if constexpr (std::is_same_v<From, E>) {
    if (count > 0) std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(count) * sizeof(E));
  } else {
    using V = simd::Vec<std::conditional_t<std::is_same_v<E, double>, double, compute_type<From>>, Isa>;
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
  if (units > 0) std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(units) * sizeof(Unit));
}

// Rows of a weight are far apart, and no hardware prefetcher follows 32 of them: 512 bytes ahead halve the time of packing. A
// prefetch past the end of an array is harmless.
constexpr Index kPrefetchUnits = 128;
template <typename E>
void prefetch_lines(const E* from, Index row_stride, Index rows) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  for (Index r = 0; r < rows; ++r)
    __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<std::uintptr_t>(r * row_stride) * sizeof(E)), 0, 2);
}

/// Packs `rows` of `width` rows (zeros for the others) and `count` of k, with zeros up to a whole unit. `convert(r, k, n, stage)`
/// writes elements [k, k + n) of row r as E.
template <typename E, typename Isa, typename Unit, typename Convert>
void pack_lines(Isa isa, Index rows, int width, Index count, Unit* to, Convert&& convert) {
  constexpr int per_unit = sizeof(Unit) / sizeof(E), block = transpose_size(Isa{}), stage_units = 64,
                stage_count = stage_units * per_unit;
  alignas(64) E stage[block * stage_count];
  const Index units = (count + per_unit - 1) / per_unit;
  if (rows < width) clear(to, units * width);
  for (Index first = 0; first < units; first += stage_units) {
    const Index k = first * per_unit;
    const int staged = static_cast<int>(std::min<Index>(stage_units, units - first));
    const int elements = static_cast<int>(std::min<Index>(stage_count, count - k));
    for (int r0 = 0; r0 < rows; r0 += block) {
      const int n = static_cast<int>(std::min<Index>(block, rows - r0));
      for (int r = 0; r < n; ++r) {
        convert(r0 + r, k, elements, stage + r * stage_count);
        std::fill(stage + r * stage_count + elements, stage + r * stage_count + staged * per_unit, E{});
      }
      for (int u = 0; u < staged; u += block)
        transpose(isa, stage + u * per_unit, Index{sizeof(stage)} / block, n, std::min(block, staged - u),
                  to + (first + u) * width + r0, width);
    }
  }
}

/// The same without conversion, straight from rows of E.
template <typename E, typename Isa, typename Unit>
void pack_raw_lines(Isa isa, const E* from, Index row_stride, Index rows, int width, Index count, Unit* to) {
  constexpr int per_unit = sizeof(Unit) / sizeof(E), block = transpose_size(Isa{});
  const Index whole = count / per_unit;
  if (rows < width) clear(to, whole * width);
  for (Index u = 0; u < whole; u += block) {
    prefetch_lines(from + (u + kPrefetchUnits) * per_unit, row_stride, rows);
    for (int r = 0; r < rows; r += block)
      transpose(isa, from + r * row_stride + u * per_unit, row_stride * Index{sizeof(E)},
                static_cast<int>(std::min<Index>(block, rows - r)), static_cast<int>(std::min<Index>(block, whole - u)),
                to + u * width + r, width);
  }
  if (whole * per_unit < count)
    pack_lines<E>(isa, rows, width, count - whole * per_unit, to + whole * width, [&](Index r, Index, int n, E* stage) {
      std::memcpy(static_cast<void*>(stage), from + r * row_stride + whole * per_unit, static_cast<std::size_t>(n) * sizeof(E));
    });
}

/// Packs a source whose k runs along the rows of memory: k at from + k * depth_stride, `rows` contiguous elements each.
template <typename E, typename Isa, typename From, typename Unit>
void pack_columns(Isa, const From* from, Index depth_stride, Index rows, int width, Index count, Unit* to) {
  constexpr int per_unit = sizeof(Unit) / sizeof(E), widest = 32;  // columns of the widest panel
  alignas(64) E lines[per_unit * widest] = {};
  for (Index k = 0; k < count; k += per_unit, to += width) {
    for (int j = 0; j < per_unit; ++j) {
      if (k + j < count)
        convert_line<Isa>(from + (k + j) * depth_stride, rows, lines + j * widest);
      else
        std::fill_n(lines + j * widest, rows, E{});
    }
    if constexpr (per_unit == 1) {
      std::memcpy(static_cast<void*>(to), lines, static_cast<std::size_t>(width) * sizeof(E));
    } else {
      static_assert(sizeof(E) == 2 && per_unit == 2);
      std::uint16_t words[2][widest];
      std::uint32_t pairs[widest];
      std::memcpy(words, lines, sizeof(words));
      for (int r = 0; r < widest; ++r) pairs[r] = words[0][r] | static_cast<std::uint32_t>(words[1][r]) << 16;
      std::memcpy(static_cast<void*>(to), pairs, static_cast<std::size_t>(width) * sizeof(Unit));
    }
  }
}

/// Either orientation, elements of E.
template <typename E, typename Isa, typename From, typename Unit>
void pack_operand(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, int width, Index k, Index count, Unit* to) {
  const From* from = source.data + row * source.row_stride + k * source.depth_stride;
  if constexpr (!std::is_same_v<E, std::int8_t>)  // int8 has no gradients
    if (source.depth_stride != 1) return pack_columns<E>(isa, from, source.depth_stride, rows, width, count, to);
  if constexpr (std::is_same_v<From, E>)
    pack_raw_lines<E>(isa, from, source.row_stride, rows, width, count, to);
  else
    pack_lines<E>(isa, rows, width, count, to,
                  [&](Index r, Index at, int n, E* stage) { convert_line<Isa>(from + r * source.row_stride + at, n, stage); });
}

/// The unit of packed weights: 64 bits for double, 32 for everything else.
template <typename Stored>
using WeightUnit = std::conditional_t<std::is_same_v<Stored, double>, double, std::uint32_t>;

/// Half keeps the two k of a step one vector after the other, so that a fragment is two plain loads.
template <typename Dot>
void separate_pairs(typename Dot::Stored* panel, Index steps) {
  constexpr int lanes = Dot::fragment / 2;
  typename Dot::Stored pairs[Dot::fragment];
  for (auto* p = panel; p != panel + steps * Dot::fragment * Dot::vectors; p += Dot::fragment) {
    std::memcpy(static_cast<void*>(pairs), p, sizeof(pairs));
    for (int i = 0; i < lanes; ++i) p[i] = pairs[2 * i], p[lanes + i] = pairs[2 * i + 1];
  }
}

/// Packs k of [k, k + count) of one panel of weights, `rows` of its columns valid; k is a multiple of the step.
template <typename Dot, typename Isa, typename From>
void pack_panel(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, Index k, Index count, typename Dot::Stored* to) {
  using E = typename Dot::Stored;
  auto* units = reinterpret_cast<WeightUnit<E>*>(to);
  pack_operand<E>(isa, source, row, rows, Dot::columns, k, count, units);
  if constexpr (std::is_same_v<E, half>) separate_pairs<Dot>(to, (count + Dot::step - 1) / Dot::step);
}

/// Adds to each column's offset what activations with 128 added make too much over a packed chunk: 128 times the sum of its
/// weights, modulo 2^32.
template <typename Dot>
void add_offsets(const std::int8_t* panel, Index steps, std::int32_t* offsets) {
  for (Index s = 0; s < steps; ++s, panel += Dot::columns * 4)
    for (int c = 0; c < Dot::columns; ++c)
      offsets[c] = static_cast<std::int32_t>(
          static_cast<std::uint32_t>(offsets[c]) +
          static_cast<std::uint32_t>(128 * (panel[4 * c] + panel[4 * c + 1] + panel[4 * c + 2] + panel[4 * c + 3])));
}

/// Packs all of k of one tile of activations: `rows` valid of `height`. Plain and widening dots take Unit elements, bfloat16 dots
/// pairs.
template <typename Dot, typename Isa, typename From>
void pack_tile(Isa isa, const MatrixOperand<From>& source, Index row, Index rows, int height, Index depth, typename Dot::Unit* to) {
  using Unit = typename Dot::Unit;
  using E = std::conditional_t<std::is_same_v<Unit, std::uint32_t>, bfloat16, Unit>;
  constexpr int per_unit = sizeof(Unit) / sizeof(E);
  pack_operand<E>(isa, source, row, rows, height, 0, depth, to);
  const Index filled = (depth + per_unit - 1) / per_unit, units = (depth + Dot::step - 1) / Dot::step * Dot::units;
  clear(to + filled * height, (units - filled) * height);
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
