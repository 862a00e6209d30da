/// \file
/// The linear layer, y = x w^T + bias, and its gradients:
///
///   y[t, o] = bias[o] + sum over i of x[t, i] * weight[o, i]         x (tokens, in), weight (out, in), bias (out), y (tokens, out)
///
/// Scalars. x: float, double, bfloat16 or half. weight: a tensor of any of these, or a PackedWeight (linear/packed_weight.h), which
/// is what to use where a weight serves more than one call. bias: x's scalar or float. y: any; double only with double x.
///   - bfloat16 x: a bfloat16 or float weight is multiplied in bfloat16 (the float one rounded first, as in mixed-precision
///   training),
///     with the ISA's bfloat16 products where it has them (they take denormals as zero); everything accumulates in float.
///   - int8 PackedWeight: x is quantized per token while it is packed (scale = max|x| / 127), sums are exact in int32, and
///     y = fma(float(sum), x's scale * weight's scale, bias) in this order: the same bits on every ISA. A token that holds NaN or
///     infinity gets NaN in all its outputs; the others are not touched.
///   - any other pair widens exactly to float (to double where one is double, with weights not packed or packed in double).
///
/// Each output is one chain of multiply-adds over i in ascending order: its bits depend neither on the other tokens, nor on
/// threads, nor on which rows of the weight are there, nor on whether the weight was packed. in = 0 gives the bias, or 0. y must
/// not overlap an input. All forms throw std::invalid_argument for shapes that do not fit and for a weight packed for another ISA,
/// before writing.
///
/// Cost: 2 * tokens * in * out operations at the rate of the widest multiply-add; one token reads the packed weights once. A plain
/// weight is packed on the way into scratch, at about the cost of one more token on AVX2 and AVX-512 (once for every 384 tokens).
/// Scratch, from the workspace: at most 384 rows of x and, for each thread, about 1 MiB.
///
/// Gradients, from grad_y (tokens, out): the input's is overwritten; those of the parameters are added to, each element one chain
/// over tokens that starts from what the gradient holds, so that micro-batches in turn give the bits of one big batch (of bfloat16
/// pairs: where the micro-batches are even).
#pragma once

#include "core/check.h"
#include "core/device.h"
#include "core/workspace.h"
#include "cpu/linear.h"
#include "linear/packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename W>
inline constexpr bool is_packed_weight = false;
template <typename T>
inline constexpr bool is_packed_weight<PackedWeight<T>> = true;

/// What plain weights of W are packed to for activations of X.
template <typename X, typename W>
using operand_scalar = std::conditional_t<
    std::is_same_v<X, double> || std::is_same_v<W, double>, double,
    std::conditional_t<std::is_same_v<X, bfloat16> && (std::is_same_v<W, bfloat16> || std::is_same_v<W, float>), bfloat16, float>>;

inline void require_linear_shapes(Index y_rows, Index y_columns, Index tokens, Index in, Index out, Index weight_in) {
  require(weight_in == in, "linear", "weight has ", weight_in, " columns, x has ", in, " features");
  require(y_rows == tokens && y_columns == out, "linear", "y has shape (", y_rows, ", ", y_columns, "), expected (", tokens, ", ",
          out, ")");
}

/// y = x w^T + bias; `bias` may be nullptr. Weight is a TensorView or a PackedWeight.
template <typename Isa, typename D, typename Y, typename X, typename W, typename B>
void linear_on(Isa isa, const D& device, TensorView<Y, 2> y, TensorView<const X, 2> x, TensorView<const W, 2> weight, const B* bias,
               Workspace& workspace) {
  static_assert(FloatingScalar<W>,
                "eigenformer: a plain weight is float, double, Eigen::bfloat16 or Eigen::half; for int8 use int8_linear "
                "or pack_weight(values, scales)");
  const Index tokens = x.dimension(0), in = x.dimension(1), out = weight.dimension(0);
  require_linear_shapes(y.dimension(0), y.dimension(1), tokens, in, out, weight.dimension(1));
  using Dot = tile::Dot<operand_scalar<X, W>, X, Isa>;
  cpu::product<Dot>(isa, device,
                    ProductProblem<X, MatrixOperand<W>, StoreSums<Y, B>>{
                        {x.data(), in, 1}, {weight.data(), in, 1}, tokens, out, in, {y.data(), out, bias}},
                    workspace);
}

template <typename Isa, typename D, typename Y, typename X, typename S, typename B>
void linear_on(Isa isa, const D& device, TensorView<Y, 2> y, TensorView<const X, 2> x, const PackedWeight<S>& weight, const B* bias,
               Workspace& workspace) {
  static_assert(std::is_same_v<X, double> == std::is_same_v<S, double>,
                "eigenformer: double x goes with PackedWeight<double> and with no other");
  const Index tokens = x.dimension(0), in = x.dimension(1), out = weight.rows();
  require_linear_shapes(y.dimension(0), y.dimension(1), tokens, in, out, weight.columns());
  const PanelLayout expected = panel_layout<S>(isa);
  require(weight.rows() == 0 || weight.layout() == expected, "linear", "weight was packed for ", weight.layout().isa,
          " (panels of ", weight.layout().columns, "), these kernels read ", expected.isa, " (panels of ", expected.columns,
          "): pack it again");
  using Dot = tile::Dot<S, X, Isa>;
  const MatrixOperand<X> activations{x.data(), in, 1};
  if constexpr (std::is_same_v<S, std::int8_t>)
    cpu::product<Dot>(isa, device,
                      ProductProblem<X, PackedPanels<S>, StoreScaledSums<Y, B>>{
                          activations, weight.panels(), tokens, out, in, {y.data(), out, bias, weight.scales()}},
                      workspace);
  else
    cpu::product<Dot>(
        isa, device,
        ProductProblem<X, PackedPanels<S>, StoreSums<Y, B>>{activations, weight.panels(), tokens, out, in, {y.data(), out, bias}},
        workspace);
}

/// Views of the arguments, checks of the scalars.
template <typename Isa, typename D, typename Output, typename Input, typename Weight, typename B>
void linear_with(Isa isa, const D& device, Output& y, const Input& x, const Weight& weight, const B* bias, Workspace& workspace) {
  using Y = scalar_of<Output>;
  using X = scalar_of<Input>;
  const auto y_view = output_view<2>(y);
  const auto x_view = input_view<2>(x);
  static_assert(FloatingScalar<X> && FloatingScalar<Y>,
                "eigenformer: x and y of a linear layer are float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(std::is_same_v<X, double> || !std::is_same_v<Y, double>, "eigenformer: a double y needs a double x");
  static_assert(FloatingScalar<B> && (std::is_same_v<X, double> || !std::is_same_v<B, double>),
                "eigenformer: a bias has x's scalar or float");
  if constexpr (is_packed_weight<Weight>)
    linear_on(isa, device, y_view, x_view, weight, bias, workspace);
  else
    linear_on(isa, device, y_view, x_view, input_view<2>(weight), bias, workspace);
}

template <typename Weight>
Index weight_rows(const Weight& weight) {
  if constexpr (is_packed_weight<Weight>)
    return weight.rows();
  else
    return input_view<2>(weight).dimension(0);
}

template <typename Weight, typename Bias>
auto checked_bias(const Weight& weight, const Bias& bias) {
  const auto view = input_view<1>(bias);
  require(view.dimension(0) == weight_rows(weight), "linear", "bias has ", view.dimension(0), " elements, weight has ",
          weight_rows(weight), " rows");
  return view;
}

/// What the returning forms return: x's scalar; of a packed weight float (double for double), since its scalar is a matter of
/// storage.
template <typename Input, typename Weight>
using linear_result = std::conditional_t<is_packed_weight<Weight>, compute_type<scalar_of<Input>>, scalar_of<Input>>;

}  // namespace detail

/// y (tokens, out) = x (tokens, in) times weight (out, in) transposed, plus bias (out). Allocates nothing after the first call at a
/// size.
///
///   ef::linear_into(device, y, x, w8);  ef::linear_into(device, y, x, w8, bias);
template <CpuDevice D, typename Output, typename Input, typename Weight>
void linear_into(const D& device, Output&& y, const Input& x, const Weight& weight, Workspace& workspace) {
  detail::linear_with(isa::best{}, device, y, x, weight, static_cast<const float*>(nullptr), workspace);
}
template <CpuDevice D, typename Output, typename Input, typename Weight>
void linear_into(const D& device, Output&& y, const Input& x, const Weight& weight) {
  linear_into(device, y, x, weight, thread_workspace());
}
template <CpuDevice D, typename Output, typename Input, typename Weight, typename Bias>
  requires(!std::same_as<Bias, Workspace>)
void linear_into(const D& device, Output&& y, const Input& x, const Weight& weight, const Bias& bias,
                 Workspace& workspace = thread_workspace()) {
  const auto view = detail::checked_bias(weight, bias);
  detail::linear_with(isa::best{}, device, y, x, weight, view.data(), workspace);
}

/// Returns y: of x's scalar where the weight is a tensor, of float (double for double x) where it is a PackedWeight.
///
///   ef::Tensor<float, 2> y = ef::linear(x, weight, bias);
///   ef::Tensor<float, 2> y3 = ef::linear(device, x, w8, bias);   // x float or bfloat16
template <CpuDevice D, typename Input, typename Weight>
auto linear(const D& device, const Input& x, const Weight& weight) {
  const auto view = input_view<2>(x);
  Tensor<detail::linear_result<Input, Weight>, 2> y(view.dimension(0), detail::weight_rows(weight));
  linear_into(device, y, x, weight);
  return y;
}
template <CpuDevice D, typename Input, typename Weight, typename Bias>
auto linear(const D& device, const Input& x, const Weight& weight, const Bias& bias) {
  const auto view = input_view<2>(x);
  Tensor<detail::linear_result<Input, Weight>, 2> y(view.dimension(0), detail::weight_rows(weight));
  linear_into(device, y, x, weight, bias);
  return y;
}
template <typename Input, typename Weight>
  requires(!Device<Input>)
auto linear(const Input& x, const Weight& weight) {
  return linear(Eigen::DefaultDevice{}, x, weight);
}
template <typename Input, typename Weight, typename Bias>
  requires(!Device<Input>)
auto linear(const Input& x, const Weight& weight, const Bias& bias) {
  return linear(Eigen::DefaultDevice{}, x, weight, bias);
}

/// grad_x (tokens, in) = grad_y (tokens, out) times weight (out, in), a tensor. grad_x must not overlap an input.
template <CpuDevice D, typename GradX, typename GradY, typename Weight>
void linear_backward_input_into(const D& device, GradX&& grad_x, const GradY& grad_y, const Weight& weight,
                                Workspace& workspace = thread_workspace()) {
  constexpr auto name = "linear_backward_input";
  static_assert(!detail::is_packed_weight<Weight>,
                "eigenformer: linear_backward_input_into takes the (out, in) tensor, not a PackedWeight");
  const auto to = output_view<2>(grad_x);
  const auto from = input_view<2>(grad_y);
  const auto w = input_view<2>(weight);
  using X = scalar_of<GradX>;
  using Y = scalar_of<GradY>;
  using W = scalar_of<Weight>;
  static_assert(FloatingScalar<X> && FloatingScalar<Y> && FloatingScalar<W>, "eigenformer: gradients are of floating scalars");
  static_assert(std::is_same_v<Y, double> || !std::is_same_v<X, double>, "eigenformer: a double grad_x needs a double grad_y");
  const Index tokens = from.dimension(0), out = w.dimension(0), in = w.dimension(1);
  require(from.dimension(1) == out, name, "grad_y has ", from.dimension(1), " features, weight has ", out, " rows");
  require(to.dimension(0) == tokens && to.dimension(1) == in, name, "grad_x has shape ", detail::shape_text(to), ", expected (",
          tokens, ", ", in, ")");
  using Dot = tile::Dot<detail::operand_scalar<Y, W>, Y, isa::best>;
  cpu::product<Dot>(isa::best{}, device,
                    ProductProblem<Y, MatrixOperand<W>, StoreSums<X, float>>{
                        {from.data(), out, 1}, {w.data(), 1, in}, tokens, in, out, {to.data(), in, nullptr}},
                    workspace);
}

/// grad_weight (out, in) += grad_y (tokens, out) transposed times x (tokens, in). grad_weight is float; double for double grad_y or
/// x.
template <CpuDevice D, typename GradW, typename GradY, typename Input>
void linear_backward_weight_into(const D& device, GradW&& grad_weight, const GradY& grad_y, const Input& x,
                                 Workspace& workspace = thread_workspace()) {
  constexpr auto name = "linear_backward_weight";
  const auto to = output_view<2>(grad_weight);
  const auto dy = input_view<2>(grad_y);
  const auto input = input_view<2>(x);
  using G = scalar_of<GradW>;
  using Y = scalar_of<GradY>;
  using X = scalar_of<Input>;
  static_assert(std::is_same_v<G, float> || std::is_same_v<G, double>, "eigenformer: gradients of parameters are float or double");
  static_assert(std::is_same_v<G, double> || (!std::is_same_v<X, double> && !std::is_same_v<Y, double>),
                "eigenformer: double activations need a double gradient");
  const Index tokens = dy.dimension(0), out = dy.dimension(1), in = input.dimension(1);
  require(input.dimension(0) == tokens, name, "x has ", input.dimension(0), " tokens, grad_y has ", tokens);
  require(to.dimension(0) == out && to.dimension(1) == in, name, "grad_weight has shape ", detail::shape_text(to), ", expected (",
          out, ", ", in, ")");
  constexpr bool narrow = std::is_same_v<X, bfloat16> && std::is_same_v<Y, bfloat16> && std::is_same_v<G, float>;
  using Dot = tile::Dot<std::conditional_t<narrow, bfloat16, G>, Y, isa::best>;
  cpu::product<Dot>(
      isa::best{}, device,
      ProductProblem<Y, MatrixOperand<X>, AddSums<G>>{{dy.data(), 1, out}, {input.data(), 1, in}, out, in, tokens, {to.data(), in}},
      workspace);
}

/// grad_bias (out) += the sum of grad_y (tokens, out) over tokens, in their order. grad_bias is float; double for double grad_y.
template <CpuDevice D, typename GradB, typename GradY>
void linear_backward_bias_into(const D& device, GradB&& grad_bias, const GradY& grad_y) {
  const auto to = output_view<1>(grad_bias);
  const auto dy = input_view<2>(grad_y);
  using G = scalar_of<GradB>;
  static_assert(std::is_same_v<G, float> || std::is_same_v<G, double>, "eigenformer: gradients of parameters are float or double");
  static_assert(std::is_same_v<G, double> || !std::is_same_v<scalar_of<GradY>, double>,
                "eigenformer: double activations need a double gradient");
  require(to.dimension(0) == dy.dimension(1), "linear_backward_bias", "grad_bias has ", to.dimension(0), " elements, grad_y has ",
          dy.dimension(1), " features");
  cpu::add_column_sums(isa::best{}, device, to.data(), dy.data(), dy.dimension(0), dy.dimension(1));
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
