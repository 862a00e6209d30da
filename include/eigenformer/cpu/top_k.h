/// \file
/// CPU kernel of top-k: the selection of sampling (sampling/filters.h) on a row, or on its negative
/// where the smallest are asked for; then the tokens of the band are gathered in order, and sorted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../core/workspace.h"
#include "../problem/top_k.h"
#include "backend.h"
#include "sampling/sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// `ids` of the k best of a row, or -1 where it holds NaN.
template <typename Isa, typename R, typename T>
SampleStatus top_k_row(const problem::TopK<T>& p, SamplingRow<R> row, std::int32_t* ids,
                       const SamplingScratch<compute_type<T>>& scratch) {
  if (scan_row<Isa>(row) == SampleStatus::nan) {
    std::fill(ids, ids + p.k, -1);
    return SampleStatus::nan;
  }
  if (p.k == 0) return SampleStatus::ok;
  row.band.lo = -std::numeric_limits<compute_type<T>>::infinity();  // a number like others
  keep_top_k<Isa>(row, p.k, TopKTies::lowest_index, scratch);
  Index n = 0;
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_bits<Isa>(x, block, row.band, row.band.lo).for_each([&](Index j) {
      ids[n++] = static_cast<std::int32_t>(block * SamplingBlock::size + j);
    });
  });
  if (p.sorted)
    std::sort(ids, ids + p.k, [&](std::int32_t a, std::int32_t b) {
      const auto xa = row.logits[a], xb = row.logits[b];
      return xa > xb || (xa == xb && a < b);
    });
  return SampleStatus::ok;
}

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::TopK<T>& p) {
  if (p.rows == 0) return;
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  Workspace::Frame frame(on.workspace);
  const int workers = worker_count(on);
  const auto* scratches = take_sampling_scratch<C>(frame, workers, p.columns, {});
  const Index negative_size = p.largest ? 0 : p.columns;
  C* const negatives =
      frame.take<C>(detail::checked_product(workers, negative_size, "top_k", "scratch"));
  const Eigen::ThreadPoolDevice* const pool = pool_of_rows(on.device, p.rows, p.columns);
  for_rows(on, pool, p.rows, Cost{p.columns}, [&](Index first, Index last, int worker) {
    const SamplingScratch<C>& scratch = scratches[worker];
    C* const negative = negatives + worker * negative_size;
    for (Index r = first; r < last; ++r) {
      const T* const x = p.x + r * p.columns;
      std::int32_t* const ids = p.ids + r * p.k;
      for_each_vector<V>(0, negative_size, [&](Index i, auto part) {
        store(V::zero() - load<V>(x + i, part), negative + i, part);
      });
      C* const maxima = scratch.block_max;
      const SampleStatus status =
          p.largest
              ? top_k_row<Isa>(p, SamplingRow<T>{x, p.columns, maxima, {}, 1.0, nullptr, pool}, ids,
                               scratch)
              : top_k_row<Isa>(p,
                               SamplingRow<C>{negative, p.columns, maxima, {}, 1.0, nullptr, pool},
                               ids, scratch);
      if (p.statuses != nullptr) p.statuses[r] = status;
      for (Index i = 0; i < p.k; ++i)
        p.values[r * p.k + i] = ids[i] < 0 ? std::numeric_limits<T>::quiet_NaN() : x[ids[i]];
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
