/// \file
/// What optimizers have in common: parameters and their groups, the pieces that kernels work on,
/// norm and scaling of their gradients, the moments. How they are used is in optimizer.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../core/check.h"
#include "../core/device.h"
#include "../core/dispatch.h"
#include "../core/workspace.h"
#include "../cpu/optimizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// One parameter of a model, flattened: views of its float master weights and of their gradient, of
/// equal size.
///
///   ef::Parameter{ef::TensorView<float, 1>(weight.data(), weight.size()),
///                 ef::TensorView<float, 1>(gradient.data(), gradient.size())}
struct Parameter {
  TensorView<float, 1> value, gradient;
};

namespace detail {

/// Parameters that share their options: AdamW::Group, Sgd::Group.
template <typename Options>
struct ParameterGroup {
  std::vector<Parameter> parameters = {};
  Options options = {};
};

inline void check_parameters(std::string_view operation, std::span<const Parameter> parameters) {
  for (std::size_t i = 0; i < parameters.size(); ++i)
    require_that(parameters[i].value.size() == parameters[i].gradient.size(), operation,
                 "parameter ", i, " has ", parameters[i].value.size(), " values and ",
                 parameters[i].gradient.size(), " gradients");
}

/// A weight that is listed twice would be stepped twice, a gradient scaled twice.
inline void check_distinct(std::string_view operation, std::span<const Parameter> parameters) {
  struct Range {
    const float* begin;
    Index size;
    std::size_t parameter;
  };
  std::vector<Range> ranges;
  ranges.reserve(2 * parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i)
    for (const TensorView<float, 1>* view : {&parameters[i].value, &parameters[i].gradient})
      if (view->size() > 0) ranges.push_back({view->data(), view->size(), i});
  const std::less<const float*> before;
  std::sort(ranges.begin(), ranges.end(),
            [&](const Range& a, const Range& b) { return before(a.begin, b.begin); });
  for (std::size_t k = 1; k < ranges.size(); ++k) {
    const Range &last = ranges[k - 1], &next = ranges[k];
    const auto [low, high] = std::minmax(last.parameter, next.parameter);
    require_that(!before(next.begin, last.begin + last.size), operation, "parameters ", low,
                 " and ", high, " share memory; a tied weight is listed once");
  }
}

inline Index piece_count(Index elements) {
  return elements / problem::kPieceElements + (elements % problem::kPieceElements != 0 ? 1 : 0);
}
inline Index piece_count(std::span<const Parameter> parameters) {
  Index count = 0;
  for (const Parameter& parameter : parameters) count += piece_count(parameter.value.size());
  return count;
}

/// Cuts a parameter into pieces and returns the end of them; moments are of its size, or null.
inline problem::ParameterPiece* cut_into_pieces(const Parameter& parameter, float* first_moment,
                                                float* second_moment,
                                                problem::ParameterPiece* pieces) {
  for (Index at = 0; at < parameter.value.size(); at += problem::kPieceElements)
    *pieces++ = {parameter.value.data() + at, parameter.gradient.data() + at,
                 first_moment == nullptr ? nullptr : first_moment + at,
                 second_moment == nullptr ? nullptr : second_moment + at,
                 (std::min)(problem::kPieceElements, parameter.value.size() - at)};
  return pieces;
}
/// The pieces of parameters for the time of a call.
inline std::span<const problem::ParameterPiece> pieces_of(std::span<const Parameter> parameters,
                                                          Workspace::Frame& frame) {
  const Index count = piece_count(parameters);
  problem::ParameterPiece* const pieces = frame.take<problem::ParameterPiece>(count);
  problem::ParameterPiece* next = pieces;
  for (const Parameter& parameter : parameters)
    next = cut_into_pieces(parameter, nullptr, nullptr, next);
  return {pieces, static_cast<std::size_t>(count)};
}

/// Such a factor is multiplied by in two, or few of its bits are left.
inline bool below_float(double factor) {
  return factor != 0 && std::abs(factor) < static_cast<double>((std::numeric_limits<float>::min)());
}

inline void require_factor(std::string_view operation, std::string_view name, double factor) {
  require_that(std::abs(factor) <= static_cast<double>((std::numeric_limits<float>::max)()),
               operation, name, " is ", factor, ", expected a finite number of float's range");
}

/// problem::ScaleGradients of the pieces, in place where `write` says so, which a factor
/// below_float needs; 1 writes nothing.
template <Device D>
void scale_pieces(const D& device, std::span<const problem::ParameterPiece> pieces, double factor,
                  bool write, double* sums) {
  const auto scale = [&](double by) {
    detail::run(device, problem::ScaleGradients{pieces.data(), static_cast<Index>(pieces.size()),
                                                static_cast<float>(by), write && by != 1, sums});
  };
  constexpr double kSmallest = (std::numeric_limits<float>::min)();
  const bool in_two = below_float(factor);
  scale(in_two ? factor / kSmallest : factor);
  if (in_two) scale(kSmallest);
}

/// The norm of all gradients times the factor; NaN or infinite where one of these is.
template <Device D>
double scaled_norm(const D& device, std::span<const Parameter> parameters, double factor,
                   bool write, Workspace& workspace = thread_workspace()) {
  Workspace::Frame frame(workspace);
  const auto pieces = pieces_of(parameters, frame);
  auto* const sums = frame.take<double>(static_cast<Index>(pieces.size()));
  scale_pieces(device, pieces, factor, write, sums);
  return std::sqrt(std::accumulate(sums, sums + pieces.size(), 0.0));
}

/// Rates end at 1e18, so that products and quotients of them are floats.
inline void require_rate(std::string_view operation, std::string_view name, Index group,
                         double value) {
  require_that(value >= 0 && value <= 1e18, operation, name, " of group ", group, " is ", value,
               ", expected 0 or more, at most 1e18");
}

inline void require_beta(std::string_view operation, std::string_view name, Index group,
                         double value) {
  require_that(value >= 0 && value < 1, operation, name, " of group ", group, " is ", value,
               ", expected 0 or more and below 1");
}

/// Groups of parameters, their pieces and the moments. The rule of an optimizer says in static
/// members what is its own: Options, name, kMoments, check_options(group, options),
/// keeps_state(options) and factors(options, step), which a problem::Optimizer is made of.
template <typename Rule>
class OptimizerState {
 public:
  using Options = typename Rule::Options;

  OptimizerState(std::vector<ParameterGroup<Options>> groups, const Memory& memory) {
    if (groups.empty()) groups.emplace_back();
    for (const ParameterGroup<Options>& group : groups) {
      Rule::check_options(static_cast<Index>(groups_.size()), group.options);
      groups_.push_back({group.options, 0, piece_count(group.parameters)});
      parameters_.insert(parameters_.end(), group.parameters.begin(), group.parameters.end());
    }
    check_parameters(Rule::name, parameters_);
    check_distinct(Rule::name, parameters_);
    lay_out(groups, memory);
  }
  OptimizerState(OptimizerState&&) noexcept = default;
  OptimizerState(const OptimizerState&) = delete;  // two optimizers would step the same weights
  OptimizerState& operator=(const OptimizerState&) = delete;

  const std::vector<Parameter>& parameters() const { return parameters_; }
  std::span<const float> memory() const {
    return {moments(), static_cast<std::size_t>(Rule::kMoments * elements_)};
  }
  Index steps = 0;

  Index group_count() const { return static_cast<Index>(groups_.size()); }
  const Options& options(Index group) const { return groups_[checked(group)].options; }
  void set_options(Index group, const Options& options) {
    Group& changed = groups_[checked(group)];
    Rule::check_options(group, options);
    require_that(Rule::keeps_state(options) == Rule::keeps_state(changed.options), Rule::name,
                 "group ", group, " changes between momentum and none; make a new optimizer");
    changed.options = options;
  }
  void set_learning_rate(Index group, double rate) {
    Group& changed = groups_[checked(group)];
    require_rate(Rule::name, "learning_rate", group, rate);
    changed.options.learning_rate = rate;
  }
  void set_learning_rate(double rate) {
    require_rate(Rule::name, "learning_rate", 0, rate);
    for (Group& group : groups_) group.options.learning_rate = rate;
  }

  /// The next step of every group, one pass over memory each.
  template <Device D>
  void step(const D& device, const problem::GradientFactors& gradient = {}) {
    require_memory(Rule::name, "the state", block_.memory(), memory_of(device));
    ++steps;
    for (const Group& group : groups_) {
      const auto factors = Rule::factors(group.options, steps);
      detail::run(device, problem::Optimizer<std::remove_cv_t<decltype(factors)>>{
                              pieces_.data() + group.first_piece, group.pieces, factors, gradient});
    }
  }
  template <Device D>
  void zero_gradients(const D& device) const {
    detail::run(device, problem::ZeroGradients{pieces_.data(), static_cast<Index>(pieces_.size())});
  }

  TensorView<const float, 1> moment(std::string_view operation, Index which,
                                    Index parameter) const {
    require_that(parameter >= 0 && parameter < static_cast<Index>(parameters_.size()), operation,
                 "parameter ", parameter, " of ", parameters_.size());
    const auto index = static_cast<std::size_t>(parameter);
    require_that(offsets_[index] >= 0, operation, "parameter ", parameter,
                 " is of a group without momentum");
    return TensorView<const float, 1>(moments() + which * elements_ + offsets_[index],
                                      parameters_[index].value.size());
  }
  void load(std::string_view operation, std::span<const float> state, Index step_count) {
    require_that(state.size() == memory().size(), operation, "state has ", state.size(),
                 " elements, expected ", memory().size());
    require_that(step_count >= 0 && step_count < (std::numeric_limits<Index>::max)(), operation,
                 "step_count is ", step_count, ", expected 0 or more");
    if (state.data() != moments())
      block_.memory().copy_in(moments(), state.data(), state.size_bytes());
    steps = step_count;
  }

 private:
  struct Group {
    Options options;
    Index first_piece, pieces;
  };

  std::size_t checked(Index group) const {
    require_that(group >= 0 && group < group_count(), Rule::name, "group ", group, " of ",
                 group_count());
    return static_cast<std::size_t>(group);
  }

  float* moments() const { return reinterpret_cast<float*>(block_.data()); }

  // Moment after moment, in each parameter after parameter, those of groups that keep state.
  void lay_out(const std::vector<ParameterGroup<Options>>& groups, const Memory& memory) {
    Index elements = 0, pieces = 0;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      groups_[g].first_piece = pieces;
      pieces += groups_[g].pieces;
      const bool keeps = Rule::keeps_state(groups[g].options);
      for (const Parameter& parameter : groups[g].parameters) {
        offsets_.push_back(keeps ? elements : -1);
        if (!keeps) continue;
        require_that(parameter.value.size() <= (std::numeric_limits<Index>::max)() - elements,
                     Rule::name, "the sizes of the parameters overflow");
        elements += parameter.value.size();
      }
    }
    elements_ = elements;
    const Index all = checked_product(elements, Rule::kMoments, Rule::name, "state");
    block_ = MemoryBlock(
        static_cast<std::size_t>(checked_product(all, Index{sizeof(float)}, Rule::name, "state")),
        memory);
    memory.clear(moments(), block_.size());
    pieces_.resize(static_cast<std::size_t>(pieces));
    problem::ParameterPiece* piece = pieces_.data();
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      float* const first = offsets_[i] < 0 ? nullptr : offset_by(moments(), offsets_[i]);
      float* const second = Rule::kMoments > 1 && first != nullptr ? first + elements : nullptr;
      piece = cut_into_pieces(parameters_[i], first, second, piece);
    }
  }

  std::vector<Parameter> parameters_;  // of all groups, in their order
  std::vector<Group> groups_;
  std::vector<Index> offsets_;  // of each parameter in a moment, -1 where it has none
  MemoryBlock block_;           // (moments, elements)
  Index elements_ = 0;
  std::vector<problem::ParameterPiece> pieces_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
