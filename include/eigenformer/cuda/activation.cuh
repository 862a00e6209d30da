/// \file
/// CUDA kernels of activations, gated activations and the residual sum: one coalesced pass, 16
/// bytes per thread and tensor where alignment allows; every element is read before its place is
/// written, so outputs may be inputs. Bytes: each tensor once. An exponential costs about 20
/// instructions per element of 4 to 12 bytes moved, below what the machine does in that time. Of
/// the bandwidth of copies an H200 gave 82% to SwiGLU of 4096 x 14336 bfloat16, 75% to its
/// gradients.
#pragma once

#include <limits>

#include "functions.cuh"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Function, typename Y, typename X>
struct ActivationBody {
  using Problem = problem::Activation<Function, Y, X>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index, Index at) const {
    auto x = load_pack<typename Problem::compute, W>(p.x + at);
    for (int i = 0; i < W; ++i) x[i] = ActivationFunction<Function>::value(x[i]);
    store_pack(x, p.y + at);
  }
};

template <typename D, typename Function, typename Y, typename X>
void execute(const Backend<D>& on, const problem::Activation<Function, Y, X>& p) {
  constexpr int width = pack_width<Y, X>;
  launch_for_each_pack<width>(on, "activation", 1, p.count,
                              packs_fit<width>(p.y, 0) && packs_fit<width>(p.x, 0),
                              ActivationBody<Function, Y, X>{p});
}

template <typename Y, typename X>
struct SoftcapBody {
  using Problem = problem::Softcap<Y, X>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index, Index at) const {
    using C = typename Problem::compute;
    auto x = load_pack<C, W>(p.x + at);
    const C unit = p.scale / p.cap;
    for (int i = 0; i < W; ++i) x[i] = p.cap == 0 ? x[i] * p.scale : std::tanh(x[i] * unit) * p.cap;
    store_pack(x, p.y + at);
  }
};

template <typename D, typename Y, typename X>
void execute(const Backend<D>& on, const problem::Softcap<Y, X>& p) {
  constexpr int width = pack_width<Y, X>;
  launch_for_each_pack<width>(on, "softcap", 1, p.count,
                              packs_fit<width>(p.y, 0) && packs_fit<width>(p.x, 0),
                              SoftcapBody<Y, X>{p});
}

template <typename Y, typename X>
struct ClampedSwigluBody {
  using Problem = problem::ClampedSwiglu<Y, X>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index row, Index at) const {
    using C = typename Problem::compute;
    const X* const gate = p.gate_up + row * 2 * p.features + at;
    auto g = load_pack<C, W>(gate);
    const auto u = load_pack<C, W>(gate + p.features);
    for (int i = 0; i < W; ++i) {
      const C x = at_most(at_least(g[i], C(-800)), p.limit);
      g[i] = (at_most(at_least(u[i], -p.limit), p.limit) + C(1)) * (x * sigmoid(p.alpha * x));
    }
    store_pack(g, p.y + row * p.features + at);
  }
  template <typename C>
  EIGENFORMER_DEVICE static C at_most(C x, C most) {
    return x > most ? most : x;
  }
};

template <typename D, typename Y, typename X>
void execute(const Backend<D>& on, const problem::ClampedSwiglu<Y, X>& p) {
  constexpr int width = pack_width<Y, X>;
  launch_for_each_pack<width>(
      on, "clamped_swiglu", p.rows, p.features,
      packs_fit<width>(p.y, p.features) && packs_fit<width>(p.gate_up, p.features),
      ClampedSwigluBody<Y, X>{p});
}

template <typename Function, typename GX, typename GY, typename X>
struct ActivationBackwardBody {
  using Problem = problem::ActivationBackward<Function, GX, GY, X>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index, Index at) const {
    using C = typename Problem::compute;
    auto grad = load_pack<C, W>(p.grad_y + at);
    const auto x = load_pack<C, W>(p.x + at);
    for (int i = 0; i < W; ++i) grad[i] *= ActivationFunction<Function>::derivative(x[i]);
    store_pack(grad, p.grad_x + at);
  }
};

template <typename D, typename Function, typename GX, typename GY, typename X>
void execute(const Backend<D>& on, const problem::ActivationBackward<Function, GX, GY, X>& p) {
  constexpr int width = pack_width<GX, GY, X>;
  launch_for_each_pack<width>(
      on, "activation_backward", 1, p.count,
      packs_fit<width>(p.grad_x, 0) && packs_fit<width>(p.grad_y, 0) && packs_fit<width>(p.x, 0),
      ActivationBackwardBody<Function, GX, GY, X>{p});
}

template <typename Function, typename Y, typename Gate, typename Up>
struct GatedBody {
  using Problem = problem::Gated<Function, Y, Gate, Up>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index row, Index column) const {
    using C = typename Problem::compute;
    const auto gate = load_pack<C, W>(p.gate + row * p.gate_stride + column);
    auto up = load_pack<C, W>(p.up + row * p.up_stride + column);
    for (int i = 0; i < W; ++i) up[i] *= ActivationFunction<Function>::value(gate[i]);
    store_pack(up, p.y + row * p.y_stride + column);
  }
};

template <typename D, typename Function, typename Y, typename Gate, typename Up>
void execute(const Backend<D>& on, const problem::Gated<Function, Y, Gate, Up>& p) {
  constexpr int width = pack_width<Y, Gate, Up>;
  const bool one = p.rows == 1;  // whose strides nobody takes
  const bool fit = packs_fit<width>(p.y, one ? 0 : p.y_stride) &&
                   packs_fit<width>(p.gate, one ? 0 : p.gate_stride) &&
                   packs_fit<width>(p.up, one ? 0 : p.up_stride);
  launch_for_each_pack<width>(on, "gated_activation", p.rows, p.features, fit,
                              GatedBody<Function, Y, Gate, Up>{p});
}

/// a * b * c for |c| of at most about 1, where a * b may overflow: as on the CPU.
template <typename C>
EIGENFORMER_DEVICE C product_with_small(C a, C b, C c) {
  const C ab = a * b;
  return std::fabs(ab) <= (std::numeric_limits<C>::max)() ? ab * c : a * (b * c);
}

template <typename Function, typename GG, typename GU, typename GY, typename Gate, typename Up>
struct GatedBackwardBody {
  using Problem = problem::GatedBackward<Function, GG, GU, GY, Gate, Up>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index row, Index column) const {
    using C = typename Problem::compute;
    using F = ActivationFunction<Function>;
    auto grad = load_pack<C, W>(p.grad_y + row * p.grad_y_stride + column);
    const auto gate = load_pack<C, W>(p.gate + row * p.gate_stride + column);
    auto up = load_pack<C, W>(p.up + row * p.gate_stride + column);
    for (int i = 0; i < W; ++i) {
      up[i] = product_with_small(grad[i], up[i], F::derivative(gate[i]));
      grad[i] *= F::value(gate[i]);
    }
    store_pack(up, p.grad_gate + row * p.grad_stride + column);
    store_pack(grad, p.grad_up + row * p.grad_stride + column);
  }
};

template <typename D, typename Function, typename GG, typename GU, typename GY, typename Gate,
          typename Up>
void execute(const Backend<D>& on,
             const problem::GatedBackward<Function, GG, GU, GY, Gate, Up>& p) {
  constexpr int width = pack_width<GG, GU, GY, Gate, Up>;
  const bool one = p.rows == 1;
  const Index grad_stride = one ? 0 : p.grad_stride, gate_stride = one ? 0 : p.gate_stride;
  const bool fit = packs_fit<width>(p.grad_gate, grad_stride) &&
                   packs_fit<width>(p.grad_up, grad_stride) &&
                   packs_fit<width>(p.grad_y, one ? 0 : p.grad_y_stride) &&
                   packs_fit<width>(p.gate, gate_stride) && packs_fit<width>(p.up, gate_stride);
  launch_for_each_pack<width>(on, "gated_activation_backward", p.rows, p.features, fit,
                              GatedBackwardBody<Function, GG, GU, GY, Gate, Up>{p});
}

template <typename Y, typename X, typename R>
struct ResidualAddBody {
  using Problem = problem::ResidualAdd<Y, X, R>;
  Problem p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index, Index at) const {
    using C = typename Problem::compute;
    auto x = load_pack<C, W>(p.x + at);
    const auto residual = load_pack<C, W>(p.residual + at);
    for (int i = 0; i < W; ++i) x[i] += residual[i];
    store_pack(x, p.y + at);
  }
};

template <typename D, typename Y, typename X, typename R>
void execute(const Backend<D>& on, const problem::ResidualAdd<Y, X, R>& p) {
  constexpr int width = pack_width<Y, X, R>;
  launch_for_each_pack<width>(
      on, "residual_add", 1, p.count,
      packs_fit<width>(p.y, 0) && packs_fit<width>(p.x, 0) && packs_fit<width>(p.residual, 0),
      ResidualAddBody<Y, X, R>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
