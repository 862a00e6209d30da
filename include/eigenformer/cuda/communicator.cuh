/// \file
/// The CUDA kernel of communicators: the sum over ranks, in the order of the ranks.
#pragma once

#include "../problem/communicator.h"
#include "packs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// One thread adds a pack of neighbours over all ranks, in registers, in rank order: no tree, so
/// that the bits are those of every other communicator. (ranks + 1) * count elements move, each
/// once and in 16 bytes at a time, for (ranks - 1) * count additions: on an H100 or H200 some 90%
/// of the speed of a copy is expected, and the slices that it adds have come over a link slower
/// than that.
template <typename T>
struct RankSumBody {
  using Sum = typename problem::RankSum<T>::Sum;
  problem::RankSum<T> p;

  template <int W>
  EIGENFORMER_DEVICE void operator()(WidthOf<W>, Index, Index at) const {
    Pack<Sum, W> sum = of_rank<W>(0, at);
    for (int r = 1; r < p.ranks; ++r) {
      const Pack<Sum, W> values = of_rank<W>(r, at);
      for (int i = 0; i < W; ++i) sum[i] += values[i];
    }
    store_pack(sum, p.values + at);
  }

  template <int W>
  EIGENFORMER_DEVICE Pack<Sum, W> of_rank(int r, Index at) const {
    const T* const values = r == p.rank ? p.values : p.others + (r - (r > p.rank)) * p.stride;
    return load_pack<Sum, W>(values + at);
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::RankSum<T>& p) {
  constexpr int width = pack_width<T>;
  launch_for_each_pack<width>(on, "all_reduce_sum", 1, p.count,
                              packs_fit<width>(p.values, 0) && packs_fit<width>(p.others, p.stride),
                              RankSumBody<T>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
