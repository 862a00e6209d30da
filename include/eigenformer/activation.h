/// \file
/// Activations, gated activations and the residual sum. Elements one by one, for tensors of any
/// rank:
///
///   silu(x) = x / (1 + e^-x)                                                 (Elfwing et al., 2017; also called swish)
///   gelu(x) = x Phi(x), Phi the normal distribution function                 (Hendrycks & Gimpel, 2016), or its tanh form
///             0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))              with {.approximation = GeluApproximation::tanh}
///   relu(x) = max(x, 0)
///   swiglu(gate, up) = silu(gate) * up,   geglu(gate, up) = gelu(gate) * up  (Shazeer, "GLU Variants Improve Transformer", 2020)
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

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "cpu/activation.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

enum class GeluApproximation { none, tanh };

struct GeluOptions {
  GeluApproximation approximation = GeluApproximation::none;  ///< none is the exact function
};

namespace detail {

template <typename X>
auto any_input(const X& x) {
  return input_view<rank_of<X>>(x);
}

/// An output of the rank of X, so that a wrong rank is named at the call.
template <typename X, typename Y>
auto output_like(Y& y) {
  return output_view<rank_of<X>>(y);
}

template <typename Function, typename D, typename Y, typename X>
void activation_into(std::string_view name, const D& device, Y y, X x) {
  require_floating_scalars<Y, X>();
  require_same_shape(name, "y", y, "x", x);
  const Index count = checked_size(name, "x", x);
  detail::run(device,
              problem::Activation<Function, scalar_of<Y>, scalar_of<X>>{y.data(), x.data(), count});
}

template <typename Function, typename D, typename GX, typename GY, typename X>
void activation_backward_into(std::string_view name, const D& device, GX grad_x, GY grad_y, X x) {
  require_floating_scalars<GX, GY, X>();
  require_same_shape(name, "grad_x", grad_x, "x", x);
  require_same_shape(name, "grad_y", grad_y, "x", x);
  using Problem = problem::ActivationBackward<Function, scalar_of<GX>, scalar_of<GY>, scalar_of<X>>;
  detail::run(device, Problem{grad_x.data(), grad_y.data(), x.data(), checked_size(name, "x", x)});
}

template <typename Function, typename D, typename Y, typename Gate, typename Up>
void gated_into(std::string_view name, const D& device, Y y, Gate gate, Up up) {
  require_floating_scalars<Y, Gate, Up>();
  require_same_shape(name, "up", up, "gate", gate);
  require_same_shape(name, "y", y, "gate", gate);
  const Index n = checked_size(name, "gate", gate);
  using Problem = problem::Gated<Function, scalar_of<Y>, scalar_of<Gate>, scalar_of<Up>>;
  detail::run(device, Problem{y.data(), gate.data(), up.data(), 1, n, n, n, n});
}

template <typename Function, typename D, typename GG, typename GU, typename GY, typename Gate,
          typename Up>
void gated_backward_into(std::string_view name, const D& device, GG grad_gate, GU grad_up,
                         GY grad_y, Gate gate, Up up) {
  require_floating_scalars<GG, GU, GY, Gate, Up>();
  require_same_shape(name, "up", up, "gate", gate);
  require_same_shape(name, "grad_y", grad_y, "gate", gate);
  require_same_shape(name, "grad_gate", grad_gate, "gate", gate);
  require_same_shape(name, "grad_up", grad_up, "gate", gate);
  const Index n = checked_size(name, "gate", gate);
  using Problem = problem::GatedBackward<Function, scalar_of<GG>, scalar_of<GU>, scalar_of<GY>,
                                         scalar_of<Gate>, scalar_of<Up>>;
  detail::run(device, Problem{grad_gate.data(), grad_up.data(), grad_y.data(), gate.data(),
                              up.data(), 1, n, n, n, n});
}

/// Rows of a fused tensor (..., 2 * features) and of its result (..., features).
template <typename Fused, typename Y>
RowShape fused_shape(std::string_view name, const Fused& fused, std::string_view y_name,
                     const Y& y) {
  const RowShape shape = row_shape(fused, name, "gate_up");
  require_that(shape.features % 2 == 0, name, "gate_up has ", shape.features,
               " columns, expected an even number (gate, then up)");
  bool same = true;
  for (int d = 0; d < rank_of<Y>; ++d) {
    const auto at = static_cast<std::size_t>(d);
    same = same && y.dimension(at) == fused.dimension(at) / (d == rank_of<Y> - 1 ? 2 : 1);
  }
  if (!same)
    require_that(false, name, y_name, " has shape ", shape_text(y), ", gate_up has shape ",
                 shape_text(fused));
  return {shape.rows, shape.features / 2};
}

template <typename Function, typename D, typename Y, typename Fused>
void gated_fused_into(std::string_view name, const D& device, Y y, Fused fused) {
  require_floating_scalars<Y, Fused>();
  const auto [rows, n] = fused_shape(name, fused, "y", y);
  using Problem = problem::Gated<Function, scalar_of<Y>, scalar_of<Fused>, scalar_of<Fused>>;
  detail::run(device, Problem{y.data(), fused.data(), offset_by(fused.data(), n), rows, n, n, 2 * n,
                              2 * n});
}

template <typename Function, typename D, typename GF, typename GY, typename Fused>
void gated_fused_backward_into(std::string_view name, const D& device, GF grad_fused, GY grad_y,
                               Fused fused) {
  require_floating_scalars<GF, GY, Fused>();
  require_same_shape(name, "grad_gate_up", grad_fused, "gate_up", fused);
  const auto [rows, n] = fused_shape(name, fused, "grad_y", grad_y);
  using Problem = problem::GatedBackward<Function, scalar_of<GF>, scalar_of<GF>, scalar_of<GY>,
                                         scalar_of<Fused>, scalar_of<Fused>>;
  detail::run(device, Problem{grad_fused.data(), offset_by(grad_fused.data(), n), grad_y.data(),
                              fused.data(), offset_by(fused.data(), n), rows, n, 2 * n, n, 2 * n});
}

/// The result of a gated activation of a fused tensor.
template <typename Fused>
auto fused_result(std::string_view name, const Fused& fused) {
  auto sizes = sizes_of<rank_of<Fused>>(fused);
  Index& columns = sizes[rank_of<Fused> - 1];
  require_that(columns % 2 == 0, name, "gate_up has ", columns,
               " columns, expected an even number (gate, then up)");
  columns /= 2;
  return make_tensor<scalar_of<Fused>, rank_of<Fused>>(name, "gate_up", sizes);
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

// ---- silu ---------------------------------------------------------------------------------------

/// y = silu(x).
template <CpuDevice D, typename Y, typename X>
void silu_into(const D& device, Y&& y, const X& x) {
  detail::activation_into<problem::Silu>("silu", device, detail::output_like<X>(y),
                                         detail::any_input(x));
}
/// grad_x = grad_y * silu'(x).
template <CpuDevice D, typename GX, typename GY, typename X>
void silu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x) {
  detail::activation_backward_into<problem::Silu>(
      "silu_backward", device, detail::output_like<X>(grad_x), input_view<rank_of<X>>(grad_y),
      detail::any_input(x));
}
/// Returns silu(x), in the scalar and shape of x.
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

// ---- gelu ---------------------------------------------------------------------------------------

/// y = gelu(x).
template <CpuDevice D, typename Y, typename X>
void gelu_into(const D& device, Y&& y, const X& x, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::activation_into<F>("gelu", device, detail::output_like<X>(y), detail::any_input(x));
  });
}
/// grad_x = grad_y * gelu'(x).
template <CpuDevice D, typename GX, typename GY, typename X>
void gelu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x,
                        const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::activation_backward_into<F>("gelu_backward", device, detail::output_like<X>(grad_x),
                                        input_view<rank_of<X>>(grad_y), detail::any_input(x));
  });
}
/// Returns gelu(x), in the scalar and shape of x.
///
///   auto y = ef::gelu(x, {.approximation = ef::GeluApproximation::tanh});
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

// ---- relu ---------------------------------------------------------------------------------------

/// y = relu(x).
template <CpuDevice D, typename Y, typename X>
void relu_into(const D& device, Y&& y, const X& x) {
  detail::activation_into<problem::Relu>("relu", device, detail::output_like<X>(y),
                                         detail::any_input(x));
}
/// grad_x = grad_y where x > 0, else 0 (at x = 0 too).
template <CpuDevice D, typename GX, typename GY, typename X>
void relu_backward_into(const D& device, GX&& grad_x, const GY& grad_y, const X& x) {
  detail::activation_backward_into<problem::Relu>(
      "relu_backward", device, detail::output_like<X>(grad_x), input_view<rank_of<X>>(grad_y),
      detail::any_input(x));
}
/// Returns relu(x), in the scalar and shape of x.
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

// ---- swiglu -------------------------------------------------------------------------------------

/// y = silu(gate) * up.
template <CpuDevice D, typename Y, typename Gate, typename Up>
void swiglu_into(const D& device, Y&& y, const Gate& gate, const Up& up) {
  detail::gated_into<problem::Silu>("swiglu", device, detail::output_like<Gate>(y),
                                    detail::any_input(gate), input_view<rank_of<Gate>>(up));
}
/// y = silu(gate) * up for the fused tensor [gate | up].
template <CpuDevice D, typename Y, typename Fused>
void swiglu_into(const D& device, Y&& y, const Fused& gate_up) {
  detail::gated_fused_into<problem::Silu>("swiglu", device, detail::output_like<Fused>(y),
                                          detail::any_input(gate_up));
}
/// grad_gate = grad_y * up * silu'(gate), grad_up = grad_y * silu(gate).
template <CpuDevice D, typename GG, typename GU, typename GY, typename Gate, typename Up>
void swiglu_backward_into(const D& device, GG&& grad_gate, GU&& grad_up, const GY& grad_y,
                          const Gate& gate, const Up& up) {
  detail::gated_backward_into<problem::Silu>(
      "swiglu_backward", device, detail::output_like<Gate>(grad_gate),
      detail::output_like<Gate>(grad_up), input_view<rank_of<Gate>>(grad_y),
      detail::any_input(gate), input_view<rank_of<Gate>>(up));
}
/// The same for the fused tensor: grad_gate_up is [grad_gate | grad_up], and may be gate_up itself.
template <CpuDevice D, typename GF, typename GY, typename Fused>
void swiglu_backward_into(const D& device, GF&& grad_gate_up, const GY& grad_y,
                          const Fused& gate_up) {
  detail::gated_fused_backward_into<problem::Silu>(
      "swiglu_backward", device, detail::output_like<Fused>(grad_gate_up),
      input_view<rank_of<Fused>>(grad_y), detail::any_input(gate_up));
}
/// Returns silu(gate) * up, in the scalar and shape of gate.
template <CpuDevice D, typename Gate, typename Up>
auto swiglu(const D& device, const Gate& gate, const Up& up) {
  require_same_shape("swiglu", "up", input_view<rank_of<Gate>>(up), "gate",
                     detail::any_input(gate));
  auto y = detail::tensor_like("swiglu", "gate", detail::any_input(gate));
  swiglu_into(device, y, gate, up);
  return y;
}
template <detail::NotAnOption Gate, typename Up>
auto swiglu(const Gate& gate, const Up& up) {
  return swiglu(Eigen::DefaultDevice{}, gate, up);
}
/// Returns silu(gate) * up for the fused tensor [gate | up].
template <CpuDevice D, typename Fused>
auto swiglu(const D& device, const Fused& gate_up) {
  auto y = detail::fused_result("swiglu", detail::any_input(gate_up));
  swiglu_into(device, y, gate_up);
  return y;
}
template <detail::NotAnOption Fused>
auto swiglu(const Fused& gate_up) {
  return swiglu(Eigen::DefaultDevice{}, gate_up);
}

// ---- geglu --------------------------------------------------------------------------------------

/// y = gelu(gate) * up.
template <CpuDevice D, typename Y, typename Gate, detail::NotAnOption Up>
void geglu_into(const D& device, Y&& y, const Gate& gate, const Up& up,
                const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::gated_into<F>("geglu", device, detail::output_like<Gate>(y), detail::any_input(gate),
                          input_view<rank_of<Gate>>(up));
  });
}
/// y = gelu(gate) * up for the fused tensor [gate | up].
template <CpuDevice D, typename Y, typename Fused>
void geglu_into(const D& device, Y&& y, const Fused& gate_up, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::gated_fused_into<F>("geglu", device, detail::output_like<Fused>(y),
                                detail::any_input(gate_up));
  });
}
/// grad_gate = grad_y * up * gelu'(gate), grad_up = grad_y * gelu(gate).
template <CpuDevice D, typename GG, typename GU, typename GY, typename Gate, typename Up>
void geglu_backward_into(const D& device, GG&& grad_gate, GU&& grad_up, const GY& grad_y,
                         const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::gated_backward_into<F>("geglu_backward", device, detail::output_like<Gate>(grad_gate),
                                   detail::output_like<Gate>(grad_up),
                                   input_view<rank_of<Gate>>(grad_y), detail::any_input(gate),
                                   input_view<rank_of<Gate>>(up));
  });
}
/// The same for the fused tensor: grad_gate_up is [grad_gate | grad_up], and may be gate_up itself.
template <CpuDevice D, typename GF, typename GY, typename Fused>
void geglu_backward_into(const D& device, GF&& grad_gate_up, const GY& grad_y, const Fused& gate_up,
                         const GeluOptions& options = {}) {
  detail::with_gelu(options, [&]<typename F>(F) {
    detail::gated_fused_backward_into<F>(
        "geglu_backward", device, detail::output_like<Fused>(grad_gate_up),
        input_view<rank_of<Fused>>(grad_y), detail::any_input(gate_up));
  });
}
/// Returns gelu(gate) * up, in the scalar and shape of gate.
template <CpuDevice D, typename Gate, detail::NotAnOption Up>
auto geglu(const D& device, const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  require_same_shape("geglu", "up", input_view<rank_of<Gate>>(up), "gate", detail::any_input(gate));
  auto y = detail::tensor_like("geglu", "gate", detail::any_input(gate));
  geglu_into(device, y, gate, up, options);
  return y;
}
template <detail::NotAnOption Gate, detail::NotAnOption Up>
auto geglu(const Gate& gate, const Up& up, const GeluOptions& options = {}) {
  return geglu(Eigen::DefaultDevice{}, gate, up, options);
}
/// Returns gelu(gate) * up for the fused tensor [gate | up].
template <CpuDevice D, typename Fused>
auto geglu(const D& device, const Fused& gate_up, const GeluOptions& options = {}) {
  auto y = detail::fused_result("geglu", detail::any_input(gate_up));
  geglu_into(device, y, gate_up, options);
  return y;
}
template <detail::NotAnOption Fused>
auto geglu(const Fused& gate_up, const GeluOptions& options = {}) {
  return geglu(Eigen::DefaultDevice{}, gate_up, options);
}

// ---- gradients, returned: in the scalar and shape of what they are gradients of -----------------

template <CpuDevice D, typename GY, typename X>
auto silu_backward(const D& device, const GY& grad_y, const X& x) {
  auto grad_x = detail::tensor_like("silu_backward", "x", detail::any_input(x));
  silu_backward_into(device, grad_x, grad_y, x);
  return grad_x;
}
template <CpuDevice D, typename GY, detail::NotAnOption X>
auto gelu_backward(const D& device, const GY& grad_y, const X& x, const GeluOptions& options = {}) {
  auto grad_x = detail::tensor_like("gelu_backward", "x", detail::any_input(x));
  gelu_backward_into(device, grad_x, grad_y, x, options);
  return grad_x;
}
template <CpuDevice D, typename GY, typename X>
auto relu_backward(const D& device, const GY& grad_y, const X& x) {
  auto grad_x = detail::tensor_like("relu_backward", "x", detail::any_input(x));
  relu_backward_into(device, grad_x, grad_y, x);
  return grad_x;
}
template <typename GY, typename X>
  requires(!Device<GY>)
auto silu_backward(const GY& grad_y, const X& x) {
  return silu_backward(Eigen::DefaultDevice{}, grad_y, x);
}
template <typename GY, typename X>
  requires(!Device<GY>)
auto gelu_backward(const GY& grad_y, const X& x, const GeluOptions& options = {}) {
  return gelu_backward(Eigen::DefaultDevice{}, grad_y, x, options);
}
template <typename GY, typename X>
  requires(!Device<GY>)
auto relu_backward(const GY& grad_y, const X& x) {
  return relu_backward(Eigen::DefaultDevice{}, grad_y, x);
}

/// auto [grad_gate, grad_up] = ef::swiglu_backward(grad_y, gate, up);
template <typename T, int Rank>
struct GatedGradients {
  Tensor<T, Rank> grad_gate, grad_up;
};
template <CpuDevice D, typename GY, typename Gate, typename Up>
auto swiglu_backward(const D& device, const GY& grad_y, const Gate& gate, const Up& up) {
  GatedGradients<scalar_of<Gate>, rank_of<Gate>> g;
  g.grad_gate = detail::tensor_like("swiglu_backward", "gate", detail::any_input(gate));
  g.grad_up = g.grad_gate;
  swiglu_backward_into(device, g.grad_gate, g.grad_up, grad_y, gate, up);
  return g;
}
template <CpuDevice D, typename GY, typename Gate, typename Up>
auto geglu_backward(const D& device, const GY& grad_y, const Gate& gate, const Up& up,
                    const GeluOptions& options = {}) {
  GatedGradients<scalar_of<Gate>, rank_of<Gate>> g;
  g.grad_gate = detail::tensor_like("geglu_backward", "gate", detail::any_input(gate));
  g.grad_up = g.grad_gate;
  geglu_backward_into(device, g.grad_gate, g.grad_up, grad_y, gate, up, options);
  return g;
}
template <typename GY, typename Gate, typename Up>
  requires(!Device<GY>)
auto swiglu_backward(const GY& grad_y, const Gate& gate, const Up& up) {
  return swiglu_backward(Eigen::DefaultDevice{}, grad_y, gate, up);
}
template <typename GY, typename Gate, typename Up>
  requires(!Device<GY>)
auto geglu_backward(const GY& grad_y, const Gate& gate, const Up& up,
                    const GeluOptions& options = {}) {
  return geglu_backward(Eigen::DefaultDevice{}, grad_y, gate, up, options);
}

// ---- residual -----------------------------------------------------------------------------------

/// y = x + residual. y may be x or residual. Its gradient is grad_y for both: no backward form is
/// needed.
template <CpuDevice D, typename Y, typename X, typename R>
void residual_add_into(const D& device, Y&& y, const X& x, const R& residual) {
  auto yv = detail::output_like<X>(y);
  const auto xv = detail::any_input(x);
  const auto rv = input_view<rank_of<X>>(residual);
  detail::require_floating_scalars<decltype(yv), decltype(xv), decltype(rv)>();
  require_same_shape("residual_add", "residual", rv, "x", xv);
  require_same_shape("residual_add", "y", yv, "x", xv);
  using Problem = problem::ResidualAdd<scalar_of<Y>, scalar_of<X>, scalar_of<R>>;
  detail::run(device, Problem{yv.data(), xv.data(), rv.data(),
                              detail::checked_size("residual_add", "x", xv)});
}
/// Returns x + residual, in the scalar and shape of x.
template <CpuDevice D, typename X, typename R>
auto residual_add(const D& device, const X& x, const R& residual) {
  require_same_shape("residual_add", "residual", input_view<rank_of<X>>(residual), "x",
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
