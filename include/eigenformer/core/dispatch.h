/// \file
/// The one dispatch. An operator's public form makes a problem (problem/X.h: pointers, sizes,
/// rules; plain data, one type in units of every ISA) and runs it; the type of the device gives the
/// backend, and the backend's namespace and the problem's type find the kernel, by
/// argument-dependent lookup:
///
///   run(device, problem)  ->  execute(cpu::Backend<D, Isa>, problem)     cpu/X.h
///                             execute(cuda::Backend<D>, problem)         cuda/X.cuh
///
/// One rule of memory: tensors are memory of the backend; everything else in a problem (lengths,
/// offsets, positions, tables of pointers, slopes, parameters, generators) is host memory, and a
/// backend that cannot read it stages it. What may be either says so beside its member. An owning
/// ef::Tensor is host memory: forms that make or resize one take a CpuDevice, or say what they do
/// on a GPU (training steps, the decoder). All others take any Device, and whether the backend has
/// a kernel decides.
///
/// A CUDA kernel for one more operator is one file and one line in cuda/kernels.cuh.
#pragma once

#include <cstddef>
#include <span>
#include <tuple>

#include "../cpu/backend.h"
#include "../cuda/backend.cuh"
#if defined(EIGENFORMER_CUDA_UNIT)
#include "../cuda/kernels.cuh"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Whether a backend has a kernel for a problem.
template <typename Backend, typename Problem>
concept RunsOn =
    requires(const Backend& backend, const Problem& problem) { execute(backend, problem); };

/// The memory that the kernels of a device work on.
template <Device D>
const Memory& memory_of([[maybe_unused]] const D& device) {
  if constexpr (CpuDevice<D>)
    return host_memory;
  else
    return device_memory(cuda::Backend<D>{device});
}

namespace detail {

template <typename D>
inline constexpr bool is_cpu_backend = false;
template <typename D, typename Isa>
inline constexpr bool is_cpu_backend<cpu::Backend<D, Isa>> = true;

/// Workers that kernels on a device may have at once, for those that the caller gives scratch: a
/// row of host memory each. Kernels of a GPU have scratch of their own.
template <Device D>
int worker_count([[maybe_unused]] const D& device) {
  if constexpr (CpuDevice<D>)
    return cpu::worker_count(device);
  else
    return 0;
}

/// The backend of a device that is no CPU.
template <Device D>
  requires(!CpuDevice<D>)
cuda::Backend<D> gpu_backend(const D& device) {
  return {device};
}

/// A frame of scratch for elements of tensors that pass from one problem to the next: of
/// `workspace`, where the device works on its memory; else of the device's stream.
///
///   auto frame = tensor_frame(device, workspace);
///   T* const rows = frame.template take<T>(tokens * features);
template <Device D>
auto tensor_frame([[maybe_unused]] const D& device, [[maybe_unused]] Workspace& workspace) {
  if constexpr (CpuDevice<D>)
    return Workspace::Frame(workspace);
  else
    return scratch_frame(gpu_backend(device));
}

/// What run(f) of an ef::StepGraph is on a CPU: a call.
struct CalledStep {
  template <typename F>
  void run(F&& f) const {
    f();
  }
};

/// Captures what a device launches, and launches it at once (step_graph.h, cuda/graph.cuh).
template <Device D>
auto step_graph_on([[maybe_unused]] const D& device) {
  if constexpr (CpuDevice<D>)
    return CalledStep{};
  else
    return step_graph(gpu_backend(device));
}

/// Host memory as the next kernels of a device read it: itself, or its copy on the device
/// (cuda/stage.cuh says for how long).
template <Device D, typename T>
std::span<const T> staged([[maybe_unused]] const D& device, [[maybe_unused]] const char* name,
                          std::span<const T> array) {
  if constexpr (CpuDevice<D>)
    return array;
  else
    return {std::get<0>(stage(gpu_backend(device), name, array)), array.size()};
}

/// Elements of a GPU's tensor into host memory, once its stream has done its work so far.
template <Device D, typename T>
void to_host(const D& device, const char* name, T* host, const T* elements, Index count) {
  static_assert(!CpuDevice<D>);
  stage_ring(gpu_backend(device))
      .fetch(name, host, reinterpret_cast<const std::byte*>(elements),
             static_cast<std::size_t>(count) * sizeof(T));
}

/// A tensor's elements as the host reads them: where they are, or copied from a GPU into `frame`.
template <Device D, typename T>
const T* on_host([[maybe_unused]] const D& device, [[maybe_unused]] const char* name,
                 const T* elements, [[maybe_unused]] Index count,
                 [[maybe_unused]] Workspace::Frame& frame) {
  if constexpr (CpuDevice<D>) {
    return elements;
  } else {
    T* const copy = frame.take<T>(count);
    if (count > 0) to_host(device, name, copy, elements, count);
    return copy;
  }
}
/// The device that works on what on_host gives.
template <Device D>
const auto& host_device([[maybe_unused]] const D& device) {
  if constexpr (CpuDevice<D>) {
    return device;
  } else {
    static const Eigen::DefaultDevice host;
    return host;
  }
}

/// Runs a problem where the device says, with this scratch on a CPU; returns what the kernel
/// returns.
template <Device D, typename Problem>
decltype(auto) run(const D& device, const Problem& problem,
                   [[maybe_unused]] Workspace& workspace = thread_workspace()) {
  if constexpr (is_cpu_backend<D>) {
    return execute(D{device.device, workspace}, problem);
  } else if constexpr (CpuDevice<D>) {
    return cpu::with_granted_isa<Problem>([&](auto isa) -> decltype(auto) {
      return execute(cpu::Backend<D, decltype(isa)>{device, workspace}, problem);
    });
  } else {
    static_assert(RunsOn<cuda::Backend<D>, Problem>,
                  "eigenformer: this operator has no CUDA kernel");
    return execute(gpu_backend(device), problem);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
