/// \file
/// How CUDA kernels are started: on the device's stream, asynchronously, every launch checked.
///
///   launch(on, "rms_norm", blocks, threads, shared_bytes, kernel);
///
/// `kernel(block)` is called by every thread of every block; `kernel` is copied to the device, so
/// it holds pointers and sizes only. The launch below is that of Eigen::GpuDevice; another device
/// brings its own, found by the type of the backend.
#pragma once

#include "backend.cuh"
#if defined(EIGENFORMER_CUDA_UNIT)
#include "block.cuh"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Threads that a kernel is compiled for, which bounds its registers: its kThreads, where it says.
template <typename Kernel>
constexpr int threads_of() {
  if constexpr (requires { Kernel::kThreads; })
    return Kernel::kThreads;
  else
    return kMostThreads;
}

/// Blocks that a multiprocessor shall have at least, for which the compiler spills registers if it
/// must: its kBlocks, where a kernel says; 0: as the compiler finds best.
template <typename Kernel>
constexpr int blocks_of_multiprocessor() {
  if constexpr (requires { Kernel::kBlocks; })
    return Kernel::kBlocks;
  else
    return 0;
}

#if defined(EIGENFORMER_CUDA_UNIT)

inline void check_cuda(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess)
    detail::fail<DeviceError>(what + ": CUDA says " + cudaGetErrorString(status));
}

template <typename Kernel>
__global__ void __launch_bounds__(threads_of<Kernel>(), blocks_of_multiprocessor<Kernel>())
    run_kernel(const Kernel kernel) {
  extern __shared__ __align__(16) std::byte shared_arena[];
  Block block(shared_arena);
  kernel(block);
}

template <typename Kernel>
void launch(const Backend<Eigen::GpuDevice>& on, const char* name, Index blocks, int threads,
            std::size_t shared, const Kernel& kernel) {
  if (shared > kSharedBytes)
    check_cuda(cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               launch_text(name, blocks, threads, shared));
  run_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared,
               on.device.stream()>>>(kernel);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
    check_cuda(status, launch_text(name, blocks, threads, shared));
}

#endif

/// body(i) for every i in [0, count): one element per thread, grid-stride.
template <typename Body>
struct ForEachIndex {
  static constexpr int kThreads = 256;
  Index count;
  Body body;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const Index stride = block.count() * block.size();
    for (Index i = block.index() * block.size() + block.thread(); i < count; i += stride) body(i);
  }
};

template <typename D, typename Body>
void launch_for_each(const Backend<D>& on, const char* name, Index count, const Body& body) {
  if (count <= 0) return;
  constexpr int threads = ForEachIndex<Body>::kThreads;
  const Index blocks = (count + threads - 1) / threads;
  launch(on, name, blocks < 65536 ? blocks : 65536, threads, 0, ForEachIndex<Body>{count, body});
}

/// A kernel whose block works on one row after the other, with Kernel::kThreads threads.
template <typename D, typename Kernel>
void launch_rows(const Backend<D>& on, const char* name, Index rows, std::size_t shared,
                 const Kernel& kernel) {
  if (rows <= 0) return;
  launch(on, name, rows < 1048576 ? rows : 1048576, Kernel::kThreads, shared, kernel);
}

/// body(i), by all lanes of one warp, for every i in [0, count): the kernel of launch_warps.
template <typename Block, typename Body>
EIGENFORMER_DEVICE void for_each_warp(Block& block, Index count, const Body& body) {
  const Index warps = block.size() / kWarp;
  for (Index i = block.index() * warps + block.warp(); i < count; i += block.count() * warps)
    body(i);
}

/// A kernel whose warps work on one piece after the other, Kernel::kThreads threads in a block.
template <typename D, typename Kernel>
void launch_warps(const Backend<D>& on, const char* name, Index pieces, const Kernel& kernel) {
  if (pieces <= 0) return;
  constexpr Index warps = Kernel::kThreads / kWarp;
  const Index blocks = (pieces - 1) / warps + 1;
  launch(on, name, blocks < 1048576 ? blocks : 1048576, Kernel::kThreads, 0, kernel);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
