/// \file
/// CUDA kernels of RMSNorm and LayerNorm: one block per row, two coalesced passes and three (all
/// but the first out of L1 or L2) with 16 bytes per thread, sums in a fixed tree; rows past the
/// range of their squares as in cpu/vector/row_unit.h, mean and variance of LayerNorm as in
/// cpu/normalization/layer_norm.h. Some 4 and 8 flops per element against a read and a write (two
/// of each with the residual sum): memory is the limit. Of the bandwidth of copies an H200 gave 46%
/// to RMSNorm of 4096 x 4096 bfloat16, 66% with the residual sum, 31% to LayerNorm.
#pragma once

#include <cmath>

#include "../problem/normalization.h"
#include "../problem/row_unit.h"
#include "collectives.cuh"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// cpu::row_unit, by all threads of the block.
template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE C row_unit(Block& block, const Scratch& scratch, const X* x, Index count) {
  C largest = 0;
  for_each_pack_of_line(
      block, count,
      [&]<int N>(WidthOf<N>, Index j) {
        const auto values = load_pack<C, N>(x + j);
        for (int i = 0; i < N; ++i) largest = Larger{}(std::fabs(values[i]), largest);
      },
      x);
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
    for_each_pack_of_line(
        block, features,
        [&]<int N>(WidthOf<N>, Index j) {
          const auto values = load_pack<C, N>(x + j);
          for (int i = 0; i < N; ++i) {
            const C value = values[i] * unit;
            squares = std::fma(value, value, squares);
          }
        },
        x);
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
  const X* x = p.x_row(row);
  Y* y = p.y + row * p.features;
  const RmsScale<C> scale = rms_scale<C>(block, scratch, x, p.features, p.epsilon);
  for_each_pack_of_line(
      block, p.features,
      [&]<int N>(WidthOf<N>, Index j) {
        auto values = load_pack<C, N>(x + j);
        const auto weights = load_pack<C, N>(p.weight + j);
        for (int i = 0; i < N; ++i) values[i] = values[i] * scale.unit * scale.inverse * weights[i];
        store_pack<N>(values, y + j);
      },
      x, p.weight, static_cast<const Y*>(y));
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

/// The sum first; what the norm reads is rounded, as if the two operators ran one after the other.
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
      for_each_pack_of_line(
          block, features,
          [&]<int N>(WidthOf<N>, Index j) {
            auto sums = load_pack<SumC, N>(residual + j);
            const auto addends = load_pack<SumC, N>(addend + j);
            for (int i = 0; i < N; ++i) sums[i] += addends[i];
            store_pack<N>(sums, residual + j);
          },
          static_cast<const R*>(residual), addend);
      block.barrier();
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

/// Two sums over a row at once.
template <typename C>
struct TwoSums {
  C first, second;
  EIGENFORMER_DEVICE friend TwoSums operator+(const TwoSums& a, const TwoSums& b) {
    return {a.first + b.first, a.second + b.second};
  }
};

/// What is known of a row times its unit: a number near the mean, how far the mean is from it, the
/// variance.
template <typename C>
struct RowMoments {
  C center, correction, variance;
};

template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE RowMoments<C> row_moments(Block& block, const Scratch& scratch, const X* x,
                                             Index features, C unit) {
  const C n = static_cast<C>(features), first = static_cast<C>(x[0]) * unit;
  const auto sums_about = [&](C center) {  // of the distances and of their squares
    TwoSums<C> sums{0, 0};
    for_each_pack_of_line(
        block, features,
        [&]<int N>(WidthOf<N>, Index j) {
          const auto values = load_pack<C, N>(x + j);
          for (int i = 0; i < N; ++i) {
            const C distance = values[i] * unit - center;
            sums = {sums.first + distance, std::fma(distance, distance, sums.second)};
          }
        },
        x);
    return reduce_block(block, scratch, sums, Add{});
  };
  const C center = first + sums_about(first).first / n;
  const TwoSums<C> sums = sums_about(center);
  const C correction = sums.first / n, variance = sums.second / n - correction * correction;
  return {center, correction, variance < 0 ? C(0) : variance};  // NaN stays
}

/// Shared memory of layer_norm_scale: an element for each warp.
template <typename Sums, typename Magnitudes>
struct LayerNormScratch {
  Sums sums;              // of TwoSums<C>
  Magnitudes magnitudes;  // of C
};

template <typename C, typename Block>
EIGENFORMER_DEVICE auto layer_norm_scratch(Block& block, int warps) {
  const auto sums = block.template shared<TwoSums<C>>(warps);
  const auto magnitudes = block.template shared<C>(warps);
  return LayerNormScratch<decltype(block.template shared<TwoSums<C>>(warps)),
                          decltype(block.template shared<C>(warps))>{sums, magnitudes};
}
template <typename C>
constexpr std::size_t layer_norm_scratch_bytes(int warps) {
  return shared_bytes<TwoSums<C>>(warps) + shared_bytes<C>(warps);
}

template <typename C, typename Block, typename Scratch, typename X>
EIGENFORMER_DEVICE problem::LayerNormScale<C> layer_norm_scale(Block& block, const Scratch& scratch,
                                                               const X* x, Index features,
                                                               float epsilon) {
  const RowMoments<C> row = row_moments(block, scratch.sums, x, features, C(1));
  const C spread = row.variance + static_cast<C>(epsilon);
  if (problem::in_range(spread)) {  // all threads of the block, or none
    const C inverse = C(1) / std::sqrt(spread);
    return {C(1), row.center, inverse, -row.correction * inverse};
  }
  const C unit = row_unit<C>(block, scratch.magnitudes, x, features);
  const RowMoments<C> scaled = row_moments(block, scratch.sums, x, features, unit);
  const double wide = epsilon;
  if (scaled.variance == 0) {  // epsilon in that unit may be no number of C
    const C inverse = static_cast<C>(1 / std::sqrt(wide));
    return {C(1), row.center, inverse, -row.correction * inverse};
  }
  const C inverse =
      static_cast<C>(1 / std::sqrt(static_cast<double>(scaled.variance) + wide * unit * unit));
  return {unit, scaled.center, inverse, -scaled.correction * inverse};
}

template <typename Y, typename X, typename W>
struct LayerNormKernel {
  using C = typename problem::LayerNorm<Y, X, W>::compute;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::LayerNorm<Y, X, W> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = layer_norm_scratch<C>(block, kWarps);
    for (Index row = block.index(); row < p.rows; row += block.count()) {
      const X* x = p.x_row(row);
      Y* y = p.y + row * p.features;
      const W* weight = p.weight + p.weights_of(row);
      const W* bias = p.bias + p.weights_of(row);
      const auto scale = layer_norm_scale<C>(block, scratch, x, p.features, p.epsilon);
      for_each_pack_of_line(
          block, p.features,
          [&]<int N>(WidthOf<N>, Index j) {
            auto values = load_pack<C, N>(x + j);
            const auto weights = load_pack<C, N>(weight + j);
            const auto biases = load_pack<C, N>(bias + j);
            for (int i = 0; i < N; ++i) {
              const C normal =
                  std::fma(values[i] * scale.unit - scale.center, scale.inverse, scale.offset);
              values[i] = std::fma(normal, weights[i], biases[i]);
            }
            store_pack<N>(values, y + j);
          },
          x, weight, bias, static_cast<const Y*>(y));
    }
  }
};

template <typename D, typename Y, typename X, typename W>
void execute(const Backend<D>& on, const problem::LayerNorm<Y, X, W>& p) {
  using Kernel = LayerNormKernel<Y, X, W>;
  launch_rows(on, "layer_norm", p.features > 0 ? p.rows : 0,
              layer_norm_scratch_bytes<typename Kernel::C>(Kernel::kWarps), Kernel{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
