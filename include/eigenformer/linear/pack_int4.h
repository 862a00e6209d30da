/// \file
/// Part of linear/pack.h, which includes it and is its manual: packing four-bit values as they are
/// stored.
#pragma once

#include <optional>
#include <span>
#include <type_traits>

#include "pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Four-bit values where they lie, as files of models hold them: a weight (out, in) is
/// value * scale of its group, or scale * value + minimum.
struct Int4View {
  TensorView<const std::int8_t, 2> values;               ///< -8 to 7; with minimums 0 to 15
  TensorView<const float, 2> scales;                     ///< (out, ceil(in / group_size))
  std::optional<TensorView<const float, 2>> minimums{};  ///< the same
  Index group_size = 32;

  Index dimension(int d) const { return values.dimension(d); }
};

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

inline Index checked_size(std::string_view name, std::string_view argument, const Int4View& w) {
  return checked_size(name, argument, w.values);
}
/// Rows [first, first + count) of a matrix.
inline Int4View rows_of(const Int4View& w, Index first, Index count) {
  const auto part = [&](const auto& all) {
    const Index columns = all.dimension(1);
    using View = std::remove_cvref_t<decltype(all)>;
    return View(offset_by(all.data(), count > 0 ? first * columns : 0), count, columns);
  };
  Int4View rows{part(w.values), part(w.scales), {}, w.group_size};
  if (w.minimums.has_value()) rows.minimums.emplace(part(*w.minimums));
  return rows;
}
template <typename W>
TensorView<const W, 2> rows_of(const TensorView<const W, 2>& w, Index first, Index count) {
  return {offset_by(w.data(), count > 0 ? first * w.dimension(1) : 0), count, w.dimension(1)};
}

/// As checked for packing.
template <Device D>
problem::Int4Values int4_values(std::string_view name, const Int4View& w) {
  const Index rows = w.dimension(0), depth = w.dimension(1), group = w.group_size;
  checked_size(name, "weight", w);
  require_group_size(group, name);
  require_group_factors<D>(name, "scales", w.scales, rows, depth, group);
  if (w.minimums.has_value())
    require_group_factors<D>(name, "minimums", *w.minimums, rows, depth, group);
  require_int4_values<D>(name, w.values, w.minimums.has_value() ? 0 : -8);
  return {w.values.data(), w.scales.data(), w.minimums.has_value() ? w.minimums->data() : nullptr};
}

/// How values are packed that are as this one.
inline Int4Packing packing_of(const Int4View& w, Int4Packing options) {
  options.group_size = w.group_size;
  options.zero_points = w.minimums.has_value();
  return options;
}

/// Values that are packed together are grouped in one way, and have minimums or none has.
inline void require_like(std::string_view name, const Int4View& a, const Int4View& b) {
  require_that(a.group_size == b.group_size && a.minimums.has_value() == b.minimums.has_value(),
               name, "weights are in groups of ", a.group_size, " and ", b.group_size,
               ", or one alone has minimums: expected one way");
}

template <int Matrices, typename D>
void pack_int4_values(const D& device, PackedWeight<int4>& packed,
                      const Int4View* const (&views)[Matrices], const Int4Packing& options) {
  constexpr std::string_view name = packing_name<Matrices>;
  const Int4View& one = *views[0];
  problem::PackInt4Weight<Matrices> problem{};
  for (int m = 0; m < Matrices; ++m) {
    require_same_shape(name, "gate", one.values, "up", views[m]->values);
    require_like(name, one, *views[m]);
    problem.weights[m] = int4_values<D>(name, *views[m]);
  }
  const auto shape =
      panels_of<int4>(one.dimension(0), one.dimension(1), packing_of(one, options), Matrices);
  pack_panels(device, packed, shape, [&](const auto& panels) {
    problem.packed = panels;
    run(device, problem);
    return -1;
  });
}

template <typename D>
void pack_stacked_int4(const D& device, PackedWeight<int4>& packed, std::span<const Int4View> views,
                       const Int4Packing& options, Workspace& workspace) {
  constexpr std::string_view name = "pack_stacked_weight";
  require_that(!views.empty(), name, "weights is empty, expected one matrix at least");
  const int count = static_cast<int>(views.size());
  Workspace::Frame frame(workspace);
  auto* const weights = frame.take<problem::Int4Values>(count);
  auto* const ends = frame.take<Index>(count);
  Index rows = 0;
  for (int m = 0; m < count; ++m) {
    const Int4View& view = views[static_cast<std::size_t>(m)];
    require_that(view.dimension(1) == views[0].dimension(1), name, "weights have ",
                 views[0].dimension(1), " and ", view.dimension(1), " columns, expected as many");
    require_like(name, views[0], view);
    require_that(add_fits(rows, view.dimension(0), rows), name, "the rows overflow");
    weights[m] = int4_values<D>(name, view);
    ends[m] = rows;
  }
  const auto shape = panels_of<int4>(rows, views[0].dimension(1), packing_of(views[0], options));
  pack_panels(device, packed, shape, [&](const auto& panels) {
    run(device, problem::PackStackedInt4Weight{panels, weights, ends, count}, workspace);
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
  detail::require_that(!options.zero_points, "pack_weight",
                       "zero_points is true, but no minimums are given");
  const Int4View view{input_view<2>(values), input_view<2>(scales), {}, options.group_size};
  detail::pack_int4_values<1>(device, packed, {&view}, options);
}
/// The same of values in [0, 15] with minimums beside the scales: weights are scale * value +
/// minimum.
template <Device D, typename Values, typename Scales, typename Minimums>
  requires(!detail::is_packing_options<Minimums>)
void pack_weight_into(const D& device, PackedWeight<int4>& packed, const Values& values,
                      const Scales& scales, const Minimums& minimums,
                      const Int4Packing& options = {}) {
  const Int4View view{input_view<2>(values), input_view<2>(scales), input_view<2>(minimums),
                      options.group_size};
  detail::pack_int4_values<1>(device, packed, {&view}, options);
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

/// Values that are one argument: alone, as a gated pair and one below the other. Those of several
/// views are grouped in one way, and all have minimums or none has. group_size and zero_points of
/// the options do not count: views have them.
template <Device D, std::same_as<Int4View> Weight>
void pack_weight_into(const D& device, PackedWeight<int4>& packed, const Weight& weight,
                      const Int4Packing& options = {}) {
  detail::pack_int4_values<1>(device, packed, {&weight}, options);
}
template <Device D, std::same_as<Int4View> Gate, std::same_as<Int4View> Up>
void pack_gated_weight_into(const D& device, PackedGatedWeight<int4>& packed, const Gate& gate,
                            const Up& up, const Int4Packing& options = {}) {
  detail::pack_int4_values<2>(device, detail::PairAccess<int4>::pair(packed), {&gate, &up},
                              options);
}
template <Device D, detail::holds_int4_views Weights>
void pack_stacked_weight_into(const D& device, PackedWeight<int4>& packed, const Weights& weights,
                              const Int4Packing& options = {},
                              Workspace& workspace = thread_workspace()) {
  detail::pack_stacked_int4(device, packed, weights, options, workspace);
}

template <typename T, Device D, std::same_as<Int4View> Weight>
  requires std::same_as<T, int4>
PackedWeight<T> pack_weight(const D& device, const Weight& weight,
                            const PackingOptions<T>& options = {}) {
  PackedWeight<T> packed;
  pack_weight_into(device, packed, weight, options);
  return packed;
}
template <typename T, Device D, std::same_as<Int4View> Gate, std::same_as<Int4View> Up>
  requires std::same_as<T, int4>
PackedGatedWeight<T> pack_gated_weight(const D& device, const Gate& gate, const Up& up,
                                       const PackingOptions<T>& options = {}) {
  PackedGatedWeight<T> packed;
  pack_gated_weight_into(device, packed, gate, up, options);
  return packed;
}
template <typename T, Device D, detail::holds_int4_views Weights>
  requires std::same_as<T, int4>
PackedWeight<T> pack_stacked_weight(const D& device, const Weights& weights,
                                    const PackingOptions<T>& options = {}) {
  PackedWeight<T> packed;
  pack_stacked_weight_into(device, packed, weights, options);
  return packed;
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
