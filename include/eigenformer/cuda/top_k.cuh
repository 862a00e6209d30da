/// \file
/// CUDA kernel of top-k, one block per row: the selection of sampling (sampling/filters.cuh) on a
/// row, or on a copy of its negative where the smallest are asked for, then a sort of the k by a
/// network. Passes over a row: 6 (bfloat16) to 10 (float), the first from memory, the others out of
/// L2.
#pragma once

#include <limits>

#include "../problem/top_k.h"
#include "sampling/log_probabilities.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct TopKKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads;
  problem::TopK<T> p;
  C* negatives = nullptr;  // a row for each block, where the smallest are asked for
  Index negatives_stride = 0;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C>(block);
    for (Index r = block.index(); r < p.rows; r += block.count()) {
      SamplingRow<T> row{p.x + r * p.columns, nullptr, p.columns, {}, 1.0};
      if (!p.largest) {
        C* const own = negatives + block.index() * negatives_stride;
        for (Index i = block.thread(); i < p.columns; i += block.size()) own[i] = -row.at(i);
        block.barrier();
        row.adjusted = own;
      }
      const SampleStatus status = scan_row(block, arrays, row);
      const bool ok = status != SampleStatus::nan;
      write(block, arrays, row, r, ok);
      if (block.thread() == 0 && p.statuses != nullptr)
        p.statuses[r] = ok ? SampleStatus::ok : SampleStatus::nan;
      block.barrier();  // the next row's scratch
    }
  }

 private:
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                Index r, bool ok) const {
    std::int32_t* const ids = p.ids + r * p.k;
    if (ok && p.k > 0) {
      gather_best(block, arrays, row, p.k,
                  [&](Index place, Index token) { ids[place] = static_cast<std::int32_t>(token); });
      sort_block(block, ids, p.k, [&](std::int32_t a, std::int32_t b) {
        const auto xa = row.at(a), xb = row.at(b);
        return p.sorted && xa != xb ? xa > xb : a < b;
      });
    }
    for (Index i = block.thread(); i < p.k; i += block.size()) {
      if (!ok) ids[i] = -1;
      p.values[r * p.k + i] =
          ok ? row.logits[ids[i]] : static_cast<T>(std::numeric_limits<C>::quiet_NaN());
    }
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::TopK<T>& p) {
  using Kernel = TopKKernel<T>;
  using C = typename Kernel::C;
  constexpr auto name = "top_k";
  Kernel kernel{p};
  if (p.largest || p.rows == 0)
    return launch_rows(on, name, p.rows, sampling_arrays_bytes<C>(), kernel);
  constexpr Index most = 132;  // an H100 has as many multiprocessors
  const Index blocks = p.rows < most ? p.rows : most;
  kernel.negatives_stride = (p.columns + 3) / 4 * 4;  // 16 bytes of whatever type
  with_scratch<C>(on, name, {blocks * kernel.negatives_stride}, [&](C* negatives) {
    kernel.negatives = negatives;
    launch(on, name, blocks, Kernel::kThreads, sampling_arrays_bytes<C>(), kernel);
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
