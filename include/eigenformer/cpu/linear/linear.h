/// \file
/// CPU kernel of the linear layer and its gradients: one blocked matrix product, sums(row, column)
/// = sum over k of x(row, k) w(column, k). Here is a block of rows; parts.h goes through them.
///
/// Activations are packed into tiles (up to 12 rows; 32 with AMX), weights into panels (32 columns
/// on AVX-512), see tile/generic.h. Loops, outermost first: blocks of rows; groups of 8 panels,
/// shared out to the threads; blocks of k; panels; tiles. Sums wait between blocks of k in
/// tile-shaped scratch. Plain weights are packed chunk by chunk into the worker's scratch. One tile
/// of rows or less streams whole panels, several in flight.
///
/// Each sum is one chain over k in ascending order whatever the blocks, so a row has the same bits
/// alone or among others, with any number of threads, and for any subset of the weight's rows.
/// Weights quantized in groups have an exact int32 sum for each group, which one chain of float
/// multiply-adds over the groups joins. After Goto and van de Geijn, "Anatomy of High-Performance
/// Matrix Multiplication" (2008).
#pragma once

#include "../../core/workspace.h"
#include "../backend.h"
#include "../tile/wide_int4.h"
#include "activations.h"
#include "epilogue.h"
#include "widen_int4.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Weights in panels of packed_steps(depth) * Dot::columns * Dot::step elements. Kernels take it by
/// value: a pointer, where problem::PackedPanels holds all there is to know of a weight.
template <typename Stored>
struct PackedPanels {
  const Stored* data;
};

/// int8 weights in panels, a scale for each `group` of k.
struct GroupedPanels {
  const std::int8_t* data;
  const float* scales;      // [panel][group][column of the panel], or nullptr
  const half* half_scales;  // in their place
  Index group;
};

/// A checked request: y = epilogue(x w^T). Weights is WeightRows, PackedPanels, GroupedPanels,
/// Int4Panels or WideInt4Panels.
template <typename X, typename Weights, typename Epilogue>
struct ProductProblem {
  using epilogue_type = Epilogue;
  MatrixOperand<X> x;  // (rows, depth)
  Weights weights;     // (columns, depth), or twice that where the epilogue is gated
  Index rows, columns, depth;
  Epilogue epilogue;
};

/// Rows whose activations are packed together; a multiple of every tile height's maximum. With
/// packed weights 192: a block of k of them (768 KiB) stays in an L2 of 1 MiB, and AMX, whose units
/// are 64 bytes for four of these, takes 128 (512 KiB of 2 MiB). Plain weights are packed once for
/// each block, so theirs are longer: 768.
template <typename Dot, bool Packed>
constexpr Index block_rows() {
  return !Packed ? 768 : tile::steps_at_once<Dot> > 1 ? 128 : 192;
}

/// Blocks of nearly equal size, whole tiles each: of 512 rows, 180, 180 and 152 rather than 192,
/// 192 and 128, whose weights would wait for memory.
template <typename Dot>
constexpr Index even_block_rows(Index rows, Index most) {
  const Index blocks = std::max<Index>((rows + most - 1) / most, 1),
              each = (rows + blocks - 1) / blocks;
  return std::max<Index>((each + Dot::rows - 1) / Dot::rows, 1) * Dot::rows;
}

/// Steps of one block of k. Packed panels are read out of L2 (128 KiB per block), which keeps up
/// with the multiply-adds, so that sums are loaded and stored seldom; plain ones, packed here for
/// many rows, stay in L1 (32 KiB). AMX's figures are reasoned, not timed.
template <typename Dot, bool Packed>
constexpr Index block_steps() {
  return (Packed || tile::steps_at_once<Dot> > 1 ? 1024 : 256) / Dot::units;
}

constexpr Index kGroupPanels = 8;

template <typename Weights>
inline constexpr bool is_packed = true;
template <typename W, int Matrices>
inline constexpr bool is_packed<WeightRows<W, Matrices>> = false;
template <>
inline constexpr bool is_packed<WideInt4Panels> = false;  // widened here, chunk by chunk

template <typename Weights>
inline constexpr bool is_grouped =
    std::is_same_v<Weights, GroupedPanels> || std::is_same_v<Weights, Int4Panels>;

/// One block of rows: the packed activations, and the work of one worker on a range of panels and
/// tiles.
template <typename Dot, typename Isa, typename Problem>
struct ProductBlock {
  using Unit = typename Dot::Unit;
  using Stored = typename Dot::Stored;
  using Weights = decltype(Problem::weights);
  static constexpr bool packed = is_packed<Weights>, grouped = is_grouped<Weights>;
  static constexpr bool gated = Problem::epilogue_type::gated,
                        resumes = Problem::epilogue_type::starts_from_output;
  using Sum = std::conditional_t<grouped, float, typename Dot::Sum>;
  static constexpr Index panel_step = tile::panel_step<Dot>;
  static constexpr int outputs = gated ? Dot::columns / 2 : Dot::columns;  // of a panel

  static_assert(!gated || Dot::vectors % 2 == 0,
                "a gated panel is whole vectors of gate and of up");

  const Problem& problem;
  Index row;  // first of the block
  Tiles<Dot> tiles;
  Index steps;
  Unit* activations;  // (tiles, steps, units, height)
  ActivationScales scales;

  struct Scratch {
    Sum* sums;      // (panels of a group, padded rows, columns of a panel)
    Stored* chunk;  // (panels of a group, block_steps, panel_step), plain weights only
  };

  Unit* tile_activations(Index t) const {
    return activations + tiles.first(t) * steps * Dot::units;
  }

  void pack(Index first, Index last) const {
    // Columns of a matrix: some k at a time for all tiles, whose parts of a line are then read
    // while it is in cache.
    const Index depth = problem.depth, at_once = problem.x.depth_stride == 1
                                                     ? std::max<Index>(depth, 1)
                                                     : tile::kColumnDepth;
    for (Index k = 0; k == 0 || k < depth; k += at_once)
      for (Index t = first; t < last; ++t)
        pack_activations<Dot>(Isa{}, problem.x, row + tiles.first(t), tiles.valid(t),
                              tiles.height(t), k, (std::min)(k + at_once, depth),
                              tile_activations(t), scales, tiles.first(t));
  }

  Sum* tile_sums(const Scratch& scratch, Index j, Index t) const {
    return scratch.sums + (j * tiles.padded_rows() + tiles.first(t)) * Dot::columns;
  }

  TileSums<Sum> sums_of(const Scratch& scratch, Index group, Index panel, Index t) const {
    const Index column = panel * outputs, r = tiles.first(t);
    return {tile_sums(scratch, panel - group, t),
            Dot::columns,
            row + r,
            static_cast<int>(tiles.valid(t)),
            column,
            static_cast<int>(std::min<Index>(outputs, problem.columns - column)),
            panel * Dot::columns,
            scales.scales + r,
            scales.offsets + r};
  }

  /// Packs steps [first, first + count) of `panels` panels of plain weights, or widens them.
  void pack_chunk(const Scratch& scratch, Index group, Index panels, Index first,
                  Index count) const {
    if constexpr (std::is_same_v<Weights, WideInt4Panels>) {
      for (Index j = 0; j < panels; ++j)
        widen_panel<gated, Dot>(Isa{}, problem.weights, group + j, problem.depth, first, count,
                                scratch.chunk + j * block_steps<Dot, packed>() * panel_step);
    } else {
      pack_plain_chunk(scratch, group, panels, first, count);
    }
  }
  void pack_plain_chunk(const Scratch& scratch, Index group, Index panels, Index first,
                        Index count) const {
    // Columns of a matrix: a few rows at a time for all panels, so that whole lines are read while
    // they are in L1.
    const Index at_once = problem.weights.matrices[0].depth_stride == 1 ? count : Index{32};
    for (Index s = 0; s < count; s += at_once) {
      const Index part = (std::min)(at_once, count - s), k = (first + s) * Dot::step;
      const Index depth = std::clamp<Index>(problem.depth - k, 0, part * Dot::step);
      for (Index j = 0; j < panels; ++j)
        tile::pack_panel<Dot>(Isa{}, problem.weights, group + j, k, depth, part,
                              scratch.chunk + (j * block_steps<Dot, packed>() + s) * panel_step);
    }
  }

  /// Steps [first, first + count) for all tiles in [t0, t1) and `panels` panels.
  void multiply(const Scratch& scratch, Index group, Index panels, Index first, Index count,
                Index t0, Index t1) const {
    const Stored* weights;
    Index stride;
    if constexpr (packed) {
      stride = tile::packed_steps<Stored>(Isa{}, problem.depth) * panel_step;
      weights = problem.weights.data + group * stride + first * panel_step;
    } else {
      stride = block_steps<Dot, packed>() * panel_step;
      weights = scratch.chunk;
    }
    // many tiles: a panel's chunk stays in cache for all of them
    const Index at_once = t1 - t0 == 1 ? panels : 1;
    for (Index j = 0; j < panels; j += at_once) {
      // What comes after this panel's chunk, in elements: the next panel's, the first panel's next,
      // or the next group's first.
      Index next = (j + 1) * stride;
      if (packed && j + 1 == panels)
        next = first + count < steps ? count * panel_step : next - first * panel_step;
      for (Index t = t0; t < t1; ++t) {
        const int height = tiles.height(t);
        const auto [ahead, ahead_step] =
            what_to_fetch(weights, j * stride, next, count, t - t0, t1 - t0);
        const tile::TileOperands<Dot> operands{tile_activations(t) + first * Dot::units * height,
                                               weights + j * stride, stride, ahead, ahead_step};
        Sum* sums = tile_sums(scratch, j, t);
        const Index sums_stride = tiles.padded_rows() * Dot::columns;
        if constexpr (grouped)
          tile::grouped_tile_products<simd::Vec<float, Isa>>(
              height, operands, count, group_factors(group + j, first, t), sums, sums_stride,
              at_once, first == 0);
        else
          tile::tile_products<Dot>(height, operands, count, sums, sums_stride, at_once,
                                   first == 0 && !resumes);
      }
    }
  }

  struct Fetch {
    std::uintptr_t address, step;
  };

  /// For tile `turn` of `turns` of the chunk at element `here`: its part of the chunk at `next`,
  /// and once that is all there, what is in cache anyway. A chunk that is read once is fetched
  /// itself, some way ahead.
  static Fetch what_to_fetch(const Stored* weights, Index here, Index next, Index count, Index turn,
                             Index turns) {
    const auto bytes = [](Index elements) {
      return static_cast<std::uintptr_t>(elements) * sizeof(Stored);
    };
    // numbers, because a fetch past the end is harmless and a pointer is not
    const auto base = reinterpret_cast<std::uintptr_t>(weights);
    if (packed && turns == 1)
      return {base + bytes(here) + std::uintptr_t{tile::kStreamBytes}, bytes(panel_step)};
    std::uintptr_t part = static_cast<std::uintptr_t>(count) * tile::kLineBytes;
    if constexpr (tile::steps_at_once<Dot> != 1)
      part = part / tile::steps_at_once<Dot> * Dot::lines_ahead;
    const std::uintptr_t done = static_cast<std::uintptr_t>(turn) * part;
    const bool useful = packed && done < bytes(count * panel_step);
    return {base + (useful ? bytes(next) + done : bytes(here)), tile::kLineBytes};
  }

  tile::GroupFactors group_factors(Index panel, Index first, Index t) const {
    const Index group_steps = problem.weights.group / Dot::step, g = first / group_steps,
                stride = scales.groups * Dot::columns, at = panel * stride + g * Dot::columns;
    const Index own = tiles.first(t) * scales.groups + g * tiles.height(t);
    using detail::offset_by;
    const half* half_scales = nullptr;
    const float* minimums = nullptr;
    if constexpr (tile::is_int4<Dot>)
      minimums = offset_by(problem.weights.minimums, at);
    else
      half_scales = offset_by(problem.weights.half_scales, at);
    return {group_steps,
            offset_by(problem.weights.scales, at),
            half_scales,
            stride,
            minimums,
            scales.offsets + own,
            offset_by(scales.sums, own)};
  }

  /// Whether a few tiles are multiplied by weights that are widened in registers; of more, the
  /// widened weights are read again.
  bool widens_in_registers() const {
    if constexpr (std::is_same_v<Weights, WideInt4Panels>)
      return tile::DotOfInt4<Isa>::columns == Dot::columns && tiles.count() <= 2;
    else
      return false;
  }
  /// All of k for `panels` panels, widened in registers.
  void multiply_widening(const Scratch& scratch, Index group, Index panels, Index t0,
                         Index t1) const {
    if constexpr (std::is_same_v<Weights, WideInt4Panels>) {
      using Int4 = tile::DotOfInt4<Isa>;
      if constexpr (Int4::columns == Dot::columns) {
        const WideInt4Panels& from = problem.weights;
        const Index stride =
                        tile::packed_steps<int4>(Isa{}, problem.depth) * tile::panel_step<Int4>,
                    groups = (problem.depth + from.group - 1) / from.group,
                    factors = groups * Dot::columns;
        const tile::GroupFactors own{from.group / Int4::step,
                                     from.scales + group * factors,
                                     nullptr,
                                     factors,
                                     detail::offset_by(from.minimums, group * factors),
                                     nullptr,
                                     nullptr};
        for (Index t = t0; t < t1; ++t)
          tile::wide_tile_products<Dot, Int4>(
              tiles.height(t), {tile_activations(t), from.data + group * stride, stride},
              problem.depth, own, tile_sums(scratch, 0, t), tiles.padded_rows() * Dot::columns,
              panels);
      }
    }
  }

  void run(const Scratch& scratch, Index p0, Index p1, Index t0, Index t1) const {
    const Index block =
        packed && tiles.count() == 1 ? std::max<Index>(steps, 1) : block_steps<Dot, packed>();
    for (Index group = p0; group < p1; group += kGroupPanels) {
      const Index panels = (std::min)(kGroupPanels, p1 - group);
      if constexpr (resumes)
        each(scratch, group, panels, t0, t1,
             [&](const auto& s) { problem.epilogue.load(Isa{}, s); });
      const bool widening = widens_in_registers();
      if (widening) multiply_widening(scratch, group, panels, t0, t1);
      for (Index first = 0; !widening && (first == 0 || first < steps); first += block) {
        const Index count = (std::min)(block, steps - first);
        if constexpr (!packed) pack_chunk(scratch, group, panels, first, count);
        multiply(scratch, group, panels, first, count, t0, t1);
      }
      if constexpr (grouped)
        if (steps == 0)
          std::fill_n(scratch.sums, panels * tiles.padded_rows() * Dot::columns, 0.0f);
      each(scratch, group, panels, t0, t1,
           [&](const auto& s) { problem.epilogue.store(Isa{}, s); });
    }
    problem.epilogue.finish(Isa{});
  }

  /// Panels inside: a row's values of the whole group are written side by side.
  template <typename F>
  void each(const Scratch& scratch, Index group, Index panels, Index t0, Index t1, F&& f) const {
    for (Index t = t0; t < t1; ++t)
      for (Index j = 0; j < panels; ++j) f(sums_of(scratch, group, group + j, t));
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
