/// \file
/// The memory of the current CUDA device.
#pragma once

#include "../core/memory.h"
#include "launch.cuh"

#if defined(EIGENFORMER_CUDA_UNIT)
namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Aligned to 256 bytes, whatever is asked for. Throws DeviceError.
inline void* allocate(std::size_t bytes, std::size_t) {
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, bytes), "device memory");
  return data;
}
/// Waits for the kernels that may still use it. An error here is one of theirs, or of a driver that
/// has shut down already at the end of the program.
inline void release(void* data, std::size_t, std::size_t) noexcept {
  static_cast<void>(cudaFree(data));
}

/// Copies once all streams have done their work: one of them may be writing what is read here.
template <cudaMemcpyKind Kind>
void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  check_cuda(cudaDeviceSynchronize(), "device memory");
  check_cuda(cudaMemcpy(to, from, bytes, Kind), "device memory");
  if constexpr (Kind != cudaMemcpyDeviceToHost)  // others may return before they are done
    check_cuda(cudaDeviceSynchronize(), "device memory");
}
inline void clear(void* data, std::size_t bytes) {
  if (bytes == 0) return;
  check_cuda(cudaMemset(data, 0, bytes), "device memory");
  check_cuda(cudaDeviceSynchronize(), "device memory");
}

/// Whether kernels find an address in memory of a device: the host's, pinned or not, is none of it.
inline bool lies_on_device(const Backend<Eigen::GpuDevice>&, const void* data) {
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, data), "device memory");
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

inline constexpr Memory memory{"cuda",
                               allocate,
                               release,
                               copy<cudaMemcpyDeviceToDevice>,
                               copy<cudaMemcpyHostToDevice>,
                               copy<cudaMemcpyDeviceToHost>,
                               clear};

/// What memory_of(device) is for a GPU; another device brings its own, as it does its launch.
inline const Memory& device_memory(const Backend<Eigen::GpuDevice>&) { return memory; }

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
#endif
