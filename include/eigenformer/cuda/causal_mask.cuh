/// \file
/// CUDA kernel of the causal mask: one write of the mask, 16 bytes per
/// thread, and some 10 integer operations per element: 80% of the bandwidth of writes and more is
/// expected from a million elements on.
#pragma once

#include "../problem/causal_mask.h"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct CausalMaskBody {
  problem::CausalMask<T> p;
  T open, blocked;
  template <int N>
  EIGENFORMER_DEVICE void operator()(WidthOf<N>, Index row, Index key) const {
    const Index b = row / p.query_length, query = row - b * p.query_length;
    Pack<T, N> values;
    for (int i = 0; i < N; ++i) values[i] = p.visible(b, query, key + i) ? open : blocked;
    *reinterpret_cast<Pack<T, N>*>(p.mask + row * p.key_length + key) = values;
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::CausalMask<T>& p) {
  constexpr int width = pack_width<T>;
  launch_for_each_pack<width>(on, "causal_mask", p.batch * p.query_length, p.key_length,
                              packs_fit<width>(p.mask, p.key_length),
                              CausalMaskBody<T>{p, T(0), -std::numeric_limits<T>::infinity()});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
