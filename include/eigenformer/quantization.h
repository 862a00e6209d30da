/// \file
/// Symmetric INT8 quantization and the product with quantized weights (INT4: quantization/int4.h):
///
///   scale = max|w| / 127                                       1 where all are zero
///   q     = clamp(round_half_to_even(w / scale), -127, 127)    so -128 never occurs
///
/// (so that |w - q * scale| <= scale / 2, up to one rounding) with one scale for a tensor, for each
/// row of a (out, in) weight, for each group of 32, 64 or 128 inputs of a row, or for each token of
/// activations. The quotient is a true division, in float (double for double); the scale is a float
/// and never 0: where max|w| / 127 rounds to 0 the smallest float serves, and among denormals,
/// whose quotients can pass 127, the clamp does. See Dettmers et al., "LLM.int8()" (2022), for
/// per-token activations against per-row weights.
///
/// Weights: float, double, bfloat16 or half, and finite: NaN or infinity (or a double past float's
/// range) throws std::invalid_argument naming the first one's index, before anything is written. On
/// a GPU nothing can throw after the launch: there a row (or group) that holds NaN or infinity gets
/// the scale NaN and values 0. Activations never throw for their values: a token that
/// holds NaN or infinity gets the scale NaN and values 0, so that its outputs are NaN and no other
/// token is touched.
///
/// Outputs must not overlap inputs. Cost: weights are read twice (scales, then values) and written
/// once, or, by row or group, read once with {.check_first = false} and in the returning forms; a
/// token's second read is in cache. The _into forms allocate nothing after the first call at a
/// size.
#pragma once

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/quantization.h"
#include "linear.h"
#include "quantization/int4.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// How weights are quantized by row or by group.
struct QuantizeOptions {
  /// All weights are read before anything is written, so that a NaN changes nothing. false: one
  /// read instead of two, at up to twice the speed where weights come from memory; a call that
  /// throws may have written some of the values and scales.
  bool check_first = true;
};

/// auto [values, scale] = ef::quantize_weights_int8(weights);
template <int Rank>
struct QuantizedTensor {
  Tensor<std::int8_t, Rank> values;
  float scale;
};

/// auto [values, scales] = ef::quantize_weights_int8_per_channel(weights);
struct QuantizedChannels {
  Tensor<std::int8_t, 2> values;  ///< (out, in)
  Tensor<float, 1> scales;        ///< (out)
};

/// auto [values, scales] = ef::quantize_weights_int8_grouped(weights, 64);
struct QuantizedGroups {
  Tensor<std::int8_t, 2> values;  ///< (out, in)
  Tensor<float, 2> scales;        ///< (out, ceil(in / group_size))
};

namespace detail {

template <typename T>
constexpr void require_quantizable_scalar() {
  static_assert(FloatingScalar<T>,
                "eigenformer: quantization takes float, double, Eigen::bfloat16 or Eigen::half");
}

template <typename Values>
constexpr void require_int8_values() {
  static_assert(std::is_same_v<scalar_of<Values>, std::int8_t>,
                "eigenformer: quantized values are std::int8_t");
}

/// What `run` said of a quantization: false where the weights hold a number that has none.
template <Device D, typename View>
void require_quantized(std::string_view name, const View& weights, bool quantized) {
  if (!quantized) throw_not_quantizable<D>(name, "weights", weights);
}

/// One scale for each row of `view`, which are its `rows`.
template <typename Scales, typename View>
void require_row_scales(std::string_view name, const Scales& scales, std::string_view view_name,
                        const View& view, std::string_view rows = "rows") {
  require_that(scales.dimension(0) == view.dimension(0), name, "scales has ", scales.dimension(0),
               " elements, ", view_name, " has ", view.dimension(0), " ", rows);
}

/// One scale for each group of a row.
template <typename Scales, typename View>
void require_group_scales(std::string_view name, const Scales& scales, const View& view,
                          Index group_size) {
  const Index groups = (view.dimension(1) + group_size - 1) / group_size;
  require_that(scales.dimension(0) == view.dimension(0) && scales.dimension(1) == groups, name,
               "scales has shape ", shape_text(scales), ", expected (", view.dimension(0), ", ",
               groups, ")");
}

/// Room for a matrix with one scale per row.
template <typename X>
QuantizedChannels quantized_channels(std::string_view name, std::string_view argument, const X& x) {
  const auto from = input_view<2>(x);
  checked_size(name, argument, from);
  return {Tensor<std::int8_t, 2>(from.dimensions()), Tensor<float, 1>(from.dimension(0))};
}

}  // namespace detail

/// Writes the values of a tensor of any rank and its scale, a number of the host's: a GPU is waited
/// for. Throws std::invalid_argument, on a GPU too.
template <Device D, typename Values, typename Weights>
void quantize_weights_int8_into(const D& device, Values&& values, float& scale,
                                const Weights& weights, Workspace& workspace = thread_workspace()) {
  constexpr int rank = rank_of<Weights>;
  detail::require_quantizable_scalar<scalar_of<Weights>>();
  detail::require_int8_values<Values>();
  const auto from = input_view<rank>(weights);
  auto to = output_view<rank>(values);
  constexpr auto name = "quantize_weights_int8";
  detail::require_same_shape(name, "values", to, "weights", from);
  const Index count = detail::checked_size(name, "weights", from);
  const problem::QuantizeTensor<scalar_of<Weights>> problem{from.data(), to.data(), &scale, count};
  detail::require_quantized<D>(name, from, detail::run(device, problem, workspace));
}

template <CpuDevice D, typename Weights>
auto quantize_weights_int8(const D& device, const Weights& weights) {
  constexpr int rank = detail::rank_or_one<rank_of<Weights>>;
  const auto from = input_view<rank_of<Weights>>(weights);
  detail::checked_size("quantize_weights_int8", "weights", from);
  QuantizedTensor<rank> result{Tensor<std::int8_t, rank>(detail::sizes_of<rank>(from)), 1.0f};
  quantize_weights_int8_into(device, result.values, result.scale, weights);
  return result;
}
template <typename Weights>
auto quantize_weights_int8(const Weights& weights) {
  return quantize_weights_int8(Eigen::DefaultDevice{}, weights);
}

/// Writes values (out, in) and one scale for each row (out). Throws std::invalid_argument.
template <Device D, typename Values, typename Scales, typename Weights>
void quantize_weights_int8_per_channel_into(const D& device, Values&& values, Scales&& scales,
                                            const Weights& weights,
                                            const QuantizeOptions& options = {},
                                            Workspace& workspace = thread_workspace()) {
  constexpr auto name = "quantize_weights_int8_per_channel";
  using T = scalar_of<Weights>;
  detail::require_quantizable_scalar<T>();
  detail::require_int8_values<Values>();
  const auto from = input_view<2>(weights);
  auto to = output_view<2>(values);
  auto factors = output_view<1>(scales);
  detail::checked_size(name, "weights", from);
  detail::require_same_shape(name, "values", to, "weights", from);
  detail::require_row_scales(name, factors, "weights", from);
  const Index rows = from.dimension(0), columns = from.dimension(1);
  const problem::Quantize<T> problem{from.data(), to.data(), factors.data(),     rows,
                                     columns,     columns,   options.check_first};
  detail::require_quantized<D>(name, from, detail::run(device, problem, workspace));
}

template <CpuDevice D, typename Weights>
QuantizedChannels quantize_weights_int8_per_channel(const D& device, const Weights& weights) {
  auto result = detail::quantized_channels("quantize_weights_int8_per_channel", "weights", weights);
  quantize_weights_int8_per_channel_into(device, result.values, result.scales, weights,
                                         {.check_first = false});
  return result;
}
template <typename Weights>
QuantizedChannels quantize_weights_int8_per_channel(const Weights& weights) {
  return quantize_weights_int8_per_channel(Eigen::DefaultDevice{}, weights);
}

/// Writes values (out, in) and scales (out, ceil(in / group_size)); the last group of a row may be
/// short. Throws std::invalid_argument, also for a group_size that is not 32, 64 or 128.
template <Device D, typename Values, typename Scales, typename Weights>
void quantize_weights_int8_grouped_into(const D& device, Values&& values, Scales&& scales,
                                        const Weights& weights, Index group_size,
                                        const QuantizeOptions& options = {},
                                        Workspace& workspace = thread_workspace()) {
  constexpr auto name = "quantize_weights_int8_grouped";
  detail::require_quantizable_scalar<scalar_of<Weights>>();
  detail::require_int8_values<Values>();
  detail::require_group_size(group_size, name);
  const auto from = input_view<2>(weights);
  auto to = output_view<2>(values);
  auto factors = output_view<2>(scales);
  detail::require_same_shape(name, "values", to, "weights", from);
  detail::checked_size(name, "weights", from);
  detail::require_group_scales(name, factors, from, group_size);
  const problem::Quantize<scalar_of<Weights>> problem{
      from.data(),       to.data(),  factors.data(),     from.dimension(0),
      from.dimension(1), group_size, options.check_first};
  detail::require_quantized<D>(name, from, detail::run(device, problem, workspace));
}

template <CpuDevice D, typename Weights>
QuantizedGroups quantize_weights_int8_grouped(const D& device, const Weights& weights,
                                              Index group_size) {
  const auto from = input_view<2>(weights);
  detail::require_group_size(group_size, "quantize_weights_int8_grouped");
  detail::checked_size("quantize_weights_int8_grouped", "weights", from);
  QuantizedGroups result{
      Tensor<std::int8_t, 2>(from.dimension(0), from.dimension(1)),
      Tensor<float, 2>(from.dimension(0), (from.dimension(1) + group_size - 1) / group_size)};
  quantize_weights_int8_grouped_into(device, result.values, result.scales, weights, group_size,
                                     {.check_first = false});
  return result;
}
template <typename Weights>
QuantizedGroups quantize_weights_int8_grouped(const Weights& weights, Index group_size) {
  return quantize_weights_int8_grouped(Eigen::DefaultDevice{}, weights, group_size);
}

/// Dynamic quantization of activations x (tokens, in): values and one scale for each token. Tokens
/// with NaN or infinity: see the top.
template <Device D, typename Values, typename Scales, typename Input>
void quantize_activations_int8_into(const D& device, Values&& values, Scales&& scales,
                                    const Input& x) {
  constexpr auto name = "quantize_activations_int8";
  using T = scalar_of<Input>;
  detail::require_quantizable_scalar<T>();
  detail::require_int8_values<Values>();
  const auto from = input_view<2>(x);
  auto to = output_view<2>(values);
  auto factors = output_view<1>(scales);
  detail::checked_size(name, "x", from);
  detail::require_same_shape(name, "values", to, "x", from);
  detail::require_row_scales(name, factors, "x", from, "tokens");
  detail::run(device, problem::QuantizeActivations<T>{from.data(), to.data(), factors.data(),
                                                      from.dimension(0), from.dimension(1)});
}

/// auto [values, scales] = ef::quantize_activations_int8(x);
template <CpuDevice D, typename Input>
QuantizedChannels quantize_activations_int8(const D& device, const Input& x) {
  auto result = detail::quantized_channels("quantize_activations_int8", "x", x);
  quantize_activations_int8_into(device, result.values, result.scales, x);
  return result;
}
template <typename Input>
QuantizedChannels quantize_activations_int8(const Input& x) {
  return quantize_activations_int8(Eigen::DefaultDevice{}, x);
}

namespace detail {

/// The view of the output, once shapes and scalars are right.
template <typename Output, typename Values>
auto dequantized_view(std::string_view name, Output& weights, const Values& values) {
  constexpr int rank = rank_of<Values>;
  require_int8_values<Values>();
  static_assert(
      FloatingScalar<scalar_of<Output>>,
      "eigenformer: dequantized weights are float, double, Eigen::bfloat16 or Eigen::half");
  auto to = output_view<rank>(weights);
  checked_size(name, "weights", to);
  require_same_shape(name, "weights", to, "values", input_view<rank>(values));
  return to;
}

template <typename Output, typename Values>
auto dequantize_problem(std::string_view name, Output& weights, const Values& values,
                        const float* scales, Index group) {
  auto to = dequantized_view(name, weights, values);
  const Index rows = to.size() == 0 ? 0 : to.dimension(0);  // any number of rows may be empty
  return problem::Dequantize<scalar_of<Output>>{values.data(), scales,          to.data(),
                                                rows,          to.dimension(1), group};
}

}  // namespace detail

/// weights = values * scale, of any rank, with one scale.
template <Device D, typename Output, typename Values>
void dequantize_into(const D& device, Output&& weights, const Values& values, float scale) {
  const auto from = input_view<rank_of<Values>>(values);
  auto to = detail::dequantized_view("dequantize", weights, values);
  detail::run(device, problem::DequantizeTensor<scalar_of<Output>>{from.data(), scale, to.data(),
                                                                   from.size()});
}

/// weights (out, in) = values * scales (out), row by row; whatever a scale is: NaN gives a row of
/// NaN, as an activation's does.
template <Device D, typename Output, typename Values, typename Scales>
  requires(!std::is_arithmetic_v<Scales>)
void dequantize_into(const D& device, Output&& weights, const Values& values,
                     const Scales& scales) {
  const auto from = input_view<2>(values);
  const auto factors = input_view<1>(scales);
  detail::require_row_scales("dequantize", factors, "values", from);
  detail::run(device, detail::dequantize_problem("dequantize", weights, from, factors.data(),
                                                 from.dimension(1)));
}

/// weights (out, in) = values * scales (out, ceil(in / group_size)).
template <Device D, typename Output, typename Values, typename Scales>
void dequantize_grouped_into(const D& device, Output&& weights, const Values& values,
                             const Scales& scales, Index group_size) {
  constexpr auto name = "dequantize_grouped";
  detail::require_group_size(group_size, name);
  const auto from = input_view<2>(values);
  const auto factors = input_view<2>(scales);
  detail::checked_size(name, "values", from);
  detail::require_group_scales(name, factors, from, group_size);
  detail::run(device, detail::dequantize_problem(name, weights, from, factors.data(), group_size));
}

/// ef::Tensor<float, 2> w = ef::dequantize(qc, scales);   and   ef::dequantize(q, scale), of any rank
template <CpuDevice D, typename Values, typename Scales>
auto dequantize(const D& device, const Values& values, const Scales& scales) {
  constexpr int rank = detail::rank_or_one<rank_of<Values>>;
  auto weights = detail::make_tensor<float, rank>(
      "dequantize", "result", detail::sizes_of<rank>(input_view<rank_of<Values>>(values)));
  dequantize_into(device, weights, values, scales);
  return weights;
}
template <typename Values, typename Scales>
  requires(!Device<Values>)
auto dequantize(const Values& values, const Scales& scales) {
  return dequantize(Eigen::DefaultDevice{}, values, scales);
}

template <CpuDevice D, typename Values, typename Scales>
Tensor<float, 2> dequantize_grouped(const D& device, const Values& values, const Scales& scales,
                                    Index group_size) {
  auto weights = detail::make_tensor<float, 2>("dequantize_grouped", "result",
                                               input_view<2>(values).dimensions());
  dequantize_grouped_into(device, weights, values, scales, group_size);
  return weights;
}
template <typename Values, typename Scales>
  requires(!Device<Values>)
Tensor<float, 2> dequantize_grouped(const Values& values, const Scales& scales, Index group_size) {
  return dequantize_grouped(Eigen::DefaultDevice{}, values, scales, group_size);
}

namespace detail {

template <Device D, typename Output, typename Input, typename Values, typename Scales, typename E>
auto int8_linear_problem(Output& y, const Input& x, const Values& values, const Scales& scales,
                         const E& epilogue) {
  using X = scalar_of<Input>;
  require_int8_values<Values>();
  static_assert(!std::is_same_v<X, double>,
                "eigenformer: int8_linear takes and gives float, Eigen::bfloat16 or Eigen::half");
  static_assert(std::is_same_v<scalar_of<Scales>, float>, "eigenformer: scales are float");
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  const auto weight = input_view<2>(values);
  const auto factors = input_view<1>(scales);
  checked_size("int8_linear", "weight", weight);
  const Index tokens = from.dimension(0), in = from.dimension(1), out = weight.dimension(0);
  require_linear({"int8_linear", "weight"}, to, from, epilogue, out, weight.dimension(1), 1);
  require_that(factors.dimension(0) == out, "int8_linear", "scales has ", factors.dimension(0),
               " elements, weight has ", out, " rows");
  require_int8_depth(in, "int8_linear");
  require_scales<D>("int8_linear", factors);
  return problem::Int8Linear<scalar_of<Output>, X, typename E::pointers>{
      to.data(), from.data(), weight.data(), factors.data(), tokens, in, out, epilogue};
}

}  // namespace detail

/// y (tokens, out) = x (tokens, in) times the quantized weight (out, in) transposed, plus bias
/// (out) where given. The values of linear with pack_weight(values, scales), bit for bit, without
/// packing first: quantized activations, exact int32 sums, in <= 133,144, and y = fma(float(sum),
/// x's scale * weight's scale, bias). Values must lie in [-127, 127]. A scale that is NaN, infinite
/// or negative throws std::invalid_argument naming the first one: O(out), on the CPU only.
template <Device D, typename Output, typename Input, typename Values, typename Scales,
          typename BiasOrEpilogue = Epilogue<>>
void int8_linear_into(const D& device, Output&& y, const Input& x, const Values& values,
                      const Scales& scales, const BiasOrEpilogue& end = {},
                      Workspace& workspace = thread_workspace()) {
  detail::run(device,
              detail::int8_linear_problem<D>(y, x, values, scales, detail::as_epilogue(end)),
              workspace);
}
template <Device D, typename Output, typename Input, typename Values, typename Scales>
void int8_linear_into(const D& device, Output&& y, const Input& x, const Values& values,
                      const Scales& scales, Workspace& workspace) {
  int8_linear_into(device, y, x, values, scales, Epilogue{}, workspace);
}

/// ef::Tensor<float, 2> y = ef::int8_linear(x, qc, scales);   // x of any scalar but double, y float
template <CpuDevice D, typename Input, typename Values, typename Scales,
          typename BiasOrEpilogue = Epilogue<>>
Tensor<float, 2> int8_linear(const D& device, const Input& x, const Values& values,
                             const Scales& scales, const BiasOrEpilogue& end = {}) {
  const Index tokens = input_view<2>(x).dimension(0), out = input_view<2>(values).dimension(0);
  auto y = detail::make_tensor<float, 2>("int8_linear", "y", Eigen::DSizes<Index, 2>(tokens, out));
  int8_linear_into(device, y, x, values, scales, end);
  return y;
}
template <typename Input, typename Values, typename Scales, typename BiasOrEpilogue = Epilogue<>>
  requires(!Device<Input>)
Tensor<float, 2> int8_linear(const Input& x, const Values& values, const Scales& scales,
                             const BiasOrEpilogue& end = {}) {
  return int8_linear(Eigen::DefaultDevice{}, x, values, scales, end);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
