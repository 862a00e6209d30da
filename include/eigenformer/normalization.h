/// \file
/// Normalization of rows: RMSNorm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)
/// and LayerNorm (Ba, Kiros & Hinton, 2016):
///
///   rms_norm    y[i, j] = x[i, j] / sqrt(mean over k of x[i, k]^2 + epsilon) * weight[j]
///   layer_norm  y[i, j] = (x[i, j] - m) / sqrt(mean over k of (x[i, k] - m)^2 + epsilon) * weight[j] + bias[j]
///
/// where m = mean over k of x[i, k].
///
/// x is (rows, features) or (batch, seq, features), y has its shape, weight and bias are
/// (features). x of rms_norm_into and layer_norm_into may be heads in the rows of a wider matrix
/// (ef::heads_of), y then (tokens, heads, head_dim): queries and keys are normalized out of the QKV
/// product; weight and bias of layer_norm_into are then (head_dim), or (heads, head_dim) where each
/// head has its own. Scalars are float, double, bfloat16 and half; y, x and weight may differ
/// (bfloat16 activations with float weights). Arithmetic is in float, or in double where an
/// argument is double; nothing is rounded in between. Every finite row has its right result: one
/// whose squares or sums leave the range of the type is summed again in a unit of its own (twice
/// the cost, for that row), and LayerNorm loses nothing where the mean is large against the spread:
/// a row of equal numbers gives the bias.
///
/// epsilon is inside the root and must be positive and finite: a row of zeros (padding) then gives
/// zeros, not NaN. NaN in a row stays in that row; going back, a row that holds NaN or infinity and
/// whose grad_y is all zero takes no part: it gives grad_x 0 and adds nothing to the gradients of
/// weight and bias.
///
/// Aliasing: y may be x itself (the same memory and scalar); any other overlap is undefined. Throws
/// std::invalid_argument for shapes that disagree and for a bad epsilon, before anything is
/// written. Cost: one read of x from memory, one write of y. No form with a destination allocates,
/// but the backward one grows its workspace on the first call at a number of rows. Results do not
/// depend on threads or on the other rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/heads_view.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/normalization/layer_norm.h"
#include "cpu/normalization/normalization.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct RmsNormOptions {
  float epsilon = 1e-5f;  ///< added to the mean square; positive
};

struct LayerNormOptions {
  float epsilon = 1e-5f;  ///< added to the variance; positive
};

namespace detail {

template <typename X>
auto norm_input(const X& x) {
  static_assert(rank_of<X> == -1 || rank_of<X> == 2 || rank_of<X> == 3,
                "eigenformer: normalization takes (rows, features) or (batch, seq, features)");
  return input_view<rank_of<X>>(x);
}
/// The forms with a destination take heads in the rows of a wider matrix too.
template <typename X>
auto norm_input_or_heads(const X& x) {
  if constexpr (tensor_traits<X>::kind == TensorKind::strided)
    return heads_input<3>(x);
  else
    return norm_input(x);
}

/// A parameter or its gradient has one element a feature.
template <typename W>
void require_features(std::string_view name, std::string_view w_name, const W& w,
                      std::string_view x_name, Index features) {
  require_that(w.dimension(0) == features, name, w_name, " has ", w.dimension(0), " elements, ",
               x_name, " has ", features, " features");
}
/// The same, or one for each head: (heads, head_dim).
template <typename W, typename X>
void require_weights(std::string_view name, std::string_view w_name, const W& w,
                     std::string_view x_name, const X& x) {
  if constexpr (rank_of<W> == 2) {
    static_assert(tensor_traits<X>::kind == TensorKind::strided,
                  "eigenformer: weights of each head go with heads (ef::heads_of)");
    require_that(w.dimension(0) == x.dimension(1) && w.dimension(1) == x.dimension(2), name, w_name,
                 " has shape ", shape_text(w), ", ", x_name, " has ", x.dimension(1), " heads of ",
                 x.dimension(2));
  } else {
    require_features(name, w_name, w, x_name,
                     x.dimension(static_cast<std::size_t>(rank_of<X> - 1)));
  }
}

/// Rows of heads, or of a token each.
struct RowsOfHeads {
  Index heads = 1;
  problem::HeadStrides strides;
  template <typename X>
  RowsOfHeads(const X& x, Index features) : strides{features, features} {
    if constexpr (tensor_traits<X>::kind == TensorKind::strided) {
      heads = x.dimension(1);
      strides = strides_of(x);
    }
  }
};

/// The rows of x, once weight and epsilon fit.
template <typename X, typename W>
RowShape norm_shape(std::string_view name, std::string_view x_name, const X& x, const W& weight,
                    float epsilon) {
  require_floating_scalars<X, W>();
  const RowShape shape = row_shape(x, name, x_name);
  require_weights(name, "weight", weight, x_name, x);
  require_that(epsilon > 0 && std::isfinite(epsilon), name, "epsilon is ", epsilon,
               ", expected positive and finite");
  return shape;
}

/// A result of the shape of x. Nothing is allocated before the weight is known to fit.
template <typename X, typename W>
auto norm_result(std::string_view name, const X& x, const W& weight, float epsilon) {
  const auto from = norm_input(x);
  norm_shape(name, "x", from, input_view<1>(weight), epsilon);
  return tensor_like(name, "x", from);
}

template <typename Y, typename X, typename W>
problem::RmsNorm<scalar_of<Y>, scalar_of<X>, scalar_of<W>> rms_norm_problem(
    std::string_view name, Y y, std::string_view x_name, X x, W weight,
    const RmsNormOptions& options) {
  require_floating_scalars<Y>();
  require_same_shape(name, "y", y, x_name, x);
  const RowShape shape = norm_shape(name, x_name, x, weight, options.epsilon);
  const RowsOfHeads rows(x, shape.features);
  return {y.data(),       x.data(),        weight.data(), shape.rows,
          shape.features, options.epsilon, rows.heads,    rows.strides};
}

/// What the backward forms have in common: the gradients of the input and of one parameter.
template <typename GX, typename GY, typename X, typename W, typename GW>
RowShape norm_backward_shape(std::string_view name, const GX& grad_x, const GY& grad_y, const X& x,
                             const W& weight, const GW& grad_weight, float epsilon) {
  require_floating_scalars<GX, GY>();
  static_assert(std::is_same_v<scalar_of<GW>, float> || std::is_same_v<scalar_of<GW>, double>,
                "eigenformer: the gradient of a weight is accumulated in float or double");
  require_same_shape(name, "grad_x", grad_x, "x", x);
  require_same_shape(name, "grad_y", grad_y, "x", x);
  const RowShape shape = norm_shape(name, "x", x, weight, epsilon);
  require_features(name, "grad_weight", grad_weight, "x", shape.features);
  return shape;
}

/// The gradient of a parameter, before anything is added to it.
template <typename C, typename W>
Tensor<C, 1> zeros_like(const W& weight) {
  Tensor<C, 1> zeros(input_view<1>(weight).dimensions());
  zeros.setZero();
  return zeros;
}

}  // namespace detail

/// y = RMSNorm(x) * weight.
///
///   ef::rms_norm_into(device, hidden, hidden, weight, {.epsilon = 1e-6f});   // in place
template <Device D, typename Y, typename X, typename W>
void rms_norm_into(const D& device, Y&& y, const X& x, const W& weight,
                   const RmsNormOptions& options = {}) {
  const auto problem =
      detail::rms_norm_problem("rms_norm", output_view<rank_of<X>>(y), "x",
                               detail::norm_input_or_heads(x), input_view<1>(weight), options);
  detail::run(device, problem);
}

/// Returns RMSNorm(x) * weight, in the scalar and shape of x.
template <CpuDevice D, typename X, typename W>
auto rms_norm(const D& device, const X& x, const W& weight, const RmsNormOptions& options = {}) {
  auto y = detail::norm_result("rms_norm", x, weight, options.epsilon);
  rms_norm_into(device, y, x, weight, options);
  return y;
}
///   ef::Tensor<float, 2> y = ef::rms_norm(x, weight, {.epsilon = 1e-5f});
template <typename X, typename W>
  requires(!Device<X>)
auto rms_norm(const X& x, const W& weight, const RmsNormOptions& options = {}) {
  return rms_norm(Eigen::DefaultDevice{}, x, weight, options);
}

/// residual += x, rounded to residual's scalar, then y = RMSNorm(residual) * weight: the same bits
/// as the two steps apart, with one pass through memory. y may be x itself, not residual.
template <Device D, typename Y, typename R, typename X, typename W>
void add_rms_norm_into(const D& device, Y&& y, R&& residual, const X& x, const W& weight,
                       const RmsNormOptions& options = {}) {
  constexpr auto name = "add_rms_norm";
  const auto addend = detail::norm_input(x);
  auto sum = output_view<rank_of<X>>(residual);
  detail::require_floating_scalars<decltype(addend)>();
  detail::require_same_shape(name, "residual", sum, "x", addend);
  const auto norm =
      detail::rms_norm_problem(name, output_view<rank_of<X>>(y), "residual",
                               detail::norm_input(residual), input_view<1>(weight), options);
  using Problem = problem::AddRmsNorm<scalar_of<Y>, scalar_of<X>, scalar_of<R>, scalar_of<W>>;
  detail::run(device, Problem{norm, sum.data(), addend.data()});
}

/// auto [normalized, sum] = ef::add_rms_norm(residual, x, weight);   // sum = residual + x, rounded
template <typename Residual, int Rank>
struct AddRmsNormResult {
  Tensor<Residual, Rank> normalized, residual;
};
template <CpuDevice D, typename R, typename X, typename W>
auto add_rms_norm(const D& device, const R& residual, const X& x, const W& weight,
                  const RmsNormOptions& options = {}) {
  AddRmsNormResult<scalar_of<R>, rank_of<R>> result;
  result.residual = detail::tensor_like("add_rms_norm", "residual", detail::norm_input(residual));
  std::copy_n(detail::norm_input(residual).data(), result.residual.size(), result.residual.data());
  result.normalized = result.residual;
  add_rms_norm_into(device, result.normalized, result.residual, x, weight, options);
  return result;
}
template <typename R, typename X, typename W>
  requires(!Device<R>)
auto add_rms_norm(const R& residual, const X& x, const W& weight,
                  const RmsNormOptions& options = {}) {
  return add_rms_norm(Eigen::DefaultDevice{}, residual, x, weight, options);
}

/// Gradients of y = RMSNorm(x) * weight from that of y, with the x, weight and options of the
/// forward call. grad_x is written and may be grad_y or x itself. grad_weight, float or double, is
/// added to: once over the rows, in a fixed order.
template <Device D, typename GX, typename GW, typename GY, typename X, typename W>
void rms_norm_backward_into(const D& device, GX&& grad_x, GW&& grad_weight, const GY& grad_y,
                            const X& x, const W& weight, const RmsNormOptions& options = {},
                            Workspace& workspace = thread_workspace()) {
  constexpr auto name = "rms_norm_backward";
  auto gx = output_view<rank_of<X>>(grad_x);
  auto gw = output_view<1>(grad_weight);
  const auto gy = input_view<rank_of<X>>(grad_y);
  const auto xv = detail::norm_input(x);
  const auto w = input_view<1>(weight);
  const auto shape = detail::norm_backward_shape(name, gx, gy, xv, w, gw, options.epsilon);
  using Problem = problem::RmsNormBackward<scalar_of<GX>, scalar_of<GW>, scalar_of<GY>,
                                           scalar_of<X>, scalar_of<W>>;
  Workspace::Frame frame(workspace);
  auto* row_scratch = frame.take<problem::RmsNormRow<typename Problem::compute>>(shape.rows);
  detail::run(device, Problem{gx.data(), gw.data(), gy.data(), xv.data(), w.data(), shape.rows,
                              shape.features, options.epsilon, row_scratch});
}

/// auto [grad_x, grad_weight] = ef::rms_norm_backward(grad_y, x, weight);   // grad_weight from 0
template <typename T, int Rank, typename G>
struct RmsNormGradients {
  Tensor<T, Rank> grad_x;
  Tensor<G, 1> grad_weight;
};
template <CpuDevice D, typename GY, typename X, typename W>
auto rms_norm_backward(const D& device, const GY& grad_y, const X& x, const W& weight,
                       const RmsNormOptions& options = {}) {
  using C = compute_type<scalar_of<X>>;
  RmsNormGradients<scalar_of<X>, rank_of<X>, C> g;
  g.grad_x = detail::norm_result("rms_norm_backward", x, weight, options.epsilon);
  g.grad_weight = detail::zeros_like<C>(weight);
  rms_norm_backward_into(device, g.grad_x, g.grad_weight, grad_y, x, weight, options);
  return g;
}
template <typename GY, typename X, typename W>
  requires(!Device<GY>)
auto rms_norm_backward(const GY& grad_y, const X& x, const W& weight,
                       const RmsNormOptions& options = {}) {
  return rms_norm_backward(Eigen::DefaultDevice{}, grad_y, x, weight, options);
}

/// y = LayerNorm(x) * weight + bias; weight and bias have one scalar and one shape.
///
///   ef::layer_norm_into(device, q, ef::heads_of(qkv, 0, heads, head_dim), weight, bias);
template <Device D, typename Y, typename X, typename W, typename B>
void layer_norm_into(const D& device, Y&& y, const X& x, const W& weight, const B& bias,
                     const LayerNormOptions& options = {}) {
  constexpr auto name = "layer_norm";
  auto yv = output_view<rank_of<X>>(y);
  const auto xv = detail::norm_input_or_heads(x);
  constexpr int rank = rank_of<W> == 2 ? 2 : 1;  // 2: each head has its own
  const auto w = input_view<rank>(weight), b = input_view<rank>(bias);
  detail::require_floating_scalars<decltype(yv)>();
  detail::require_same_shape(name, "y", yv, "x", xv);
  const auto shape = detail::norm_shape(name, "x", xv, w, options.epsilon);
  detail::require_weights(name, "bias", b, "x", xv);
  const detail::RowsOfHeads rows(xv, shape.features);
  using Problem = problem::LayerNorm<scalar_of<Y>, scalar_of<X>, scalar_of<W>>;
  detail::run(device, Problem{yv.data(), xv.data(), w.data(), b.data(), shape.rows, shape.features,
                              options.epsilon, rows.heads, rows.strides, rank == 2});
}

/// Returns LayerNorm(x) * weight + bias, in the scalar and shape of x.
template <CpuDevice D, typename X, typename W, typename B>
auto layer_norm(const D& device, const X& x, const W& weight, const B& bias,
                const LayerNormOptions& options = {}) {
  auto y = detail::norm_result("layer_norm", x, weight, options.epsilon);
  layer_norm_into(device, y, x, weight, bias, options);
  return y;
}
template <typename X, typename W, typename B>
  requires(!Device<X>)
auto layer_norm(const X& x, const W& weight, const B& bias, const LayerNormOptions& options = {}) {
  return layer_norm(Eigen::DefaultDevice{}, x, weight, bias, options);
}

/// Gradients of LayerNorm from that of y, with the x, weight and options of the forward call.
/// grad_x is written and may be grad_y or x itself. grad_weight and grad_bias, both float or both
/// double, are added to, in a fixed order.
template <Device D, typename GX, typename GW, typename GB, typename GY, typename X, typename W>
void layer_norm_backward_into(const D& device, GX&& grad_x, GW&& grad_weight, GB&& grad_bias,
                              const GY& grad_y, const X& x, const W& weight,
                              const LayerNormOptions& options = {},
                              Workspace& workspace = thread_workspace()) {
  constexpr auto name = "layer_norm_backward";
  auto gx = output_view<rank_of<X>>(grad_x);
  auto gw = output_view<1>(grad_weight), gb = output_view<1>(grad_bias);
  const auto gy = input_view<rank_of<X>>(grad_y);
  const auto xv = detail::norm_input(x);
  const auto w = input_view<1>(weight);
  const auto shape = detail::norm_backward_shape(name, gx, gy, xv, w, gw, options.epsilon);
  detail::require_features(name, "grad_bias", gb, "x", shape.features);
  using Problem = problem::LayerNormBackward<scalar_of<GX>, scalar_of<GW>, scalar_of<GY>,
                                             scalar_of<X>, scalar_of<W>>;
  Workspace::Frame frame(workspace);
  auto* row_scratch = frame.take<problem::LayerNormRow<typename Problem::compute>>(shape.rows);
  detail::run(device, Problem{gx.data(), gw.data(), gb.data(), gy.data(), xv.data(), w.data(),
                              shape.rows, shape.features, options.epsilon, row_scratch});
}

/// auto [grad_x, grad_weight, grad_bias] = ef::layer_norm_backward(grad_y, x, weight);
template <typename T, int Rank, typename G>
struct LayerNormGradients {
  Tensor<T, Rank> grad_x;
  Tensor<G, 1> grad_weight, grad_bias;
};
template <CpuDevice D, typename GY, typename X, typename W>
auto layer_norm_backward(const D& device, const GY& grad_y, const X& x, const W& weight,
                         const LayerNormOptions& options = {}) {
  using C = compute_type<scalar_of<X>>;
  LayerNormGradients<scalar_of<X>, rank_of<X>, C> g;
  g.grad_x = detail::norm_result("layer_norm_backward", x, weight, options.epsilon);
  g.grad_weight = detail::zeros_like<C>(weight);
  g.grad_bias = g.grad_weight;
  layer_norm_backward_into(device, g.grad_x, g.grad_weight, g.grad_bias, grad_y, x, weight,
                           options);
  return g;
}
template <typename GY, typename X, typename W>
  requires(!Device<GY>)
auto layer_norm_backward(const GY& grad_y, const X& x, const W& weight,
                         const LayerNormOptions& options = {}) {
  return layer_norm_backward(Eigen::DefaultDevice{}, grad_y, x, weight, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
