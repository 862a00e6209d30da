/// \file
/// Gradients of the linear layer. The manual is linear.h.
#pragma once

#include "../linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// grad_x (tokens, in) = grad_y (tokens, out) times weight (out, in), a tensor. grad_x must not
/// overlap an input.
template <Device D, typename GradX, typename GradY, typename Weight>
void linear_backward_input_into(const D& device, GradX&& grad_x, const GradY& grad_y,
                                const Weight& weight, Workspace& workspace = thread_workspace()) {
  constexpr auto name = "linear_backward_input";
  static_assert(
      !detail::is_packed_weight<Weight>,
      "eigenformer: linear_backward_input_into takes the (out, in) tensor, not a PackedWeight");
  const auto to = output_view<2>(grad_x);
  const auto from = input_view<2>(grad_y);
  const auto w = input_view<2>(weight);
  using X = scalar_of<GradX>;
  using Y = scalar_of<GradY>;
  using W = scalar_of<Weight>;
  static_assert(FloatingScalar<X> && FloatingScalar<Y> && FloatingScalar<W>,
                "eigenformer: gradients are of floating scalars");
  static_assert(std::is_same_v<Y, double> || !std::is_same_v<X, double>,
                "eigenformer: a double grad_x needs a double grad_y");
  detail::checked_size(name, "grad_x", to);
  detail::checked_size(name, "grad_y", from);
  detail::checked_size(name, "weight", w);
  const Index tokens = from.dimension(0), out = w.dimension(0), in = w.dimension(1);
  detail::require_that(from.dimension(1) == out, name, "grad_y has ", from.dimension(1),
                       " features, weight has ", out, " rows");
  detail::require_that(to.dimension(0) == tokens && to.dimension(1) == in, name,
                       "grad_x has shape ", detail::shape_text(to), ", expected (", tokens, ", ",
                       in, ")");
  detail::run(
      device,
      problem::LinearBackwardInput<X, Y, W>{to.data(), from.data(), w.data(), tokens, in, out},
      workspace);
}

/// grad_weight (out, in) += grad_y (tokens, out) transposed times x (tokens, in). grad_weight is
/// float; double for double grad_y or x.
template <Device D, typename GradW, typename GradY, typename Input>
void linear_backward_weight_into(const D& device, GradW&& grad_weight, const GradY& grad_y,
                                 const Input& x, Workspace& workspace = thread_workspace()) {
  constexpr auto name = "linear_backward_weight";
  const auto to = output_view<2>(grad_weight);
  const auto dy = input_view<2>(grad_y);
  const auto input = input_view<2>(x);
  using G = scalar_of<GradW>;
  using Y = scalar_of<GradY>;
  using X = scalar_of<Input>;
  static_assert(std::is_same_v<G, float> || std::is_same_v<G, double>,
                "eigenformer: gradients of parameters are float or double");
  static_assert(
      std::is_same_v<G, double> || (!std::is_same_v<X, double> && !std::is_same_v<Y, double>),
      "eigenformer: double activations need a double gradient");
  detail::checked_size(name, "grad_weight", to);
  detail::checked_size(name, "grad_y", dy);
  detail::checked_size(name, "x", input);
  const Index tokens = dy.dimension(0), out = dy.dimension(1), in = input.dimension(1);
  detail::require_that(input.dimension(0) == tokens, name, "x has ", input.dimension(0),
                       " tokens, grad_y has ", tokens);
  detail::require_that(to.dimension(0) == out && to.dimension(1) == in, name,
                       "grad_weight has shape ", detail::shape_text(to), ", expected (", out, ", ",
                       in, ")");
  detail::run(
      device,
      problem::LinearBackwardWeight<G, Y, X>{to.data(), dy.data(), input.data(), tokens, in, out},
      workspace);
}

/// grad_bias (out) += the sum of grad_y (tokens, out) over tokens, in their order. grad_bias is
/// float; double for double grad_y.
template <Device D, typename GradB, typename GradY>
void linear_backward_bias_into(const D& device, GradB&& grad_bias, const GradY& grad_y) {
  const auto to = output_view<1>(grad_bias);
  const auto dy = input_view<2>(grad_y);
  using G = scalar_of<GradB>;
  static_assert(std::is_same_v<G, float> || std::is_same_v<G, double>,
                "eigenformer: gradients of parameters are float or double");
  static_assert(std::is_same_v<G, double> || !std::is_same_v<scalar_of<GradY>, double>,
                "eigenformer: double activations need a double gradient");
  if (detail::checked_size("linear_backward_bias", "grad_y", dy) == 0 && to.dimension(0) == 0)
    return;
  detail::require_that(to.dimension(0) == dy.dimension(1), "linear_backward_bias", "grad_bias has ",
                       to.dimension(0), " elements, grad_y has ", dy.dimension(1), " features");
  detail::run(device, problem::LinearBackwardBias<G, scalar_of<GradY>>{
                          to.data(), dy.data(), dy.dimension(0), dy.dimension(1)});
}

/// The same, returned: of grad_y's scalar (grad_x), of float or double, from 0 (grad_weight,
/// grad_bias).
template <CpuDevice D, typename GradY, typename Weight>
auto linear_backward_input(const D& device, const GradY& grad_y, const Weight& weight) {
  auto grad_x = detail::make_tensor<scalar_of<GradY>, 2>(
      "linear_backward_input", "grad_x",
      Eigen::DSizes<Index, 2>(input_view<2>(grad_y).dimension(0),
                              input_view<2>(weight).dimension(1)));
  linear_backward_input_into(device, grad_x, grad_y, weight);
  return grad_x;
}
template <typename GradY, typename Weight>
  requires(!Device<GradY>)
auto linear_backward_input(const GradY& grad_y, const Weight& weight) {
  return linear_backward_input(Eigen::DefaultDevice{}, grad_y, weight);
}
template <CpuDevice D, typename GradY, typename Input>
auto linear_backward_weight(const D& device, const GradY& grad_y, const Input& x) {
  auto grad_weight =
      detail::make_tensor<detail::common_compute_type<scalar_of<GradY>, scalar_of<Input>>, 2>(
          "linear_backward_weight", "grad_weight",
          Eigen::DSizes<Index, 2>(input_view<2>(grad_y).dimension(1),
                                  input_view<2>(x).dimension(1)));
  grad_weight.setZero();
  linear_backward_weight_into(device, grad_weight, grad_y, x);
  return grad_weight;
}
template <typename GradY, typename Input>
  requires(!Device<GradY>)
auto linear_backward_weight(const GradY& grad_y, const Input& x) {
  return linear_backward_weight(Eigen::DefaultDevice{}, grad_y, x);
}
template <CpuDevice D, typename GradY>
auto linear_backward_bias(const D& device, const GradY& grad_y) {
  Tensor<compute_type<scalar_of<GradY>>, 1> grad_bias(input_view<2>(grad_y).dimension(1));
  grad_bias.setZero();
  linear_backward_bias_into(device, grad_bias, grad_y);
  return grad_bias;
}
template <typename GradY>
  requires(!Device<GradY>)
auto linear_backward_bias(const GradY& grad_y) {
  return linear_backward_bias(Eigen::DefaultDevice{}, grad_y);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
