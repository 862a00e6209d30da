/// \file
/// The gated unit of gpt-oss (2025), of rows [gate | up]:
///
///   y = (u + 1) * g * sigmoid(alpha * g)      g = min(gate, limit), u = up within [-limit, limit]
///
/// activation.h is the manual.
#pragma once

#include "../activation.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct ClampedSwigluOptions {
  float alpha = 1.702f;  ///< of the sigmoid
  float limit = 7.0f;    ///< gate is at most this, up within it on both sides
};

namespace detail {
inline void require_clamped_swiglu(std::string_view name, const ClampedSwigluOptions& options) {
  require_that(std::isfinite(options.alpha), name, "alpha is ", options.alpha,
               ", expected a finite number");
  require_that(options.limit > 0, name, "limit is ", options.limit, ", expected a positive number");
}
}  // namespace detail

/// y = (up' + 1) * g * sigmoid(alpha * g), of the fused tensor (rows, [gate | up]). Throws
/// std::invalid_argument for an alpha that is not finite and a limit that is not positive. It has
/// no backward form.
template <Device D, typename Y, typename Fused>
void clamped_swiglu_into(const D& device, Y&& y, const Fused& gate_up,
                         const ClampedSwigluOptions& options = {}) {
  constexpr auto name = "clamped_swiglu";
  auto to = output_view<2>(y);
  const auto from = input_view<2>(gate_up);
  detail::require_floating_scalars<decltype(to), decltype(from)>();
  detail::checked_size(name, "gate_up", from);
  const Index rows = to.dimension(0), features = to.dimension(1);
  detail::require_that(
      from.dimension(0) == rows && from.dimension(1) % 2 == 0 && from.dimension(1) / 2 == features,
      name, "gate_up has shape ", detail::shape_text(from), ", y has shape ",
      detail::shape_text(to), ", expected twice as many columns");
  detail::require_clamped_swiglu(name, options);
  using Problem = problem::ClampedSwiglu<scalar_of<Y>, scalar_of<Fused>>;
  using C = typename Problem::compute;
  detail::run(device, Problem{to.data(), from.data(), rows, features, static_cast<C>(options.alpha),
                              static_cast<C>(options.limit)});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
