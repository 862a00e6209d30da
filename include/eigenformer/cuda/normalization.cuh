/// \file
/// CUDA kernels of RMSNorm and LayerNorm: one block per row, two coalesced passes and three (all
/// but the first out of L2), sums in a fixed tree; rows past the range of their squares as in
/// cpu/vector/row_unit.h, mean and variance of LayerNorm as in cpu/normalization/layer_norm.h. Some
/// 4 and 8 flops per element against a read and a write (two of each with the residual sum): memory
/// is the limit, of which 80% and more is expected for 1024 rows on.
#pragma once

#include <cmath>

#include "../problem/normalization.h"
#include "../problem/row_unit.h"
#include "collectives.cuh"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// cpu::row_unit, by all threads of the block.
template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE C row_unit(Block& block, const Scratch& scratch, const X* x, Index count) {
  C largest = 0;
  for (Index j = block.thread(); j < count; j += block.size())
    largest = Larger{}(std::fabs(static_cast<C>(x[j])), largest);
  return problem::unit_of(reduce_block(block, scratch, largest, Larger{}));
}

/// x / rms is (x * unit) * inverse, as in cpu/normalization/normalization.h.
template <typename C>
struct RmsScale {
  C unit, inverse;
};

template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE RmsScale<C> rms_scale(Block& block, const Scratch& scratch, const X* x,
                                         Index features, float epsilon) {
  const C n = static_cast<C>(features);
  const auto sum_of_squares = [&](C unit) {
    C squares = 0;
    for (Index j = block.thread(); j < features; j += block.size()) {
      const C value = static_cast<C>(x[j]) * unit;
      squares = std::fma(value, value, squares);
    }
    return reduce_block(block, scratch, squares, Add{});
  };
  const C mean = sum_of_squares(C(1)) / n + static_cast<C>(epsilon);
  if (problem::in_range(mean)) return {C(1), C(1) / std::sqrt(mean)};  // all threads, or none
  const C unit = row_unit<C>(block, scratch, x, features);
  const double scaled =
      static_cast<double>(sum_of_squares(unit) / n) + static_cast<double>(epsilon) * unit * unit;
  return {unit, static_cast<C>(1 / std::sqrt(scaled))};
}

template <typename Block, typename Scratch, typename Y, typename X, typename W>
EIGENFORMER_DEVICE void rms_normalize(Block& block, const Scratch& scratch,
                                      const problem::RmsNorm<Y, X, W>& p, Index row) {
  using C = typename problem::RmsNorm<Y, X, W>::compute;
  const X* x = p.x + row * p.features;
  Y* y = p.y + row * p.features;
  const RmsScale<C> scale = rms_scale<C>(block, scratch, x, p.features, p.epsilon);
  for (Index j = block.thread(); j < p.features; j += block.size())
    y[j] = static_cast<Y>(static_cast<C>(x[j]) * scale.unit * scale.inverse *
                          static_cast<C>(p.weight[j]));
}

template <typename Y, typename X, typename W>
struct RmsNormKernel {
  using C = typename problem::RmsNorm<Y, X, W>::compute;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::RmsNorm<Y, X, W> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<C>(kWarps);
    for (Index row = block.index(); row < p.rows; row += block.count())
      rms_normalize(block, scratch, p, row);
  }
};

template <typename D, typename Y, typename X, typename W>
void execute(const Backend<D>& on, const problem::RmsNorm<Y, X, W>& p) {
  using Kernel = RmsNormKernel<Y, X, W>;
  launch_rows(on, "rms_norm", p.features > 0 ? p.rows : 0,
              shared_bytes<typename Kernel::C>(Kernel::kWarps), Kernel{p});
}

/// The sum first. Every thread reads and writes the same elements in each pass, so that none waits
/// for another's; what the norm reads is rounded, as if the two operators ran one after the other.
/// Residual and addend are read once from memory, residual and y written once.
template <typename Y, typename X, typename R, typename W>
struct AddRmsNormKernel {
  using C = typename problem::RmsNorm<Y, R, W>::compute;
  using SumC = detail::common_compute_type<Y, X, R, W>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::AddRmsNorm<Y, X, R, W> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<C>(kWarps);
    const Index features = p.norm.features;
    for (Index row = block.index(); row < p.norm.rows; row += block.count()) {
      R* residual = p.residual + row * features;
      const X* addend = p.addend + row * features;
      for (Index j = block.thread(); j < features; j += block.size())
        residual[j] = static_cast<R>(static_cast<SumC>(residual[j]) + static_cast<SumC>(addend[j]));
      rms_normalize(block, scratch, p.norm, row);
    }
  }
};

template <typename D, typename Y, typename X, typename R, typename W>
void execute(const Backend<D>& on, const problem::AddRmsNorm<Y, X, R, W>& p) {
  using Kernel = AddRmsNormKernel<Y, X, R, W>;
  launch_rows(on, "add_rms_norm", p.norm.features > 0 ? p.norm.rows : 0,
              shared_bytes<typename Kernel::C>(Kernel::kWarps), Kernel{p});
}

/// Sums over a row of the distances from a number, and of their squares.
template <typename C>
struct DistanceSums {
  C distances, squares;
  EIGENFORMER_DEVICE friend DistanceSums operator+(const DistanceSums& a, const DistanceSums& b) {
    return {a.distances + b.distances, a.squares + b.squares};
  }
};

template <typename Y, typename X, typename W>
struct LayerNormKernel {
  using C = typename problem::LayerNorm<Y, X, W>::compute;
  using Scale = problem::LayerNormScale<C>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::LayerNorm<Y, X, W> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<DistanceSums<C>>(kWarps);
    const auto magnitudes = block.template shared<C>(kWarps);
    for (Index row = block.index(); row < p.rows; row += block.count()) {
      const X* x = p.x + row * p.features;
      Y* y = p.y + row * p.features;
      const Scale scale = scale_of(block, scratch, magnitudes, x);
      for (Index j = block.thread(); j < p.features; j += block.size()) {
        const C normal =
            std::fma(static_cast<C>(x[j]) * scale.unit - scale.center, scale.inverse, scale.offset);
        y[j] = static_cast<Y>(
            std::fma(normal, static_cast<C>(p.weight[j]), static_cast<C>(p.bias[j])));
      }
    }
  }

 private:
  struct Moments {
    C center, correction, variance;  // a number near the mean, how far the mean is from it
  };

  template <typename Block, typename Scratch>
  EIGENFORMER_DEVICE Moments moments(Block& block, const Scratch& scratch, const X* x,
                                     C unit) const {
    const C n = static_cast<C>(p.features), first = static_cast<C>(x[0]) * unit;
    const auto sums_about = [&](C center) {
      DistanceSums<C> sums{0, 0};
      for (Index j = block.thread(); j < p.features; j += block.size()) {
        const C distance = static_cast<C>(x[j]) * unit - center;
        sums = {sums.distances + distance, std::fma(distance, distance, sums.squares)};
      }
      return reduce_block(block, scratch, sums, Add{});
    };
    const C center = first + sums_about(first).distances / n;
    const DistanceSums<C> sums = sums_about(center);
    const C correction = sums.distances / n, variance = sums.squares / n - correction * correction;
    return {center, correction, variance < 0 ? C(0) : variance};  // NaN stays
  }

  template <typename Block, typename Scratch, typename Magnitudes>
  EIGENFORMER_DEVICE Scale scale_of(Block& block, const Scratch& scratch,
                                    const Magnitudes& magnitudes, const X* x) const {
    const Moments row = moments(block, scratch, x, C(1));
    const C spread = row.variance + static_cast<C>(p.epsilon);
    if (problem::in_range(spread)) {  // all threads of the block, or none
      const C inverse = C(1) / std::sqrt(spread);
      return {C(1), row.center, inverse, -row.correction * inverse};
    }
    const C unit = row_unit<C>(block, magnitudes, x, p.features);
    const Moments scaled = moments(block, scratch, x, unit);
    const double epsilon = p.epsilon;
    if (scaled.variance == 0) {  // epsilon in that unit may be no number of C
      const C inverse = static_cast<C>(1 / std::sqrt(epsilon));
      return {C(1), row.center, inverse, -row.correction * inverse};
    }
    const C inverse =
        static_cast<C>(1 / std::sqrt(static_cast<double>(scaled.variance) + epsilon * unit * unit));
    return {unit, scaled.center, inverse, -scaled.correction * inverse};
  }
};

template <typename D, typename Y, typename X, typename W>
void execute(const Backend<D>& on, const problem::LayerNorm<Y, X, W>& p) {
  using Kernel = LayerNormKernel<Y, X, W>;
  using C = typename Kernel::C;
  launch_rows(on, "layer_norm", p.features > 0 ? p.rows : 0,
              shared_bytes<DistanceSums<C>>(Kernel::kWarps) + shared_bytes<C>(Kernel::kWarps),
              Kernel{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
