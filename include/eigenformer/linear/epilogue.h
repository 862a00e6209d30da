/// \file
/// What a linear layer does with its sums before they leave the registers, put together from types:
///
///   ef::linear_into(device, y, x, w, ef::Epilogue{}.bias(b).silu());                 // y = silu(x w^T + b)
///   ef::linear_into(device, y, x, w, ef::Epilogue{}.bias(b).residual(h));            // y = h + (x w^T + b); h may be y
///   ef::gated_linear_into(device, y, x, gate_up, ef::Epilogue{}.silu());             // y = silu(x Wg^T) * (x Wu^T), SwiGLU
///
/// In the order residual + function(sum + bias); the calls may come in any order. The values are
/// those of the separate operators on float intermediates, bit for bit. An epilogue holds views:
/// its tensors must outlive the call it is passed to.
#pragma once

#include "../core/tensor.h"
#include "../problem/activation.h"
#include "../problem/linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Function: of the sum, one of problem/activation.h. B, R: scalars of bias and residual.
template <typename Function = problem::Identity, typename B = float, typename R = float>
class Epilogue {
 public:
  using function = Function;
  using bias_scalar = B;
  using residual_scalar = R;
  using pointers = problem::Epilogue<Function, B, R>;

  Epilogue() = default;
  Epilogue(const B* bias, Index bias_size, const R* residual, Index residual_rows,
           Index residual_columns)
      : bias_(bias),
        residual_(residual),
        bias_size_(bias_size),
        residual_rows_(residual_rows),
        residual_columns_(residual_columns) {}

  /// (out); of a gated layer (2 * out), gate's then up's.
  template <typename Bias>
  auto bias(Bias&& values) const {
    require_life<Bias>();
    const auto view = input_view<1>(values);
    return Epilogue<Function, scalar_of<Bias>, R>(view.data(), view.dimension(0), residual_,
                                                  residual_rows_, residual_columns_);
  }
  /// (tokens, out); may be the output itself.
  template <typename Residual>
  auto residual(Residual&& values) const {
    require_life<Residual>();
    const auto view = input_view<2>(values);
    return Epilogue<Function, B, scalar_of<Residual>>(bias_, bias_size_, view.data(),
                                                      view.dimension(0), view.dimension(1));
  }
  auto silu() const { return with<problem::Silu>(); }
  auto gelu() const { return with<problem::GeluErf>(); }
  auto gelu_tanh() const { return with<problem::GeluTanh>(); }
  auto relu() const { return with<problem::Relu>(); }

  operator pointers() const { return {bias_, residual_}; }
  const B* bias_data() const { return bias_; }            ///< nullptr where there is none
  Index bias_size() const { return bias_size_; }          ///< kNone where there is none
  const R* residual_data() const { return residual_; }    ///< nullptr where there is none
  Index residual_rows() const { return residual_rows_; }  ///< kNone where there is none
  Index residual_columns() const { return residual_columns_; }
  static constexpr Index kNone = -1;

 private:
  template <typename X>
  static constexpr void require_life() {
    static_assert(
        std::is_lvalue_reference_v<X> || !detail::owns_its_elements<X>,
        "eigenformer: an epilogue holds a view, and this tensor ends with the expression. "
        "Give it a name first.");
  }
  template <typename Other>
  auto with() const {
    return Epilogue<Other, B, R>(bias_, bias_size_, residual_, residual_rows_, residual_columns_);
  }

  // Pointers rather than views: a view's assignment writes through it.
  const B* bias_ = nullptr;
  const R* residual_ = nullptr;
  Index bias_size_ = kNone, residual_rows_ = kNone, residual_columns_ = kNone;
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
