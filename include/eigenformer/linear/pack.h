/// \file
/// Weights of linear layers packed once into the order that the matrix kernels stream: panels of
/// rows, k-major (linear/packed_weight.h).
///
///   ef::PackedWeight<Eigen::bfloat16> w = ef::pack_weight<Eigen::bfloat16>(weight);   // (out, in) of any floating scalar
///   ef::PackedWeight<std::int8_t> w8 = ef::pack_weight<std::int8_t>(weight);          // quantized, one scale per row
///   ef::PackedWeight<std::int8_t> g = ef::pack_weight<std::int8_t>(weight, {.group_size = 64});   // a scale every 64 inputs
///   ef::PackedWeight<std::int8_t> h = ef::pack_weight<std::int8_t>(weight, {.group_size = 32, .half_scales = true});   // which may be halves
///   ef::PackedWeight<std::int8_t> w9 = ef::pack_weight(q, scales);     // from int8 values in [-127, 127] and their scales: (out), or
///                                                                      // (out, ceil(in / group_size)) with {.group_size = ...}
///   ef::PackedWeight<ef::int4> w4 = ef::pack_weight<ef::int4>(weight);                // four bits, a scale every 32 inputs
///   ef::PackedWeight<ef::int4> z4 = ef::pack_weight<ef::int4>(weight, {.group_size = 64, .zero_points = true});
///   ef::PackedWeight<ef::int4> s4 = ef::pack_weight<ef::int4>(q, scales);             // from values in [-8, 7] and scales of groups, as stored
///   ef::PackedWeight<ef::int4> m4 = ef::pack_weight<ef::int4>(u, scales, minimums);   // from values in [0, 15]: weights are scale * u + minimum
///   ef::PackedWeight<ef::int4> v4 = ef::pack_weight<ef::int4>(device, ef::Int4View{u, scales, minimums, 32});   // the same, one argument
///   ef::PackedGatedWeight<float> gu = ef::pack_gated_weight<float>(gate, up);   // two weights whose outputs a gated unit pairs
///   ef::PackedWeight<float> qkv = ef::pack_stacked_weight<float>(device, std::array{query, key, value});   // one below the other
///   ef::pack_weight_into(device, w, weight);                           // again, reusing w's memory: training, every step
///
/// bfloat16 and half round to nearest even. int8 is symmetric: scale = max|w| / 127, 1 for a row
/// (or group) of zeros. int4 is always in groups, two weights in a byte: symmetric with scale =
/// max|w| / 7, or above a minimum (quantization.h has the formulas). Its values, scales and
/// minimums are those of quantize_weights_int4, or the ones given: GGUF's Q4_0, Q4_1 and Q4_K fit
/// as they are, scales below zero included. A packed weight carries the layout of the ISA it was
/// packed for, and a product refuses another; where a GPU packs, the weight lies in the GPU's
/// memory, as rows that begin at multiples of 16 bytes. Packing the rows [a, b) gives the bits of
/// the same rows of the whole weight. Cost: one read and one write of the weights (int8 and int4:
/// one more read, for the scales), on the device's threads.
///
/// Throws std::invalid_argument: for int8 and int4, NaN or infinity in the weight (named by its
/// first index, before `packed` is touched); scales or minimums that do not match, or are NaN or
/// infinite, scales of int8 that are negative, values outside int4's range (the first one's index
/// is named); a group_size other than 32, 64 or 128; an input dimension above 133,144 for int8
/// without groups, where the sum of products could leave 32 bits. On a GPU no number is looked at
/// before the launch: a row (or group) that holds NaN or infinity gets the scale NaN and values 0,
/// and scales that are given are taken as they are.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <span>
#include <string>
#include <string_view>

#include "../core/dispatch.h"
#include "../core/rows.h"
#include "../cpu/linear/pack.h"
#include "packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct Int4View;  // pack_int4.h

struct Int8Packing {
  Index group_size = 0;  ///< inputs that share a scale: 32, 64 or 128; 0: one scale per row
  /// Of groups, on a CPU: where each scale is a half, as those of GGUF's Q8_0 are, they are kept as
  /// halves, 2 bytes for 4, and products have the same bits; else, and on a GPU, they are floats.
  /// Packing into a weight takes new memory then.
  bool half_scales = false;
};

struct Int4Packing {
  Index group_size = 32;  ///< inputs that share a scale: 32, 64 or 128
  /// A minimum beside each scale, so that one-sided groups use all 16 values.
  bool zero_points = false;
  /// W4A8: a product quantizes its activations to int8 per token, exact sums, the fast one. false,
  /// W4A16: activations stay what they are and weights are widened, linear.h says what that costs.
  bool quantize_activations = true;
  /// How scales and minimums are found, of weights that are quantized here; decoders, and models
  /// that are loaded, search. It costs about 1.5 ns per weight more on one thread of Zen 5.
  Int4Fit fit = Int4Fit::extremes;
};

/// How weights are packed into T.
template <typename T>
using PackingOptions = std::conditional_t<std::is_same_v<T, int4>, Int4Packing, Int8Packing>;

namespace detail {

template <typename Weights>
concept holds_int4_views = std::same_as<typename Weights::value_type, Int4View>;

/// The largest k whose sum of int8 products fits 32 bits: 127 * 127 * k < 2^31.
inline constexpr Index kLargestInt8Depth = (std::numeric_limits<std::int32_t>::max)() / (127 * 127);

inline void require_int8_depth(Index depth, std::string_view operation) {
  require_that(depth <= kLargestInt8Depth, operation, "weight has ", depth,
               " columns, int8 sums are exact up to ", kLargestInt8Depth);
}

inline void require_group_size(Index group_size, std::string_view name) {
  require_that(group_size == 32 || group_size == 64 || group_size == 128, name, "group_size is ",
               group_size, ", expected 32, 64 or 128");
}

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

/// "operation: weights[3, 17] is nan, expected finite numbers", for the first that is not
/// quantizable; there is one. Which, the host cannot see in a GPU's memory.
template <Device D, typename View>
[[noreturn]] void throw_not_quantizable(std::string_view operation, std::string_view argument,
                                        const View& view, int steps = 127) {
  constexpr auto expected = "expected finite numbers whose scale fits a float";
  if constexpr (host_readable<D>) {
    const Index flat = run(Eigen::DefaultDevice{}, problem::FirstNotQuantizable<scalar_of<View>>{
                                                       view.data(), view.size(), steps});
    require_that(false, operation, argument, "[", index_text(view, flat), "] is ",
                 static_cast<double>(view.data()[flat]), ", ", expected);
  }
  require_that(false, operation, argument, " of shape ", shape_text(view),
               " holds a number that has no scale, ", expected);
  std::abort();  // not reached
}

/// A group of inputs that share a scale: none of floating weights, that of `options` for int8 and
/// int4.
template <typename T>
void require_packing(std::string_view name, Index columns, const PackingOptions<T>& options) {
  static_assert(FloatingScalar<T> || problem::is_quantized_weight<T>,
                "eigenformer: a PackedWeight holds a floating scalar, std::int8_t or ef::int4");
  if constexpr (std::is_same_v<T, int4>) {
    require_group_size(options.group_size, name);
  } else if constexpr (std::is_same_v<T, std::int8_t>) {
    if (options.group_size == 0)
      require_int8_depth(columns, name);
    else
      require_group_size(options.group_size, name);
  } else {
    require_that(options.group_size == 0, name, "group_size is ", options.group_size,
                 ", but only int8 weights have groups");
  }
}

/// Panels for a weight packed as `options` say.
template <typename T>
problem::PanelsOf<T> panels_of(Index rows, Index columns, const PackingOptions<T>& options,
                               int matrices = 1) {
  if constexpr (std::is_same_v<T, int4>)
    return {rows,
            columns,
            options.group_size,
            matrices,
            options.zero_points,
            options.quantize_activations};
  else
    return {rows, columns, options.group_size, matrices, false, true, options.half_scales};
}

/// The value that the largest weight of a group gets: what throw_not_quantizable takes.
template <typename T>
int scale_steps(const PackingOptions<T>& options) {
  if constexpr (std::is_same_v<T, int4>)
    return options.zero_points ? 1 : 7;
  else
    return 127;
}

template <typename T>
Int4Fit fit_of([[maybe_unused]] const PackingOptions<T>& options) {
  if constexpr (std::is_same_v<T, int4>)
    return options.fit;
  else
    return Int4Fit::extremes;
}

/// Packs into `packed` by pack(panels), which returns the first matrix that is not quantizable
/// (`packed` is then what it was) or -1; returns that.
template <typename D, typename T, typename Pack>
int pack_panels(const D& device, PackedWeight<T>& packed, const problem::PanelsOf<T>& shape,
                Pack&& pack) {
  const problem::PanelSizes sizes = run(device, shape);
  Packing<T> packing(packed, shape, sizes, memory_of(device));
  const int bad = pack(packing.whole_panels());
  if (bad >= 0) return bad;
  packing.keep_scales(0, sizes.scales);
  packing.finish();
  return bad;
}

/// What exceptions call the operator.
template <int Matrices>
inline constexpr std::string_view packing_name =
    Matrices == 1 ? "pack_weight" : "pack_gated_weight";

template <int Matrices, typename D, typename T, typename W>
void pack_weight(const D& device, PackedWeight<T>& packed,
                 const TensorView<const W, 2> (&views)[Matrices],
                 const std::string_view (&names)[Matrices], const PackingOptions<T>& options,
                 Workspace& workspace) {
  static_assert(FloatingScalar<W>,
                "eigenformer: pack_weight takes float, double, Eigen::bfloat16 or Eigen::half; "
                "quantized values need their scales");
  constexpr std::string_view name = packing_name<Matrices>;
  const Index rows = views[0].dimension(0), columns = views[0].dimension(1),
              group = options.group_size;
  checked_size(name, names[0], views[0]);
  for (int m = 1; m < Matrices; ++m)
    require_same_shape(name, names[0], views[0], names[m], views[m]);
  require_packing<T>(name, columns, options);
  if constexpr (problem::is_quantized_weight<T>) {
    const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
    checked_product(checked_product(rows, groups, name, "scales"), Matrices, name, "scales");
  }
  const auto shape = panels_of<T>(rows, columns, options, Matrices);
  const int bad = pack_panels(device, packed, shape, [&](const auto& panels) {
    problem::PackWeight<T, W, Matrices> problem{panels, {}, fit_of<T>(options)};
    for (int m = 0; m < Matrices; ++m) problem.weights[m] = views[m].data();
    return run(device, problem, workspace);
  });
  if (bad >= 0) throw_not_quantizable<D>(name, names[bad], views[bad], scale_steps<T>(options));
}

/// Packs `count` views as one weight, the rows of each below those of the one before.
template <typename D, typename T, typename View>
void pack_stacked(const D& device, PackedWeight<T>& packed, const View* views, int count,
                  const PackingOptions<T>& options, Workspace& workspace) {
  using W = scalar_of<View>;
  static_assert(FloatingScalar<W>,
                "eigenformer: pack_stacked_weight takes float, double, Eigen::bfloat16 or "
                "Eigen::half");
  constexpr std::string_view name = "pack_stacked_weight";
  require_that(count > 0, name, "weights is empty, expected one matrix at least");
  const Index columns = views[0].dimension(1);
  require_packing<T>(name, columns, options);
  Workspace::Frame frame(workspace);
  auto* const weights = frame.take<const W*>(count);
  auto* const ends = frame.take<Index>(count);
  Index rows = 0;
  for (int m = 0; m < count; ++m) {
    const std::string text = "weights[" + std::to_string(m) + "]";
    checked_size(name, text, views[m]);
    require_that(views[m].dimension(1) == columns, name, text, " has shape ", shape_text(views[m]),
                 ", weights[0] has ", columns, " columns");
    require_that(add_fits(rows, views[m].dimension(0), rows), name, "the rows overflow");
    weights[m] = views[m].data();
    ends[m] = rows;
  }
  checked_product(rows, (std::max)(Index{1}, columns), name, "weights");
  const auto shape = panels_of<T>(rows, columns, options);
  const int bad = pack_panels(device, packed, shape, [&](const auto& panels) {
    return run(device,
               problem::PackStackedWeight<T, W>{panels, weights, ends, count, fit_of<T>(options)},
               workspace);
  });
  if (bad >= 0)
    throw_not_quantizable<D>(name, "weights[" + std::to_string(bad) + "]", views[bad],
                             scale_steps<T>(options));
}

/// Numbers that a slice of pack_slices has, unless one panel has more: 4 MB of float.
inline constexpr Index kPackedSlice = Index{1} << 20;

/// A weight (rows, columns) whose numbers need not lie in memory together: slice_of(first, count)
/// gives a view of the rows from `first` on, (count, columns), which is read before the next one is
/// asked for. The bits are those of packing it whole. On CPUs, whose panels of so many rows lie one
/// behind the other.
template <typename T, typename D, typename Slice>
PackedWeight<T> pack_slices(const D& device, Index rows, Index columns,
                            const PackingOptions<T>& options, Slice&& slice_of,
                            Index slice_size = kPackedSlice) {
  using W = scalar_of<decltype(slice_of(Index{}, Index{}))>;
  constexpr std::string_view name = "pack_weight";
  checked_product(rows, (std::max)(Index{1}, columns), name, "weights");
  require_packing<T>(name, columns, options);
  const auto sizes_of = [&](Index count) {
    return run(device, panels_of<T>(count, columns, options));
  };
  const Index width = sizes_of(rows).layout.columns,
              panels_at_once = slice_size / (std::max)(Index{1}, columns) / width,
              most = (std::max)(Index{1}, panels_at_once) * width;
  PackedWeight<T> packed;
  Packing<T> packing(packed, panels_of<T>(rows, columns, options), sizes_of(rows),
                     memory_of(device));
  for (Index first = 0; first < rows; first += most) {
    const Index count = (std::min)(most, rows - first);
    const TensorView<const W, 2> slice = slice_of(first, count);
    const problem::PanelSizes before = sizes_of(first), own = sizes_of(count);
    problem::PackWeight<T, W, 1> part{packing.panels(), {slice.data()}};
    part.packed.rows = count;
    part.packed.data += before.elements;
    part.packed.scales = packing.scales_of_part(before.scales, own.scales);
    part.packed.minimums = offset_by(part.packed.minimums, before.scales);
    if (run(device, part, thread_workspace()) >= 0)
      throw_not_quantizable<D>(name, "weights from row " + std::to_string(first) + " on", slice,
                               scale_steps<T>(options));
    packing.keep_scales(before.scales, own.scales);
  }
  packing.finish();
  return packed;
}

/// Scales of weights are finite and not negative; names the first that is not.
template <Device D, typename View>
void require_scales(std::string_view name, const View& scales) {
  if constexpr (host_readable<D>)
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
                 ", but scales has one number per row: expected (", rows, ", ",
                 group > 0 ? (depth + group - 1) / group : 1, ")");
    require_int8_depth(depth, name);
  } else {
    require_group_size(group, name);
    const Index groups = (depth + group - 1) / group;
    require_that(scales.dimension(1) == groups, name, "scales has ", scales.dimension(1),
                 " columns, expected ", groups, ", one for each ", group, " of ", depth, " inputs");
  }
  require_scales<D>(name, scales);
  pack_panels(device, packed, panels_of<std::int8_t>(rows, depth, options),
              [&](const auto& panels) {
                run(device, problem::PackInt8Weight{panels, values.data(), scales.data()});
                return -1;
              });
}

template <typename Scales>
auto scales_view(const Scales& scales) {
  static_assert(std::is_same_v<scalar_of<Scales>, float>, "eigenformer: scales are float");
  return input_view<(rank_of<Scales> == 2 ? 2 : 1)>(scales);
}

}  // namespace detail

/// Packs `weight` (out, in) into `packed`, whose memory is reused; nothing is allocated where it
/// suffices.
template <Device D, typename T, typename Weight>
  requires(!std::same_as<Weight, Int4View>)
void pack_weight_into(const D& device, PackedWeight<T>& packed, const Weight& weight,
                      Workspace& workspace = thread_workspace()) {
  detail::pack_weight(device, packed, {input_view<2>(weight)}, {"weights"}, {}, workspace);
}
template <Device D, typename T, typename Weight>
  requires(problem::is_quantized_weight<T> && !std::same_as<Weight, Int4View>)
void pack_weight_into(const D& device, PackedWeight<T>& packed, const Weight& weight,
                      const PackingOptions<T>& options, Workspace& workspace = thread_workspace()) {
  detail::pack_weight(device, packed, {input_view<2>(weight)}, {"weights"}, options, workspace);
}

/// Packs int8 values (out, in) with one scale per row (out), or one per group (out, ceil(in /
/// group_size)).
template <Device D, typename Values, typename Scales>
  requires(!std::same_as<Scales, Int8Packing>)
void pack_weight_into(const D& device, PackedWeight<std::int8_t>& packed, const Values& values,
                      const Scales& scales, const Int8Packing& options = {}) {
  detail::pack_int8_values(device, packed, input_view<2>(values), detail::scales_view(scales),
                           options);
}

template <typename T, Device D, typename Weight>
  requires(!std::same_as<Weight, Int4View>)
PackedWeight<T> pack_weight(const D& device, const Weight& weight,
                            const PackingOptions<T>& options = {}) {
  PackedWeight<T> packed;
  detail::pack_weight(device, packed, {input_view<2>(weight)}, {"weights"}, options,
                      thread_workspace());
  return packed;
}
template <typename T, typename Weight>
  requires(!Device<Weight>)
PackedWeight<T> pack_weight(const Weight& weight, const PackingOptions<T>& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, weight, options);
}

template <typename T = std::int8_t, Device D, typename Values, typename Scales>
  requires(std::same_as<T, std::int8_t> && !std::same_as<Scales, Int8Packing>)
PackedWeight<T> pack_weight(const D& device, const Values& values, const Scales& scales,
                            const Int8Packing& options = {}) {
  PackedWeight<T> packed;
  detail::pack_int8_values(device, packed, input_view<2>(values), detail::scales_view(scales),
                           options);
  return packed;
}
template <typename T = std::int8_t, typename Values, typename Scales>
  requires(std::same_as<T, std::int8_t> && !Device<Values> && !std::same_as<Scales, Int8Packing>)
PackedWeight<T> pack_weight(const Values& values, const Scales& scales,
                            const Int8Packing& options = {}) {
  return pack_weight<T>(Eigen::DefaultDevice{}, values, scales, options);
}

/// Packs several weights (rows, in) of one scalar as one, the rows of each below those of the one
/// before: queries, keys and values out of one product. `weights` is an array, vector or span of
/// ef::TensorView<const W, 2>. Row by row the bits are those of packing each alone.
///
///   auto qkv = ef::pack_stacked_weight<float>(device, std::array{query, key, value});
template <Device D, typename T, typename Weights>
  requires(!detail::holds_int4_views<Weights>)
void pack_stacked_weight_into(const D& device, PackedWeight<T>& packed, const Weights& weights,
                              const PackingOptions<T>& options = {},
                              Workspace& workspace = thread_workspace()) {
  const std::span views(weights);
  detail::pack_stacked(device, packed, views.data(), static_cast<int>(views.size()), options,
                       workspace);
}
template <typename T, Device D, typename Weights>
  requires(!detail::holds_int4_views<Weights>)
PackedWeight<T> pack_stacked_weight(const D& device, const Weights& weights,
                                    const PackingOptions<T>& options = {}) {
  PackedWeight<T> packed;
  pack_stacked_weight_into(device, packed, weights, options);
  return packed;
}

/// Packs gate and up, both (out, in) and of one scalar.
template <Device D, typename T, typename Gate, typename Up>
  requires(!std::same_as<Gate, Int4View>)
void pack_gated_weight_into(const D& device, PackedGatedWeight<T>& packed, const Gate& gate,
                            const Up& up, const PackingOptions<T>& options = {},
                            Workspace& workspace = thread_workspace()) {
  static_assert(std::is_same_v<scalar_of<Gate>, scalar_of<Up>>,
                "eigenformer: gate and up have one scalar");
  detail::pack_weight(device, detail::PairAccess<T>::pair(packed),
                      {input_view<2>(gate), input_view<2>(up)}, {"gate", "up"}, options, workspace);
}
template <typename T, Device D, typename Gate, typename Up>
  requires(!std::same_as<Gate, Int4View>)
PackedGatedWeight<T> pack_gated_weight(const D& device, const Gate& gate, const Up& up,
                                       const PackingOptions<T>& options = {}) {
  PackedGatedWeight<T> packed;
  pack_gated_weight_into(device, packed, gate, up, options);
  return packed;
}
template <typename T, typename Gate, typename Up>
  requires(!Device<Gate>)
PackedGatedWeight<T> pack_gated_weight(const Gate& gate, const Up& up,
                                       const PackingOptions<T>& options = {}) {
  return pack_gated_weight<T>(Eigen::DefaultDevice{}, gate, up, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "pack_int4.h"
