/// \file
/// CPU kernels that pack weights into panels (tile/generic.h): one read of the weight and one write
/// of the panels, int8 with one read more, for the scales. Panels are shared out to the threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/check.h"
#include "../../core/memory.h"
#include "../../problem/linear.h"
#include "../backend.h"
#include "../tile/pack.h"
#include "../vector/quantize_line.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using tile::MatrixOperand;
using tile::StackedRows;
using tile::WeightRows;

template <typename T, typename Isa>
problem::PanelLayout panel_layout(Isa) {
  using Dot = tile::Dot<T, T, Isa>;
  return {std::is_base_of_v<isa::amx, Isa> ? isa::avx512_bf16::name : Isa::name, Dot::columns,
          Dot::step, host_memory.backend};
}

/// A weight that was packed somewhere else is refused.
template <typename S, typename Isa>
void require_layout(Isa isa, const problem::PackedPanels<const S>& weight,
                    std::string_view operation) {
  const problem::PanelLayout layout = panel_layout<S>(isa);
  detail::require_that(weight.rows == 0 || weight.layout == layout, operation,
                       "weight was packed for ", weight.layout.backend, " ", weight.layout.isa,
                       " (panels of ", weight.layout.columns, "), these kernels read ",
                       layout.backend, " ", layout.isa, " (panels of ", layout.columns,
                       "): pack it again");
}

/// (rows, columns) matrices as the packing takes them.
template <typename W, int Matrices>
WeightRows<W, Matrices> weight_rows(const W* const (&weights)[Matrices], Index rows,
                                    Index columns) {
  WeightRows<W, Matrices> result;
  for (int m = 0; m < Matrices; ++m) result.matrices[m] = {weights[m], columns, 1};
  result.rows = rows;
  return result;
}

/// How many scales an int8 row has, and over how many inputs each.
struct ScaleGroups {
  Index count, each;
  ScaleGroups(Index depth, Index group)
      : count(group == 0 ? 1 : (depth + group - 1) / group),
        each(group == 0 ? std::max<Index>(depth, 1) : group) {}
};

template <typename D, typename Isa, typename T>
problem::PanelSizes execute(const Backend<D, Isa>&, const problem::PanelsOf<T>& p) {
  constexpr auto name = "pack_weight";
  using detail::checked_product;
  const problem::PanelLayout layout = panel_layout<T>(Isa{});
  const Index width = layout.columns / p.matrices, panels = (p.rows + width - 1) / width;
  const Index panel = checked_product(tile::packed_steps<T>(Isa{}, p.columns),
                                      tile::panel_step<tile::Dot<T, T, Isa>>, name, "weight");
  checked_product(p.rows, p.matrices, name, "weight");
  const Index elements = checked_product(panels, panel, name, "weight"),
              scales =
                  checked_product(checked_product(panels, Index{layout.columns}, name, "scales"),
                                  ScaleGroups(p.columns, p.group).count, name, "scales");
  return {layout, elements, problem::is_quantized_weight<T> ? scales : 0};
}

/// Calls pack(panel, memory of the panel) for all panels, in parallel.
template <int Matrices, typename T, typename D, typename Isa, typename Pack>
void for_each_panel(const Backend<D, Isa>& on, const problem::PackedPanels<T>& packed,
                    Pack&& pack) {
  using Dot = tile::Dot<T, T, Isa>;
  const Index width = Dot::columns / Matrices, rows = packed.rows / Matrices,
              panels = (rows + width - 1) / width;
  const Index panel_size = tile::packed_steps<T>(Isa{}, packed.columns) * tile::panel_step<Dot>;
  parallel_for(on, panels, Cost{panel_size, kPackCycles}, [&](Index first, Index last, int) {
    for (Index p = first; p < last; ++p) pack(p, packed.data + p * panel_size);
  });
}

/// Values as they are, converted where their scalar differs.
template <int Matrices, typename D, typename Isa, typename T, typename Rows>
void pack_values(const Backend<D, Isa>& on, const problem::PackedPanels<T>& packed,
                 const Rows& weights) {
  using Dot = tile::Dot<T, T, Isa>;
  const Index depth = packed.columns, steps = tile::packed_steps<T>(Isa{}, depth);
  for_each_panel<Matrices>(on, packed, [&](Index panel, T* to) {
    tile::pack_panel<Dot>(Isa{}, weights, panel, 0, depth, steps, to);
  });
}

/// Scales (rows, groups) of each matrix, into the order of the panels; 1 where there is no row.
template <int Matrices, typename Isa, typename T>
void arrange_scales(Isa, const problem::PackedPanels<T>& packed, float* to,
                    const float* const (&scales)[Matrices]) {
  using Dot = tile::Dot<T, T, Isa>;
  const Index width = Dot::columns / Matrices, rows = packed.rows / Matrices, group = packed.group;
  const Index groups = ScaleGroups(packed.columns, group).count;
  for (Index first = 0; first < rows; first += width)
    for (Index g = 0; g < groups; ++g)
      for (int m = 0; m < Matrices; ++m)
        for (Index r = first; r < first + width; ++r)
          *to++ = r < rows ? scales[m][r * groups + g] : 1.0f;
}

/// Quantizes the rows of `weights` into panels; scales[m] (rows, groups) are those of matrix m.
template <int Matrices, typename D, typename Isa, typename Rows>
void pack_quantized_rows(const Backend<D, Isa>& on,
                         const problem::PackedPanels<std::int8_t>& packed, const Rows& weights,
                         const float* const* scales, const ScaleGroups& groups) {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  const Index depth = packed.columns, steps = tile::packed_steps<std::int8_t>(Isa{}, depth);
  for_each_panel<Matrices>(on, packed, [&](Index panel, std::int8_t* to) {
    auto* units = reinterpret_cast<std::uint32_t*>(to);
    tile::clear(units, steps * Dot::columns);
    weights.for_each_part(panel, Dot::columns, [&](int m, Index row, Index valid, int column) {
      const float* own = scales[m] + row * groups.count;
      const auto* from = weights.matrices[m].data + row * depth;
      tile::pack_lines<std::int8_t>(
          Isa{}, valid, Dot::columns, depth, units + column,
          [&](Index r, Index k, int n, std::int8_t* stage) {
            // k is a multiple of 256, so of every group size.
            const auto* line = from + r * depth + k;
            for (Index at = 0; at < n; at += groups.each) {
              const Index count = std::min<Index>(groups.each, n - at),
                          g = groups.count == 1 ? 0 : (k + at) / groups.each;
              quantize_line<Isa>(line + at, count, own[r * groups.count + g], stage + at);
            }
          });
    });
    tile::finish_panel<Dot>(to, steps);
  });
}

template <typename D, typename Isa, typename W, int Matrices>
int pack_quantized(const Backend<D, Isa>& on,
                   const problem::PackWeight<std::int8_t, W, Matrices>& p) {
  const Index rows = p.packed.rows / Matrices, depth = p.packed.columns;
  const ScaleGroups groups(depth, p.packed.group);
  Workspace::Frame frame(on.workspace);
  float* found = frame.take<float>(rows * groups.count * Matrices);
  std::fill_n(found, rows * groups.count * Matrices, 1.0f);
  const float* scales[Matrices];
  for (int m = 0; m < Matrices; ++m) {
    float* own = found + m * rows * groups.count;
    scales[m] = own;
    if (depth > 0 && !group_scales(on, p.weights[m], rows, depth, groups.each, own)) return m;
  }
  arrange_scales(Isa{}, p.packed, p.packed.scales, scales);
  pack_quantized_rows<Matrices>(on, p.packed, weight_rows(p.weights, rows, depth), scales, groups);
  return -1;
}

template <typename D, typename Isa, typename T, typename W>
int execute(const Backend<D, Isa>& on, const problem::PackStackedWeight<T, W>& p) {
  const Index rows = p.packed.rows, depth = p.packed.columns;
  Workspace::Frame frame(on.workspace);
  auto* const matrices = frame.take<MatrixOperand<W>>(p.count);
  for (int m = 0; m < p.count; ++m) matrices[m] = {p.weights[m], depth, 1};
  const StackedRows<W> stacked{matrices, p.ends, p.count, rows};
  if constexpr (std::is_same_v<T, std::int8_t>) {
    const ScaleGroups groups(depth, p.packed.group);
    float* found = frame.take<float>(rows * groups.count);
    std::fill_n(found, rows * groups.count, 1.0f);
    auto* const scales = frame.take<const float*>(p.count);
    for (int m = 0; m < p.count; ++m) {
      const Index begin = m == 0 ? 0 : p.ends[m - 1];
      float* own = found + begin * groups.count;
      scales[m] = own;
      if (depth > 0 && !group_scales(on, p.weights[m], p.ends[m] - begin, depth, groups.each, own))
        return m;
    }
    arrange_scales<1>(Isa{}, p.packed, p.packed.scales, {found});
    pack_quantized_rows<1>(on, p.packed, stacked, scales, groups);
  } else {
    pack_values<1>(on, p.packed, stacked);
  }
  return -1;
}

template <typename D, typename Isa, typename T, typename W, int Matrices>
int execute(const Backend<D, Isa>& on, const problem::PackWeight<T, W, Matrices>& p) {
  if constexpr (std::is_same_v<T, std::int8_t>) return pack_quantized(on, p);
  pack_values<Matrices>(on, p.packed,
                        weight_rows(p.weights, p.packed.rows / Matrices, p.packed.columns));
  return -1;
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::PackInt8Weight& p) {
  arrange_scales<1>(Isa{}, p.packed, p.packed.scales, {p.scales});
  pack_values<1>(on, p.packed,
                 weight_rows<std::int8_t, 1>({p.values}, p.packed.rows, p.packed.columns));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
