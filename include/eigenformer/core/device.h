/// \file
/// Devices. The type alone selects the specialization, at compile time: `Eigen::DefaultDevice` (the
/// calling thread), `Eigen::ThreadPoolDevice`, `Eigen::GpuDevice` (CUDA translation units only).
#pragma once

#include <type_traits>

#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename D>
inline constexpr bool is_cpu_device =
    std::is_same_v<std::remove_cvref_t<D>, Eigen::DefaultDevice> ||
    std::is_same_v<std::remove_cvref_t<D>, Eigen::ThreadPoolDevice>;

/// Specialised for a type that is one, or stands where one does: tests have an emulated GPU.
template <typename D>
inline constexpr bool is_gpu_device = false;
#if defined(EIGENFORMER_CUDA_UNIT)
template <>
inline constexpr bool is_gpu_device<Eigen::GpuDevice> = true;
#endif

}  // namespace detail

/// An Eigen device that operators run on, or a backend in its place (cpu/backend.h).
template <typename D>
concept Device = detail::is_cpu_device<D> || detail::is_gpu_device<D>;

template <typename D>
concept CpuDevice = detail::is_cpu_device<D>;

namespace detail {

/// Whether the host may read the elements of a device's tensors. Checks of elements (ids, scales,
/// positions) are made where it may. Where not, a kernel has to bear whatever they are: each manual
/// says what comes of it.
template <Device D>
inline constexpr bool host_readable = is_cpu_device<D>;

/// What a model hands out: on a CPU a tensor of its own, on a GPU a view of memory of the device
/// that the model keeps.
template <Device D, typename T, int Rank>
using ModelTensor = std::conditional_t<CpuDevice<D>, Tensor<T, Rank>, TensorView<T, Rank>>;

}  // namespace detail

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
