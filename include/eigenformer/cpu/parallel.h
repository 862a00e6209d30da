/// \file
/// The one way kernels run in parallel, and the one statement of what waking a thread costs.
///
///   parallel_for(on, rows, Cost{features}, [&](Index first, Index last, int worker) { ... });
#pragma once

#include <algorithm>

#include "../core/device.h"
#include "../core/error.h"
#include "thread_team.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Work below which a part does not pay for waking a thread, in cycles of one core: 13 us at 3 GHz.
/// The call that wakes one costs 50 us, the thread begins after 20 (bench/programs/waking.cpp).
inline constexpr double kWakingCycles = 40000;
/// The same for a thread that a ParallelRegion keeps awake: 0.2 us per part, measured, and room for
/// parts of unequal length.
inline constexpr double kAwakeCycles = kWakingCycles / 16;

// Cycles of an element, rough: they decide only from where on a second thread pays. Beside each,
// how many elements pay for one.
inline constexpr double kReadCycles = 0.1;     // read out of a cache, for a maximum: 400000
inline constexpr double kWeightCycles = 0.25;  // an exponential, in float, for a sum: 160000
inline constexpr double kPackCycles = 0.625;   // quantized or packed, in order: 64000
inline constexpr double kMoveCycles = 1.25;    // rows of one head moved: 32000
inline constexpr double kComputeCycles = 2.5;  // activated, normalised, added: 16000
inline constexpr double kExpCycles = 5;        // an exponential and a sum: 8000

/// What one index of a loop costs.
struct Cost {
  Index elements;
  double cycles = kComputeCycles;  // of each element
};
/// Of an index that is worth a thread whatever it is.
inline constexpr Cost kWorthAThread{1, kWakingCycles};

/// How many parts parallel_for makes at most; scratch memory is laid out for that many workers.
inline int worker_count(const Eigen::DefaultDevice&) { return 1; }
inline int worker_count(const Eigen::ThreadPoolDevice& device) {
  // A thread of the pool that waited for the pool could wait for itself: it works alone.
  return device.currentThreadId() >= 0 ? 1 : (std::max)(1, device.numThreads());
}

/// How many parts parallel_for makes of `count` indices, 1 at least.
inline Index part_count(const Eigen::DefaultDevice&, Index /*count*/, Cost) { return 1; }
inline Index part_count(const Eigen::ThreadPoolDevice& device, Index count, Cost cost) {
  const double cycles =
      static_cast<double>(count) * static_cast<double>(cost.elements) * cost.cycles;
  const ThreadTeam* const team = team_on(device.getPool());
  if (team != nullptr && team->serial()) return 1;
  const double paid = team != nullptr ? kAwakeCycles : kWakingCycles;
  const Index most = std::clamp<Index>(count, 1, worker_count(device));
  return std::clamp(static_cast<Index>((std::min)(cycles / paid, 1e6)), Index{1}, most);
}

/// Calls body(begin, end, worker) on disjoint ranges that cover [0, count), and returns when all
/// are done. Ranges are static: equal parts, as many as their cost pays for, worker in [0,
/// worker_count(device)). The body must not throw, and what it computes for an index must not
/// depend on where the ranges are cut: results are the same bits for any number of threads.
///
/// On a pool each part but the first is a task of its own, which Eigen allocates and wakes a thread
/// for; inside a ParallelRegion (parallel_region.h) parts go to threads that are awake, and may be
/// a sixteenth as long.
template <typename Body>
void parallel_for(const Eigen::DefaultDevice&, Index count, Cost, Body&& body) {
  if (count > 0) body(Index{0}, count, 0);
}

template <typename Body>
void parallel_for(const Eigen::ThreadPoolDevice& device, Index count, Cost cost, Body&& body) {
  if (count <= 0) return;
  const Index parts = part_count(device, count, cost);
  if (parts == 1) {
    body(Index{0}, count, 0);
    return;
  }
  const auto compute = [&body, parts, count](Index part) {
    body(count * part / parts, count * (part + 1) / parts, static_cast<int>(part));
  };
  if (ThreadTeam* const team = team_on(device.getPool()); team != nullptr) {
    team->run(parts, compute);
    return;
  }
  Eigen::Barrier barrier(static_cast<unsigned>(parts - 1));
  const auto run = [&compute, &barrier](Index part) {
    compute(part);
    barrier.Notify();
  };
  for (Index part = 1; part < parts; ++part)  // where there is no memory for the task, it runs here
    eigenformer::detail::attempt([&] { device.enqueueNoNotification([&run, part] { run(part); }); },
                                 [&](const char*) { run(part); });
  compute(0);
  barrier.Wait();
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
