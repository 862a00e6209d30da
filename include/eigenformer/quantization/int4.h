/// \file
/// Part of quantization.h, which includes it: INT4 by groups of 32, 64 or 128 inputs of a row. In
/// plain form a value is one std::int8_t; ef::PackedWeight<ef::int4> stores two in a byte
/// (linear/pack.h).
///
///   symmetric       scale = max|w| / 7 (1 where all are zero)      q = clamp(round_half_to_even(w / scale), -7, 7)
///   with minimums   scale = max / 15 - min / 15 (1 where that is 0)      u = clamp(round_half_to_even((w - min) / scale), 0, 15)
///
/// so that |w - q * scale| and |w - (scale * u + min)| are at most scale / 2, up to rounding.
/// Int4Fit::least_squares lowers the sum of a group's squared errors: of 32 (with minimums 21)
/// roundings, around those by the scale above, it takes the one whose values a line, through 0
/// where there are no minimums, brings nearest to the weights, and the scale and minimum of that
/// line; values are then rounded by these, symmetric ones from -8 on, by scales of either sign
/// (cpu/vector/fit_int4.h has the formulas). The bits are the same on every ISA and GPU. Groups
/// whose scale is below 2^-40 or above 2^40 stay as they are.
///
/// Minimums suit groups whose weights lie to one side of zero, and are GGUF's Q4_1 and Q4_K; values
/// of Q4_0, -8 among them, are symmetric ones. Arithmetic is in float (double for double), scales
/// and minimums are floats; a group that spans more than float's largest number has its far end at
/// 15. Weights are refused as for INT8, and on a GPU a group that holds NaN or infinity gets the
/// scale NaN and values 0. Cost: two reads of the weights, the second in cache, and one write.
#pragma once

#include "../core/check.h"
#include "../core/device.h"
#include "../core/dispatch.h"
#include "../cpu/quantization.h"
#include "../linear/pack.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// auto [values, scales] = ef::quantize_weights_int4(weights, 32);
struct QuantizedInt4 {
  Tensor<std::int8_t, 2> values;  ///< (out, in), -7 to 7, by least squares -8 to 7
  Tensor<float, 2> scales;        ///< (out, ceil(in / group_size))
};

/// auto [values, scales, minimums] = ef::quantize_weights_int4_with_minimums(weights, 32);
struct QuantizedInt4WithMinimums {
  Tensor<std::int8_t, 2> values;      ///< (out, in), 0 to 15
  Tensor<float, 2> scales, minimums;  ///< (out, ceil(in / group_size))
};

namespace detail {

template <Device D, typename Values, typename Scales, typename Weights>
void quantize_int4(const D& device, std::string_view name, Values& values, Scales& scales,
                   Scales* minimums, const Weights& weights, Index group_size, Int4Fit fit,
                   Workspace& workspace) {
  using T = scalar_of<Weights>;
  static_assert(FloatingScalar<T>,
                "eigenformer: quantization takes float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(std::is_same_v<scalar_of<Values>, std::int8_t>,
                "eigenformer: quantized values are std::int8_t");
  require_group_size(group_size, name);
  const auto from = input_view<2>(weights);
  auto to = output_view<2>(values);
  auto factors = output_view<2>(scales);
  checked_size(name, "weights", from);
  require_same_shape(name, "values", to, "weights", from);
  const Index rows = from.dimension(0), columns = from.dimension(1);
  require_group_shape(name, "scales", factors, rows, columns, group_size);
  problem::QuantizeInt4<T> problem{from.data(), to.data(), factors.data(), nullptr,
                                   rows,        columns,   group_size,     fit};
  if (minimums != nullptr) {
    auto least = output_view<2>(*minimums);
    require_group_shape(name, "minimums", least, rows, columns, group_size);
    problem.minimums = least.data();
  }
  if (!run(device, problem, workspace))
    throw_not_quantizable<D>(name, "weights", from, minimums == nullptr ? 7 : 1);
}

}  // namespace detail

/// Writes values (out, in) and scales (out, ceil(in / group_size)); the last group of a row may be
/// short. Throws std::invalid_argument, before anything is written.
template <Device D, typename Values, typename Scales, typename Weights>
void quantize_weights_int4_into(const D& device, Values&& values, Scales&& scales,
                                const Weights& weights, Index group_size = 32,
                                Int4Fit fit = Int4Fit::extremes,
                                Workspace& workspace = thread_workspace()) {
  detail::quantize_int4<D, Values, std::remove_reference_t<Scales>>(
      device, "quantize_weights_int4", values, scales, nullptr, weights, group_size, fit,
      workspace);
}

template <CpuDevice D, typename Weights>
QuantizedInt4 quantize_weights_int4(const D& device, const Weights& weights, Index group_size = 32,
                                    Int4Fit fit = Int4Fit::extremes) {
  constexpr auto name = "quantize_weights_int4";
  const auto from = input_view<2>(weights);
  detail::require_group_size(group_size, name);
  detail::checked_size(name, "weights", from);
  const Index rows = from.dimension(0), columns = from.dimension(1);
  QuantizedInt4 result{Tensor<std::int8_t, 2>(rows, columns),
                       Tensor<float, 2>(rows, (columns + group_size - 1) / group_size)};
  quantize_weights_int4_into(device, result.values, result.scales, weights, group_size, fit);
  return result;
}
template <typename Weights>
  requires(!Device<Weights>)
QuantizedInt4 quantize_weights_int4(const Weights& weights, Index group_size = 32,
                                    Int4Fit fit = Int4Fit::extremes) {
  return quantize_weights_int4(Eigen::DefaultDevice{}, weights, group_size, fit);
}

/// The same with a minimum beside each scale.
template <Device D, typename Values, typename Scales, typename Weights>
void quantize_weights_int4_with_minimums_into(const D& device, Values&& values, Scales&& scales,
                                              Scales&& minimums, const Weights& weights,
                                              Index group_size = 32,
                                              Int4Fit fit = Int4Fit::extremes,
                                              Workspace& workspace = thread_workspace()) {
  detail::quantize_int4<D, Values, std::remove_reference_t<Scales>>(
      device, "quantize_weights_int4_with_minimums", values, scales, &minimums, weights, group_size,
      fit, workspace);
}

template <CpuDevice D, typename Weights>
QuantizedInt4WithMinimums quantize_weights_int4_with_minimums(const D& device,
                                                              const Weights& weights,
                                                              Index group_size = 32,
                                                              Int4Fit fit = Int4Fit::extremes) {
  constexpr auto name = "quantize_weights_int4_with_minimums";
  const auto from = input_view<2>(weights);
  detail::require_group_size(group_size, name);
  detail::checked_size(name, "weights", from);
  const Index rows = from.dimension(0), columns = from.dimension(1),
              groups = (columns + group_size - 1) / group_size;
  QuantizedInt4WithMinimums result{Tensor<std::int8_t, 2>(rows, columns),
                                   Tensor<float, 2>(rows, groups), Tensor<float, 2>(rows, groups)};
  quantize_weights_int4_with_minimums_into(device, result.values, result.scales, result.minimums,
                                           weights, group_size, fit);
  return result;
}
template <typename Weights>
  requires(!Device<Weights>)
QuantizedInt4WithMinimums quantize_weights_int4_with_minimums(const Weights& weights,
                                                              Index group_size = 32,
                                                              Int4Fit fit = Int4Fit::extremes) {
  return quantize_weights_int4_with_minimums(Eigen::DefaultDevice{}, weights, group_size, fit);
}

/// weights (out, in) = fma(scale, value, minimum) of their group: what W4A16 products multiply by.
/// Of symmetric values dequantize_grouped without minimums gives the same, value * scale.
template <Device D, typename Output, typename Values, typename Scales, typename Minimums>
void dequantize_grouped_into(const D& device, Output&& weights, const Values& values,
                             const Scales& scales, const Minimums& minimums, Index group_size) {
  constexpr auto name = "dequantize_grouped";
  static_assert(std::is_same_v<scalar_of<Values>, std::int8_t> && FloatingScalar<scalar_of<Output>>,
                "eigenformer: values are std::int8_t, weights float, double, bfloat16 or half");
  detail::require_group_size(group_size, name);
  const auto from = input_view<2>(values);
  const auto factors = input_view<2>(scales), least = input_view<2>(minimums);
  auto to = output_view<2>(weights);
  detail::checked_size(name, "values", from);
  detail::require_same_shape(name, "weights", to, "values", from);
  const Index rows = from.dimension(0), columns = from.dimension(1);
  detail::require_group_shape(name, "scales", factors, rows, columns, group_size);
  detail::require_group_shape(name, "minimums", least, rows, columns, group_size);
  detail::run(device,
              problem::Dequantize<scalar_of<Output>>{from.data(), factors.data(), to.data(), rows,
                                                     columns, group_size, least.data()});
}
template <CpuDevice D, typename Values, typename Scales, typename Minimums>
  requires(rank_of<Minimums> == 2)
Tensor<float, 2> dequantize_grouped(const D& device, const Values& values, const Scales& scales,
                                    const Minimums& minimums, Index group_size) {
  auto weights = detail::make_tensor<float, 2>("dequantize_grouped", "result",
                                               input_view<2>(values).dimensions());
  dequantize_grouped_into(device, weights, values, scales, minimums, group_size);
  return weights;
}
template <typename Values, typename Scales, typename Minimums>
  requires(!Device<Values> && rank_of<Minimums> == 2)
Tensor<float, 2> dequantize_grouped(const Values& values, const Scales& scales,
                                    const Minimums& minimums, Index group_size) {
  return dequantize_grouped(Eigen::DefaultDevice{}, values, scales, minimums, group_size);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
