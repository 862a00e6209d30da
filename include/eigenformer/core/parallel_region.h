/// \file
/// Several operators, one waking of threads: while a ParallelRegion is open, the operators that its thread calls on that pool hand
/// their parts to threads that spin for them.
///
///   ef::ParallelRegion region(device);        // from here to the end of the scope
///   ef::rms_norm_into(device, n, x, weight);
///   ef::linear_into(device, y, n, w8);        // no allocation, no system call
///
/// Outside of a region every part of every operator is a task that Eigen allocates, and often a sleeping thread that the kernel
/// wakes: tens of microseconds, where a layer of a decode step may take as much. ef::Decoder opens a region for each step; open one
/// around a loop of steps to keep the threads awake from step to step.
///
/// Results have the same bits inside and outside: ranges and the worker numbers that go with them do not change. Only the order in
/// which parts are computed, and by whom, does: the caller computes those that no thread has begun when it is done with its own, so
/// a busy machine slows a region down to one thread's speed, never below.
///
/// Costs. Opening one allocates 256 bytes and wakes nobody. The first operator with more than one part enqueues one task for each
/// part but the first (an allocation and a wake-up each), and so does the next after an idle spell. From then on a part costs some
/// 0.1 us and no allocation. Up to worker_count(device) - 1 threads of the pool stay busy while the region is open, and for at most
/// `linger` after the last operator with several parts: 50 us spinning, then yielding. Meanwhile others who share the pool have
/// its remaining thread. Ending a region waits for nobody: its threads leave when they next look, within a microsecond.
///
/// Threads. A region serves the thread that opened it and no other; it must end there, in the reverse order of opening. The pool
/// must outlive it. A second region on the same pool does nothing, and so does one on a pool of one thread, on a thread of that
/// very pool, on Eigen::DefaultDevice or Eigen::GpuDevice: generic code may open one on any device. Regions of several threads on
/// one pool compete for its threads and all make progress.
#pragma once

#include <chrono>

#include "device.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct ParallelRegionOptions {
  /// How long a thread waits for the next operator before it goes back to the pool. The default bridges the short serial operators
  /// between two products of a decode step; longer serial work costs one wake-up.
  std::chrono::microseconds linger{100};
};

template <Device D>
class ParallelRegion {
 public:
  /// Throws std::bad_alloc.
  [[nodiscard]] explicit ParallelRegion(const D& device, [[maybe_unused]] const ParallelRegionOptions& options = {}) {
    if constexpr (std::is_same_v<D, Eigen::ThreadPoolDevice>) {
      if (worker_count(device) < 2 || detail::team_on(device.getPool()) != nullptr) return;
      team_ = new detail::ThreadTeam(device.getPool(), options.linger, detail::innermost_team());
      detail::innermost_team() = team_;
    }
  }
  ParallelRegion(const ParallelRegion&) = delete;
  ParallelRegion& operator=(const ParallelRegion&) = delete;
  ~ParallelRegion() {
    if (team_ == nullptr) return;
    detail::innermost_team() = team_->outer();
    team_->close();
  }

 private:
  detail::ThreadTeam* team_ = nullptr;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
