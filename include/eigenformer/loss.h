/// \file
/// Softmax cross-entropy over rows of logits (rows, classes) with class indices as targets (rows),
/// any contiguous range of integers:
///
///   loss[r]        = log(sum_k exp(x[r, k])) - x[r, target[r]]
///   gradient[r, k] = (softmax(x[r])[k] - [k == target[r]]) * gradient_scale
///
/// with the options
///   - ignore_index:     rows with this target have loss 0 and gradient 0, whatever their logits, and do not count
///   - label_smoothing:  the target's distribution is (1 - s) at the target plus s / classes everywhere (Szegedy et al.,
///                       "Rethinking the Inception Architecture", 2016)
///   - z_loss z:         + z * log(sum_k exp(x[r, k]))^2, which keeps logits from drifting (Chowdhery et al., "PaLM", 2022)
///
/// The result is a sum and a count, so that parts of a batch can be put together: the mean over the
/// whole is sum of sums over sum of counts, and its gradient needs gradient_scale = 1 / count
/// (times a loss scale, where one is used).
///
/// Logits are float, double, Eigen::bfloat16 or Eigen::half; arithmetic is in float (double for
/// double), rows' losses are added in double in their order. Everything is measured from the
/// maximum: no finite logit overflows, and large ones lose nothing. A logit of -infinity is a class
/// of probability 0 (with label smoothing the loss is then infinite); NaN, +infinity, and a row
/// that is all -infinity give a NaN loss and gradient row. A gradient past the range of its type
/// becomes infinite: a loss scaler sees that.
///
/// Targets are checked one by one, O(rows), before anything is written. Cost: one exponential per
/// element (two where the gradient is narrower than float); reads the logits and writes the
/// gradient once. On a GPU the call waits for its result. Nothing is allocated after the first call
/// at a size.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/values.h"
#include "core/workspace.h"
#include "cpu/loss.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct CrossEntropyOptions {
  std::int32_t ignore_index = -100;  ///< rows with this target do not count
  double label_smoothing = 0;        ///< in [0, 1]
  double z_loss = 0;                 ///< weight of the squared log-partition, 0 or more
};

/// A loss summed over rows, with the number of rows that counted.
struct LossResult {
  double sum = 0;
  Index count = 0;

  /// The mean over the rows that counted, 0 where there were none.
  double mean() const { return count > 0 ? sum / static_cast<double>(count) : 0.0; }
};

namespace detail {

/// Throws for the first target that is neither a class nor ignore_index; returns how many are
/// classes.
inline Index checked_target_count(const LengthSpan& targets, Index rows, Index classes,
                                  std::int32_t ignore_index) {
  Index count = 0;
  for (Index r = 0; r < rows; ++r) {
    if (targets[r] == ignore_index) continue;
    require_that(targets[r] >= 0 && targets[r] < classes, "cross_entropy", "target ", r, " is ",
                 targets[r], ", expected a class in [0, ", classes, ") or ignore_index ",
                 ignore_index);
    ++count;
  }
  return count;
}

/// Targets as whatever holds them.
template <typename Targets>
LengthSpan target_span(const Targets& targets) {
  static_assert(std::is_convertible_v<const Targets&, LengthSpan>,
                "eigenformer: targets are an ef::Tensor<std::int32_t, 1> or any other contiguous "
                "range of integers");
  return LengthSpan(targets);
}

/// A checked request with one loss per row in `frame`; result.count is set. `gradient` may be null.
template <typename G, typename Logits>
problem::CrossEntropy<scalar_of<Logits>, G> cross_entropy_problem(
    LossResult& result, G* gradient, const Logits& logits, const LengthSpan& targets,
    double gradient_scale, const CrossEntropyOptions& options, Workspace::Frame& frame) {
  constexpr auto name = "cross_entropy";
  static_assert(FloatingScalar<scalar_of<Logits>>,
                "eigenformer: logits are float, double, Eigen::bfloat16 or Eigen::half");
  checked_size(name, "logits", logits);
  const Index rows = logits.dimension(0), classes = logits.dimension(1);
  require_that(targets.size() == rows, name, "targets has ", targets.size(),
               " elements, logits has ", rows, " rows");
  require_that(options.label_smoothing >= 0 && options.label_smoothing <= 1, name,
               "label_smoothing is ", options.label_smoothing, ", expected 0 to 1");
  require_that(options.z_loss >= 0 && std::isfinite(options.z_loss), name, "z_loss is ",
               options.z_loss, ", expected 0 or more");
  require_that(std::isfinite(gradient_scale), name, "gradient_scale is ", gradient_scale,
               ", expected a finite number");
  result.count = checked_target_count(targets, rows, classes, options.ignore_index);
  return {logits.data(),
          indices(targets, frame),
          gradient,
          frame.take<double>(rows),
          rows,
          classes,
          gradient_scale,
          options.ignore_index,
          options.label_smoothing,
          options.z_loss};
}

/// Adds the rows' losses in their order.
template <typename Problem>
LossResult with_sum(LossResult result, const Problem& problem) {
  for (Index r = 0; r < problem.rows; ++r) result.sum += problem.row_loss[r];
  return result;
}

}  // namespace detail

/// The loss of logits (rows, classes) against targets (rows). Throws std::invalid_argument for a
/// target that is neither a class nor ignore_index (naming its position and value), for sizes that
/// differ and for options out of range.
///
///   const ef::LossResult loss = ef::cross_entropy(logits, targets);   // loss.mean()
template <Device D, typename Logits, typename Targets = LengthSpan>
LossResult cross_entropy(const D& device, const Logits& logits, const Targets& targets,
                         const CrossEntropyOptions& options = {},
                         Workspace& workspace = thread_workspace()) {
  const LengthSpan classes = detail::target_span(targets);
  Workspace::Frame frame(workspace);
  LossResult result;
  compute_type<scalar_of<Logits>>* const no_gradient = nullptr;
  const auto problem = detail::cross_entropy_problem(result, no_gradient, input_view<2>(logits),
                                                     classes, 1.0, options, frame);
  detail::run(device, problem);
  return detail::with_sum(result, problem);
}
template <typename Logits, typename Targets = LengthSpan>
  requires(!Device<Logits>)
LossResult cross_entropy(const Logits& logits, const Targets& targets,
                         const CrossEntropyOptions& options = {}) {
  return cross_entropy(Eigen::DefaultDevice{}, logits, targets, options);
}

/// The loss, and its gradient times gradient_scale into grad_logits (rows, classes). grad_logits
/// has the type of the logits, or is float where they are narrower. It may be the logits themselves
/// (same memory, same type) and must not overlap them otherwise. Throws like cross_entropy.
///
///   ef::cross_entropy_with_gradient_into(device, logits, logits, targets, 1.0 / count);   // in place
template <Device D, typename Gradient, typename Logits, typename Targets = LengthSpan>
LossResult cross_entropy_with_gradient_into(const D& device, Gradient&& grad_logits,
                                            const Logits& logits, const Targets& targets,
                                            double gradient_scale,
                                            const CrossEntropyOptions& options = {},
                                            Workspace& workspace = thread_workspace()) {
  using L = scalar_of<Logits>;
  using G = scalar_of<Gradient>;
  static_assert(
      std::is_same_v<G, L> || std::is_same_v<G, compute_type<L>>,
      "eigenformer: the gradient has the type of the logits, or is float where they are narrower");
  const auto x = input_view<2>(logits);
  auto gradient = output_view<2>(grad_logits);
  detail::require_same_shape("cross_entropy_with_gradient_into", "grad_logits", gradient, "logits",
                             x);
  const LengthSpan classes = detail::target_span(targets);
  Workspace::Frame frame(workspace);
  LossResult result;
  const auto problem = detail::cross_entropy_problem(result, gradient.data(), x, classes,
                                                     gradient_scale, options, frame);
  detail::run(device, problem);
  return detail::with_sum(result, problem);
}

/// auto [loss, grad_logits] = ef::cross_entropy_with_gradient(logits, targets, 1.0 / count);
template <typename T>
struct LossAndGradient {
  LossResult loss;
  Tensor<T, 2> gradient;
};
template <CpuDevice D, typename Logits, typename Targets = LengthSpan>
auto cross_entropy_with_gradient(const D& device, const Logits& logits, const Targets& targets,
                                 double gradient_scale, const CrossEntropyOptions& options = {}) {
  LossAndGradient<scalar_of<Logits>> result;
  result.gradient =
      detail::tensor_like("cross_entropy_with_gradient", "logits", input_view<2>(logits));
  result.loss = cross_entropy_with_gradient_into(device, result.gradient, logits, targets,
                                                 gradient_scale, options);
  return result;
}
template <typename Logits, typename Targets = LengthSpan>
  requires(!Device<Logits>)
auto cross_entropy_with_gradient(const Logits& logits, const Targets& targets,
                                 double gradient_scale, const CrossEntropyOptions& options = {}) {
  return cross_entropy_with_gradient(Eigen::DefaultDevice{}, logits, targets, gradient_scale,
                                     options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
