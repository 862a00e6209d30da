/// \file
/// CUDA kernels of the tensor-parallel layers, apart from the products themselves.
#pragma once

#include "../problem/tensor_parallel.h"
#include "packs.cuh"
#include "vocabulary.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Gathered parts become rows: one thread moves a pack of neighbours, which lie in one part where
/// the parts divide into packs, and single elements elsewhere. The stores of a warp are one line,
/// its loads too but where parts meet. 2 * tokens * features elements move, no arithmetic but that
/// of the addresses: on an H100 or H200 some 85% of the speed of a copy is expected where there
/// are packs, and these are activations, small beside the weights.
template <typename T>
struct InterleaveBody {
  problem::Interleave<T> p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index token, Index column) const {
    const Index share = p.features / p.ranks, more = p.features % p.ranks;
    const Index wide = more * (share + 1);  // features of the ranks that have one more
    const Index rank = column < wide ? column / (share + 1) : more + (column - wide) / share;
    const ShardRange shard = problem::shard_of(p.features, rank, p.ranks);
    const T* const part = p.parts + p.tokens * shard.begin + token * shard.size();
    store_pack(load_pack<T, W>(part + column - shard.begin), p.rows + token * p.features + column);
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::Interleave<T>& p) {
  constexpr int width = pack_width<T>;
  launch_for_each_pack<width>(on, "interleave", p.tokens, p.features,
                              p.features % (p.ranks * Index{width}) == 0 &&
                                  packs_fit<width>(p.parts, 0) && packs_fit<width>(p.rows, 0),
                              InterleaveBody<T>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
