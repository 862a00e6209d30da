/// \file
/// Activations, gated activations and the residual sum. Elements one by one, for tensors of any
/// rank:
///
///   silu(x) = x / (1 + e^-x)                                                 (Elfwing et al., 2017; also called swish)
///   gelu(x) = x Phi(x), Phi the normal distribution function                 (Hendrycks & Gimpel, 2016), or its tanh form
///             0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))              with {.approximation = GeluApproximation::tanh}
///   relu(x) = max(x, 0)
///   softcap(x) = cap tanh(scale x / cap), or scale x where cap is 0          (Gemma Team, "Gemma 2", 2024), of logits
///   swiglu(gate, up) = silu(gate) * up,   geglu(gate, up) = gelu(gate) * up  (Shazeer, "GLU Variants Improve Transformer", 2020)
///   clamped_swiglu(gate, up) = (up' + 1) * g * sigmoid(alpha * g)            (gpt-oss, 2025), g = min(gate, limit), up' = up within [-limit, limit]
///
/// The gated forms take gate and up of one shape, or one fused tensor (..., 2 * features) whose
/// rows are [gate | up], as one matrix product leaves them; the result is (..., features).
///
/// Scalars are float, double, bfloat16 and half, and may differ among the arguments of a call.
/// Arithmetic is in float, or in double where an argument is double. In float the error is below
/// 5e-7 of the value or 2e-7 of |x|, whichever is larger. Infinities give the function's limit; NaN
/// gives NaN.
///
/// Aliasing: an output may be an input itself (the same memory, scalar and shape); any other
/// overlap is undefined. In the backward forms grad_gate and grad_up may take the place of gate, up
/// and grad_y in any arrangement. Throws std::invalid_argument where shapes disagree or a fused
/// dimension is odd, before anything is written. Cost: one pass through memory; the forms with a
/// destination allocate nothing. Results do not depend on threads or position.
#pragma once

#include <cmath>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "cpu/activation.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

enum class GeluApproximation { none, tanh };

struct SoftcapOptions {
  float cap = 0;    ///< results stay within (-cap, cap); 0 means no cap
  float scale = 1;  ///< multiplies x
};

struct GeluOptions {
  GeluApproximation approximation = GeluApproximation::none;  ///< none is the exact function
};

namespace detail {

/// The view of an input, and one of the rank of X, so that a wrong rank is named at the call.
template <typename X>
auto any_input(const X& x) {
  return input_view<rank_of<X>>(x);
}
template <typename X, typename Y>
auto input_like(const Y& y) {
  return input_view<rank_of<X>>(y);
}
template <typename X, typename Y>
auto output_like(Y& y) {
  return output_view<rank_of<X>>(y);
}

/// The number of elements of x, once all others (their name, their view, ...) have its shape.
template <typename X>
Index common_size(std::string_view name, std::string_view x_name, const X& x) {
  require_floating_scalars<X>();
  return checked_size(name, x_name, x);
}
template <typename X, typename Y, typename... Others>
Index common_size(std::string_view name, std::string_view x_name, const X& x,
                  std::string_view y_name, const Y& y, const Others&... others) {
  require_floating_scalars<Y>();
  require_same_shape(name, y_name, y, x_name, x);
  return common_size(name, x_name, x, others...);
}

template <typename Function, typename Y, typename X>
auto activation_problem(std::string_view name, Y& to, const X& from) {
  const auto y = output_like<X>(to);
  const auto x = any_input(from);
  return problem::Activation<Function, scalar_of<Y>, scalar_of<X>>{
      y.data(), x.data(), common_size(name, "x", x, "y", y)};
}

template <typename Function, typename GX, typename GY, typename X>
auto activation_backward_problem(std::string_view name, GX& to, const GY& from, const X& input) {
  const auto grad_x = output_like<X>(to);
  const auto grad_y = input_like<X>(from);
  const auto x = any_input(input);
  const Index n = common_size(name, "x", x, "grad_x", grad_x, "grad_y", grad_y);
  return problem::ActivationBackward<Function, scalar_of<GX>, scalar_of<GY>, scalar_of<X>>{
      grad_x.data(), grad_y.data(), x.data(), n};
}

template <typename Function, typename Y, typename Gate, typename Up>
auto gated_problem(std::string_view name, Y& to, const Gate& gates, const Up& ups) {
  const auto y = output_like<Gate>(to);
  const auto gate = any_input(gates);
  const auto up = input_like<Gate>(ups);
  const Index n = common_size(name, "gate", gate, "up", up, "y", y);
  return problem::Gated<Function, scalar_of<Y>, scalar_of<Gate>, scalar_of<Up>>{
      y.data(), gate.data(), up.data(), 1, n, n, n, n};
}

template <typename Function, typename GG, typename GU, typename GY, typename Gate, typename Up>
auto gated_backward_problem(std::string_view name, GG& to_gate, GU& to_up, const GY& from,
                            const Gate& gates, const Up& ups) {
  const auto grad_gate = output_like<Gate>(to_gate);
  const auto grad_up = output_like<Gate>(to_up);
  const auto grad_y = input_like<Gate>(from);
  const auto gate = any_input(gates);
  const auto up = input_like<Gate>(ups);
  const Index n = common_size(name, "gate", gate, "up", up, "grad_y", grad_y, "grad_gate",
                              grad_gate, "grad_up", grad_up);
  return problem::GatedBackward<Function, scalar_of<GG>, scalar_of<GU>, scalar_of<GY>,
                                scalar_of<Gate>, scalar_of<Up>>{
      grad_gate.data(), grad_up.data(), grad_y.data(), gate.data(), up.data(), 1, n, n, n, n};
}

inline Index half_of(std::string_view name, Index columns) {
  require_that(columns % 2 == 0, name, "gate_up has ", columns,
               " columns, expected an even number (gate, then up)");
  return columns / 2;
}

/// Rows of a fused tensor (..., 2 * features) and of its result (..., features).
template <typename Fused, typename Y>
RowShape fused_shape(std::string_view name, const Fused& fused, std::string_view y_name,
                     const Y& y) {
  const RowShape shape = row_shape(fused, name, "gate_up");
  auto sizes = sizes_of<rank_of<Fused>>(fused);
  sizes[rank_of<Fused> - 1] = half_of(name, shape.features);
  if (sizes_of<rank_of<Fused>>(y) != sizes)
    require_that(false, name, y_name, " has shape ", shape_text(y), ", gate_up has shape ",
                 shape_text(fused));
  return {shape.rows, shape.features / 2};
}

template <typename Function, typename Y, typename Fused>
auto gated_problem(std::string_view name, Y& to, const Fused& from) {
  const auto y = output_like<Fused>(to);
  const auto fused = any_input(from);
  require_floating_scalars<decltype(y), decltype(fused)>();
  const auto [rows, n] = fused_shape(name, fused, "y", y);
  return problem::Gated<Function, scalar_of<Y>, scalar_of<Fused>, scalar_of<Fused>>{
      y.data(), fused.data(), offset_by(fused.data(), n), rows, n, n, 2 * n, 2 * n};
}

template <typename Function, typename GF, typename GY, typename Fused>
auto gated_backward_problem(std::string_view name, GF& to, const GY& from, const Fused& input) {
  const auto grad_fused = output_like<Fused>(to);
  const auto grad_y = input_like<Fused>(from);
  const auto fused = any_input(input);
  require_floating_scalars<decltype(grad_fused), decltype(grad_y), decltype(fused)>();
  require_same_shape(name, "grad_gate_up", grad_fused, "gate_up", fused);
  const auto [rows, n] = fused_shape(name, fused, "grad_y", grad_y);
  return problem::GatedBackward<Function, scalar_of<GF>, scalar_of<GF>, scalar_of<GY>,
                                scalar_of<Fused>, scalar_of<Fused>>{grad_fused.data(),
                                                                    offset_by(grad_fused.data(), n),
                                                                    grad_y.data(),
                                                                    fused.data(),
                                                                    offset_by(fused.data(), n),
                                                                    rows,
                                                                    n,
                                                                    2 * n,
                                                                    n,
                                                                    2 * n};
}

/// The result of a gated activation: of gate and up apart, or of both in one tensor.
template <typename Gate, typename Up>
auto gated_result(std::string_view name, const Gate& gate, const Up& up) {
  require_same_shape(name, "up", input_like<Gate>(up), "gate", any_input(gate));
  return tensor_like(name, "gate", any_input(gate));
}
template <typename Fused>
auto gated_result(std::string_view name, const Fused& gate_up) {
  const auto fused = any_input(gate_up);
  constexpr int rank = rank_of<decltype(fused)>;
  auto sizes = sizes_of<rank>(fused);
  sizes[rank - 1] = half_of(name, sizes[rank - 1]);
  return make_tensor<scalar_of<Fused>, rank>(name, "gate_up", sizes);
}

template <typename T, int Rank>
struct GatedGradients {
  Tensor<T, Rank> grad_gate, grad_up;
};
template <typename Gate>
auto gated_gradients(std::string_view name, const Gate& gate) {
  GatedGradients<scalar_of<Gate>, rank_or_one<rank_of<Gate>>> g;
  g.grad_gate = tensor_like(name, "gate", any_input(gate));
  g.grad_up = g.grad_gate;
  return g;
}

/// Calls f with the function that the options choose.
template <typename F>
void with_gelu(const GeluOptions& options, F&& f) {
  if (options.approximation == GeluApproximation::tanh)
    f(problem::GeluTanh{});
  else
    f(problem::GeluErf{});
}

template <typename X>
concept NotAnOption = !Device<X> && !std::same_as<X, GeluOptions>;

}  // namespace detail

// Results and gradients that are returned have the scalar and shape of the input they belong to.

// ---- silu ---------------------------------------------------------------------------------------

/// y = silu(x).
template <Device D, typename Y, typename X>
void silu_into(const D& device, Y&& y, const X& x) {
  detail::run(device, detail::activation_problem<problem::Silu>("silu", y, x));
}
template <CpuDevice D, typename X>
auto silu(const D& device, const X& x) {
  auto y = detail::tensor_like("silu", "x", detail::any_input(x));
  silu_into(device, y, x);
  return y;
}
template <detail::NotAnOption X>
auto silu(const X& x) {
  return silu(Eigen::DefaultDevice{}, x);
}

/// grad_x = grad_y * silu'(x).
template <Device D, typename GX, typename GY, typename X>
void silu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x) {
  detail::run(device, detail::activation_backward_problem<problem::Silu>("silu_backward", grad_x,
                                                                         grad_y, x));
}
template <CpuDevice D, typename GY, typename X>
auto silu_backward(const D& device, const GY& grad_y, const X& x) {
  auto grad_x = detail::tensor_like("silu_backward", "x", detail::any_input(x));
  silu_backward_into(device, grad_x, grad_y, x);
  return grad_x;
}
template <detail::NotAnOption GY, typename X>
auto silu_backward(const GY& grad_y, const X& x) {
  return silu_backward(Eigen::DefaultDevice{}, grad_y, x);
}

// ---- gelu ---------------------------------------------------------------------------------------

/// y = gelu(x).
///
///   auto y = ef::gelu(x, {.approximation = ef::GeluApproximation::tanh});
template <Device D, typename Y, typename X>
void gelu_into(const D& device, Y&& y, const X& x, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device, detail::activation_problem<F>("gelu", y, x));
  });
}
template <CpuDevice D, typename X>
auto gelu(const D& device, const X& x, const GeluOptions& options = {}) {
  auto y = detail::tensor_like("gelu", "x", detail::any_input(x));
  gelu_into(device, y, x, options);
  return y;
}
template <detail::NotAnOption X>
auto gelu(const X& x, const GeluOptions& options = {}) {
  return gelu(Eigen::DefaultDevice{}, x, options);
}

/// grad_x = grad_y * gelu'(x).
template <Device D, typename GX, typename GY, typename X>
void gelu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x,
                        const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device, detail::activation_backward_problem<F>("gelu_backward", grad_x, grad_y, x));
  });
}
template <CpuDevice D, typename GY, detail::NotAnOption X>
auto gelu_backward(const D& device, const GY& grad_y, const X& x, const GeluOptions& options = {}) {
  auto grad_x = detail::tensor_like("gelu_backward", "x", detail::any_input(x));
  gelu_backward_into(device, grad_x, grad_y, x, options);
  return grad_x;
}
template <detail::NotAnOption GY, typename X>
auto gelu_backward(const GY& grad_y, const X& x, const GeluOptions& options = {}) {
  return gelu_backward(Eigen::DefaultDevice{}, grad_y, x, options);
}

// ---- relu ---------------------------------------------------------------------------------------

/// y = relu(x).
template <Device D, typename Y, typename X>
void relu_into(const D& device, Y&& y, const X& x) {
  detail::run(device, detail::activation_problem<problem::Relu>("relu", y, x));
}
template <CpuDevice D, typename X>
auto relu(const D& device, const X& x) {
  auto y = detail::tensor_like("relu", "x", detail::any_input(x));
  relu_into(device, y, x);
  return y;
}
template <detail::NotAnOption X>
auto relu(const X& x) {
  return relu(Eigen::DefaultDevice{}, x);
}

/// grad_x = grad_y where x > 0, else 0 (at x = 0 too).
template <Device D, typename GX, typename GY, typename X>
void relu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x) {
  detail::run(device, detail::activation_backward_problem<problem::Relu>("relu_backward", grad_x,
                                                                         grad_y, x));
}
template <CpuDevice D, typename GY, typename X>
auto relu_backward(const D& device, const GY& grad_y, const X& x) {
  auto grad_x = detail::tensor_like("relu_backward", "x", detail::any_input(x));
  relu_backward_into(device, grad_x, grad_y, x);
  return grad_x;
}
template <detail::NotAnOption GY, typename X>
auto relu_backward(const GY& grad_y, const X& x) {
  return relu_backward(Eigen::DefaultDevice{}, grad_y, x);
}

// ---- softcap ------------------------------------------------------------------------------------

/// y = cap * tanh(scale * x / cap), or scale * x where cap is 0. Throws std::invalid_argument for a
/// negative cap and numbers that are not finite. It has no backward form.
template <Device D, typename Y, typename X>
void softcap_into(const D& device, Y&& y, const X& x, const SoftcapOptions& options) {
  const auto to = detail::output_like<X>(y);
  const auto from = detail::any_input(x);
  const Index n = detail::common_size("softcap", "x", from, "y", to);
  detail::require_that(std::isfinite(options.cap) && options.cap >= 0, "softcap", "cap is ",
                       options.cap, ", expected 0 (none) or a positive number");
  detail::require_that(std::isfinite(options.scale), "softcap", "scale is ", options.scale,
                       ", expected a finite number");
  using Problem = problem::Softcap<scalar_of<Y>, scalar_of<X>>;
  using C = typename Problem::compute;
  detail::run(device, Problem{to.data(), from.data(), n, static_cast<C>(options.scale),
                              static_cast<C>(options.cap)});
}
template <CpuDevice D, typename X>
auto softcap(const D& device, const X& x, const SoftcapOptions& options) {
  auto y = detail::tensor_like("softcap", "x", detail::any_input(x));
  softcap_into(device, y, x, options);
  return y;
}
template <detail::NotAnOption X>
auto softcap(const X& x, const SoftcapOptions& options) {
  return softcap(Eigen::DefaultDevice{}, x, options);
}

// ---- swiglu -------------------------------------------------------------------------------------

/// y = silu(gate) * up, from (gate, up) or from the fused tensor (gate_up).
template <Device D, typename Y, typename... GateUp>
  requires(sizeof...(GateUp) == 1 || sizeof...(GateUp) == 2)
void swiglu_into(const D& device, Y&& y, const GateUp&... gate_up) {
  detail::run(device, detail::gated_problem<problem::Silu>("swiglu", y, gate_up...));
}
template <CpuDevice D, typename... GateUp>
  requires(sizeof...(GateUp) == 1 || sizeof...(GateUp) == 2)
auto swiglu(const D& device, const GateUp&... gate_up) {
  auto y = detail::gated_result("swiglu", gate_up...);
  swiglu_into(device, y, gate_up...);
  return y;
}
template <detail::NotAnOption Gate, typename... Up>
auto swiglu(const Gate& gate, const Up&... up) {
  return swiglu(Eigen::DefaultDevice{}, gate, up...);
}

/// grad_gate = grad_y * up * silu'(gate), grad_up = grad_y * silu(gate): (device, grad_gate,
/// grad_up, grad_y, gate, up), or (device, grad_gate_up, grad_y, gate_up) for the fused tensor,
/// where grad_gate_up is [grad_gate | grad_up] and may be gate_up itself.
template <Device D, typename First, typename... Rest>
void swiglu_backward_into(const D& device, First&& first, Rest&&... rest) {
  detail::run(device,
              detail::gated_backward_problem<problem::Silu>("swiglu_backward", first, rest...));
}
/// auto [grad_gate, grad_up] = ef::swiglu_backward(grad_y, gate, up);
template <CpuDevice D, typename GY, typename Gate, typename Up>
auto swiglu_backward(const D& device, const GY& grad_y, const Gate& gate, const Up& up) {
  auto g = detail::gated_gradients("swiglu_backward", gate);
  swiglu_backward_into(device, g.grad_gate, g.grad_up, grad_y, gate, up);
  return g;
}
template <detail::NotAnOption GY, typename Gate, typename Up>
auto swiglu_backward(const GY& grad_y, const Gate& gate, const Up& up) {
  return swiglu_backward(Eigen::DefaultDevice{}, grad_y, gate, up);
}

// ---- geglu --------------------------------------------------------------------------------------

/// y = gelu(gate) * up.
template <Device D, typename Y, typename Gate, detail::NotAnOption Up>
void geglu_into(const D& device, Y&& y, const Gate& gate, const Up& up,
                const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device, detail::gated_problem<F>("geglu", y, gate, up));
  });
}
template <CpuDevice D, typename Gate, detail::NotAnOption Up>
auto geglu(const D& device, const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  auto y = detail::gated_result("geglu", gate, up);
  geglu_into(device, y, gate, up, options);
  return y;
}
template <detail::NotAnOption Gate, detail::NotAnOption Up>
auto geglu(const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  return geglu(Eigen::DefaultDevice{}, gate, up, options);
}

/// y = gelu(gate) * up for the fused tensor [gate | up].
template <Device D, typename Y, typename Fused>
void geglu_into(const D& device, Y&& y, const Fused& gate_up, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device, detail::gated_problem<F>("geglu", y, gate_up));
  });
}
template <CpuDevice D, typename Fused>
auto geglu(const D& device, const Fused& gate_up, const GeluOptions& options = {}) {
  auto y = detail::gated_result("geglu", gate_up);
  geglu_into(device, y, gate_up, options);
  return y;
}
template <detail::NotAnOption Fused>
auto geglu(const Fused& gate_up, const GeluOptions& options = {}) {
  return geglu(Eigen::DefaultDevice{}, gate_up, options);
}

/// grad_gate = grad_y * up * gelu'(gate), grad_up = grad_y * gelu(gate).
template <Device D, typename GG, typename GU, typename GY, typename Gate, typename Up>
void geglu_backward_into(const D& device, GG&& grad_gate, GU&& grad_up, const GY& grad_y,
                         const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device, detail::gated_backward_problem<F>("geglu_backward", grad_gate, grad_up,
                                                          grad_y, gate, up));
  });
}
/// auto [grad_gate, grad_up] = ef::geglu_backward(grad_y, gate, up);
template <CpuDevice D, typename GY, typename Gate, typename Up>
auto geglu_backward(const D& device, const GY& grad_y, const Gate& gate, const Up& up,
                    const GeluOptions& options = {}) {
  auto g = detail::gated_gradients("geglu_backward", gate);
  geglu_backward_into(device, g.grad_gate, g.grad_up, grad_y, gate, up, options);
  return g;
}
template <detail::NotAnOption GY, typename Gate, typename Up>
auto geglu_backward(const GY& grad_y, const Gate& gate, const Up& up,
                    const GeluOptions& options = {}) {
  return geglu_backward(Eigen::DefaultDevice{}, grad_y, gate, up, options);
}
/// For the fused tensor: grad_gate_up is [grad_gate | grad_up], and may be gate_up itself.
template <Device D, typename GF, typename GY, typename Fused>
void geglu_backward_into(const D& device, GF&& grad_gate_up, const GY& grad_y, const Fused& gate_up,
                         const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::run(device,
                detail::gated_backward_problem<F>("geglu_backward", grad_gate_up, grad_y, gate_up));
  });
}

// ---- residual -----------------------------------------------------------------------------------

/// y = x + residual. y may be x or residual. Its gradient is grad_y for both: no backward form is
/// needed.
template <Device D, typename Y, typename X, typename R>
void residual_add_into(const D& device, Y&& y, const X& x, const R& residual) {
  const auto to = detail::output_like<X>(y);
  const auto from = detail::any_input(x);
  const auto addend = detail::input_like<X>(residual);
  const Index n = detail::common_size("residual_add", "x", from, "residual", addend, "y", to);
  detail::run(device, problem::ResidualAdd<scalar_of<Y>, scalar_of<X>, scalar_of<R>>{
                          to.data(), from.data(), addend.data(), n});
}
template <CpuDevice D, typename X, typename R>
auto residual_add(const D& device, const X& x, const R& residual) {
  detail::require_same_shape("residual_add", "residual", input_view<rank_of<X>>(residual), "x",
                             detail::any_input(x));
  auto y = detail::tensor_like("residual_add", "x", detail::any_input(x));
  residual_add_into(device, y, x, residual);
  return y;
}
template <detail::NotAnOption X, typename R>
auto residual_add(const X& x, const R& residual) {
  return residual_add(Eigen::DefaultDevice{}, x, residual);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "activation/clamped_swiglu.h"
