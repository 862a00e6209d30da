/// \file
/// What GradScaler must do, as a table of six gradients; weights and optimizers for its tests.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <vector>

#include <eigenformer/optimizer.h>

#include "compare.h"

namespace eigenformer_test {

struct Weights {
  ef::Tensor<float, 1> value, gradient;
  explicit Weights(Index size = 37)
      : value(random_tensor<float, 1>({size}, 1)), gradient(random_tensor<float, 1>({size}, 2)) {}
  std::vector<ef::Parameter> parameters() {
    return {ef::Parameter{ef::TensorView<float, 1>(value.data(), value.size()),
                          ef::TensorView<float, 1>(gradient.data(), gradient.size())}};
  }
};

/// Counts its steps, after as many failures as told.
struct CountingOptimizer {
  std::vector<ef::Parameter> list;
  int steps = 0, failures = 0;
  std::vector<ef::Parameter> parameters() const { return list; }
  void step() {
    if (failures-- > 0) throw std::runtime_error("no");
    ++steps;
  }
};

/// The scaler as a table: what is known of each of six gradients.
struct PlainScaler {
  struct Cell {
    float gradient = 0;
    std::optional<double> multiplier;  // it was unscaled with
    bool finite = true;                // afterwards
    bool stepped = false;
    int steps = 0;
  };
  static constexpr ef::Index kInterval = 3;
  std::array<Cell, 6> cells;
  double scale = 64;
  Index good = 0, skipped = 0;
  bool pending = false, found_inf = false;

  /// What the calls return, nothing where they are refused.
  std::optional<bool> unscale(const std::set<std::size_t>& which, double multiplier) {
    for (std::size_t i : which)
      if (cells[i].multiplier) return {};
    bool finite = true;
    for (std::size_t i : which) {
      cells[i].gradient *= static_cast<float>(multiplier / scale);
      cells[i].multiplier = multiplier;
      cells[i].finite = std::isfinite(cells[i].gradient);
      finite = finite && cells[i].finite;
    }
    pending = true;
    found_inf = found_inf || !finite;
    return finite;
  }
  std::optional<bool> step(const std::set<std::size_t>& which, std::optional<bool> verdict) {
    std::set<std::size_t> rest;
    std::set<double> multipliers;
    for (std::size_t i : which) {
      if (cells[i].stepped) return {};
      if (!cells[i].multiplier) rest.insert(i);
      multipliers.insert(cells[i].multiplier.value_or(1));
    }
    if (multipliers.size() > 1) return {};
    if (!rest.empty()) unscale(rest, 1);
    bool finite = true;
    for (std::size_t i : which) finite = finite && cells[i].finite;
    if (verdict == false && !finite) return {};
    const bool skip = verdict.value_or(!finite);
    for (std::size_t i : which) {
      cells[i].stepped = true;
      if (!skip) ++cells[i].steps;
    }
    found_inf = found_inf || skip;
    return !skip;
  }
  std::optional<bool> update(std::optional<bool> found) {
    if (found ? !*found && found_inf : !pending) return {};
    const bool bad = found.value_or(found_inf);
    good = bad ? 0 : good + 1;
    skipped += bad ? 1 : 0;
    if (bad) scale = std::max(scale / 2, 1.0);
    if (good == kInterval) {
      good = 0;
      scale = std::min(scale * 2, 256.0);
    }
    forget();
    return true;
  }
  void forget() {
    for (Cell& cell : cells) cell.multiplier = {}, cell.stepped = false;
    pending = found_inf = false;
  }
};

/// An optimizer that counts the steps of each of its gradients.
struct StepCounter {
  std::vector<ef::Parameter> list;
  std::span<int> counts;
  std::vector<std::size_t> which;
  const std::vector<ef::Parameter>& parameters() const { return list; }
  void step() {
    for (std::size_t i : which) ++counts[i];
  }
};

/// A call's result, nothing where it throws std::logic_error.
template <typename Call>
std::optional<bool> outcome(Call&& call) {
  try {
    return call();
  } catch (const std::logic_error&) {
    return {};
  }
}

}  // namespace eigenformer_test
