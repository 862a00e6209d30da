/// \file
/// CUDA kernel of the causal mask: one thread per element, one coalesced write of the mask.
#pragma once

#include "../problem/causal_mask.h"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct CausalMaskBody {
  problem::CausalMask<T> p;
  T open, blocked;
  EIGENFORMER_DEVICE void operator()(Index at) const {
    const Index row = at / p.key_length;
    p.mask[at] =
        p.visible(row / p.query_length, row % p.query_length, at % p.key_length) ? open : blocked;
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::CausalMask<T>& p) {
  launch_for_each(on, "causal_mask", p.batch * p.query_length * p.key_length,
                  CausalMaskBody<T>{p, T(0), -std::numeric_limits<T>::infinity()});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
