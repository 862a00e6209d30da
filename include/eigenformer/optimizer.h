/// \file
/// Optimizers over flat float parameters, and what is done to gradients before a step.
///
/// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019), with the update of torch.optim.AdamW; t counts
/// steps from 1, g is the gradient, everything elementwise:
///
///   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
///   w = w (1 - learning_rate weight_decay) - learning_rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
///
/// SGD with momentum (Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013), with the update
/// of torch.optim.SGD, decay coupled to the gradient:
///
///   d = g + weight_decay w;   u = momentum u + d;   w = w - learning_rate (nesterov ? d + momentum u : u)
///
/// An optimizer refers to the memory of its parameters, which must outlive it and stay where it is; it owns its state. A step with
/// a gradient that is infinite or NaN spoils the weight it belongs to: GradScaler and `all_finite` exist to skip such steps.
/// Results are the same bits for any number of threads.
///
/// Cost: one pass; AdamW reads 16 and writes 12 bytes an element, SGD reads 8 and writes 4 (12 and 8 with momentum). Nothing is
/// allocated after construction (by the free functions: after the first call at a size).
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/workspace.h"
#include "cpu/optimizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// One parameter of a model, flattened: views of its float master weights and of their gradient, of equal size.
///
///   ef::Parameter{ef::TensorView<float, 1>(weight.data(), weight.size()), ef::TensorView<float, 1>(gradient.data(),
///   gradient.size())}
struct Parameter {
  TensorView<float, 1> value, gradient;
};

namespace detail {

inline void check_parameters(std::string_view operation, std::span<const Parameter> parameters) {
  for (std::size_t i = 0; i < parameters.size(); ++i)
    require_that(parameters[i].value.size() == parameters[i].gradient.size(), operation,
                 "parameter ", i, " has ", parameters[i].value.size(), " values and ",
                 parameters[i].gradient.size(), " gradients");
}

/// A weight that is listed twice would be stepped twice.
inline void check_distinct(std::string_view operation, std::span<const Parameter> parameters) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].value.size() > 0) order.push_back(i);
  const std::less<const float*> before;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return before(parameters[a].value.data(), parameters[b].value.data());
  });
  for (std::size_t k = 1; k < order.size(); ++k) {
    const auto& last = parameters[order[k - 1]].value;
    require_that(!before(parameters[order[k]].value.data(), last.data() + last.size()), operation,
                 "parameters ", order[k - 1], " and ", order[k],
                 " share memory; a tied weight is listed once");
  }
}

inline Index piece_count(std::span<const Parameter> parameters) {
  Index count = 0;
  for (const Parameter& parameter : parameters)
    count += (parameter.value.size() + kPieceElements - 1) / kPieceElements;
  return count;
}

/// Cuts the parameters into pieces; moments, where not null, are laid out one parameter after the other.
inline void cut_into_pieces(std::span<const Parameter> parameters, float* first_moments,
                            float* second_moments, ParameterPiece* pieces) {
  for (const Parameter& parameter : parameters)
    for (Index at = 0; at < parameter.value.size(); at += kPieceElements) {
      const Index size = (std::min)(kPieceElements, parameter.value.size() - at);
      *pieces++ = {parameter.value.data() + at, parameter.gradient.data() + at, first_moments,
                   second_moments, size};
      if (first_moments != nullptr) first_moments += size;
      if (second_moments != nullptr) second_moments += size;
    }
}

/// Parameters, their pieces and the moments: what AdamW and Sgd have in common.
class OptimizerState {
 public:
  OptimizerState(std::string_view operation, std::vector<Parameter> parameters, int moments)
      : parameters_(std::move(parameters)), moments_(moments) {
    check_parameters(operation, parameters_);
    check_distinct(operation, parameters_);
    for (const Parameter& parameter : parameters_) elements_ += parameter.value.size();
    memory_ = Tensor<float, 1>(checked_product(elements_, moments, operation, "state"));
    memory_.setZero();
    float* const first = moments > 0 ? memory_.data() : nullptr;
    float* const second = moments > 1 ? memory_.data() + elements_ : nullptr;
    pieces_.resize(static_cast<std::size_t>(piece_count(parameters_)));
    cut_into_pieces(parameters_, first, second, pieces_.data());
  }
  OptimizerState(OptimizerState&&) noexcept = default;
  OptimizerState(const OptimizerState&) = delete;  // two optimizers would step the same weights
  OptimizerState& operator=(const OptimizerState&) = delete;

  const std::vector<Parameter>& parameters() const { return parameters_; }
  std::span<const float> memory() const {
    return {memory_.data(), static_cast<std::size_t>(memory_.size())};
  }
  Index steps = 0;

  template <typename Factors>
  OptimizerProblem<Factors> problem(const Factors& factors) const {
    return {pieces_.data(), static_cast<Index>(pieces_.size()), factors};
  }
  template <CpuDevice D>
  void zero_gradients(const D& device) const {
    cpu::zero_gradients(isa::best{}, device, pieces_.data(), static_cast<Index>(pieces_.size()));
  }

  TensorView<const float, 1> moment(std::string_view operation, int which, Index index) const {
    require_that(index >= 0 && index < static_cast<Index>(parameters_.size()), operation,
                 "parameter ", index, " of ", parameters_.size());
    require_that(which < moments_, operation, "there is no such moment");
    Index offset = which * elements_;
    for (Index i = 0; i < index; ++i)
      offset += parameters_[static_cast<std::size_t>(i)].value.size();
    return TensorView<const float, 1>(memory_.data() + offset,
                                      parameters_[static_cast<std::size_t>(index)].value.size());
  }
  void load(std::string_view operation, std::span<const float> state, Index step_count) {
    require_that(static_cast<Index>(state.size()) == memory_.size(), operation, "state has ",
                 state.size(), " elements, expected ", memory_.size());
    require_that(step_count >= 0, operation, "step_count is ", step_count, ", expected 0 or more");
    std::copy(state.begin(), state.end(), memory_.data());
    steps = step_count;
  }

 private:
  std::vector<Parameter> parameters_;
  int moments_;
  Index elements_ = 0;
  Tensor<float, 1> memory_;  // (moments, elements)
  std::vector<ParameterPiece> pieces_;
};

inline void require_rate(std::string_view operation, std::string_view name, double value) {
  require_that(value >= 0 && std::isfinite(value), operation, name, " is ", value,
               ", expected 0 or more");
}

inline void require_beta(std::string_view operation, std::string_view name, double value) {
  require_that(value >= 0 && value < 1, operation, name, " is ", value,
               ", expected 0 or more and below 1");
}

}  // namespace detail

struct AdamWOptions {
  double learning_rate = 1e-3;
  double weight_decay = 0.01;  ///< of the weights themselves, times the learning rate; 0: Adam
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
};

/// ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
class AdamW {
 public:
  /// Throws std::invalid_argument where a value and its gradient differ in size, where two parameters share memory, and for an
  /// option that is NaN, negative or (betas) 1 or more.
  explicit AdamW(std::vector<Parameter> parameters, const AdamWOptions& options = {})
      : options_(checked(options)), state_("AdamW", std::move(parameters), 2) {}

  /// One update from the gradients as they are. The gradients keep their values.
  void step() { step(Eigen::DefaultDevice{}); }
  template <CpuDevice D>
  void step(const D& device) {
    const double t = static_cast<double>(++state_.steps);
    const AdamWOptions& o = options_;
    const AdamWFactors factors{static_cast<float>(1.0 - o.learning_rate * o.weight_decay),
                               static_cast<float>(o.beta1),
                               static_cast<float>(1.0 - o.beta1),
                               static_cast<float>(o.beta2),
                               static_cast<float>(1.0 - o.beta2),
                               static_cast<float>(o.learning_rate / (1.0 - std::pow(o.beta1, t))),
                               static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, t))),
                               static_cast<float>(o.epsilon)};
    cpu::optimizer_step(isa::best{}, device, state_.problem(factors));
  }

  /// Sets all gradients to zero.
  void zero_grad() { state_.zero_gradients(Eigen::DefaultDevice{}); }
  template <CpuDevice D>
  void zero_grad(const D& device) {
    state_.zero_gradients(device);
  }

  const std::vector<Parameter>& parameters() const { return state_.parameters(); }
  const AdamWOptions& options() const { return options_; }
  double learning_rate() const { return options_.learning_rate; }
  /// For schedules. Throws std::invalid_argument for NaN, infinity or a negative rate.
  void set_learning_rate(double rate) {
    detail::require_rate("AdamW", "learning_rate", rate);
    options_.learning_rate = rate;
  }

  /// Steps taken.
  Index step_count() const { return state_.steps; }
  /// m and v of one parameter. Throws std::invalid_argument for an index out of range.
  TensorView<const float, 1> first_moment(Index parameter) const {
    return state_.moment("AdamW::first_moment", 0, parameter);
  }
  TensorView<const float, 1> second_moment(Index parameter) const {
    return state_.moment("AdamW::second_moment", 1, parameter);
  }
  /// All of m, parameter after parameter, then all of v: what a checkpoint saves beside step_count() and the weights.
  std::span<const float> state() const { return state_.memory(); }
  /// Goes on from a checkpoint with the same bits. Throws std::invalid_argument for another size.
  void load_state(std::span<const float> state, Index step_count) {
    state_.load("AdamW::load_state", state, step_count);
  }

 private:
  static const AdamWOptions& checked(const AdamWOptions& options) {
    detail::require_rate("AdamW", "learning_rate", options.learning_rate);
    detail::require_rate("AdamW", "weight_decay", options.weight_decay);
    detail::require_beta("AdamW", "beta1", options.beta1);
    detail::require_beta("AdamW", "beta2", options.beta2);
    detail::require_rate("AdamW", "epsilon", options.epsilon);
    return options;
  }

  AdamWOptions options_;
  detail::OptimizerState state_;
};

struct SgdOptions {
  double learning_rate = 1e-3;
  double weight_decay = 0;  ///< added to the gradient, times the weight
  double momentum = 0;      ///< in [0, 1); 0 keeps no state
  bool nesterov = false;    ///< needs momentum
};

/// ef::Sgd optimizer(model.parameters(), {.learning_rate = 0.1f, .momentum = 0.9f});
class Sgd {
 public:
  /// Throws std::invalid_argument like AdamW, and for nesterov without momentum.
  explicit Sgd(std::vector<Parameter> parameters, const SgdOptions& options = {})
      : options_(checked(options)),
        state_("Sgd", std::move(parameters), options.momentum > 0 ? 1 : 0) {}

  /// One update from the gradients as they are. The gradients keep their values.
  void step() { step(Eigen::DefaultDevice{}); }
  template <CpuDevice D>
  void step(const D& device) {
    ++state_.steps;
    const SgdFactors factors{static_cast<float>(options_.learning_rate),
                             static_cast<float>(options_.momentum),
                             static_cast<float>(options_.weight_decay), options_.nesterov};
    cpu::optimizer_step(isa::best{}, device, state_.problem(factors));
  }

  /// Sets all gradients to zero.
  void zero_grad() { state_.zero_gradients(Eigen::DefaultDevice{}); }
  template <CpuDevice D>
  void zero_grad(const D& device) {
    state_.zero_gradients(device);
  }

  const std::vector<Parameter>& parameters() const { return state_.parameters(); }
  const SgdOptions& options() const { return options_; }
  double learning_rate() const { return options_.learning_rate; }
  /// For schedules. Throws std::invalid_argument for NaN, infinity or a negative rate.
  void set_learning_rate(double rate) {
    detail::require_rate("Sgd", "learning_rate", rate);
    options_.learning_rate = rate;
  }

  /// Steps taken.
  Index step_count() const { return state_.steps; }
  /// u of one parameter. Throws std::invalid_argument for an index out of range and where there is no momentum.
  TensorView<const float, 1> momentum(Index parameter) const {
    return state_.moment("Sgd::momentum", 0, parameter);
  }
  /// All of u, parameter after parameter; empty without momentum.
  std::span<const float> state() const { return state_.memory(); }
  /// Goes on from a checkpoint with the same bits. Throws std::invalid_argument for another size.
  void load_state(std::span<const float> state, Index step_count) {
    state_.load("Sgd::load_state", state, step_count);
  }

 private:
  static const SgdOptions& checked(const SgdOptions& options) {
    detail::require_rate("Sgd", "learning_rate", options.learning_rate);
    detail::require_rate("Sgd", "weight_decay", options.weight_decay);
    detail::require_beta("Sgd", "momentum", options.momentum);
    require_that(!options.nesterov || options.momentum > 0, "Sgd",
                 "nesterov is set, momentum is 0, expected a momentum");
    return options;
  }

  SgdOptions options_;
  detail::OptimizerState state_;
};

// ---- gradients -----------------------------------------------------------------------------------------------------------------

/// The L2 norm of all gradients together, in double: finite for any finite floats, NaN or infinite where a gradient is.
/// Throws std::invalid_argument where a value and its gradient differ in size, as all functions below do.
template <CpuDevice D>
double gradient_norm(const D& device, std::span<const Parameter> parameters,
                     Workspace& workspace = thread_workspace()) {
  detail::check_parameters("gradient_norm", parameters);
  Workspace::Frame frame(workspace);
  const Index count = detail::piece_count(parameters);
  auto* pieces = frame.take<ParameterPiece>(count);
  auto* sums = frame.take<double>(count);
  detail::cut_into_pieces(parameters, nullptr, nullptr, pieces);
  cpu::gradient_squares(isa::best{}, device, pieces, count, sums);
  double total = 0;
  for (Index i = 0; i < count; ++i) total += sums[i];
  return std::sqrt(total);
}
inline double gradient_norm(std::span<const Parameter> parameters) {
  return gradient_norm(Eigen::DefaultDevice{}, parameters);
}

/// Multiplies every gradient by the factor and returns whether all are finite afterwards: the unscaling of mixed precision, in one
/// pass.
template <CpuDevice D>
bool scale_gradients(const D& device, std::span<const Parameter> parameters, double factor,
                     Workspace& workspace = thread_workspace()) {
  detail::check_parameters("scale_gradients", parameters);
  require_that(std::isfinite(factor), "scale_gradients", "factor is ", factor,
               ", expected a finite number");
  Workspace::Frame frame(workspace);
  const Index count = detail::piece_count(parameters);
  auto* pieces = frame.take<ParameterPiece>(count);
  auto* finite = frame.take<bool>(count);
  detail::cut_into_pieces(parameters, nullptr, nullptr, pieces);
  if (factor == 1.0)  // nothing to write
    cpu::scale_gradients<false>(isa::best{}, device, pieces, count, 1.0f, finite);
  else
    cpu::scale_gradients<true>(isa::best{}, device, pieces, count, static_cast<float>(factor),
                               finite);
  return std::all_of(finite, finite + count, [](bool ok) { return ok; });
}
inline bool scale_gradients(std::span<const Parameter> parameters, double factor) {
  return scale_gradients(Eigen::DefaultDevice{}, parameters, factor);
}

/// Whether no gradient is infinite or NaN. Reads only.
template <CpuDevice D>
bool all_finite(const D& device, std::span<const Parameter> parameters,
                Workspace& workspace = thread_workspace()) {
  return scale_gradients(device, parameters, 1.0, workspace);
}
inline bool all_finite(std::span<const Parameter> parameters) {
  return all_finite(Eigen::DefaultDevice{}, parameters);
}

/// Scales all gradients together so that their L2 norm is at most max_norm (Pascanu et al., "On the difficulty of training
/// recurrent neural networks", 2013), and returns the norm before. A norm that is infinite or NaN is returned and leaves the
/// gradients as they are: skip the step. Throws std::invalid_argument unless max_norm is above 0.
template <CpuDevice D>
double clip_gradient_norm(const D& device, std::span<const Parameter> parameters, double max_norm,
                          Workspace& workspace = thread_workspace()) {
  require_that(max_norm > 0, "clip_gradient_norm", "max_norm is ", max_norm,
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
