/// \file
/// What a linear layer does with its sums before they leave the registers, put together from types:
///
///   ef::linear_into(device, y, x, w, ef::Epilogue{}.bias(b).silu());                 // y = silu(x w^T + b)
///   ef::linear_into(device, y, x, w, ef::Epilogue{}.bias(b).residual(h));            // y = h + (x w^T + b); h may be y
///   ef::gated_linear_into(device, y, x, gate_up, ef::Epilogue{}.silu());             // y = silu(x Wg^T) * (x Wu^T), SwiGLU
///
/// In the order residual + function(sum + bias); the calls may come in any order. The values are those of the separate operators on
/// float intermediates, bit for bit. An epilogue holds views: its tensors must outlive the call it is passed to.
#pragma once

#include "../core/tensor.h"
#include "../cpu/activation_functions.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Function: of the sum, one of cpu/activation_functions.h. B, R: scalars of bias and residual.
template <typename Function = cpu::Identity, typename B = float, typename R = float>
class Epilogue {
 public:
  using function = Function;
  using bias_scalar = B;
  using residual_scalar = R;

  Epilogue() = default;
  Epilogue(TensorView<const B, 1> bias, bool has_bias, TensorView<const R, 2> residual, bool has_residual)
      : bias_(bias), residual_(residual), has_bias_(has_bias), has_residual_(has_residual) {}

  /// (out); of a gated layer (2 * out), gate's then up's.
  template <RowMajorTensor Tensor1>
  auto bias(const Tensor1& values) const {
    return Epilogue<Function, scalar_of<Tensor1>, R>(input_view<1>(values), true, residual_, has_residual_);
  }
  /// (tokens, out); may be the output itself.
  template <RowMajorTensor Tensor2>
  auto residual(const Tensor2& values) const {
    return Epilogue<Function, B, scalar_of<Tensor2>>(bias_, has_bias_, input_view<2>(values), true);
  }
  auto silu() const { return with<cpu::Silu>(); }
  auto gelu() const { return with<cpu::GeluErf>(); }
  auto gelu_tanh() const { return with<cpu::GeluTanh>(); }
  auto relu() const { return with<cpu::Relu>(); }

  const TensorView<const B, 1>& bias_view() const { return bias_; }
  const TensorView<const R, 2>& residual_view() const { return residual_; }
  bool has_bias() const { return has_bias_; }
  bool has_residual() const { return has_residual_; }

 private:
  template <typename Other>
  auto with() const {
    return Epilogue<Other, B, R>(bias_, has_bias_, residual_, has_residual_);
  }

  TensorView<const B, 1> bias_{nullptr, 0};
  TensorView<const R, 2> residual_{nullptr, 0, 0};
  bool has_bias_ = false, has_residual_ = false;
};
Epilogue() -> Epilogue<>;

namespace detail {

template <typename X>
inline constexpr bool is_epilogue = false;
template <typename Function, typename B, typename R>
inline constexpr bool is_epilogue<Epilogue<Function, B, R>> = true;

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
