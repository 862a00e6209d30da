/// \file
/// CPU kernels that pack four-bit weights: values are quantized or taken as given, 256 of a row at
/// a time, transposed like int8 into a stage in L1 and joined two in a byte (tile/int4.h).
#pragma once

#include "../vector/quantize_int4.h"
#include "pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Packs all panels of `weights`, values(matrix, row of it, k, n, to) writing u of [k, k + n).
template <int Matrices, typename D, typename Isa, typename Rows, typename Values>
void pack_nibbles(const Backend<D, Isa>& on, const problem::PackedPanels<int4>& packed,
                  const Rows& weights, Values&& values) {
  using Dot = tile::DotOfInt4<Isa>;
  constexpr Index chunk = 256, columns = Dot::columns, stage_units = chunk / 4 * columns;
  const Index depth = packed.columns;
  for_each_panel<Matrices>(on, packed, [&](Index panel, int4* to) {
    alignas(64) std::uint32_t stage[stage_units];  // [step][column]
    for (Index k = 0; k < depth; k += chunk) {
      const Index n = (std::min)(chunk, depth - k), steps = (n + 3) / 4;
      tile::clear(stage, steps * columns);
      weights.for_each_part(panel, columns, [&](int m, Index row, Index valid, int column) {
        tile::pack_lines<std::int8_t>(
            Isa{}, valid, columns, n, stage + column,
            [&](Index r, Index, int count, std::int8_t* u) { values(m, row + r, k, count, u); });
      });
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(stage);
      for (Index s = 0; s < steps; ++s, bytes += 4 * columns, to += tile::panel_step<Dot>)
        tile::join_nibbles<Dot>(bytes, to);
    }
  });
}

/// Symmetric values as what is stored.
inline void add_eight(std::int8_t* values, Index count) {
  for (Index i = 0; i < count; ++i) values[i] = static_cast<std::int8_t>(values[i] + 8);
}

/// Quantizes the rows of `weights` into panels, groups[m] those of matrix m.
template <int Matrices, typename D, typename Isa, typename Rows>
void pack_quantized_nibbles(const Backend<D, Isa>& on, const problem::PackedPanels<int4>& packed,
                            const Rows& weights, const Int4Groups* groups) {
  pack_nibbles<Matrices>(on, packed, weights,
                         [&](int m, Index row, Index k, int n, std::int8_t* u) {
                           const auto* line = weights.matrices[m].data + row * packed.columns;
                           quantize_int4_line<Isa>(line, k, n, groups[m].of_row(row), u);
                           if (groups[m].minimums == nullptr) add_eight(u, n);
                         });
}

/// Scales, and minimums where there are any, into the order of the panels.
template <int Matrices, typename Isa>
void arrange_groups(Isa isa, const problem::PackedPanels<int4>& packed, const Int4Groups* groups) {
  const float *scales[Matrices], *minimums[Matrices];
  for (int m = 0; m < Matrices; ++m) scales[m] = groups[m].scales, minimums[m] = groups[m].minimums;
  arrange_scales(isa, packed, packed.scales, scales);
  if (packed.minimums != nullptr) arrange_scales(isa, packed, packed.minimums, minimums);
}

/// Room for what quantizes `rows` rows: scales 1 and minimums 0 where there is no column.
inline Int4Groups take_groups(Workspace::Frame& frame, const problem::PackedPanels<int4>& packed,
                              Index rows, Int4Fit fit) {
  const Index count = ScaleGroups(packed.columns, packed.group).count;
  float* const scales = frame.take<float>(rows * count);
  float* const minimums = packed.minimums == nullptr ? nullptr : frame.take<float>(rows * count);
  return {scales, minimums, packed.group, count, fit};
}

template <typename D, typename Isa, typename W, int Matrices>
int execute(const Backend<D, Isa>& on, const problem::PackWeight<int4, W, Matrices>& p) {
  const Index rows = p.packed.rows / Matrices, depth = p.packed.columns;
  Workspace::Frame frame(on.workspace);
  const Int4Groups all = take_groups(frame, p.packed, p.packed.rows, p.fit);
  std::array<Int4Groups, Matrices> groups;
  for (int m = 0; m < Matrices; ++m) {
    groups[m] = all.of_row(m * rows);
    if (!find_int4_groups(on, p.weights[m], rows, depth, groups[m])) return m;
  }
  arrange_groups<Matrices>(Isa{}, p.packed, groups.data());
  pack_quantized_nibbles<Matrices>(on, p.packed, weight_rows(p.weights, rows, depth),
                                   groups.data());
  return -1;
}

template <typename D, typename Isa, typename W>
int execute(const Backend<D, Isa>& on, const problem::PackStackedWeight<int4, W>& p) {
  const Index rows = p.packed.rows, depth = p.packed.columns;
  Workspace::Frame frame(on.workspace);
  const Int4Groups all = take_groups(frame, p.packed, rows, p.fit);
  auto* const matrices = frame.take<MatrixOperand<W>>(p.count);
  auto* const groups = frame.take<Int4Groups>(p.count);
  for (int m = 0; m < p.count; ++m) {
    const Index begin = m == 0 ? 0 : p.ends[m - 1];
    matrices[m] = {p.weights[m], depth, 1};
    groups[m] = all.of_row(begin);
    if (!find_int4_groups(on, p.weights[m], p.ends[m] - begin, depth, groups[m])) return m;
  }
  arrange_groups<1>(Isa{}, p.packed, &all);
  pack_quantized_nibbles<1>(on, p.packed, StackedRows<W>{matrices, p.ends, p.count, rows}, groups);
  return -1;
}

/// Packs values that are given, weights[m] those of matrix m of `rows`.
template <int Matrices, typename D, typename Isa, typename Rows>
void pack_int4_values(const Backend<D, Isa>& on, const problem::PackedPanels<int4>& packed,
                      const Rows& rows, const problem::Int4Values* weights) {
  pack_nibbles<Matrices>(on, packed, rows, [&](int m, Index row, Index k, int n, std::int8_t* u) {
    std::copy_n(weights[m].values + row * packed.columns + k, n, u);
    if (packed.minimums == nullptr) add_eight(u, n);
  });
}

template <typename D, typename Isa, int Matrices>
void execute(const Backend<D, Isa>& on, const problem::PackInt4Weight<Matrices>& p) {
  const float *scales[Matrices], *minimums[Matrices];
  const std::int8_t* values[Matrices];
  for (int m = 0; m < Matrices; ++m) {
    values[m] = p.weights[m].values;
    scales[m] = p.weights[m].scales;
    minimums[m] = p.weights[m].minimums;
  }
  arrange_scales(Isa{}, p.packed, p.packed.scales, scales);
  if (p.packed.minimums != nullptr) arrange_scales(Isa{}, p.packed, p.packed.minimums, minimums);
  pack_int4_values<Matrices>(
      on, p.packed, weight_rows(values, p.packed.rows / Matrices, p.packed.columns), p.weights);
}

template <typename D, typename Isa>
void execute(const Backend<D, Isa>& on, const problem::PackStackedInt4Weight& p) {
  const Index rows = p.packed.rows, depth = p.packed.columns;
  Workspace::Frame frame(on.workspace);
  const Int4Groups all = take_groups(frame, p.packed, rows, Int4Fit::extremes);
  auto* const matrices = frame.take<MatrixOperand<std::int8_t>>(p.count);
  for (int m = 0; m < p.count; ++m) {
    const problem::Int4Values& own = p.weights[m];
    const Index begin = m == 0 ? 0 : p.ends[m - 1], count = (p.ends[m] - begin) * all.count;
    matrices[m] = {own.values, depth, 1};
    std::copy_n(own.scales, count, all.of_row(begin).scales);
    if (all.minimums != nullptr) std::copy_n(own.minimums, count, all.of_row(begin).minimums);
  }
  arrange_groups<1>(Isa{}, p.packed, &all);
  pack_int4_values<1>(on, p.packed, StackedRows<std::int8_t>{matrices, p.ends, p.count, rows},
                      p.weights);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
