/// \file
/// The logarithm of softmax over the last dimension:
///
///   y_i = (x_i - max x) - log(sum over j of exp(x_j - max x))
///
/// The sum beside its greatest term is added by itself and taken by log1p, so that y is right also
/// where one probability is nearly 1 and y nearly 0, which softmax and log in turn cannot say. In
/// float the relative error of every y is below 3e-7 + 1e-7 g, where the next best x lies g below
/// the best; in double below 2e-15.
///
/// x is float, double, bfloat16 or half of any rank, y of the same shape, float, or double where x
/// is. It may be x itself. -infinity stays -infinity. A row that holds NaN or +infinity, or that is
/// all -infinity, has no softmax and gives a row of NaN, as in PyTorch. Shapes that differ throw
/// std::invalid_argument. Nothing is allocated after the first call at a size.
///
/// Cost: one read for the maximum, one with an exponential for each element, one to write.
#pragma once

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/log_softmax.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

template <Device D, typename Y, typename X>
void log_softmax_into(const D& device, Y&& y, const X& x,
                      Workspace& workspace = thread_workspace()) {
  constexpr auto name = "log_softmax";
  const auto input = input_view<rank_of<X>>(x);
  auto output = output_view<rank_of<X>>(y);
  using T = scalar_of<decltype(input)>;
  using Out = scalar_of<decltype(output)>;
  detail::require_floating_scalars<decltype(input)>();
  static_assert(std::is_same_v<Out, float> || std::is_same_v<Out, compute_type<T>>,
                "eigenformer: log-probabilities are float, or double where x is double");
  detail::require_same_shape(name, "y", output, "x", input);
  const auto [rows, columns] = detail::row_shape(input, name, "x");
  detail::run(device, problem::LogSoftmax<Out, T>{output.data(), input.data(), rows, columns},
              workspace);
}

/// Returns float, or double where x is double.
///
///   ef::Tensor<float, 2> scores = ef::log_softmax(logits);
template <CpuDevice D, typename X>
auto log_softmax(const D& device, const X& x) {
  const auto input = input_view<rank_of<X>>(x);
  auto y = detail::make_tensor<compute_type<scalar_of<X>>, rank_of<X>>(
      "log_softmax", "x", detail::sizes_of<rank_of<X>>(input));
  log_softmax_into(device, y, input);
  return y;
}
template <typename X>
  requires(!Device<X>)
auto log_softmax(const X& x) {
  return log_softmax(Eigen::DefaultDevice{}, x);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
