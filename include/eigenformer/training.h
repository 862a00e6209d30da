/// \file
/// Training steps over any model that meets `TrainableModel`: gradient accumulation and mixed
/// precision.
///
/// Gradient accumulation splits a big batch into micro-batches that fit in memory. Every
/// `accumulation_steps` micro-batches of the range form one group, the last of which may be
/// shorter, and one optimizer step. The step's gradients are those of the mean loss over all
/// targets of the group that count: weighted by targets, not by micro-batch, so that micro-batches
/// may differ in size. The number of targets is known only at the group's last micro-batch (the
/// range may be single-pass), so the loss gradients are divided by n, the rows of logits of the
/// group's first micro-batch, which keeps them in the range of half, and all gradients are
/// multiplied by n / count once before the step: nothing where they are equal.
///
/// Mixed precision (Micikevicius et al., 2018): the model computes forward and backward in Compute
/// (float, Eigen::bfloat16 or Eigen::half), the loss and all sums are in float or double, master
/// weights, their gradients and the optimizer's state are float. A GradScaler multiplies the loss
/// gradient; gradients are unscaled once, before clipping and the step; a step whose gradients are
/// not all finite is skipped, leaving weights and optimizer bit for bit, and the scale backs off.
/// An overflow of the scaled loss gradient itself is such a case.
///
/// One pass reads the gradients and finds the norm of the unscaled ones, and so whether all are
/// finite. AdamW and Sgd unscale and clip each gradient as they read it, and keep the result; for
/// another optimizer the first pass unscales and one more clips. The bits are the same.
///
/// A step, in order: zero gradients, forward and backward of each micro-batch, unscale, clip,
/// optimizer step, scaler update, on_step. On several ranks hooks between them (TrainOptions) put
/// the ranks' sums together; `data_parallel` sets them. On a pool each micro-batch and each step is
/// a ParallelRegion. A group in which no target counts makes no step and does not move the scale.
/// After the epoch the gradients are those the last step used; where it was skipped, they may still
/// be scaled. An exception (a target out of range, or one of the model's own) passes through;
/// weights, optimizer and scaler are then as the last finished group left them.
///
/// On a GPU the host waits for the device at each loss, and at each verdict and norm.
///
/// Cost beyond the model: the loss (in place over the logits), one pass over the gradients to zero
/// them, one that reads them with a scaler or clipping, and the optimizer's, which writes them
/// where it changes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <functional>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "grad_scaler.h"
#include "loss.h"
#include "optimizer.h"
#include "parallel_region.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What a model offers, for one type of computation and of inputs:
///
///   struct Model {
///     template <typename Compute, typename Inputs>
///     ef::Tensor<Compute, 2> forward(const Inputs& inputs);               // logits (targets, classes); keeps what backward needs
///     template <typename Compute>
///     void backward(const ef::Tensor<Compute, 2>& logits_gradient);       // of the last forward; adds to the gradients
///     std::vector<ef::Parameter> parameters();                            // values and gradients, flattened, float
///   };
///
/// One that trains on a GPU (D its device) has ef::TensorView<Compute, 2> in both places: views of
/// memory of the device, which the model keeps until its next forward; so has its loss. Parameters
/// are of that memory, and so is the optimizer's state.
template <typename Model, typename Compute = float, typename Inputs = Tensor<Compute, 2>,
          typename D = Eigen::DefaultDevice>
concept TrainableModel = requires(Model& model, const Inputs& inputs,
                                  const detail::ModelTensor<D, Compute, 2>& logits_gradient) {
  {
    model.template forward<Compute>(inputs)
  } -> std::convertible_to<detail::ModelTensor<D, Compute, 2>>;
  model.template backward<Compute>(logits_gradient);
  { model.parameters() } -> std::convertible_to<std::vector<Parameter>>;
};

/// What a training step needs of an optimizer: AdamW, Sgd, or the user's own. step(device) and
/// zero_grad(device) are used where they exist.
template <typename O>
concept TrainingOptimizer = requires(O& optimizer) {
  optimizer.step();
  optimizer.zero_grad();
  { optimizer.parameters() } -> std::convertible_to<std::span<const Parameter>>;
};

/// The default loss. A loss function is any callable
///
///   ef::LossResult loss(ef::Tensor<Compute, 2>& logits, const Targets& targets, double gradient_scale)
///
/// that returns the loss summed over the targets that count, and their number, and overwrites the
/// logits (targets, classes) with the gradient of that sum times gradient_scale. `targets` is what
/// the batch carries, of any type: class indices, soft labels or values (rows, classes) of float, a
/// struct. It may take the device as one more first argument.
struct CrossEntropyLoss {
  CrossEntropyOptions options = {};

  template <Device D, typename Logits, typename Targets>
  LossResult operator()(const D& device, Logits& logits, const Targets& targets,
                        double gradient_scale) const {
    return cross_entropy_with_gradient_into(device, logits, logits, targets, gradient_scale,
                                            options);
  }
};

/// One finished group of micro-batches, as TrainOptions::on_step sees it.
struct StepReport {
  bool stepped = false;    ///< the weights were updated
  bool found_inf = false;  ///< a gradient was infinite or NaN, and the step was skipped for that
  double scale = 1;        ///< loss scale from here on
  /// steps skipped for found_inf: over the scaler's life, or over this epoch without a scaler
  Index skipped_total = 0;
  double loss = 0;           ///< mean over the group's targets
  Index targets = 0;         ///< how many counted
  double gradient_norm = 0;  ///< before clipping, finite or not; 0 where clipping is off
  Index group = 0;           ///< groups finished before this one in the epoch
};

/// What all ranks must know to step alike, as TrainOptions::reduce_verdict sees it.
struct GradientVerdict {
  bool found_inf = false;   ///< a gradient is infinite or NaN; the step is skipped where true
  double squared_norm = 0;  ///< of the unscaled gradients, for clipping; 0 where clipping is off
};

struct TrainOptions {
  /// Gradients are clipped to this L2 norm; 0: not clipped. A norm that is not finite skips the
  /// step, with or without a scaler.
  double max_gradient_norm = 0;
  /// called after each group, for progress and learning rate schedules
  std::function<void(const StepReport&)> on_step = {};

  // Training on several ranks. Each hook is called once for each group on every rank, in this
  // order, with what this rank has; it leaves there what all ranks together have. So each rank
  // needs as many groups as the others.

  /// The loss and the number of targets: sums over ranks. Goes with reduce_gradients.
  std::function<void(LossResult&)> reduce_loss = {};
  /// The gradients, after the backward passes and before unscaling: sums over ranks, which are
  /// those of the mean over all ranks' targets, times the scale.
  std::function<void(std::span<const Parameter>)> reduce_gradients = {};
  /// The verdict, after unscaling and before clipping and the step: found_inf anywhere, and the sum
  /// of squared_norm, where ranks hold different parameters. Where all ranks have the same
  /// gradients they agree already.
  std::function<void(GradientVerdict&)> reduce_verdict = {};
};

/// Data parallelism: options under which every rank trains on batches of its own and all take the
/// same steps, those of the mean over all their targets. Each rank has its own model, optimizer and
/// scaler, alike at the start; they stay alike bit for bit. The communicator must outlive the call.
///
///   ef::ThreadCommunicator::run(4, [&](auto& communicator) {
///     ef::train_step_mixed_precision<Eigen::half>(model, optimizer, inputs, labels, scaler,
///                                                 ef::data_parallel(communicator));
///   });
template <typename C>
TrainOptions data_parallel(C& communicator, TrainOptions options = {}) {
  options.reduce_loss = [&communicator](LossResult& loss) {
    double sums[] = {loss.sum, static_cast<double>(loss.count)};
    communicator.all_reduce_sum(std::span<double>(sums));
    loss = {sums[0], static_cast<Index>(sums[1])};
  };
  options.reduce_gradients = [&communicator](std::span<const Parameter> parameters) {
    for (const Parameter& parameter : parameters) {
      const auto size = static_cast<std::size_t>(parameter.gradient.size());
      communicator.all_reduce_sum(std::span<float>(parameter.gradient.data(), size));
    }
  };
  return options;
}

/// Model parallelism: options under which ranks that hold different parameters, each a part of one
/// model, agree on each step and clip by the norm of the whole. A parameter that several ranks hold
/// alike counts in the norm once for each.
template <typename C>
TrainOptions model_parallel(C& communicator, TrainOptions options = {}) {
  options.reduce_verdict = [&communicator](GradientVerdict& verdict) {
    double sums[] = {verdict.found_inf ? 1.0 : 0.0, verdict.squared_norm};
    communicator.all_reduce_sum(std::span<double>(sums));
    verdict = {sums[0] > 0, sums[1]};
  };
  return options;
}

namespace detail {

template <typename L, typename D, typename Logits, typename Targets>
concept LossWithDevice =
    requires(L& loss, const D& device, Logits& logits, const Targets& targets) {
      { loss(device, logits, targets, 1.0) } -> std::convertible_to<LossResult>;
    };
template <typename L, typename Logits, typename Targets>
concept LossWithoutDevice = requires(L& loss, Logits& logits, const Targets& targets) {
  { loss(logits, targets, 1.0) } -> std::convertible_to<LossResult>;
};

/// Stands for the scaler where there is none.
struct NoScaler {};

/// One epoch, or one step: what is alike in all training functions.
template <typename Compute, Device D, typename Model, TrainingOptimizer Optimizer, typename Loss,
          typename Scaler>
class Trainer {
  using Logits = ModelTensor<D, Compute, 2>;

 public:
  Trainer(const D& device, Model& model, Optimizer& optimizer, Loss& loss, Scaler& scaler,
          const TrainOptions& options)
      : device_(device),
        model_(model),
        optimizer_(optimizer),
        loss_(loss),
        scaler_(scaler),
        options_(options) {
    require_that(options.max_gradient_norm >= 0, "train_step", "max_gradient_norm is ",
                 options.max_gradient_norm, ", expected 0 (off) or more");
    require_that(!options.reduce_loss == !options.reduce_gradients, "train_step",
                 "reduce_loss and reduce_gradients are set together or not at all");
  }

  /// Forward and backward of one micro-batch; the first of a group zeroes the gradients.
  template <typename Inputs, typename Targets>
  void accumulate(const Inputs& inputs, const Targets& targets) {
    static_assert(TrainableModel<Model, Compute, Inputs, D>,
                  "eigenformer: the model needs forward<Compute>(inputs), "
                  "backward<Compute>(logits_gradient) and parameters(), as "
                  "ef::TrainableModel in training.h describes them");
    const ParallelRegion region(device_);
    if (micro_batches_ == 0) begin_group();
    Logits logits = model_.template forward<Compute>(inputs);
    if (micro_batches_ == 0)
      normaliser_ = static_cast<double>((std::max)(logits.dimension(0), Index{1}));
    ++micro_batches_;
    const LossResult result = apply_loss(logits, targets);
    group_loss_.sum += result.sum;
    group_loss_.count += result.count;
    model_.template backward<Compute>(std::as_const(logits));
  }

  /// The optimizer step of the micro-batches so far.
  void finish_group() {
    StepReport report;
    if (options_.reduce_loss) options_.reduce_loss(group_loss_);
    if (group_loss_.count > 0) step(report);
    report.scale = scale();
    report.skipped_total = skipped();
    report.loss = group_loss_.mean();
    report.targets = group_loss_.count;
    report.group = groups_++;
    total_.sum += group_loss_.sum;
    total_.count += group_loss_.count;
    micro_batches_ = 0;
    if (options_.on_step) options_.on_step(report);
  }

  Index micro_batches() const { return micro_batches_; }
  double mean_loss() const { return total_.mean(); }

 private:
  static constexpr bool kScaled = std::is_same_v<Scaler, GradScaler>;
  static constexpr bool kTakesFactors =
      requires(Optimizer& o, const D& device) { o.step(device, problem::GradientFactors{}); };

  double scale() const {
    if constexpr (kScaled) return scaler_.scale();
    return 1.0;
  }
  Index skipped() const {
    if constexpr (kScaled) return scaler_.skipped_steps();
    return skipped_;
  }

  void begin_group() {
    if constexpr (kScaled)
      if (scaler_.pending())
        fail<std::logic_error>(
            "train_step: the scaler has gradients unscaled since its last update; call update() "
            "before");
    if constexpr (requires { optimizer_.zero_grad(device_); })
      optimizer_.zero_grad(device_);
    else
      optimizer_.zero_grad();
    group_loss_ = {};
  }

  template <typename Targets>
  LossResult apply_loss(Logits& logits, const Targets& targets) {
    const double gradient_scale = scale() / normaliser_;
    if constexpr (LossWithDevice<Loss, D, Logits, Targets>) {
      return loss_(device_, logits, targets, gradient_scale);
    } else {
      static_assert(LossWithoutDevice<Loss, Logits, Targets>,
                    "eigenformer: a loss is called as loss(logits, targets, gradient_scale), "
                    "overwrites logits with the gradient and "
                    "returns ef::LossResult; see ef::CrossEntropyLoss in training.h");
      return loss_(logits, targets, gradient_scale);
    }
  }

  void step(StepReport& report) {
    const auto& list = optimizer_.parameters();  // a user's optimizer may return them by value
    const std::span<const Parameter> parameters(list);
    const ParallelRegion region(device_);
    // Gradients are those of the loss times scale / normaliser, and become those of the mean.
    double factor = normaliser_ / static_cast<double>(group_loss_.count);
    if (options_.reduce_gradients) {
      if (factor != 1.0) scale_gradients(device_, parameters, factor);
      factor = 1;
      options_.reduce_gradients(parameters);
    }
    factor /= scale();
    check_parameters("train_step", parameters);
    require_factor("train_step", "the factor of the gradients", factor);
    const double limit = options_.max_gradient_norm;
    const bool written = !kTakesFactors || below_float(factor);  // by the first pass
    GradientVerdict verdict;
    if (kScaled || limit > 0) {
      report.gradient_norm = scaled_norm(device_, parameters, factor, written);
      verdict.found_inf = !std::isfinite(report.gradient_norm);
    } else if (written && factor != 1) {
      scale_gradients(device_, parameters, factor);
    }
    agree(verdict, report);
    report.stepped = !verdict.found_inf;
    report.found_inf = verdict.found_inf;
    const double norm = report.gradient_norm;
    if (report.stepped)
      step_optimizer(parameters, written ? 1 : factor,
                     limit > 0 && norm > limit ? limit / norm : 1);
    skipped_ += report.stepped ? 0 : 1;
    if constexpr (kScaled) scaler_.update(verdict.found_inf);
  }

  /// Completes the verdict, and the norm where one is wanted.
  void agree(GradientVerdict& verdict, StepReport& report) {
    const bool clips = options_.max_gradient_norm > 0;
    if (!clips) report.gradient_norm = 0;
    if (!options_.reduce_verdict) return;
    verdict.squared_norm = report.gradient_norm * report.gradient_norm;
    options_.reduce_verdict(verdict);
    if (clips) report.gradient_norm = std::sqrt(verdict.squared_norm);
  }

  /// A step of the gradients times both factors.
  void step_optimizer(std::span<const Parameter> parameters, double factor, double clip) {
    if constexpr (kTakesFactors) {
      if (!below_float(clip)) {
        optimizer_.step(device_, {static_cast<float>(factor), static_cast<float>(clip)});
        return;
      }
    }
    for (double by : {factor, clip})
      if (by != 1) scale_gradients(device_, parameters, by);
    if constexpr (requires { optimizer_.step(device_); })
      optimizer_.step(device_);
    else
      optimizer_.step();
  }

  const D& device_;
  Model& model_;
  Optimizer& optimizer_;
  Loss& loss_;
  Scaler& scaler_;
  const TrainOptions& options_;
  double normaliser_ = 1;  // of the group's loss gradients: rows of its first logits
  LossResult group_loss_, total_;
  Index micro_batches_ = 0, groups_ = 0, skipped_ = 0;
};

/// One of the optional arguments of a training function, found by what it is: the first for which
/// Is<Argument>::value holds, or `missing`.
template <template <typename> class Is, typename Missing>
Missing& find_argument(Missing& missing) {
  return missing;
}
template <template <typename> class Is, typename Missing, typename First, typename... Rest>
auto& find_argument(Missing& missing, First& first, Rest&... rest) {
  if constexpr (Is<std::remove_const_t<First>>::value)
    return first;
  else
    return find_argument<Is>(missing, rest...);
}
template <typename A>
using IsOptions = std::is_same<A, TrainOptions>;
template <typename A>
using IsScaler = std::is_same<A, GradScaler>;
template <typename A>
using IsLoss = std::bool_constant<!IsOptions<A>::value && !IsScaler<A>::value>;
template <typename... Arguments>
inline constexpr bool each_kind_once =
    (0 + ... + IsOptions<std::remove_cvref_t<Arguments>>::value) <= 1 &&
    (0 + ... + IsScaler<std::remove_cvref_t<Arguments>>::value) <= 1 &&
    (0 + ... + IsLoss<std::remove_cvref_t<Arguments>>::value) <= 1;

template <typename Compute, Device D, typename Model, typename Optimizer, typename Loader,
          typename Loss, typename Scaler>
double train_epoch(const D& device, Model& model, Optimizer& optimizer, Loader& loader,
                   Index accumulation_steps, Loss& loss, Scaler& scaler,
                   const TrainOptions& options) {
  require_that(accumulation_steps >= 1, "train_step_with_grad_accumulation",
               "accumulation_steps is ", accumulation_steps, ", expected 1 or more");
  Trainer<Compute, D, Model, Optimizer, Loss, Scaler> trainer(device, model, optimizer, loss,
                                                              scaler, options);
  for (auto&& batch : loader) {
    trainer.accumulate(batch.inputs, batch.targets);
    if (trainer.micro_batches() == accumulation_steps) trainer.finish_group();
  }
  if (trainer.micro_batches() > 0) trainer.finish_group();
  return trainer.mean_loss();
}

}  // namespace detail

/// One epoch over `data_loader`: any input range, single-pass ones included, of batches with
/// members `inputs` (of any type the model takes) and `targets` (ef::Tensor<std::int32_t, 1>, class
/// indices, -100 is ignored; anything else that a loss of one's own takes, such as soft labels
/// (rows, classes)). Returns the mean loss over all targets of the epoch. An empty range returns 0
/// and leaves everything as it was, gradients included. Throws std::invalid_argument for
/// accumulation_steps below 1 before anything happens, and for a target out of range before any
/// weight of its group changes.
///
/// Then follow, in any order and where wanted, TrainOptions (clipping, a callback after each step,
/// ranks; first where they come in braces), a GradScaler (mixed precision over accumulated
/// micro-batches; the scale is fixed within a group), and a loss of the form at CrossEntropyLoss.
///
///   double average_loss = ef::train_step_with_grad_accumulation(model, optimizer, data_loader, accumulation_steps);
///   ef::train_step_with_grad_accumulation<Eigen::bfloat16>(device, model, optimizer, data_loader, 4);   // on a pool, in bfloat16
///   ef::train_step_with_grad_accumulation(model, optimizer, data_loader, 4, ef::CrossEntropyLoss{{.label_smoothing = 0.1}});
///   ef::train_step_with_grad_accumulation<Eigen::half>(model, optimizer, data_loader, 4, {.max_gradient_norm = 1}, scaler);
template <FloatingScalar Compute = float, Device D, typename Model, TrainingOptimizer Optimizer,
          std::ranges::input_range Loader, typename First = TrainOptions, typename... More>
double train_step_with_grad_accumulation(const D& device, Model& model, Optimizer& optimizer,
                                         Loader&& data_loader, Index accumulation_steps,
                                         First&& first = {}, More&&... more) {
  static_assert(detail::each_kind_once<First, More...>,
                "eigenformer: at most one TrainOptions, one GradScaler and one loss follow "
                "accumulation_steps");
  const TrainOptions no_options;
  detail::NoScaler no_scaler;
  CrossEntropyLoss cross_entropy;
  return detail::train_epoch<Compute>(
      device, model, optimizer, data_loader, accumulation_steps,
      detail::find_argument<detail::IsLoss>(cross_entropy, first, more...),
      detail::find_argument<detail::IsScaler>(no_scaler, first, more...),
      detail::find_argument<detail::IsOptions>(no_options, first, more...));
}
template <FloatingScalar Compute = float, typename Model, TrainingOptimizer Optimizer,
          std::ranges::input_range Loader, typename First = TrainOptions, typename... More>
  requires(!Device<Model>)
double train_step_with_grad_accumulation(Model& model, Optimizer& optimizer, Loader&& data_loader,
                                         Index accumulation_steps, First&& first = {},
                                         More&&... more) {
  return train_step_with_grad_accumulation<Compute>(
      Eigen::DefaultDevice{}, model, optimizer, data_loader, accumulation_steps, first, more...);
}

/// One step of mixed precision on one batch; returns the unscaled mean loss over its targets. What
/// happened is in the scaler (skipped_steps, scale) or in options.on_step.
///
///   double loss = ef::train_step_mixed_precision<Eigen::half>(model, optimizer, inputs, labels, scaler);
template <FloatingScalar Compute, Device D, typename Model, TrainingOptimizer Optimizer,
          typename Inputs, typename Labels, typename Loss = CrossEntropyLoss>
double train_step_mixed_precision(const D& device, Model& model, Optimizer& optimizer,
                                  const Inputs& inputs, const Labels& labels, GradScaler& scaler,
                                  const TrainOptions& options = {}, Loss loss = {}) {
  detail::Trainer<Compute, D, Model, Optimizer, Loss, GradScaler> trainer(device, model, optimizer,
                                                                          loss, scaler, options);
  trainer.accumulate(inputs, labels);
  trainer.finish_group();
  return trainer.mean_loss();
}
template <FloatingScalar Compute, typename Model, TrainingOptimizer Optimizer, typename Inputs,
          typename Labels, typename Loss = CrossEntropyLoss>
  requires(!Device<Model>)
double train_step_mixed_precision(Model& model, Optimizer& optimizer, const Inputs& inputs,
                                  const Labels& labels, GradScaler& scaler,
                                  const TrainOptions& options = {}, Loss loss = {}) {
  return train_step_mixed_precision<Compute>(Eigen::DefaultDevice{}, model, optimizer, inputs,
                                             labels, scaler, options, std::move(loss));
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
