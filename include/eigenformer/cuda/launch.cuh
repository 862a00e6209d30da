/// \file
/// How CUDA kernels are started: on the device's stream, asynchronously, with every launch checked.
///
/// A kernel is `execute(const Backend&, const problem::X&)` in this namespace, found by
/// core/dispatch.h.
#pragma once

#include <stdexcept>
#include <string>

#include "../core/device.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A failure of the CUDA runtime.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace cuda {

/// Where a CUDA kernel runs: the stream of an Eigen device.
struct Backend {
  const Eigen::GpuDevice& device;
};

inline void check_cuda(cudaError_t status, const char* operation) {
  if (status != cudaSuccess)
    detail::fail<DeviceError>(std::string(operation) + ": CUDA says " + cudaGetErrorString(status));
}

template <typename Body>
__global__ void for_each_index(Index count, Body body) {
  const Index stride = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
    body(i);
}

/// body(i) for every i in [0, count): one element per thread, grid-stride.
template <typename Body>
void launch_for_each(const Eigen::GpuDevice& device, const char* operation, Index count,
                     const Body& body) {
  if (count <= 0) return;
  constexpr int threads = 256;
  const Index blocks = (count + threads - 1) / threads;
  for_each_index<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), threads, 0,
                   device.stream()>>>(count, body);
  check_cuda(cudaGetLastError(), operation);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
