/// \file
/// CUDA kernel of RMSNorm: one block per row, two coalesced passes (the second out of L2), sums in a
/// fixed tree; rows past the range of their squares as in cpu/vector/row_unit.h.
#pragma once

#include "../problem/normalization.h"
#include "../problem/row_unit.h"
#include "block.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

struct Larger {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

/// cpu::row_unit, by all threads of the block.
template <typename C, typename X>
__device__ C row_unit(const X* x, Index count) {
  C largest = 0;
  for (Index j = threadIdx.x; j < count; j += kRowThreads)
    largest = Larger{}(static_cast<C>(fabs(static_cast<C>(x[j]))), largest);
  return problem::unit_of(reduce_block(largest, Larger{}));
}

template <typename Y, typename X, typename W>
struct RmsNormBody {
  problem::RmsNorm<Y, X, W> p;
  __device__ void operator()(Index row) const {
    using C = typename problem::RmsNorm<Y, X, W>::compute;
    const X* x = p.x + row * p.features;
    Y* y = p.y + row * p.features;
    const C n = static_cast<C>(p.features);
    const auto sum_of_squares = [&](C unit) {
      C squares = 0;
      for (Index j = threadIdx.x; j < p.features; j += kRowThreads) {
        const C value = static_cast<C>(x[j]) * unit;
        squares = fma(value, value, squares);
      }
      return reduce_block(squares, Add{});
    };
    C unit = 1;
    double mean = sum_of_squares(unit) / n + static_cast<C>(p.epsilon);
    if (!problem::in_range(static_cast<C>(mean))) {  // all threads of the block, or none
      unit = row_unit<C>(x, p.features);
      mean = static_cast<double>(sum_of_squares(unit) / n) +
             static_cast<double>(p.epsilon) * unit * unit;
    }
    const C scale = unit == 1 ? C(1) / sqrt(static_cast<C>(mean)) : static_cast<C>(1 / sqrt(mean));
    for (Index j = threadIdx.x; j < p.features; j += kRowThreads)
      y[j] = static_cast<Y>(static_cast<C>(x[j]) * unit * scale * static_cast<C>(p.weight[j]));
  }
};

template <typename Y, typename X, typename W>
void execute(const Backend& on, const problem::RmsNorm<Y, X, W>& p) {
  launch_rows(on.device, "rms_norm", p.features > 0 ? p.rows : 0, RmsNormBody<Y, X, W>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
