/// \file
/// CUDA kernel of the causal mask: one thread an element, one coalesced write of the mask.
#pragma once

#include "../cpu/causal_mask.h"  // CausalMaskProblem
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct CausalMaskBody {
  CausalMaskProblem<T> p;
  T open, blocked;
  __device__ void operator()(Index at) const {
    const Index row = at / p.key_length;
    p.mask[at] =
        p.visible(row / p.query_length, row % p.query_length, at % p.key_length) ? open : blocked;
  }
};

}  // namespace cuda

template <typename T>
void launch_on_gpu(const Eigen::GpuDevice& device, const CausalMaskProblem<T>& p) {
  cuda::launch_for_each(device, "causal_mask", p.batch * p.query_length * p.key_length,
                        cuda::CausalMaskBody<T>{p, T(0), -std::numeric_limits<T>::infinity()});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
