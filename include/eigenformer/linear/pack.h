/// \file
/// Packing: from tensors to PackedWeight. The manual is packed_weight.h.
#pragma once

#include <cmath>

#include "../core/dispatch.h"
#include "../core/rows.h"
#include "../cpu/linear/pack.h"
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

/// What exceptions call the operator.
template <int Matrices>
inline constexpr std::string_view packing_name =
    Matrices == 1 ? "pack_weight" : "pack_gated_weight";

template <int Matrices, typename D, typename T, typename W>
void pack_weight(const D& device, PackedWeight<T>& packed,
                 const TensorView<const W, 2> (&views)[Matrices],
                 const std::string_view (&names)[Matrices], const Int8Packing& options,
                 Workspace& workspace) {
  static_assert(FloatingScalar<W>,
                "eigenformer: pack_weight takes float, double, Eigen::bfloat16 or Eigen::half; "
                "int8 needs its scales");
  static_assert(FloatingScalar<T> || std::is_same_v<T, std::int8_t>,
                "eigenformer: a PackedWeight holds a floating scalar or std::int8_t");
  constexpr std::string_view name = packing_name<Matrices>;
  const Index rows = views[0].dimension(0), columns = views[0].dimension(1),
              group = options.group_size;
  checked_size(name, names[0], views[0]);
  for (int m = 1; m < Matrices; ++m)
    require_same_shape(name, names[0], views[0], names[m], views[m]);
  if constexpr (std::is_same_v<T, std::int8_t>) {
    if (group == 0)
      require_int8_depth(columns, name);
    else
      require_group_size(group, name);
    const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
    checked_product(checked_product(rows, groups, name, "scales"), Matrices, name, "scales");
  } else {
    require_that(group == 0, name, "group_size is ", group, ", but only int8 weights have groups");
  }
  problem::PackWeight<T, W, Matrices> problem{packed, {}, rows, columns, group};
  for (int m = 0; m < Matrices; ++m) problem.weights[m] = views[m].data();
  if (const int bad = run(device, problem, workspace); bad >= 0)
    throw_not_quantizable(name, names[bad], views[bad],
                          cpu::first_not_quantizable(views[bad].data(), rows * columns));
}

template <typename D, typename T, typename W>
void pack_weight(const D& device, PackedWeight<T>& packed, TensorView<const W, 2> weight,
                 Workspace& workspace, const Int8Packing& options = {}) {
  pack_weight(device, packed, {weight}, {"weights"}, options, workspace);
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
template <typename D, typename Scales>
void pack_int8_values(const D& device, PackedWeight<std::int8_t>& packed,
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
  run(device, problem::PackInt8Weight{packed, values.data(), scales.data(), rows, depth, group});
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
  detail::pack_weight(device, packed, input_view<2>(weight), workspace);
}
template <CpuDevice D, typename Weight>
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Weight& weight,
                      const Int8Packing& options, Workspace& workspace = thread_workspace()) {
  detail::pack_weight(device, packed, input_view<2>(weight), workspace, options);
}

/// Packs int8 values (out, in) with one scale a row (out), or one a group (out, ceil(in /
/// group_size)).
template <CpuDevice D, typename Values, typename Scales>
  requires(!std::same_as<Scales, Int8Packing>)
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Values& values,
                      const Scales& scales, const Int8Packing& options = {}) {
  detail::pack_int8_values(device, packed, input_view<2>(values), detail::scales_view(scales),
                           options);
}

template <typename T, CpuDevice D, typename Weight>
PackedWeight<T> pack_weight(const D& device, const Weight& weight,
                            const Int8Packing& options = {}) {
  PackedWeight<T> packed;
  detail::pack_weight(device, packed, input_view<2>(weight), thread_workspace(), options);
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
  detail::pack_weight(device, WeightAccess<T>::pair(packed),
                      {input_view<2>(gate), input_view<2>(up)}, {"gate", "up"}, options, workspace);
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
