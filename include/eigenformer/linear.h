/// \file
/// The linear layer, y = x w^T + bias, and its gradients:
///
///   y[t, o] = bias[o] + sum over i of x[t, i] * weight[o, i]         x (tokens, in), weight (out, in), bias (out), y (tokens, out)
///
/// Scalars. x: float, double, bfloat16 or half. weight: a tensor of any of these, or a PackedWeight
/// (linear/pack.h), which is what to use where a weight serves more than one call. bias:
/// x's scalar or float. y: any; double only with double x.
///   - bfloat16 x: a bfloat16 or float weight is multiplied in bfloat16 (the float one rounded
///     first, as in mixed-precision training), with the ISA's bfloat16 products where it has them
///     (they take denormals as zero); everything accumulates in float.
///   - int8 PackedWeight: x is quantized per token while it is packed (scale = max|x| / 127), sums
///     are exact in int32, and y = fma(float(sum), x's scale * weight's scale, bias) in this order:
///     the same bits on every ISA. A token that holds NaN or infinity gets NaN in all its outputs;
///     the others are not touched. Weights quantized in groups have one such sum per group, and
///     y = fma(chain of fma(float(sum), group's scale, .), x's scale, bias).
///   - int4 PackedWeight: the same in groups, of q = u - 8 from -8 to 7, with activations in int8
///     (W4A8): the same bits on every ISA. Where groups have minimums, the sum is of u from 0 to
///     15, and after each link of the chain follows fma(float(sum of the group's quantized x),
///     group's minimum, .). Packed with {.quantize_activations = false} (W4A16) x stays what it is:
///     the bits of a PackedWeight<float> of scale * q, or fma(scale, u, minimum). On normal(0, 1)
///     numbers W4A8 in groups of 64 with minimums has a relative error below 0.12.
///   - any other pair widens exactly to float (to double where one is double, with weights not
///     packed or packed in double).
///
/// What follows the sum (bias, activation, residual, gated pairs, another type of output) is fused:
/// linear/epilogue.h.
///
/// Each output is one chain over i in ascending order: its bits depend neither on the other tokens,
/// nor on threads, nor on which rows of the weight are there, nor on whether the weight was packed.
/// A link of the chain is one multiply-add, or the instruction that the ISA multiplies bfloat16
/// with: 2 of i (vdpbf16ps), 32 (AMX, counted from i = 0; see cpu/tile/amx.h). in = 0 gives the
/// bias, or 0. y must not overlap an input, but a residual may be y itself. All forms throw
/// std::invalid_argument for shapes that do not fit and for a weight packed for another ISA, before
/// writing. A build for AMX asks the operating system for the tile registers once, and uses AVX-512
/// for everything where they are refused.
///
/// On a GPU the order is another, and as independent. Pairs of bfloat16 (a plain float weight
/// rounded first, as above) and of half go to the tensor cores, 16 of i in a link; every 512 of i
/// are a chain of their own, and these sums are added in ascending order. All other pairs are 32
/// chains of multiply-adds, 16 bytes of i in turn, whose sums meet in a fixed tree. Plain weights
/// are read where they lie, without scratch: at full speed where rows begin at multiples of 16
/// bytes. Up to 32 tokens (8 of those other pairs, 16 with int8 in groups) read the weight once.
/// int8 and int4 weights take x quantized in scratch of the stream, and have the bits of the CPU
/// (int4 with activations as they are: those of a float weight on that GPU). Calls with a
/// destination can be captured into a graph. A build with EIGENFORMER_CUBLASLT gives products of 64
/// tokens and more, gradients too, to cuBLASLt, which orders floating sums as it likes: their bits
/// then differ from those of fewer tokens, and depend on the shape (cuda/gemm.cuh).
///
/// Cost: 2 * tokens * in * out operations at the rate of the widest multiply-add; up to four tokens
/// read the packed weights once, at memory speed. A plain weight is packed on the way into scratch,
/// once for every 768 tokens, and so is one of int4 beside more than two tiles (24 on AVX-512) of
/// activations that are not quantized; beside fewer it is widened in registers. In groups of 32 one
/// token by 4096 x 4096 takes 0.32 ms where W4A8 takes 0.20 (0.34 and 0.26 with minimums), 16
/// tokens 2.5 and 0.75, 512 tokens 69 and 24 (one thread of Zen 5, -O3). Scratch, from the
/// workspace: at most 192 rows of x (768 with a plain weight) and, for each thread, sums of 32
/// columns x 8 for these rows.
///
/// Gradients, from grad_y (tokens, out): the input's is overwritten; those of the parameters are
/// added to, each element one chain over tokens that starts from what the gradient holds, so that
/// micro-batches in turn give the bits of one big batch (of bfloat16 pairs, on a GPU of half too:
/// where all micro-batches but the last are whole links, 2 tokens, 32, or 16 on a GPU). Products
/// are IEEE arithmetic, 0 * NaN is NaN: a row of x that holds NaN or infinity makes grad_weight NaN
/// also where its row of grad_y is all zero. Set such rows of x (padding) to zero first.
#pragma once

#include <array>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/linear/layer.h"
#include "linear/epilogue.h"
#include "linear/pack.h"
#include "linear/packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename W>
inline constexpr bool is_packed_weight = false;
template <typename T>
inline constexpr bool is_packed_weight<PackedWeight<T>> = true;

/// What exceptions call an operator and its weight.
struct LinearNames {
  std::string_view operation, weight;
};

template <typename W>
constexpr void require_plain_scalar() {
  static_assert(FloatingScalar<W>,
                "eigenformer: a plain weight is float, double, Eigen::bfloat16 or Eigen::half; for "
                "int8 use int8_linear or pack_weight(values, scales)");
}
template <typename X, typename S>
constexpr void require_packed_scalars() {
  static_assert(std::is_same_v<X, double> == std::is_same_v<S, double>,
                "eigenformer: double x goes with PackedWeight<double> and with no other");
}

/// Checks of scalars and shapes that all forms share. `rows` are the layer's outputs, `matrices`
/// the weights that give each.
template <typename Y, typename X, typename E>
void require_linear(const LinearNames& names, const Y& y, const X& x, const E& epilogue, Index rows,
                    Index weight_in, Index matrices) {
  using XS = scalar_of<X>;
  using B = typename E::bias_scalar;
  using R = typename E::residual_scalar;
  static_assert(
      FloatingScalar<XS> && FloatingScalar<scalar_of<Y>>,
      "eigenformer: x and y of a linear layer are float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(std::is_same_v<XS, double> || !std::is_same_v<scalar_of<Y>, double>,
                "eigenformer: a double y needs a double x");
  static_assert(FloatingScalar<B> && (std::is_same_v<XS, double> || !std::is_same_v<B, double>),
                "eigenformer: a bias has x's scalar or float");
  static_assert(FloatingScalar<R> && (std::is_same_v<XS, double> || !std::is_same_v<R, double>),
                "eigenformer: a residual is double only where x is");
  const std::string_view name = names.operation;
  checked_size(name, "x", x);
  checked_size(name, "y", y);
  const Index tokens = x.dimension(0), in = x.dimension(1);
  require_that(weight_in == in, name, names.weight, " has ", weight_in, " columns, x has ", in,
               " features");
  require_that(y.dimension(0) == tokens && y.dimension(1) == rows, name, "y has shape ",
               shape_text(y), ", expected (", tokens, ", ", rows, ")");
  if (epilogue.bias_size() != E::kNone && epilogue.bias_size() != rows * matrices)
    require_that(false, name, "bias has ", epilogue.bias_size(), " elements, ", names.weight,
                 " has ", rows, " rows",
                 matrices > 1 ? ": expected one for each of gate and of up" : "");
  if (epilogue.residual_rows() != E::kNone)
    require_that(epilogue.residual_rows() == tokens && epilogue.residual_columns() == rows, name,
                 "residual has shape (", epilogue.residual_rows(), ", ",
                 epilogue.residual_columns(), "), y has shape ", shape_text(y));
}

template <typename Output, typename Input, typename Weight, typename E>
auto linear_problem(Output& y, const Input& x, const Weight& weight, const E& epilogue) {
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  using Y = scalar_of<Output>;
  using X = scalar_of<Input>;
  const Index tokens = from.dimension(0), in = from.dimension(1), out = to.dimension(1);
  if constexpr (is_packed_weight<Weight>) {
    using S = typename Weight::scalar;
    require_packed_scalars<X, S>();
    require_linear({"linear", "weight"}, to, from, epilogue, weight.rows(), weight.columns(), 1);
    return problem::PackedLinear<Y, X, S, false, typename E::pointers>{
        to.data(), from.data(), weight.panels(), tokens, in, out, epilogue};
  } else {
    const auto w = input_view<2>(weight);
    using W = scalar_of<Weight>;
    require_plain_scalar<W>();
    checked_size("linear", "weight", w);
    require_linear({"linear", "weight"}, to, from, epilogue, w.dimension(0), w.dimension(1), 1);
    return problem::Linear<Y, X, W, 1, typename E::pointers>{
        to.data(), from.data(), {w.data()}, tokens, in, out, epilogue};
  }
}

template <typename Output, typename Input, typename S, typename E>
auto gated_linear_problem(Output& y, const Input& x, const PackedGatedWeight<S>& weight,
                          const E& epilogue) {
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  using X = scalar_of<Input>;
  require_packed_scalars<X, S>();
  require_linear({"gated_linear", "gate"}, to, from, epilogue, weight.rows(), weight.columns(), 2);
  return problem::PackedLinear<scalar_of<Output>, X, S, true, typename E::pointers>{
      to.data(),       from.data(), weight.pair().panels(), from.dimension(0), from.dimension(1),
      to.dimension(1), epilogue};
}

template <typename Output, typename Input, typename Gate, typename Up, typename E>
auto gated_linear_problem(Output& y, const Input& x, const Gate& gate, const Up& up,
                          const E& epilogue) {
  const auto to = output_view<2>(y);
  const auto from = input_view<2>(x);
  const auto g = input_view<2>(gate), u = input_view<2>(up);
  using W = scalar_of<Gate>;
  require_plain_scalar<W>();
  checked_size("gated_linear", "gate", g);
  require_same_shape("gated_linear", "gate", g, "up", u);
  require_linear({"gated_linear", "gate"}, to, from, epilogue, g.dimension(0), g.dimension(1), 2);
  return problem::Linear<scalar_of<Output>, scalar_of<Input>, W, 2, typename E::pointers>{
      to.data(),       from.data(), {g.data(), u.data()}, from.dimension(0), from.dimension(1),
      to.dimension(1), epilogue};
}

template <typename Weight>
std::array<Index, 2> weight_shape(const Weight& weight) {
  if constexpr (is_packed_weight<Weight>) {
    return {weight.rows(), weight.columns()};
  } else {
    const auto view = input_view<2>(weight);
    return {view.dimension(0), view.dimension(1)};
  }
}

/// An epilogue as it is; a bias as one.
template <typename End>
auto as_epilogue(const End& end) {
  if constexpr (is_epilogue<End>) {
    return end;
  } else {
    require_tensor_argument<1, End>();
    return Epilogue{}.bias(end);
  }
}

/// What the returning forms return: x's scalar; of a packed weight float (double for double), since
/// its scalar is a matter of storage.
template <typename Input, typename Weight>
using linear_result =
    std::conditional_t<is_packed_weight<Weight>, compute_type<scalar_of<Input>>, scalar_of<Input>>;

}  // namespace detail

/// y (tokens, out) = x (tokens, in) times weight (out, in) transposed, plus bias (out), or whatever
/// an Epilogue says. Allocates nothing after the first call at a size.
///
///   ef::linear_into(device, y, x, w8);  ef::linear_into(device, y, x, w8, bias);
///   ef::linear_into(device, y, x, w8, ef::Epilogue{}.bias(bias).gelu().residual(y));
template <Device D, typename Output, typename Input, typename Weight,
          typename BiasOrEpilogue = Epilogue<>>
void linear_into(const D& device, Output&& y, const Input& x, const Weight& weight,
                 const BiasOrEpilogue& end = {}, Workspace& workspace = thread_workspace()) {
  detail::run(device, detail::linear_problem(y, x, weight, detail::as_epilogue(end)), workspace);
}
template <Device D, typename Output, typename Input, typename Weight>
void linear_into(const D& device, Output&& y, const Input& x, const Weight& weight,
                 Workspace& workspace) {
  linear_into(device, y, x, weight, Epilogue{}, workspace);
}

/// Returns y: of x's scalar where the weight is a tensor, of float (double for double x) where it
/// is a PackedWeight.
///
///   ef::Tensor<float, 2> y = ef::linear(x, weight, bias);
///   ef::Tensor<float, 2> y3 = ef::linear(device, x, w8, bias);   // x float or bfloat16; an Epilogue in the bias' place
template <CpuDevice D, typename Input, typename Weight, typename BiasOrEpilogue = Epilogue<>>
auto linear(const D& device, const Input& x, const Weight& weight, const BiasOrEpilogue& end = {}) {
  const Index tokens = input_view<2>(x).dimension(0), in = input_view<2>(x).dimension(1);
  const auto [out, weight_in] = detail::weight_shape(weight);
  detail::require_that(weight_in == in, "linear", "weight has ", weight_in, " columns, x has ", in,
                       " features");
  auto y = detail::make_tensor<detail::linear_result<Input, Weight>, 2>(
      "linear", "y", Eigen::DSizes<Index, 2>(tokens, out));
  linear_into(device, y, x, weight, end);
  return y;
}
template <typename Input, typename Weight, typename BiasOrEpilogue = Epilogue<>>
  requires(!Device<Input>)
auto linear(const Input& x, const Weight& weight, const BiasOrEpilogue& end = {}) {
  return linear(Eigen::DefaultDevice{}, x, weight, end);
}

/// y (tokens, out) = residual + function(x gate^T + bias[0, out)) * (x up^T + bias[out, 2 out)) in
/// one product, neither half written: SwiGLU with Epilogue{}.silu(), GeGLU with .gelu() (Shazeer,
/// 2020). Gate and up (out, in) are packed together (pack_gated_weight), or two tensors of one
/// scalar.
template <Device D, typename Output, typename Input, typename S, typename E>
  requires detail::is_epilogue<E>
void gated_linear_into(const D& device, Output&& y, const Input& x,
                       const PackedGatedWeight<S>& weight, const E& epilogue,
                       Workspace& workspace = thread_workspace()) {
  detail::run(device, detail::gated_linear_problem(y, x, weight, epilogue), workspace);
}
template <Device D, typename Output, typename Input, typename Gate, typename Up, typename E>
  requires detail::is_epilogue<E>
void gated_linear_into(const D& device, Output&& y, const Input& x, const Gate& gate, const Up& up,
                       const E& epilogue, Workspace& workspace = thread_workspace()) {
  static_assert(std::is_same_v<scalar_of<Gate>, scalar_of<Up>>,
                "eigenformer: gate and up have one scalar");
  detail::run(device, detail::gated_linear_problem(y, x, gate, up, epilogue), workspace);
}

/// Returns y: of x's scalar where the weights are tensors, of float (double for double x) where
/// they are packed.
///
///   ef::Tensor<float, 2> y = ef::gated_linear(x, gate_up, ef::Epilogue{}.silu());
///   ef::Tensor<float, 2> y2 = ef::gated_linear(x, gate, up, ef::Epilogue{}.silu());
template <CpuDevice D, typename Input, typename S, typename E>
  requires detail::is_epilogue<E>
auto gated_linear(const D& device, const Input& x, const PackedGatedWeight<S>& weight,
                  const E& epilogue) {
  auto y = detail::make_tensor<compute_type<scalar_of<Input>>, 2>(
      "gated_linear", "y", Eigen::DSizes<Index, 2>(input_view<2>(x).dimension(0), weight.rows()));
  gated_linear_into(device, y, x, weight, epilogue);
  return y;
}
template <CpuDevice D, typename Input, typename Gate, typename Up, typename E>
  requires detail::is_epilogue<E>
auto gated_linear(const D& device, const Input& x, const Gate& gate, const Up& up,
                  const E& epilogue) {
  auto y = detail::make_tensor<scalar_of<Input>, 2>(
      "gated_linear", "y",
      Eigen::DSizes<Index, 2>(input_view<2>(x).dimension(0), input_view<2>(gate).dimension(0)));
  gated_linear_into(device, y, x, gate, up, epilogue);
  return y;
}
template <typename Input, typename... Rest>
  requires(!Device<Input>)
auto gated_linear(const Input& x, const Rest&... rest) {
  return gated_linear(Eigen::DefaultDevice{}, x, rest...);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "linear/backward.h"
