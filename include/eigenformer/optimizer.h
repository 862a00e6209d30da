/// \file
/// Optimizers over flat float parameters, and what is done to gradients before a step.
///
/// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019), with the update of
/// torch.optim.AdamW; t counts steps from 1, g is the gradient, everything elementwise:
///
///   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
///   w = w - learning_rate ((m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon) + weight_decay w)
///
/// The weight is rounded once per step, so that a decay far below its last digit (learning_rate
/// 2e-6, weight_decay 0.01) arrives in the long run: the update, which is larger and varies,
/// carries it.
///
/// SGD with momentum (Sutskever et al., "On the importance of initialization and momentum in deep
/// learning", 2013), with the update of torch.optim.SGD, decay coupled to the gradient:
///
///   d = g + weight_decay w;   u = momentum u + d;   w = w - learning_rate (nesterov ? d + momentum u : u)
///
/// Parameters may come in groups, each with options of its own; recipes do not decay norms and
/// biases:
///
///   ef::AdamW optimizer({{matrices, {.learning_rate = 1e-3, .weight_decay = 0.1}},
///                        {norms_and_biases, {.learning_rate = 1e-3, .weight_decay = 0}}});
///   optimizer.set_learning_rate(0, 5e-4);        // of one group, between steps; without a group: of all
///
/// AdamW with epsilon 0 gives NaN for a weight whose gradient has always been 0 (0 / 0). Moments
/// are floats: a finite gradient so large that (1 - beta2) g^2 is beyond 3.4e38 (from 6e20 on with
/// beta2 = 0.999, from 2e19 on with small beta2) makes the second moment infinite for good, which
/// freezes that weight but for its decay.
///
/// An optimizer refers to the memory of its parameters, which must outlive it and stay where it is;
/// it owns its state. A step with a gradient that is infinite or NaN spoils the weight it belongs
/// to: GradScaler and `all_finite` exist to skip such steps. Results are the same bits for any
/// number of threads. Norms, and whether numbers are finite, are waited for on a GPU.
///
/// Cost: one pass; AdamW reads 16 and writes 12 bytes per element, SGD reads 8 and writes 4 (12 and
/// 8 with momentum), either writes 4 more where it scales gradients. Nothing is allocated after
/// construction (by the free functions: after the first call at a size).
#pragma once

#include <cmath>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "core/workspace.h"
#include "optimizer/state.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct AdamWOptions {
  double learning_rate = 1e-3;
  double weight_decay = 0.01;  ///< of the weights themselves, times the learning rate; 0: Adam
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
};

struct SgdOptions {
  double learning_rate = 1e-3;
  double weight_decay = 0;  ///< added to the gradient, times the weight
  double momentum = 0;      ///< in [0, 1); 0 keeps no state
  bool nesterov = false;    ///< needs momentum
};

namespace detail {

struct AdamWRule {
  using Options = AdamWOptions;
  static constexpr auto name = "AdamW", load_state = "AdamW::load_state";
  static constexpr Index kMoments = 2;
  static bool keeps_state(const Options&) { return true; }
  static void check_options(Index group, const Options& o) {
    require_rate(name, "learning_rate", group, o.learning_rate);
    require_rate(name, "weight_decay", group, o.weight_decay);
    require_beta(name, "beta1", group, o.beta1);
    require_beta(name, "beta2", group, o.beta2);
    require_rate(name, "epsilon", group, o.epsilon);
  }
  static problem::AdamWFactors factors(const Options& o, Index step) {
    const double t = static_cast<double>(step);
    return {static_cast<float>(o.learning_rate * o.weight_decay),
            static_cast<float>(o.beta1),
            static_cast<float>(1.0 - o.beta1),
            static_cast<float>(o.beta2),
            static_cast<float>(1.0 - o.beta2),
            static_cast<float>(o.learning_rate / (1.0 - std::pow(o.beta1, t))),
            static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, t))),
            static_cast<float>(o.epsilon)};
  }
};

struct SgdRule {
  using Options = SgdOptions;
  static constexpr auto name = "Sgd", load_state = "Sgd::load_state";
  static constexpr Index kMoments = 1;
  static bool keeps_state(const Options& o) { return o.momentum > 0; }
  static void check_options(Index group, const Options& o) {
    require_rate(name, "learning_rate", group, o.learning_rate);
    require_rate(name, "weight_decay", group, o.weight_decay);
    require_beta(name, "momentum", group, o.momentum);
    require_that(!o.nesterov || o.momentum > 0, name, "nesterov of group ", group,
                 " is set, momentum is 0, expected a momentum");
  }
  static problem::SgdFactors factors(const Options& o, Index) {
    return {static_cast<float>(o.learning_rate), static_cast<float>(o.momentum),
            static_cast<float>(o.weight_decay), o.nesterov};
  }
};

/// ef::AdamW and ef::Sgd.
template <typename Rule>
class Optimizer {
 public:
  using Options = typename Rule::Options;
  using Group = ParameterGroup<Options>;

  /// Throws std::invalid_argument where a value and its gradient differ in size, where two
  /// parameters share memory, and for an option that is NaN, negative, above 1e18 or (betas,
  /// momentum) 1 or more, or nesterov without momentum.
  explicit Optimizer(std::vector<Parameter> parameters, const Options& options = {},
                     const Memory& memory = host_memory)
      : Optimizer(std::vector<Group>{{std::move(parameters), options}}, memory) {}
  explicit Optimizer(std::vector<Group> groups, const Memory& memory = host_memory)
      : state_(std::move(groups), memory) {}
  explicit Optimizer(std::initializer_list<Group> groups) : Optimizer(std::vector<Group>(groups)) {}

  /// One update from the gradients as they are, which keep their values. The device must work on
  /// the state's memory (memory_of(device)), or std::invalid_argument is thrown.
  template <Device D = Eigen::DefaultDevice>
  void step(const D& device = {}) {
    state_.step(device);
  }
  /// The same from gradients times both factors, {scale, clip}, multiplied in this pass and kept:
  /// the bits of scale_gradients by one, then by the other, and a step.
  template <Device D>
  void step(const D& device, const problem::GradientFactors& factors) {
    state_.step(device, factors);
  }
  /// Sets all gradients to zero.
  template <Device D = Eigen::DefaultDevice>
  void zero_grad(const D& device = {}) {
    state_.zero_gradients(device);
  }

  /// Of all groups, one after the other.
  const std::vector<Parameter>& parameters() const { return state_.parameters(); }
  Index group_count() const { return state_.group_count(); }
  /// Of one group. Throws std::invalid_argument for a group out of range, as all functions below
  /// do.
  const Options& options(Index group = 0) const { return state_.options(group); }
  double learning_rate(Index group = 0) const { return options(group).learning_rate; }
  /// From the next step on, for schedules: the rate of all groups, of one, or all options of one.
  /// Throws std::invalid_argument as the constructor does, and changes nothing then. The value of a
  /// group's momentum may change, not whether it has one.
  void set_learning_rate(double rate) { state_.set_learning_rate(rate); }
  void set_learning_rate(Index group, double rate) { state_.set_learning_rate(group, rate); }
  void set_options(Index group, const Options& options) { state_.set_options(group, options); }

  /// Steps taken.
  Index step_count() const { return state_.steps; }
  /// AdamW's m and v, Sgd's u, of one parameter, counted as in parameters(). Throws
  /// std::invalid_argument for an index out of range and where its group has no momentum.
  TensorView<const float, 1> first_moment(Index parameter) const
    requires(Rule::kMoments == 2)
  {
    return state_.moment("AdamW::first_moment", 0, parameter);
  }
  TensorView<const float, 1> second_moment(Index parameter) const
    requires(Rule::kMoments == 2)
  {
    return state_.moment("AdamW::second_moment", 1, parameter);
  }
  TensorView<const float, 1> momentum(Index parameter) const
    requires(Rule::kMoments == 1)
  {
    return state_.moment("Sgd::momentum", 0, parameter);
  }
  /// All of m, parameter after parameter, then all of v; or all of u, of the groups that have
  /// momentum: what a checkpoint saves beside step_count(), the options and the weights. It lies in
  /// the memory of the state, load_state's in the host's.
  std::span<const float> state() const { return state_.memory(); }
  /// Goes on from a checkpoint with the same bits. Throws std::invalid_argument for another size.
  void load_state(std::span<const float> state, Index step_count) {
    state_.load(Rule::load_state, state, step_count);
  }

 private:
  OptimizerState<Rule> state_;
};

}  // namespace detail

/// ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
/// ef::AdamW optimizer({{matrices, {.weight_decay = 0.1}}, {norms, {.weight_decay = 0}}});   //
/// groups
using AdamW = detail::Optimizer<detail::AdamWRule>;

/// ef::Sgd optimizer(model.parameters(), {.learning_rate = 0.1f, .momentum = 0.9f});
/// ef::Sgd optimizer({{matrices, {.weight_decay = 1e-4}}, {norms, {}}});   // groups
using Sgd = detail::Optimizer<detail::SgdRule>;

// ---- gradients ----------------------------------------------------------------------------------

/// The L2 norm of all gradients together, in double: finite for any finite floats, NaN or infinite
/// where a gradient is. Throws std::invalid_argument where a value and its gradient differ in size,
/// as all functions below do.
template <Device D>
double gradient_norm(const D& device, std::span<const Parameter> parameters,
                     Workspace& workspace = thread_workspace()) {
  detail::check_parameters("gradient_norm", parameters);
  return detail::scaled_norm(device, parameters, 1, false, workspace);
}
inline double gradient_norm(std::span<const Parameter> parameters) {
  return gradient_norm(Eigen::DefaultDevice{}, parameters);
}

/// Multiplies every gradient by the factor and returns whether all are finite afterwards: the
/// unscaling of mixed precision, in one pass. Throws std::invalid_argument for a factor that is NaN
/// or past the range of float.
template <Device D>
bool scale_gradients(const D& device, std::span<const Parameter> parameters, double factor,
                     Workspace& workspace = thread_workspace()) {
  detail::check_parameters("scale_gradients", parameters);
  detail::require_factor("scale_gradients", "factor", factor);
  return std::isfinite(detail::scaled_norm(device, parameters, factor, true, workspace));
}
inline bool scale_gradients(std::span<const Parameter> parameters, double factor) {
  return scale_gradients(Eigen::DefaultDevice{}, parameters, factor);
}

/// Whether no gradient is infinite or NaN. Reads only.
template <Device D>
bool all_finite(const D& device, std::span<const Parameter> parameters,
                Workspace& workspace = thread_workspace()) {
  return scale_gradients(device, parameters, 1.0, workspace);
}
inline bool all_finite(std::span<const Parameter> parameters) {
  return scale_gradients(Eigen::DefaultDevice{}, parameters, 1.0);
}

/// Scales all gradients together so that their L2 norm is at most max_norm (Pascanu et al., "On the
/// difficulty of training recurrent neural networks", 2013), and returns the norm before. A norm
/// that is infinite or NaN is returned and leaves the gradients as they are: skip the step. Throws
/// std::invalid_argument unless max_norm is above 0.
template <Device D>
double clip_gradient_norm(const D& device, std::span<const Parameter> parameters, double max_norm,
                          Workspace& workspace = thread_workspace()) {
  detail::require_that(max_norm > 0, "clip_gradient_norm", "max_norm is ", max_norm,
                       ", expected more than 0");
  const double norm = gradient_norm(device, parameters, workspace);
  if (std::isfinite(norm) && norm > max_norm)
    scale_gradients(device, parameters, max_norm / norm, workspace);
  return norm;
}
inline double clip_gradient_norm(std::span<const Parameter> parameters, double max_norm) {
  return clip_gradient_norm(Eigen::DefaultDevice{}, parameters, max_norm);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
