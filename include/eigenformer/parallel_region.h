/// \file
/// Several operators, one waking of threads: while a ParallelRegion is open, the operators that its
/// thread calls on that pool hand their parts to threads that spin for them.
///
///   ef::ParallelRegion region(device);        // from here to the end of the scope
///   ef::rms_norm_into(device, n, x, weight);
///   ef::linear_into(device, y, n, w8);        // no allocation, no system call
///
/// Outside of a region every part of every operator is a task that Eigen allocates, and often a
/// sleeping thread that the kernel wakes: 20 us until it begins and 50 us for the call
/// (bench/programs/waking.cpp, AMD EPYC, 2 virtual cores), where half of a decode-sized INT8
/// product takes 70. ef::Decoder opens a region for each step; open one around a loop of steps to
/// keep the threads awake from step to step.
///
/// Results have the same bits inside and outside. Ranges are static as there, shared out finer, and
/// the caller takes those that no thread has begun when it is done with its own. So a thread that
/// comes late costs nothing; one that the kernel takes off its core in the middle of a part is
/// waited for, as outside.
///
/// Costs. Opening a region allocates 192 bytes and wakes nobody. The first operator with more than
/// one part enqueues one task for each part but the first (an allocation and a wake-up each, 7 us),
/// and so does the next after an idle spell. From then on a part costs 0.2 us and no allocation. Up
/// to worker_count(device) - 1 threads of the pool are busy until the region ends or has been idle
/// for `linger`: 50 us spinning, then yielding their cores. Meanwhile others who share the pool
/// have its remaining thread. Ending a region waits for nobody: its threads leave when they next
/// look, after some microseconds.
///
/// Threads. A region serves the thread that opened it and no other; it must end there, in the
/// reverse order of opening. The pool must outlive it. A second region on the same pool does
/// nothing, and so does one on a pool of one thread, on a thread of that very pool, on
/// Eigen::DefaultDevice or Eigen::GpuDevice: generic code may open one on any device. Regions of
/// several threads on one pool compete for its threads and all make progress. A call of an operator
/// from within a part runs on its thread alone.
#pragma once

#include <chrono>

#include "core/device.h"
#include "cpu/parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct ParallelRegionOptions {
  /// How long a thread waits for the next operator before it goes back to the pool. Waiting for
  /// twice what a wake-up costs never costs more than three times the best choice; where serial
  /// work of a known length lies between, for example sampling, say more.
  std::chrono::microseconds linger{100};
  /// Operators run on the calling thread alone: for a step too small to be shared.
  bool serial = false;
};

template <Device D>
class ParallelRegion {
 public:
  /// Throws std::bad_alloc.
  [[nodiscard]] explicit ParallelRegion(
      const D& device, [[maybe_unused]] const ParallelRegionOptions& options = {}) {
    if constexpr (std::is_same_v<D, Eigen::ThreadPoolDevice>) {
      if (cpu::worker_count(device) < 2 || cpu::team_on(device.getPool()) != nullptr) return;
      team_ = new cpu::ThreadTeam(device.getPool(), options.linger, cpu::innermost_team(),
                                  options.serial);
      cpu::innermost_team() = team_;
    }
  }
  ParallelRegion(const ParallelRegion&) = delete;
  ParallelRegion& operator=(const ParallelRegion&) = delete;
  ~ParallelRegion() {
    if (team_ == nullptr) return;
    cpu::innermost_team() = team_->outer();
    team_->close();
  }

 private:
  cpu::ThreadTeam* team_ = nullptr;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
