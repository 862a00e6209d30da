/// \file
/// CUDA kernel of RMSNorm: one block per row, two coalesced passes (the second out of L2), sums in a
/// fixed tree; rows past the range of their squares as in cpu/vector/row_unit.h.
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

template <typename Y, typename X, typename W>
struct RmsNormKernel {
  using C = typename problem::RmsNorm<Y, X, W>::compute;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::RmsNorm<Y, X, W> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<C>(kWarps);
    for (Index row = block.index(); row < p.rows; row += block.count())
      normalize(block, scratch, p.x + row * p.features, p.y + row * p.features);
  }

 private:
  template <typename Block, typename Scratch>
  EIGENFORMER_DEVICE void normalize(Block& block, const Scratch& scratch, const X* x, Y* y) const {
    const C n = static_cast<C>(p.features);
    const auto sum_of_squares = [&](C unit) {
      C squares = 0;
      for (Index j = block.thread(); j < p.features; j += block.size()) {
        const C value = static_cast<C>(x[j]) * unit;
        squares = std::fma(value, value, squares);
      }
      return reduce_block(block, scratch, squares, Add{});
    };
    C unit = 1;
    double mean = sum_of_squares(unit) / n + static_cast<C>(p.epsilon);
    if (!problem::in_range(static_cast<C>(mean))) {  // all threads of the block, or none
      unit = row_unit<C>(block, scratch, x, p.features);
      mean = static_cast<double>(sum_of_squares(unit) / n) +
             static_cast<double>(p.epsilon) * unit * unit;
    }
    const C scale =
        unit == 1 ? C(1) / std::sqrt(static_cast<C>(mean)) : static_cast<C>(1 / std::sqrt(mean));
    for (Index j = block.thread(); j < p.features; j += block.size())
      y[j] = static_cast<Y>(static_cast<C>(x[j]) * unit * scale * static_cast<C>(p.weight[j]));
  }
};

template <typename D, typename Y, typename X, typename W>
void execute(const Backend<D>& on, const problem::RmsNorm<Y, X, W>& p) {
  using Kernel = RmsNormKernel<Y, X, W>;
  launch_rows(on, "rms_norm", p.features > 0 ? p.rows : 0,
              shared_bytes<typename Kernel::C>(Kernel::kWarps), Kernel{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
