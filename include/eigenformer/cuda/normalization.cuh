/// \file
/// CUDA kernel of RMSNorm: one block a row, two coalesced passes (the second out of L2), sums in a fixed tree.
#pragma once

#include "../cpu/normalization.h"  // RmsNormProblem
#include "block.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Y, typename X, typename W>
struct RmsNormBody {
  RmsNormProblem<Y, X, W> p;
  __device__ void operator()(Index row) const {
    using C = typename RmsNormProblem<Y, X, W>::compute;
    const X* x = p.x + row * p.features;
    Y* y = p.y + row * p.features;
    C squares = 0;
    for (Index j = threadIdx.x; j < p.features; j += kRowThreads) {
      const C value = static_cast<C>(x[j]);
      squares = fma(value, value, squares);
    }
    squares = reduce_block(squares, Add{});
    const C scale = C(1) / sqrt(squares / static_cast<C>(p.features) + static_cast<C>(p.epsilon));
    for (Index j = threadIdx.x; j < p.features; j += kRowThreads)
      y[j] = static_cast<Y>(static_cast<C>(x[j]) * scale * static_cast<C>(p.weight[j]));
  }
};

}  // namespace cuda

template <typename Y, typename X, typename W>
void launch_on_gpu(const Eigen::GpuDevice& device, const RmsNormProblem<Y, X, W>& p) {
  cuda::launch_rows(device, "rms_norm", p.features > 0 ? p.rows : 0, cuda::RmsNormBody<Y, X, W>{p});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
