/// \file
/// Reductions over the threads of one block, in a fixed tree: the same bits for a row whatever the
/// grid.
#pragma once

#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Threads of a block that works on one row; a power of two.
inline constexpr int kRowThreads = 256;

/// combine(a, b) over the values of all threads, returned to every thread. Called by all threads of
/// the block.
template <typename T, typename Combine>
__device__ T reduce_block(T value, Combine combine) {
  __shared__ T values[kRowThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + half]);
    __syncthreads();
  }
  const T result = values[0];
  __syncthreads();  // the array may be used again at once
  return result;
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <typename Body>
__global__ void for_each_row(Index rows, Body body) {
  for (Index row = blockIdx.x; row < rows; row += gridDim.x) body(row);
}

/// body(row) for every row, one block of kRowThreads threads each.
template <typename Body>
void launch_rows(const Eigen::GpuDevice& device, const char* operation, Index rows,
                 const Body& body) {
  if (rows <= 0) return;
  for_each_row<<<static_cast<unsigned>(rows < 1048576 ? rows : 1048576), kRowThreads, 0,
                 device.stream()>>>(rows, body);
  check_cuda(cudaGetLastError(), operation);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
