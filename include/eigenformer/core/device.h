/// \file
/// Devices and the one way kernels run in parallel. The type of the device alone selects the
/// specialization, at compile time: `Eigen::DefaultDevice` (the calling thread),
/// `Eigen::ThreadPoolDevice`, `Eigen::GpuDevice` (CUDA translation units only).
#pragma once

#include <algorithm>
#include <type_traits>

#include "error.h"
#include "tensor.h"
#include "thread_team.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

template <typename D>
inline constexpr bool is_cpu_device =
    std::is_same_v<std::remove_cvref_t<D>, Eigen::DefaultDevice> ||
    std::is_same_v<std::remove_cvref_t<D>, Eigen::ThreadPoolDevice>;

#if defined(__CUDACC__)
template <typename D>
inline constexpr bool is_gpu_device = std::is_same_v<std::remove_cvref_t<D>, Eigen::GpuDevice>;
#else
template <typename D>
inline constexpr bool is_gpu_device = false;
#endif

/// An Eigen device that operators run on.
template <typename D>
concept Device = is_cpu_device<D> || is_gpu_device<D>;

template <typename D>
concept CpuDevice = is_cpu_device<D>;

/// How many parts `parallel_for` makes at most; scratch memory is laid out for that many workers.
inline int worker_count(const Eigen::DefaultDevice&) { return 1; }
inline int worker_count(const Eigen::ThreadPoolDevice& device) {
  // A thread of the pool that waited for the pool could wait for itself: it works alone.
  return device.currentThreadId() >= 0 ? 1 : (std::max)(1, device.numThreads());
}

/// Calls body(begin, end, worker) on disjoint ranges that cover [0, count), and returns when all
/// are done. Ranges are static: equal parts, at least `grain` long, worker in [0,
/// worker_count(device)). The body must not throw, and what it computes for an index must not
/// depend on where the ranges are cut: results are the same bits for any number of threads.
///
/// On a pool each part but the first is a task of its own, which Eigen allocates and wakes a thread
/// for; inside a ParallelRegion (core/parallel_region.h) parts go to threads that are awake, and
/// may be a sixteenth as long.
template <typename Body>
void parallel_for(const Eigen::DefaultDevice&, Index count, Index /*grain*/, Body&& body) {
  if (count > 0) body(Index{0}, count, 0);
}

template <typename Body>
void parallel_for(const Eigen::ThreadPoolDevice& device, Index count, Index grain, Body&& body) {
  if (count <= 0) return;
  detail::ThreadTeam* team = detail::team_on(device.getPool());
  // Grains are what pays for waking a thread, about 40,000 cycles; a thread that is awake costs a
  // sixteenth at most.
  if (team != nullptr) grain /= 16;
  const Index parts = std::clamp<Index>(count / std::max<Index>(grain, 1), 1, worker_count(device));
  if (parts == 1) {
    body(Index{0}, count, 0);
    return;
  }
  const auto compute = [&body, parts, count](Index part) {
    body(count * part / parts, count * (part + 1) / parts, static_cast<int>(part));
  };
  if (team != nullptr) {
    team->run(parts, compute);
    return;
  }
  Eigen::Barrier barrier(static_cast<unsigned>(parts - 1));
  const auto run = [&compute, &barrier](Index part) {
    compute(part);
    barrier.Notify();
  };
  for (Index part = 1; part < parts; ++part)  // where there is no memory for the task, it runs here
    detail::attempt([&] { device.enqueueNoNotification([&run, part] { run(part); }); },
                    [&](const char*) { run(part); });
  compute(0);
  barrier.Wait();
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
