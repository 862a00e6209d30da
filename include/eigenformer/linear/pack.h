/// \file
/// Packing: from tensors to PackedWeight. The manual is packed_weight.h.
#pragma once

#include <cmath>

#include "../core/rows.h"
#include "packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// "3, 17": where in a view the element at `flat` is.
template <typename View>
std::string index_text(const View& view, Index flat) {
  std::string at;
  Index rest = flat;
  for (int d = rank_of<View> - 1; d >= 0; --d) {
    const Index size = view.dimension(static_cast<std::size_t>(d));
    at = std::to_string(rest % size) + (at.empty() ? "" : ", ") + at;
    rest /= size;
  }
  return at;
}

/// "operation: weights[3, 17] is nan, expected finite numbers", for the element at `flat`.
template <typename View>
[[noreturn]] void throw_not_quantizable(std::string_view operation, std::string_view argument,
                                        const View& view, Index flat) {
  require_that(false, operation, argument, "[", index_text(view, flat), "] is ",
               static_cast<double>(view.data()[flat]),
               ", expected finite numbers whose scale fits a float");
  std::abort();  // not reached
}

/// One weight, or the two of a gated unit, as the packing takes them.
template <typename W, int Matrices>
WeightRows<W, Matrices> weight_rows_of(const TensorView<const W, 2> (&views)[Matrices]) {
  WeightRows<W, Matrices> result;
  for (int m = 0; m < Matrices; ++m)
    result.matrices[m] = {views[m].data(), views[m].dimension(1), 1};
  result.rows = views[0].dimension(0);
  return result;
}

/// Calls pack(panel, memory of the panel) for all panels, in parallel.
template <int Matrices, typename T, typename Isa, typename D, typename Pack>
void for_each_panel(Isa isa, const D& device, PackedWeight<T>& packed, Pack&& pack) {
  using Dot = tile::Dot<T, T, Isa>;
  const Index width = Dot::columns / Matrices, rows = packed.rows() / Matrices,
              panels = (rows + width - 1) / width;
  const Index panel_size = tile::packed_steps<T>(isa, packed.columns()) * Dot::step * Dot::columns;
  T* data = WeightAccess<T>::data(packed);
  parallel_for(device, panels, 1 + 65536 / (panel_size + 1), [&](Index first, Index last, int) {
    for (Index p = first; p < last; ++p) pack(p, data + p * panel_size);
  });
}

/// Values as they are, converted where their scalar differs.
template <int Matrices, typename Isa, typename D, typename T, typename W>
void pack_values(Isa isa, const D& device, PackedWeight<T>& packed,
                 const TensorView<const W, 2> (&views)[Matrices]) {
  using Dot = tile::Dot<T, T, Isa>;
  const auto weights = weight_rows_of(views);
  const Index depth = packed.columns(), steps = tile::packed_steps<T>(isa, depth);
  for_each_panel<Matrices>(isa, device, packed, [&](Index panel, T* to) {
    tile::pack_panel<Dot>(isa, weights, panel, 0, depth, steps, to);
  });
}

/// Scales (rows, groups) of each matrix, into the order of the panels; 1 where there is no row.
template <int Matrices, typename Isa>
void arrange_scales(Isa, PackedWeight<std::int8_t>& packed,
                    const float* const (&scales)[Matrices]) {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  const Index width = Dot::columns / Matrices, rows = packed.rows() / Matrices,
              group = packed.group_size();
  const Index groups = group == 0 ? 1 : (packed.columns() + group - 1) / group;
  float* to = WeightAccess<std::int8_t>::scales(packed);
  for (Index first = 0; first < rows; first += width)
    for (Index g = 0; g < groups; ++g)
      for (int m = 0; m < Matrices; ++m)
        for (Index r = first; r < first + width; ++r)
          *to++ = r < rows ? scales[m][r * groups + g] : 1.0f;
}

/// What exceptions call the operator.
template <int Matrices>
inline constexpr std::string_view packing_name =
    Matrices == 1 ? "pack_weight" : "pack_gated_weight";

/// Quantizes and packs, with a scale for each `group` inputs (0: each row). `names` are those of
/// the arguments.
template <int Matrices, typename Isa, typename D, typename W>
void pack_quantized(Isa isa, const D& device, PackedWeight<std::int8_t>& packed,
                    const TensorView<const W, 2> (&views)[Matrices],
                    const std::string_view (&names)[Matrices], Index group, Workspace& workspace) {
  using Dot = tile::Dot<std::int8_t, std::int8_t, Isa>;
  const auto weights = weight_rows_of(views);
  const Index rows = weights.rows, depth = views[0].dimension(1),
              each = group == 0 ? std::max<Index>(depth, 1) : group;
  const Index groups = group == 0 ? 1 : (depth + group - 1) / group;
  constexpr std::string_view name = packing_name<Matrices>;
  const Index all_scales =
      checked_product(checked_product(rows, groups, name, "scales"), Matrices, name, "scales");
  Workspace::Frame frame(workspace);
  float* found = frame.take<float>(all_scales);
  std::fill_n(found, all_scales, 1.0f);
  const float* scales[Matrices];
  for (int m = 0; m < Matrices; ++m) {
    float* own = found + m * rows * groups;
    scales[m] = own;
    if (depth > 0 && !cpu::group_scales(isa, device, views[m].data(), rows, depth, each, own))
      throw_not_quantizable(name, names[m], views[m],
                            cpu::first_not_quantizable(views[m].data(), rows * depth));
  }
  WeightAccess<std::int8_t>::reshape(packed, isa, rows, depth, Matrices, group);
  arrange_scales(isa, packed, scales);
  const Index steps = tile::packed_steps<std::int8_t>(isa, depth);
  for_each_panel<Matrices>(isa, device, packed, [&](Index panel, std::int8_t* to) {
    auto* units = reinterpret_cast<std::uint32_t*>(to);
    tile::clear(units, steps * Dot::columns);
    int m = 0;
    weights.for_each_part(
        panel, Dot::columns,
        [&](const MatrixOperand<W>& matrix, Index row, Index valid, int column) {
          const float* own = scales[m++] + row * groups;
          tile::pack_lines<std::int8_t>(
              isa, valid, Dot::columns, depth, units + column,
              [&](Index r, Index k, int n, std::int8_t* stage) {
                const W* line = matrix.data + (row + r) * depth +
                                k;  // k is a multiple of 256, so of every group size
                for (Index at = 0; at < n; at += each) {
                  const Index count = std::min<Index>(each, n - at),
                              g = group == 0 ? 0 : (k + at) / each;
                  cpu::quantize_line<Isa>(line + at, count, own[r * groups + g], stage + at);
                }
              });
        });
    tile::finish_panel<Dot>(to, steps);
  });
}

template <int Matrices, typename Isa, typename D, typename T, typename W>
void pack_weight_on(Isa isa, const D& device, PackedWeight<T>& packed,
                    const TensorView<const W, 2> (&views)[Matrices],
                    const std::string_view (&names)[Matrices], const Int8Packing& options,
                    Workspace& workspace) {
  static_assert(FloatingScalar<W>,
                "eigenformer: pack_weight takes float, double, Eigen::bfloat16 or Eigen::half; "
                "int8 needs its scales");
  static_assert(FloatingScalar<T> || std::is_same_v<T, std::int8_t>,
                "eigenformer: a PackedWeight holds a floating scalar or std::int8_t");
  constexpr std::string_view name = packing_name<Matrices>;
  checked_size(name, names[0], views[0]);
  for (int m = 1; m < Matrices; ++m)
    require_same_shape(name, names[0], views[0], names[m], views[m]);
  if constexpr (std::is_same_v<T, std::int8_t>) {
    if (options.group_size == 0)
      require_int8_depth(views[0].dimension(1), name);
    else
      require_group_size(options.group_size, name);
    pack_quantized(isa, device, packed, views, names, options.group_size, workspace);
  } else {
    require_that(options.group_size == 0, name, "group_size is ", options.group_size,
                 ", but only int8 weights have groups");
    WeightAccess<T>::reshape(packed, isa, views[0].dimension(0), views[0].dimension(1), Matrices,
                             0);
    pack_values(isa, device, packed, views);
  }
}

template <typename Isa, typename D, typename T, typename W>
void pack_weight_on(Isa isa, const D& device, PackedWeight<T>& packed,
                    TensorView<const W, 2> weight, Workspace& workspace,
                    const Int8Packing& options = {}) {
  pack_weight_on(isa, device, packed, {weight}, {"weights"}, options, workspace);
}

/// Scales of weights are finite and not negative; names the first that is not.
template <typename View>
void require_scales(std::string_view name, const View& scales) {
  for (Index i = 0; i < scales.size(); ++i) {
    const float scale = scales.data()[i];
    if (std::isfinite(scale) && scale >= 0) [[likely]]
      continue;
    require_that(false, name, "scales[", index_text(scales, i), "] is ", scale,
                 ", expected finite and not negative");
  }
}

/// From int8 values and scales (out) or (out, groups).
template <typename Isa, typename D, typename Scales>
void pack_int8_values(Isa isa, const D& device, PackedWeight<std::int8_t>& packed,
                      TensorView<const std::int8_t, 2> values, const Scales& scales,
                      const Int8Packing& options) {
  constexpr auto name = "pack_weight";
  checked_size(name, "weight", values);
  checked_size(name, "scales", scales);
  const Index rows = values.dimension(0), depth = values.dimension(1), group = options.group_size;
  require_that(scales.dimension(0) == rows, name, "scales has ", scales.dimension(0),
               " rows, weight has ", rows, " rows");
  if constexpr (rank_of<Scales> == 1) {
    require_that(group == 0, name, "group_size is ", group,
                 ", but scales has one number a row: expected (", rows, ", ",
                 group > 0 ? (depth + group - 1) / group : 1, ")");
    require_int8_depth(depth, name);
  } else {
    require_group_size(group, name);
    const Index groups = (depth + group - 1) / group;
    require_that(scales.dimension(1) == groups, name, "scales has ", scales.dimension(1),
                 " columns, expected ", groups, ", one for each ", group, " of ", depth, " inputs");
  }
  require_scales(name, scales);
  WeightAccess<std::int8_t>::reshape(packed, isa, rows, depth, 1, group);
  arrange_scales(isa, packed, {scales.data()});
  pack_values(isa, device, packed, {values});
}

template <typename Scales>
auto scales_view(const Scales& scales) {
  static_assert(std::is_same_v<scalar_of<Scales>, float>, "eigenformer: scales are float");
  return input_view<(rank_of<Scales> == 2 ? 2 : 1)>(scales);
}

}  // namespace detail

/// Packs `weight` (out, in) into `packed`, whose memory is reused; nothing is allocated where it
/// suffices.
template <CpuDevice D, typename T, typename Weight>
void pack_weight_into(const D& device, PackedWeight<T>& packed, const Weight& weight,
                      Workspace& workspace = thread_workspace()) {
  detail::pack_weight_on(isa::best{}, device, packed, input_view<2>(weight), workspace);
}
template <CpuDevice D, typename Weight>
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Weight& weight,
                      const Int8Packing& options, Workspace& workspace = thread_workspace()) {
  detail::pack_weight_on(isa::best{}, device, packed, input_view<2>(weight), workspace, options);
}

/// Packs int8 values (out, in) with one scale a row (out), or one a group (out, ceil(in /
/// group_size)).
template <CpuDevice D, typename Values, typename Scales>
  requires(!std::same_as<Scales, Int8Packing>)
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Values& values,
                      const Scales& scales, const Int8Packing& options = {}) {
  detail::pack_int8_values(isa::best{}, device, packed, input_view<2>(values),
                           detail::scales_view(scales), options);
}

template <typename T, CpuDevice D, typename Weight>
PackedWeight<T> pack_weight(const D& device, const Weight& weight,
                            const Int8Packing& options = {}) {
  PackedWeight<T> packed;
  detail::pack_weight_on(isa::best{}, device, packed, input_view<2>(weight), thread_workspace(),
                         options);
  return packed;
}
template <typename T, typename Weight>
  requires(!Device<Weight>)
PackedWeight<T> pack_weight(const Weight& weight, const Int8Packing& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, weight, options);
}

template <typename T = std::int8_t, CpuDevice D, typename Values, typename Scales>
  requires(std::same_as<T, std::int8_t> && !std::same_as<Scales, Int8Packing>)
PackedWeight<T> pack_weight(const D& device, const Values& values, const Scales& scales,
                            const Int8Packing& options = {}) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, values, scales, options);
  return packed;
}
template <typename T = std::int8_t, typename Values, typename Scales>
  requires(std::same_as<T, std::int8_t> && !Device<Values> && !std::same_as<Scales, Int8Packing>)
PackedWeight<T> pack_weight(const Values& values, const Scales& scales,
                            const Int8Packing& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, values, scales, options);
}

/// Packs gate and up, both (out, in) and of one scalar.
template <CpuDevice D, typename T, typename Gate, typename Up>
void pack_gated_weight_into(const D& device, PackedGatedWeight<T>& packed, const Gate& gate,
                            const Up& up, const Int8Packing& options = {},
                            Workspace& workspace = thread_workspace()) {
  static_assert(std::is_same_v<scalar_of<Gate>, scalar_of<Up>>,
                "eigenformer: gate and up have one scalar");
  detail::pack_weight_on(isa::best{}, device, WeightAccess<T>::pair(packed),
                         {input_view<2>(gate), input_view<2>(up)}, {"gate", "up"}, options,
                         workspace);
}
template <typename T, CpuDevice D, typename Gate, typename Up>
PackedGatedWeight<T> pack_gated_weight(const D& device, const Gate& gate, const Up& up,
                                       const Int8Packing& options = {}) {
  PackedGatedWeight<T> packed;
  pack_gated_weight_into(device, packed, gate, up, options);
  return packed;
}
template <typename T, typename Gate, typename Up>
  requires(!Device<Gate>)
PackedGatedWeight<T> pack_gated_weight(const Gate& gate, const Up& up,
                                       const Int8Packing& options = {}) {
  return pack_gated_weight<T>(Eigen::DefaultDevice{}, gate, up, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
