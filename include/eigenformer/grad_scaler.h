/// \file
/// Dynamic loss scaling for mixed precision (Micikevicius et al., "Mixed Precision Training",
/// 2018), the state machine of torch.amp.GradScaler. The loss gradient is multiplied by scale()
/// before the backward pass, so that small gradients survive in half; gradients are divided by it
/// before the step. A step whose gradients are not all finite is skipped and the scale backs off;
/// after growth_interval good steps in a row it grows.
///
///   ef::GradScaler scaler;
///   ... backward pass of the loss times scaler.scale(), as often as gradients accumulate ...
///   scaler.unscale(optimizer);                          // once; then clip, if you clip
///   const bool stepped = scaler.step(optimizer);        // unscales what you did not; skips where
///                                                       // a gradient is not finite
///   scaler.update();                                    // once per step: grows or backs off
///
/// The scaler remembers by their memory which gradients were unscaled and stepped since the last
/// update, so parameters may be unscaled in groups (to clip each by itself) and stepped by one
/// optimizer or by several. Whatever would divide a gradient twice, step it twice, or step it where
/// it was not divided is a std::logic_error and changes nothing. An exception from an optimizer's
/// own step passes through; its gradients stay unscaled and step may be called again.
///
/// With {.enabled = false} (bfloat16 has the range of float) the scale is 1 and never moves; steps
/// with gradients that are not finite are skipped and counted all the same.
///
/// Ranks of a distributed run must agree on each step. Where every rank unscales the same sums
/// (data parallelism) they do; where each has its own part of the model, reduce the verdict:
///
///   const bool found_inf = any_of_all_ranks(!scaler.unscale(optimizer));
///   scaler.step(optimizer, found_inf);                  // all ranks step, or none
///   scaler.update();                                    // remembers the verdict
///
/// `train_step_mixed_precision` in training.h does all of this, with hooks for several ranks.
///
/// Cost: unscale reads and writes the gradients once, and on a GPU waits for what it finds. Nothing
/// else touches data.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
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

/// One scaler serves any number of optimizers; all skips count for the one scale.
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
  /// Whether an unscale or a verdict since the last update found a gradient that was not finite.
  bool found_inf() const { return found_inf_; }
  /// Whether gradients were unscaled since the last update.
  bool pending() const { return pending_; }

  /// Divides the gradients by scale(), times multiplier, and returns whether all are finite; source
  /// is a range of parameters, or an optimizer. Throws
  /// std::logic_error where one of them was unscaled since the last update, and
  /// std::invalid_argument where two share memory or the multiplier over the scale is no float or
  /// 0.
  template <Device D, typename Source>
  bool unscale(const D& device, Source&& source, double multiplier = 1) {
    constexpr auto name = "GradScaler::unscale";
    const auto& list = list_of(source);
    const std::span<const Parameter> parameters(list);
    detail::check_parameters(name, parameters);
    const double factor = multiplier / scale();
    detail::require_factor(name, "multiplier / scale", factor);
    detail::require_that(static_cast<float>(factor) != 0, name, "multiplier / scale is ", factor,
                         " and 0 in float: it would take every gradient away");
    // All that can fail comes before the first gradient is written, so that a retry divides once.
    fresh_.clear();
    fresh_.reserve(parameters.size());
    for (const Parameter& parameter : parameters)
      if (parameter.gradient.size() > 0) fresh_.push_back({range_of(parameter), multiplier, true});
    sort(fresh_);
    for (std::size_t i = 0; i < fresh_.size(); ++i) {
      detail::require_that(i == 0 || !before(fresh_[i].range.begin, fresh_[i - 1].range.end), name,
                           "two of the parameters share a gradient, it would be divided twice");
      require_order(!overlaps(unscaled_, fresh_[i].range), name,
                    "these gradients were unscaled already since the last update");
    }
    unscaled_.reserve(unscaled_.size() + fresh_.size());
    const bool finite = divide(device, parameters, factor, multiplier);
    sort(unscaled_);
    pending_ = true;
    found_inf_ = found_inf_ || !finite;
    return finite;
  }
  template <typename Source>
    requires(!Device<Source>)
  bool unscale(Source&& source, double multiplier = 1) {
    return unscale(Eigen::DefaultDevice{}, source, multiplier);
  }

  /// Steps the optimizer where all its gradients are finite, unscaling first those that were not;
  /// returns whether it stepped. With the verdict of all ranks in found_inf, which counts for
  /// update() too, it skips where that is true. A step that is skipped changes nothing but
  /// gradients. Throws std::logic_error for a second step before update, where the optimizer's
  /// gradients were unscaled with different multipliers (1 for those that step unscales) or one
  /// only in part, and where found_inf is false and a gradient here is not finite: the verdict
  /// leaves this rank out. With a device, the optimizer's step(device) is called where it has one.
  template <Device D, typename Optimizer>
  bool step(const D& device, Optimizer& optimizer, std::optional<bool> found_inf = {}) {
    constexpr auto name = "GradScaler::step";
    const auto& list = list_of(optimizer);
    const std::span<const Parameter> parameters(list);
    detail::check_parameters(name, parameters);
    fresh_steps_.clear();
    for (const Parameter& parameter : parameters)
      if (parameter.gradient.size() > 0) fresh_steps_.push_back({range_of(parameter)});
    if (fresh_steps_.empty()) {
      const auto* const self = reinterpret_cast<const std::byte*>(std::addressof(optimizer));
      fresh_steps_.push_back({{self, self + 1}});
    }
    for (const Stepped& entry : fresh_steps_)
      require_order(!overlaps(stepped_, entry.range), name,
                    "this optimizer stepped already since the last update");
    stepped_.reserve(stepped_.size() + fresh_steps_.size());
    const Found found = unscale_rest(device, parameters);
    const bool skip = found_inf.value_or(!found.finite);
    require_order(skip || found.finite, name,
                  "found_inf is false, but a gradient of this optimizer is not finite");
    if (!skip) {
      if constexpr (requires { optimizer.step(device); })
        optimizer.step(device);
      else
        optimizer.step();
    }
    stepped_.insert(stepped_.end(), fresh_steps_.begin(), fresh_steps_.end());
    sort(stepped_);
    found_inf_ = found_inf_ || skip;
    return !skip;
  }
  template <typename Optimizer>
    requires(!Device<Optimizer>)
  bool step(Optimizer& optimizer, std::optional<bool> found_inf = {}) {
    return step(Eigen::DefaultDevice{}, optimizer, found_inf);
  }

  /// Moves the scale by what the unscales and verdicts since the last update found. Throws
  /// std::logic_error where there was none.
  void update() {
    require_order(pending_, "GradScaler::update",
                  "no gradients were unscaled since the last update");
    update(found_inf_);
  }
  /// Moves the scale by what the caller found, on all ranks for example. Throws std::logic_error
  /// where that is nothing, but an unscale or a verdict here found something.
  void update(bool found_inf) {
    require_order(found_inf || !found_inf_, "GradScaler::update",
                  "found_inf is false, but a gradient was not finite since the last update");
    forget();
    if (found_inf && state_.skipped_steps < (std::numeric_limits<Index>::max)())
      ++state_.skipped_steps;
    if (!options_.enabled) return;
    if (found_inf) {
      state_.scale = (std::max)(state_.scale * options_.backoff_factor, options_.min_scale);
      state_.good_steps = 0;
    } else if (state_.good_steps >= options_.growth_interval - 1) {
      state_.scale = (std::min)(state_.scale * options_.growth_factor, options_.max_scale);
      state_.good_steps = 0;
    } else {
      ++state_.good_steps;
    }
  }

  GradScalerState state() const { return state_; }
  /// Goes on from a checkpoint: as a new scaler with these options would, whatever was unscaled
  /// before. Throws std::invalid_argument for a scale outside the options' limits or a negative
  /// count.
  void load_state(const GradScalerState& state) {
    constexpr auto name = "GradScaler::load_state";
    detail::require_that(state.scale >= options_.min_scale && state.scale <= options_.max_scale,
                         name, "scale is ", state.scale, ", expected ", options_.min_scale, " to ",
                         options_.max_scale);
    detail::require_that(state.good_steps >= 0, name, "good_steps is ", state.good_steps,
                         ", expected 0 or more");
    detail::require_that(state.skipped_steps >= 0, name, "skipped_steps is ", state.skipped_steps,
                         ", expected 0 or more");
    state_ = state;
    forget();
  }

 private:
  /// Memory: gradients are known by theirs, an optimizer without any by its own.
  struct Range {
    const std::byte *begin, *end;
  };
  struct Unscaled {
    Range range;
    double multiplier;
    bool finite;
  };
  struct Stepped {
    Range range;
  };

  /// The parameters of an optimizer, which a user's own may return by value, or the source itself.
  template <typename Source>
  static decltype(auto) list_of(Source& source) {
    if constexpr (requires { source.parameters(); })
      return source.parameters();
    else
      return (source);
  }
  static bool before(const std::byte* a, const std::byte* b) {
    return std::less<const std::byte*>{}(a, b);
  }
  static Range range_of(const Parameter& parameter) {
    const auto* const begin = reinterpret_cast<const std::byte*>(parameter.gradient.data());
    return {begin, begin + static_cast<std::size_t>(parameter.gradient.size()) * sizeof(float)};
  }
  template <typename Entry>
  static void sort(std::vector<Entry>& entries) {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return before(a.range.begin, b.range.begin); });
  }
  /// The first of the sorted, disjoint entries that ends past `at`.
  template <typename Entry>
  static auto first_past(const std::vector<Entry>& entries, const std::byte* at) {
    return std::upper_bound(
        entries.begin(), entries.end(), at,
        [](const std::byte* p, const Entry& entry) { return before(p, entry.range.end); });
  }
  template <typename Entry>
  static bool overlaps(const std::vector<Entry>& entries, const Range& range) {
    const auto found = first_past(entries, range.begin);
    return found != entries.end() && before(found->range.begin, range.end);
  }
  template <typename... Parts>
  static void require_order(bool ok, std::string_view operation, const Parts&... parts) {
    if (!ok) [[unlikely]]
      detail::fail<std::logic_error>(detail::join(operation, parts...));
  }

  void forget() {
    unscaled_.clear();
    stepped_.clear();
    pending_ = found_inf_ = false;
  }

  /// Divides the gradients and notes each with what was found in it. Throws before either or never:
  /// unscaled_ has the room.
  template <Device D>
  bool divide(const D& device, std::span<const Parameter> parameters, double factor,
              double multiplier) {
    Workspace::Frame frame(thread_workspace());
    const auto pieces = detail::pieces_of(parameters, frame);
    auto* const sums = frame.take<double>(static_cast<Index>(pieces.size()));
    detail::scale_pieces(device, pieces, factor, true, sums);
    bool all = true;
    const double* next = sums;
    for (const Parameter& parameter : parameters) {
      const double* const end = next + detail::piece_count(parameter.gradient.size());
      const bool finite = std::all_of(next, end, [](double sum) { return std::isfinite(sum); });
      if (next != end) unscaled_.push_back({range_of(parameter), multiplier, finite});
      all = all && finite;
      next = end;
    }
    return all;
  }

  /// What the unscales so far found in some parameters.
  struct Found {
    std::size_t unscaled = 0;  // how many of the parameters were
    bool finite = true, one_multiplier = true;
    double multiplier = 1;
  };
  Found find(std::span<const Parameter> parameters) const {
    Found found;
    for (const Parameter& parameter : parameters) {
      const Range range = range_of(parameter);
      if (parameter.gradient.size() == 0 || !overlaps(unscaled_, range)) continue;
      const std::byte* at = range.begin;
      for (auto entry = first_past(unscaled_, at);
           entry != unscaled_.end() && before(at, range.end) && !before(at, entry->range.begin);
           ++entry) {
        found.finite = found.finite && entry->finite;
        if (found.unscaled == 0 && at == range.begin) found.multiplier = entry->multiplier;
        found.one_multiplier = found.one_multiplier && found.multiplier == entry->multiplier;
        at = entry->range.end;
      }
      require_order(!before(at, range.end), "GradScaler::step",
                    "only a part of a gradient was unscaled");
      ++found.unscaled;
    }
    return found;
  }

  /// Unscales those of the parameters that were not; what was found in all of them.
  template <Device D>
  Found unscale_rest(const D& device, std::span<const Parameter> parameters) {
    const Found found = find(parameters);
    std::vector<Parameter> rest;  // empty unless some were unscaled and some were not
    for (const Parameter& parameter : parameters) {
      if (found.unscaled > 0 && parameter.gradient.size() > 0 &&
          !overlaps(unscaled_, range_of(parameter)))
        rest.push_back(parameter);
    }
    require_order(found.one_multiplier && (rest.empty() || found.multiplier == 1),
                  "GradScaler::step",
                  "the optimizer's gradients were unscaled with different multipliers");
    if (found.unscaled == 0)
      unscale(device, parameters);
    else if (!rest.empty())
      unscale(device, std::span<const Parameter>(rest));
    return find(parameters);
  }

  static const GradScalerOptions& checked(const GradScalerOptions& o) {
    constexpr auto name = "GradScaler";
    detail::require_that(o.min_scale >= 0x1p-120 && o.min_scale <= 0x1p120, name, "min_scale is ",
                         o.min_scale, ", expected 2^-120 to 2^120");
    detail::require_that(o.max_scale >= o.min_scale && o.max_scale <= 0x1p120, name,
                         "max_scale is ", o.max_scale, ", expected min_scale to 2^120");
    detail::require_that(o.init_scale >= o.min_scale && o.init_scale <= o.max_scale, name,
                         "init_scale is ", o.init_scale, ", expected ", o.min_scale,
                         " (min_scale) to ", o.max_scale, " (max_scale)");
    detail::require_that(o.growth_factor > 1 && std::isfinite(o.growth_factor), name,
                         "growth_factor is ", o.growth_factor, ", expected more than 1");
    detail::require_that(o.backoff_factor > 0 && o.backoff_factor < 1, name, "backoff_factor is ",
                         o.backoff_factor, ", expected between 0 and 1");
    detail::require_that(o.growth_interval >= 1, name, "growth_interval is ", o.growth_interval,
                         ", expected 1 or more");
    return o;
  }

  GradScalerOptions options_;
  GradScalerState state_;
  std::vector<Unscaled> unscaled_, fresh_;      // sorted by memory; fresh_ is scratch of unscale
  std::vector<Stepped> stepped_, fresh_steps_;  // the same for step
  bool pending_ = false, found_inf_ = false;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
