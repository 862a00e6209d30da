/// \file
/// CUDA kernels that pack weights. On a GPU a packed weight is its rows one below the other,
/// row-major, each from a multiple of 16 bytes on and filled up with zeros: tensor cores take
/// their operands from any such rows, and a warp that streams a row has its 16 bytes per lane in
/// one line; int4 has an order of its own (int4.cuh). Several weights, those of a gated pair too,
/// lie one below the other. Scales are (rows, groups).
///
/// One coalesced pass per matrix: a read and a write, int8 and int4 with one read more, for the
/// scales (quantization.cuh, int4.cuh). Bound by bandwidth; more than half of it is expected, not
/// measured yet.
#pragma once

#include "../core/check.h"
#include "../problem/linear.h"
#include "packs.cuh"
#include "quantization.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Elements of 16 bytes, to multiples of which rows are filled up.
template <typename T>
inline constexpr int row_step = static_cast<int>(16 / sizeof(T));

template <typename T>
constexpr problem::PanelLayout panel_layout() {
  return {"sm_80", 1, row_step<T>, "cuda"};
}

/// From one row of a packed weight to the next; of int4, whose rows are of bytes (int4.cuh), in
/// these.
template <typename T>
EIGENFORMER_HOST_DEVICE constexpr Index packed_stride(Index columns) {
  constexpr Index each = std::is_same_v<T, int4> ? 2 : 1, step = row_step<T> * each;
  return (columns + step - 1) / step * row_step<T>;
}

/// A weight that was packed somewhere else is refused.
template <typename S>
void require_rows(const problem::PackedPanels<const S>& weight, std::string_view operation) {
  detail::require_that(weight.rows == 0 || weight.layout == panel_layout<S>(), operation,
                       "weight was packed for ", weight.layout.backend, " ", weight.layout.isa,
                       ", these kernels read what is packed on a GPU: pack it there");
}

/// Scales of a quantized row.
constexpr Index scale_groups(Index columns, Index group) {
  return group == 0 ? 1 : (columns + group - 1) / group;
}

template <typename D, typename T>
problem::PanelSizes execute(const Backend<D>&, const problem::PanelsOf<T>& p) {
  constexpr auto name = "pack_weight";
  using detail::checked_product;
  using detail::require_that;
  require_that(p.columns <= (std::numeric_limits<Index>::max)() - 2 * row_step<T>, name,
               "weight has ", p.columns, " columns, too many");
  const Index rows = checked_product(p.rows, p.matrices, name, "weight"),
              elements = checked_product(rows, packed_stride<T>(p.columns), name, "weight"),
              scales = checked_product(rows, scale_groups(p.columns, p.group), name, "scales");
  return {panel_layout<T>(), elements, problem::is_quantized_weight<T> ? scales : 0};
}

/// Rows (rows, columns) to rows of `stride`, each number rounded once.
template <typename T, typename W>
struct PackBody {
  // what are the same scalars keeps its bits, NaN's too
  using C = std::conditional_t<std::is_same_v<T, W>, T, compute_type<T>>;
  T* to;
  const W* from;
  Index columns, stride;

  template <int Width>
  EIGENFORMER_DEVICE void operator()(WidthOf<Width>, Index row, Index column) const {
    Pack<C, Width> values;
    for (int i = 0; i < Width; ++i) values[i] = static_cast<C>(0);
    if (column < columns) values = load_pack<C, Width>(from + row * columns + column);
    store_pack(values, to + row * stride + column);
  }
};

template <typename D, typename T, typename W>
void pack_values(const Backend<D>& on, T* to, const W* from, Index rows, Index columns) {
  const Index stride = packed_stride<T>(columns);
  constexpr int width = row_step<T>;
  launch_for_each_pack<width>(on, "pack_weight", rows, stride,
                              packs_fit<width>(from, columns) && packs_fit<width>(to, stride),
                              PackBody<T, W>{to, from, columns, stride});
}

/// Quantizes one matrix (rows, columns) as the rows from `first` on.
template <typename D, typename W>
void pack_int4_rows(const Backend<D>& on, const problem::PackedPanels<int4>& packed, Index first,
                    const W* weight, Index rows, Int4Fit fit) {
  const Index columns = packed.columns, stride = packed_stride<int4>(columns),
              groups = scale_groups(columns, packed.group), scales = first * groups;
  launch_warps(on, "pack_weight", rows * groups,
               PackInt4Kernel<W>{weight, packed.data + first * stride, packed.scales + scales,
                                 packed.minimums == nullptr ? nullptr : packed.minimums + scales,
                                 rows, columns, packed.group, groups, stride, fit});
}

/// Packs one matrix (rows, columns) as the rows from `first` on.
template <typename D, typename T, typename W>
void pack_matrix(const Backend<D>& on, const problem::PackedPanels<T>& packed, Index first,
                 const W* weight, Index rows, [[maybe_unused]] Int4Fit fit) {
  const Index columns = packed.columns, stride = packed_stride<T>(columns);
  T* const to = packed.data + first * stride;
  if constexpr (std::is_same_v<T, int4>) {
    pack_int4_rows(on, packed, first, weight, rows, fit);
  } else if constexpr (std::is_same_v<T, std::int8_t>) {
    const Index group = packed.group == 0 ? columns : packed.group,
                groups = scale_groups(columns, packed.group);
    const problem::Quantize<W> quantize{weight, to,   packed.scales + first * groups, rows, columns,
                                        group,  false};
    quantize_rows(on, "pack_weight", quantize, groups, stride);
  } else {
    pack_values(on, to, weight, rows, columns);
  }
}

/// A row, or group, that is not quantizable has the scale NaN and zeros: -1, whatever it holds.
template <typename D, typename T, typename W, int Matrices>
int execute(const Backend<D>& on, const problem::PackWeight<T, W, Matrices>& p) {
  const Index rows = p.packed.rows / Matrices;
  for (int m = 0; m < Matrices; ++m) pack_matrix(on, p.packed, m * rows, p.weights[m], rows, p.fit);
  return -1;
}

template <typename D, typename T, typename W>
int execute(const Backend<D>& on, const problem::PackStackedWeight<T, W>& p) {
  for (int m = 0; m < p.count; ++m) {
    const Index first = m == 0 ? 0 : p.ends[m - 1];
    pack_matrix(on, p.packed, first, p.weights[m], p.ends[m] - first, p.fit);
  }
  return -1;
}

/// Numbers that belong to rows or groups, as they are.
template <typename D>
void copy_factors(const Backend<D>& on, const float* from, float* to, Index count) {
  constexpr int width = row_step<float>;
  launch_for_each_pack<width>(on, "pack_weight", 1, count,
                              packs_fit<width>(from, 0) && packs_fit<width>(to, 0),
                              PackBody<float, float>{to, from, count, count});
}

template <typename D>
void execute(const Backend<D>& on, const problem::PackInt8Weight& p) {
  const problem::PackedPanels<std::int8_t>& packed = p.packed;
  pack_values(on, packed.data, p.values, packed.rows, packed.columns);
  copy_factors(on, p.scales, packed.scales,
               packed.rows * scale_groups(packed.columns, packed.group));
}

/// Values that are given, of one matrix, as the rows from `first` on.
template <typename D>
void pack_int4_values(const Backend<D>& on, const problem::PackedPanels<int4>& packed, Index first,
                      const problem::Int4Values& weight, Index rows) {
  const Index stride = packed_stride<int4>(packed.columns),
              groups = scale_groups(packed.columns, packed.group);
  launch_for_each(on, "pack_weight", rows * stride,
                  PackInt4Body{weight.values, packed.data + first * stride, packed.columns, stride,
                               packed.minimums == nullptr ? 8 : 0});
  copy_factors(on, weight.scales, packed.scales + first * groups, rows * groups);
  if (packed.minimums != nullptr)
    copy_factors(on, weight.minimums, packed.minimums + first * groups, rows * groups);
}

template <typename D, int Matrices>
void execute(const Backend<D>& on, const problem::PackInt4Weight<Matrices>& p) {
  const Index rows = p.packed.rows / Matrices;
  for (int m = 0; m < Matrices; ++m) pack_int4_values(on, p.packed, m * rows, p.weights[m], rows);
}

template <typename D>
void execute(const Backend<D>& on, const problem::PackStackedInt4Weight& p) {
  for (int m = 0; m < p.count; ++m) {
    const Index first = m == 0 ? 0 : p.ends[m - 1];
    pack_int4_values(on, p.packed, first, p.weights[m], p.ends[m] - first);
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
