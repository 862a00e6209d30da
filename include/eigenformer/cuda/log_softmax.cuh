/// \file
/// CUDA kernel of log-softmax, one block per row: the maximum, the sum of the weights in double and
/// in token order (sampling/order.cuh), the differences. A row is read three times, all but the
/// first out of L2, and has one exponential of doubles per element: 128256 of them take 30
/// microseconds of a multiprocessor at its peak, so that arithmetic is the limit and not memory.
#pragma once

#include <limits>

#include "../problem/log_softmax.h"
#include "sampling/log_probabilities.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename Y, typename T>
struct LogSoftmaxKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads;
  problem::LogSoftmax<Y, T> p;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C>(block);
    for (Index r = block.index(); r < p.rows; r += block.count()) {
      const T* const x = p.x + r * p.columns;
      Y* const y = p.y + r * p.columns;
      SamplingRow<T> row{x, nullptr, p.columns, {}, 1.0};
      const bool ok = scan_row(block, arrays, row) == SampleStatus::ok;
      const double log_total =
          ok ? log_sum_weights(block, arrays, row) : std::numeric_limits<double>::quiet_NaN();
      const double best = ok ? static_cast<double>(row.band.hi) : 0.0;
      for (Index i = block.thread(); i < p.columns; i += block.size())
        y[i] = static_cast<Y>((static_cast<double>(x[i]) - best) - log_total);
      block.barrier();  // the next row's scratch
    }
  }
};

template <typename D, typename Y, typename T>
void execute(const Backend<D>& on, const problem::LogSoftmax<Y, T>& p) {
  launch_rows(on, "log_softmax", p.rows, sampling_arrays_bytes<compute_type<T>>(),
              LogSoftmaxKernel<Y, T>{p});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
