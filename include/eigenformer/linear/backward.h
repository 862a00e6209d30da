/// \file
/// Gradients of the linear layer. The manual is linear.h.
#pragma once

#include "../linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// grad_x = grad_y w, checked views.
template <typename Isa, typename D, typename X, typename Y, typename W>
void linear_backward_input_on(Isa isa, const D& device, TensorView<X, 2> grad_x,
                              TensorView<const Y, 2> grad_y, TensorView<const W, 2> weight,
                              Workspace& workspace) {
  const Index tokens = grad_y.dimension(0), out = weight.dimension(0), in = weight.dimension(1);
  const auto end = finish<false>(PlainSums<float>{nullptr}, grad_x, Epilogue{});
  using Dot = tile::Dot<operand_scalar<Y, W>, Y, Isa>;
  cpu::product<Dot>(
      isa, device,
      ProductProblem<Y, WeightRows<W, 1>, std::remove_const_t<decltype(end)>>{
          {grad_y.data(), out, 1}, {{{weight.data(), 1, in}}, in}, tokens, in, out, end},
      workspace);
}

/// grad_weight += grad_y^T x, checked views.
template <typename Isa, typename D, typename G, typename Y, typename X>
void linear_backward_weight_on(Isa isa, const D& device, TensorView<G, 2> grad_weight,
                               TensorView<const Y, 2> grad_y, TensorView<const X, 2> x,
                               Workspace& workspace) {
  const Index tokens = grad_y.dimension(0), out = grad_y.dimension(1), in = x.dimension(1);
  constexpr bool narrow =
      std::is_same_v<X, bfloat16> && std::is_same_v<Y, bfloat16> && std::is_same_v<G, float>;
  using Dot = tile::Dot<std::conditional_t<narrow, bfloat16, G>, Y, Isa>;
  cpu::product<Dot>(isa, device,
                    ProductProblem<Y, WeightRows<X, 1>, AddSums<G>>{{grad_y.data(), 1, out},
                                                                    {{{x.data(), 1, in}}, in},
                                                                    out,
                                                                    in,
                                                                    tokens,
                                                                    {grad_weight.data(), in}},
                    workspace);
}

}  // namespace detail

/// grad_x (tokens, in) = grad_y (tokens, out) times weight (out, in), a tensor. grad_x must not
/// overlap an input.
template <CpuDevice D, typename GradX, typename GradY, typename Weight>
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
  require_that(from.dimension(1) == out, name, "grad_y has ", from.dimension(1),
               " features, weight has ", out, " rows");
  require_that(to.dimension(0) == tokens && to.dimension(1) == in, name, "grad_x has shape ",
               detail::shape_text(to), ", expected (", tokens, ", ", in, ")");
  cpu::with_granted_isa(
      [&](auto isa) { detail::linear_backward_input_on(isa, device, to, from, w, workspace); });
}

/// grad_weight (out, in) += grad_y (tokens, out) transposed times x (tokens, in). grad_weight is
/// float; double for double grad_y or x.
template <CpuDevice D, typename GradW, typename GradY, typename Input>
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
  require_that(input.dimension(0) == tokens, name, "x has ", input.dimension(0),
               " tokens, grad_y has ", tokens);
  require_that(to.dimension(0) == out && to.dimension(1) == in, name, "grad_weight has shape ",
               detail::shape_text(to), ", expected (", out, ", ", in, ")");
  cpu::with_granted_isa(
      [&](auto isa) { detail::linear_backward_weight_on(isa, device, to, dy, input, workspace); });
}

/// grad_bias (out) += the sum of grad_y (tokens, out) over tokens, in their order. grad_bias is
/// float; double for double grad_y.
template <CpuDevice D, typename GradB, typename GradY>
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
  require_that(to.dimension(0) == dy.dimension(1), "linear_backward_bias", "grad_bias has ",
               to.dimension(0), " elements, grad_y has ", dy.dimension(1), " features");
  cpu::add_column_sums(isa::best{}, device, to.data(), dy.data(), dy.dimension(0), dy.dimension(1));
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
