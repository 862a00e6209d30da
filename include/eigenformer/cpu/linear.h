/// \file
/// CPU kernel of the linear layer and its gradients: one blocked matrix product, sums(row, column) = sum over k of x(row, k)
/// w(column, k).
///
/// Activations are packed into tiles (up to 12 rows), weights into panels (32 columns on AVX-512), see tile/generic.h. Loops,
/// outermost first: blocks of 384 rows, so that a block of activations and k fills less than half of an L2 of 1 MiB; groups of 8
/// panels, shared out to the threads; blocks of k of 32 KiB a panel; panels; tiles. Sums wait between blocks of k in tile-shaped
/// scratch. Plain weights are packed chunk by chunk into the worker's scratch. One tile of rows or less streams whole panels,
/// several in flight.
///
/// Each sum is one chain over k in ascending order whatever the blocks, so a row has the same bits alone or among others, with any
/// number of threads, and for any subset of the weight's rows. After Goto and van de Geijn, "Anatomy of High-Performance Matrix
/// Multiplication" (2008).
#pragma once

#include "../core/device.h"
#include "../core/workspace.h"
#include "linear_epilogue.h"
#include "quantize_line.h"
#include "tile/pack.h"
#include "tile/product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Weights in panels: steps * Dot::columns * Dot::step elements a panel, `sums` 128 times each column's sum (int8 only).
template <typename Stored>
struct PackedPanels {
  const Stored* data;
  const std::int32_t* offsets;
};

/// A checked request: y = epilogue(x w^T). Weights is MatrixOperand<W> or PackedPanels<Stored>.
template <typename X, typename Weights, typename Epilogue>
struct ProductProblem {
  using epilogue_type = Epilogue;
  MatrixOperand<X> x;  // (rows, depth)
  Weights weights;     // (columns, depth)
  Index rows, columns, depth;
  Epilogue epilogue;
};

namespace cpu {

constexpr Index kBlockRows = 384;   // a multiple of every tile height's maximum: 12, 6, 4
constexpr Index kBlockUnits = 256;  // units of a row in one block of k
constexpr Index kGroupPanels = 8;

template <typename Weights>
inline constexpr bool is_packed = false;
template <typename Stored>
inline constexpr bool is_packed<PackedPanels<Stored>> = true;

template <typename Dot>
inline constexpr bool offset_activations = false;
template <typename Dot>
  requires std::is_same_v<typename Dot::Stored, std::int8_t>
inline constexpr bool offset_activations<Dot> = Dot::offset_activations;

/// How the rows of a block fall into tiles.
template <typename Dot>
struct Tiles {
  Index rows, count;
  explicit Tiles(Index block_rows) : rows(block_rows), count((block_rows + Dot::rows - 1) / Dot::rows) {}
  Index valid(Index t) const { return std::min<Index>(Dot::rows, rows - t * Dot::rows); }
  int height(Index t) const { return tile::tile_height<Dot>(valid(t)); }
  Index padded_rows() const { return count == 0 ? 0 : (count - 1) * Dot::rows + height(count - 1); }
};

/// Quantizes one row of activations into its place in an int8 tile; the scale goes to *scale.
template <typename Dot, typename Isa, typename X>
void pack_quantized_row(Isa, const X* row, Index depth, int height, typename Dot::Unit* to, float* scale) {
  constexpr Index chunk = 256;
  alignas(64) std::int8_t values[chunk];
  *scale = activation_scale<Isa>(row, depth);
  for (Index k = 0; k < depth; k += chunk) {
    const Index n = std::min(chunk, depth - k), quads = (n + 3) / 4;
    quantize_activation_line<Isa>(row + k, n, *scale, values);
    std::fill(values + n, values + quads * 4, std::int8_t{0});
    for (Index q = 0; q < quads; ++q, to += height * Dot::units) {
      std::uint32_t quad;
      std::memcpy(&quad, values + 4 * q, 4);
      if constexpr (Dot::offset_activations)
        *to = quad ^ 0x80808080u;
      else if constexpr (Dot::units == 1)
        *to = quad;
      else
        tile::split_quad(quad, to[0], to[height]);
    }
  }
}

template <typename Dot, typename Isa, typename X>
void pack_activations(Isa isa, const MatrixOperand<X>& x, Index row, Index rows, int height, Index depth, typename Dot::Unit* to,
                      float* scales) {
  if constexpr (std::is_same_v<typename Dot::Stored, std::int8_t>) {
    if (rows < height) std::fill_n(to, (depth + 3) / 4 * Dot::units * height, 0u);
    for (Index r = 0; r < rows; ++r)
      pack_quantized_row<Dot>(isa, x.data + (row + r) * x.row_stride, depth, height, to + r, scales + r);
  } else {
    tile::pack_tile<Dot>(isa, x, row, rows, height, depth, to);
  }
}

/// One block of rows: the packed activations, and the work of one worker on a range of panels and tiles.
template <typename Dot, typename Isa, typename Problem>
struct ProductBlock {
  using Unit = typename Dot::Unit;
  using Sum = typename Dot::Sum;
  using Stored = typename Dot::Stored;
  static constexpr bool packed = is_packed<decltype(Problem::weights)>;
  static constexpr Index panel_step = Index{Dot::columns} * Dot::step;  // elements of a panel in one step
  static constexpr Index block_steps = kBlockUnits / Dot::units;

  const Problem& problem;
  Index row;  // first of the block
  Tiles<Dot> tiles;
  Index steps;
  Unit* activations;  // (tiles, steps, units, height)
  float* scales;      // (rows) of int8 activations

  struct Scratch {
    Sum* sums;              // (panels of a group, padded rows, columns of a panel)
    Stored* chunk;          // (panels of a group, block_steps, panel_step), plain weights only
    std::int32_t* offsets;  // (panels of a group, columns of a panel), plain int8 weights only
  };

  Unit* tile_activations(Index t) const { return activations + t * Dot::rows * steps * Dot::units; }

  void pack(Index first, Index last) const {
    for (Index t = first; t < last; ++t)
      pack_activations<Dot>(Isa{}, problem.x, row + t * Dot::rows, tiles.valid(t), tiles.height(t), problem.depth,
                            tile_activations(t), scales + t * Dot::rows);
  }

  TileSums<Sum> sums_of(const Scratch& scratch, Index group, Index panel, Index t) const {
    const Index column = panel * Dot::columns, j = panel - group;
    Sum* sums = scratch.sums + (j * tiles.padded_rows() + t * Dot::rows) * Dot::columns;
    const std::int32_t* offsets = nullptr;
    if constexpr (offset_activations<Dot>) {
      if constexpr (packed)
        offsets = problem.weights.offsets + column;
      else
        offsets = scratch.offsets + j * Dot::columns;
    }
    return {sums,
            Dot::columns,
            row + t * Dot::rows,
            static_cast<int>(tiles.valid(t)),
            column,
            static_cast<int>(std::min<Index>(Dot::columns, problem.columns - column)),
            scales + t * Dot::rows,
            offsets};
  }

  /// Packs steps [first, first + count) of `panels` panels of plain weights.
  void pack_chunk(const Scratch& scratch, Index group, Index panels, Index first, Index count) const {
    const Index k = first * Dot::step, depth = std::min(count * Dot::step, problem.depth - k);
    for (Index j = 0; j < panels; ++j) {
      const Index column = (group + j) * Dot::columns;
      Stored* chunk = scratch.chunk + j * block_steps * panel_step;
      tile::pack_panel<Dot>(Isa{}, problem.weights, column, std::min<Index>(Dot::columns, problem.columns - column), k, depth,
                            chunk);
      if constexpr (offset_activations<Dot>) tile::add_offsets<Dot>(chunk, count, scratch.offsets + j * Dot::columns);
    }
  }

  /// Steps [first, first + count) for all tiles in [t0, t1) and `panels` panels.
  void multiply(const Scratch& scratch, Index group, Index panels, Index first, Index count, Index t0, Index t1) const {
    const Stored* weights;
    Index stride;
    if constexpr (packed) {
      stride = steps * panel_step;
      weights = problem.weights.data + group * stride + first * panel_step;
    } else {
      stride = block_steps * panel_step;
      weights = scratch.chunk;
    }
    const Index sums_stride = tiles.padded_rows() * Dot::columns;
    const bool from_zero = first == 0 && !Problem::epilogue_type::starts_from_output;
    const Index at_once = t1 - t0 == 1 ? panels : 1;  // many tiles: a panel's chunk stays in L1 for all of them
    for (Index j = 0; j < panels; j += at_once)
      for (Index t = t0; t < t1; ++t) {
        const int height = tiles.height(t);
        tile::tile_products<Dot>(height, tile_activations(t) + first * Dot::units * height, weights + j * stride, stride, count,
                                 scratch.sums + (j * tiles.padded_rows() + t * Dot::rows) * Dot::columns, sums_stride, at_once,
                                 from_zero);
      }
  }

  void run(const Scratch& scratch, Index p0, Index p1, Index t0, Index t1) const {
    const Index block = packed && tiles.count == 1 ? std::max<Index>(steps, 1) : block_steps;
    for (Index group = p0; group < p1; group += kGroupPanels) {
      const Index panels = std::min(kGroupPanels, p1 - group);
      if constexpr (Problem::epilogue_type::starts_from_output)
        each(scratch, group, panels, t0, t1, [&](const auto& s) { problem.epilogue.load(Isa{}, s); });
      if constexpr (offset_activations<Dot> && !packed) std::fill_n(scratch.offsets, panels * Dot::columns, 0);
      for (Index first = 0; first == 0 || first < steps; first += block) {
        const Index count = std::min(block, steps - first);
        if constexpr (!packed) pack_chunk(scratch, group, panels, first, count);
        multiply(scratch, group, panels, first, count, t0, t1);
      }
      each(scratch, group, panels, t0, t1, [&](const auto& s) { problem.epilogue.store(Isa{}, s); });
    }
  }

  template <typename F>
  void each(const Scratch& scratch, Index group, Index panels, Index t0, Index t1, F&& f) const {
    for (Index j = 0; j < panels; ++j)
      for (Index t = t0; t < t1; ++t) f(sums_of(scratch, group, group + j, t));
  }
};

template <typename Dot, typename Isa, CpuDevice D, typename Problem>
void product(Isa, const D& device, const Problem& p, Workspace& workspace) {
  using Block = ProductBlock<Dot, Isa, Problem>;
  const Index steps = (p.depth + Dot::step - 1) / Dot::step, panels = (p.columns + Dot::columns - 1) / Dot::columns;
  if (p.rows == 0 || panels == 0) return;
  const Tiles<Dot> largest(std::min(kBlockRows, p.rows));
  const Index group = std::min(kGroupPanels, panels), workers = worker_count(device);
  const Index sums = group * largest.padded_rows() * Dot::columns;
  const Index chunk = Block::packed ? 0 : group * Block::block_steps * Block::panel_step;
  const Index offsets = Block::packed ? 0 : group * Dot::columns;
  Workspace::Frame frame(workspace);
  auto* activations = frame.take<typename Dot::Unit>(largest.padded_rows() * steps * Dot::units);
  auto* scales = frame.take<float>(kBlockRows);
  auto* all_sums = frame.take<typename Dot::Sum>(workers * sums);
  auto* all_chunks = frame.take<typename Dot::Stored>(workers * chunk);
  auto* all_offsets = frame.take<std::int32_t>(workers * offsets);
  for (Index row = 0; row < p.rows; row += kBlockRows) {
    const Tiles<Dot> tiles(std::min(kBlockRows, p.rows - row));
    const Block block{p, row, tiles, steps, activations, scales};
    parallel_for(device, tiles.count, 1 + 65536 / (Dot::rows * (p.depth + 1)),
                 [&](Index first, Index last, int) { block.pack(first, last); });
    const auto scratch = [&](int worker) {
      return typename Block::Scratch{all_sums + worker * sums, all_chunks + worker * chunk, all_offsets + worker * offsets};
    };
    // About 40,000 cycles pay for waking a thread: a step of a panel costs two cycles a row, and eight to fetch its weights.
    const Index panel_cycles = (steps + 1) * (2 * tiles.rows + 8);
    if (panels < workers && tiles.count > panels)
      parallel_for(device, tiles.count, 1 + 40000 * tiles.count / (panel_cycles * panels),
                   [&](Index first, Index last, int worker) { block.run(scratch(worker), 0, panels, first, last); });
    else
      parallel_for(device, panels, 1 + 40000 / panel_cycles,
                   [&](Index first, Index last, int worker) { block.run(scratch(worker), first, last, 0, tiles.count); });
  }
}

/// grad_bias[column] += sum over tokens, in their order.
template <typename Isa, CpuDevice D, typename G, typename T>
void add_column_sums(Isa, const D& device, G* sums, const T* matrix, Index rows, Index columns) {
  using V = simd::Vec<G, Isa>;
  const Index blocks = (columns + V::lanes - 1) / V::lanes;
  parallel_for(device, blocks, 1 + 65536 / (rows * V::lanes + 1), [&](Index first, Index last, int) {
    for (Index b = first; b < last; ++b) {
      const Index at = b * V::lanes;
      const int n = static_cast<int>(std::min<Index>(V::lanes, columns - at));
      V sum = V::load_partial(sums + at, n);
      for (Index r = 0; r < rows; ++r) sum = sum + V::load_partial(matrix + r * columns + at, n);
      sum.store_partial(sums + at, n);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
