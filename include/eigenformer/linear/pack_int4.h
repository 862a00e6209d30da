/// \file
/// Part of linear/pack.h, which includes it and is its manual: packing four-bit values as they are
/// stored.
#pragma once

#include "pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename T>
inline constexpr bool is_packing_options =
    std::is_same_v<T, Int8Packing> || std::is_same_v<T, Int4Packing>;

/// Numbers of groups are (out, groups).
template <typename View>
void require_group_shape(std::string_view name, std::string_view argument, const View& numbers,
                         Index rows, Index depth, Index group) {
  const Index groups = (depth + group - 1) / group;
  require_that(numbers.dimension(0) == rows && numbers.dimension(1) == groups, name, argument,
               " has shape ", shape_text(numbers), ", expected (", rows, ", ", groups,
               "), one for each ", group, " of ", depth, " inputs");
  checked_size(name, argument, numbers);
}

/// And finite. Names the first that is not.
template <Device D, typename View>
void require_group_factors(std::string_view name, std::string_view argument, const View& numbers,
                           Index rows, Index depth, Index group) {
  require_group_shape(name, argument, numbers, rows, depth, group);
  if constexpr (host_readable<D>)
    for (Index i = 0; i < numbers.size(); ++i)
      if (!std::isfinite(numbers.data()[i])) [[unlikely]]
        require_that(false, name, argument, "[", index_text(numbers, i), "] is ", numbers.data()[i],
                     ", expected a finite number");
}

/// Four-bit values lie in [first, first + 15]. Names the first that does not.
template <Device D, typename View>
void require_int4_values(std::string_view name, const View& values, int first) {
  if constexpr (host_readable<D>) {
    const auto fits = [&](std::int8_t q) { return q >= first && q <= first + 15; };
    bool all = true;
    for (Index i = 0; i < values.size(); ++i) all = all && fits(values.data()[i]);
    if (all) return;
    for (Index i = 0; i < values.size(); ++i)
      require_that(fits(values.data()[i]), name, "weight[", index_text(values, i), "] is ",
                   int{values.data()[i]}, ", expected ", first, " to ", first + 15);
  }
}

/// From four-bit values, scales and minimums (out, groups), or nullptr where they are symmetric.
template <typename D>
void pack_int4_values(const D& device, PackedWeight<int4>& packed,
                      TensorView<const std::int8_t, 2> values, TensorView<const float, 2> scales,
                      const TensorView<const float, 2>* minimums, Int4Packing options) {
  constexpr auto name = "pack_weight";
  const Index rows = values.dimension(0), depth = values.dimension(1), group = options.group_size;
  checked_size(name, "weight", values);
  require_group_size(group, name);
  require_that(minimums != nullptr || !options.zero_points, name,
               "zero_points is true, but no minimums are given");
  require_group_factors<D>(name, "scales", scales, rows, depth, group);
  if (minimums != nullptr)
    require_group_factors<D>(name, "minimums", *minimums, rows, depth, group);
  require_int4_values<D>(name, values, minimums != nullptr ? 0 : -8);
  options.zero_points = minimums != nullptr;
  pack_panels(device, packed, panels_of<int4>(rows, depth, options), [&](const auto& panels) {
    run(device, problem::PackInt4Weight{panels, values.data(), scales.data(),
                                        minimums == nullptr ? nullptr : minimums->data()});
    return -1;
  });
}

}  // namespace detail

/// Packs four-bit values (out, in), int8 numbers in [-8, 7], with one scale per group (out, ceil(in
/// / group_size)): weights are value * scale.
template <Device D, typename Values, typename Scales>
  requires(!detail::is_packing_options<Scales>)
void pack_weight_into(const D& device, PackedWeight<int4>& packed, const Values& values,
                      const Scales& scales, const Int4Packing& options = {}) {
  detail::pack_int4_values(device, packed, input_view<2>(values), input_view<2>(scales), nullptr,
                           options);
}
/// The same of values in [0, 15] with minimums beside the scales: weights are scale * value +
/// minimum.
template <Device D, typename Values, typename Scales, typename Minimums>
  requires(!detail::is_packing_options<Minimums>)
void pack_weight_into(const D& device, PackedWeight<int4>& packed, const Values& values,
                      const Scales& scales, const Minimums& minimums,
                      const Int4Packing& options = {}) {
  const TensorView<const float, 2> least = input_view<2>(minimums);
  detail::pack_int4_values(device, packed, input_view<2>(values), input_view<2>(scales), &least,
                           options);
}

template <typename T, Device D, typename Values, typename Scales>
  requires(std::same_as<T, int4> && !detail::is_packing_options<Scales>)
PackedWeight<T> pack_weight(const D& device, const Values& values, const Scales& scales,
                            const Int4Packing& options = {}) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, values, scales, options);
  return packed;
}
template <typename T, typename Values, typename Scales>
  requires(std::same_as<T, int4> && !Device<Values> && !detail::is_packing_options<Scales>)
PackedWeight<T> pack_weight(const Values& values, const Scales& scales,
                            const Int4Packing& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, values, scales, options);
}
template <typename T, Device D, typename Values, typename Scales, typename Minimums>
  requires(std::same_as<T, int4> && !detail::is_packing_options<Minimums>)
PackedWeight<T> pack_weight(const D& device, const Values& values, const Scales& scales,
                            const Minimums& minimums, const Int4Packing& options = {}) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, values, scales, minimums, options);
  return packed;
}
template <typename T, typename Values, typename Scales, typename Minimums>
  requires(std::same_as<T, int4> && !Device<Values> && !detail::is_packing_options<Minimums>)
PackedWeight<T> pack_weight(const Values& values, const Scales& scales, const Minimums& minimums,
                            const Int4Packing& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, values, scales, minimums, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
