/// \file
/// Dynamic loss scaling for mixed precision (Micikevicius et al., "Mixed Precision Training", 2018), the state machine of
/// torch.amp.GradScaler. The loss gradient is multiplied by scale() before the backward pass, so that small gradients survive in
/// half; gradients are divided by it before the step. A step whose gradients are not all finite is skipped and the scale backs off;
/// after growth_interval good steps in a row it grows.
///
///   ef::GradScaler scaler;
///   ... backward pass of the loss times scaler.scale(), as often as gradients accumulate ...
///   scaler.unscale(optimizer);                          // once; then clip, if you clip
///   const bool stepped = scaler.step(optimizer);        // unscales if you did not; skips where a gradient is not finite
///   scaler.update();                                    // once a step: grows or backs off
///
/// With {.enabled = false} (bfloat16 has the range of float) the scale is 1 and never moves; steps with gradients that are not
/// finite are skipped and counted all the same. Ranks of a distributed run must agree: reduce found_inf() over them and call
/// update(found_inf_anywhere). `train_step_mixed_precision` in training.h does all of this.
///
/// Cost: unscale reads and writes the gradients once. Nothing else touches data.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <stdexcept>
#include <vector>

#include "optimizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct GradScalerOptions {
  double init_scale = 65536;
  double growth_factor = 2;      ///< above 1
  double backoff_factor = 0.5;   ///< between 0 and 1
  Index growth_interval = 2000;  ///< good steps in a row before the scale grows
  double min_scale = 0x1p-24;    ///< the scale never backs off below
  double max_scale = 0x1p64;     ///< nor grows above
  bool enabled = true;
};

/// What a checkpoint saves.
struct GradScalerState {
  double scale = 65536;
  Index good_steps = 0;     ///< in a row, since the scale last moved
  Index skipped_steps = 0;  ///< in all
};

/// One scaler serves any number of optimizers; each is unscaled once between two updates, and all skips count for the one scale.
class GradScaler {
 public:
  GradScaler() = default;
  /// Throws std::invalid_argument for an option out of range.
  explicit GradScaler(const GradScalerOptions& options) : options_(checked(options)) {
    state_.scale = options.init_scale;
  }

  bool enabled() const { return options_.enabled; }
  const GradScalerOptions& options() const { return options_; }
  /// What the loss gradient is multiplied by; 1 where disabled.
  double scale() const { return options_.enabled ? state_.scale : 1.0; }
  /// Updates, since the beginning, that found a gradient that was not finite.
  Index skipped_steps() const { return state_.skipped_steps; }
  /// Whether an unscale since the last update found a gradient that was not finite.
  bool found_inf() const { return found_inf_; }

  /// Divides the gradients by scale(), times multiplier, and returns whether all are finite. Throws std::logic_error where these
  /// gradients were unscaled since the last update.
  template <CpuDevice D>
  bool unscale(const D& device, std::span<const Parameter> parameters, double multiplier = 1) {
    const void* const key = key_of(parameters);
    if (find(key) != nullptr)
      detail::fail<std::logic_error>(
          "GradScaler::unscale: these gradients were unscaled already since the last update");
    const bool finite = scale_gradients(device, parameters, multiplier / scale());
    unscaled_.push_back({key, finite});
    found_inf_ = found_inf_ || !finite;
    return finite;
  }
  bool unscale(std::span<const Parameter> parameters, double multiplier = 1) {
    return unscale(Eigen::DefaultDevice{}, parameters, multiplier);
  }
  template <typename Optimizer>
    requires requires(Optimizer& optimizer) { optimizer.parameters(); }
  bool unscale(Optimizer& optimizer) {
    return unscale(std::span<const Parameter>(optimizer.parameters()));
  }

  /// Steps the optimizer where all its gradients are finite, unscaling them first if that was not done; returns whether it stepped.
  /// A step that is skipped changes nothing but gradients. Throws std::logic_error for a second step before update.
  template <typename Optimizer>
  bool step(Optimizer& optimizer) {
    const auto& list = optimizer.parameters();  // a user's optimizer may return them by value
    const std::span<const Parameter> parameters(list);
    if (find(key_of(parameters)) == nullptr) unscale(parameters);
    Unscaled& entry = *find(key_of(parameters));
    if (entry.stepped)
      detail::fail<std::logic_error>(
          "GradScaler::step: this optimizer stepped already since the last update");
    entry.stepped = true;
    if (entry.finite) optimizer.step();
    return entry.finite;
  }

  /// Moves the scale by what the unscales since the last update found. Throws std::logic_error where there was none.
  void update() {
    if (unscaled_.empty())
      detail::fail<std::logic_error>(
          "GradScaler::update: no gradients were unscaled since the last update");
    update(found_inf_);
  }
  /// Moves the scale by what the caller found, on all ranks for example.
  void update(bool found_inf) {
    unscaled_.clear();
    found_inf_ = false;
    if (found_inf) ++state_.skipped_steps;
    if (!options_.enabled) return;
    if (found_inf) {
      state_.scale = (std::max)(state_.scale * options_.backoff_factor, options_.min_scale);
      state_.good_steps = 0;
    } else if (++state_.good_steps >= options_.growth_interval) {
      state_.scale = (std::min)(state_.scale * options_.growth_factor, options_.max_scale);
      state_.good_steps = 0;
    }
  }

  GradScalerState state() const { return state_; }
  /// Goes on from a checkpoint. Throws std::invalid_argument for a scale outside the options' limits or a negative count.
  void load_state(const GradScalerState& state) {
    constexpr auto name = "GradScaler::load_state";
    require_that(state.scale >= options_.min_scale && state.scale <= options_.max_scale, name,
                 "scale is ", state.scale, ", expected ", options_.min_scale, " to ",
                 options_.max_scale);
    require_that(state.good_steps >= 0, name, "good_steps is ", state.good_steps,
                 ", expected 0 or more");
    require_that(state.skipped_steps >= 0, name, "skipped_steps is ", state.skipped_steps,
                 ", expected 0 or more");
    state_ = state;
    unscaled_.clear();
    found_inf_ = false;
  }

 private:
  struct Unscaled {
    const void* key;
    bool finite;
    bool stepped = false;
  };

  // Gradients are known by where they begin: an optimizer's parameters do not share memory.
  static const void* key_of(std::span<const Parameter> parameters) {
    for (const Parameter& parameter : parameters)
      if (parameter.gradient.size() > 0) return parameter.gradient.data();
    return nullptr;
  }
  Unscaled* find(const void* key) {
    const auto found = std::find_if(unscaled_.begin(), unscaled_.end(),
                                    [&](const Unscaled& entry) { return entry.key == key; });
    return found == unscaled_.end() ? nullptr : &*found;
  }

  static const GradScalerOptions& checked(const GradScalerOptions& o) {
    constexpr auto name = "GradScaler";
    require_that(o.min_scale >= 0x1p-120 && o.min_scale <= 0x1p120, name, "min_scale is ",
                 o.min_scale, ", expected 2^-120 to 2^120");
    require_that(o.max_scale >= o.min_scale && o.max_scale <= 0x1p120, name, "max_scale is ",
                 o.max_scale, ", expected min_scale to 2^120");
    require_that(o.init_scale >= o.min_scale && o.init_scale <= o.max_scale, name, "init_scale is ",
                 o.init_scale, ", expected ", o.min_scale, " (min_scale) to ", o.max_scale,
                 " (max_scale)");
    require_that(o.growth_factor > 1 && std::isfinite(o.growth_factor), name, "growth_factor is ",
                 o.growth_factor, ", expected more than 1");
    require_that(o.backoff_factor > 0 && o.backoff_factor < 1, name, "backoff_factor is ",
                 o.backoff_factor, ", expected between 0 and 1");
    require_that(o.growth_interval >= 1, name, "growth_interval is ", o.growth_interval,
                 ", expected 1 or more");
    return o;
  }

  GradScalerOptions options_;
  GradScalerState state_;
  std::vector<Unscaled> unscaled_;
  bool found_inf_ = false;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
