/// \file
/// The mechanism behind ParallelRegion: threads of an Eigen pool that spin for the parts of the
/// next `parallel_for`.
///
/// A job is published by one store to `claim_` and finished by a counter. `claim_` holds (jobs
/// published so far, parts nobody has taken); who decrements it owns a part, and the job's number
/// in the same word keeps a late thread from claiming in a job that it did not read. The opener
/// claims as well when it is done with part 0, so that a thread that was never scheduled is not
/// missed. A part costs one compare-and-swap and one cache line in each direction: 0.2 us, where a
/// sleeping thread costs system calls and 20 to 50 us.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "../core/error.h"
#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Waits until holds() does, or `limit` has passed; returns holds(). Spins for 50 us, which is what
/// a call that wakes a sleeping thread costs (bench/programs/waking.cpp), then yields the core
/// between looks to whoever wants it.
template <typename Condition>
bool spin_until(std::chrono::nanoseconds limit, Condition&& holds) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kSpin{50};
  // between two looks at the clock, which take 20 to 50 ns: 1 to 3 us of pauses
  constexpr int kLooks = 64;
  const auto look = [&holds] {
    for (int i = 0; i < kLooks; ++i) {
      if (holds()) return true;
      eigenformer::detail::pause_instruction();
    }
    return false;
  };
  if (look()) return true;
  const auto start = Clock::now();
  for (Clock::duration waited{0}; waited < limit; waited = Clock::now() - start) {
    if (waited > kSpin) std::this_thread::yield();
    if (look()) return true;
  }
  return holds();
}

/// Memory of the opener and its helpers; the last who lets go deletes it. Helpers that have not
/// begun when the region ends find it closed whenever the pool comes to them, so that nobody waits
/// for them.
class ThreadTeam {
 public:
  ThreadTeam(Eigen::ThreadPoolInterface* pool, std::chrono::nanoseconds linger, ThreadTeam* outer,
             bool serial)
      : pool_(pool), linger_(linger), outer_(outer), serial_(serial) {}
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  const Eigen::ThreadPoolInterface* pool() const { return pool_; }
  ThreadTeam* outer() const { return outer_; }
  /// Loops have one part and no helper is ever summoned.
  bool serial() const { return serial_; }

  /// Calls part(p) once for each p in [0, parts), part 0 on this thread, the opener, and returns
  /// when all are done. A call from within a part finds the helpers busy and runs alone.
  template <typename Part>
  void run(Index parts, const Part& part) {
    if (running_) {
      for (Index p = 0; p < parts; ++p) part(p);
      return;
    }
    running_ = true;
    summon(parts - 1);
    part_ = &part;
    call_ = [](const void* f, Index p) { (*static_cast<const Part*>(f))(p); };
    unfinished_.store(parts - 1, std::memory_order_relaxed);
    const std::uint64_t jobs = (claim_.load(std::memory_order_relaxed) >> kPartBits) + 1;
    claim_.store(jobs << kPartBits | static_cast<std::uint64_t>(parts - 1),
                 std::memory_order_release);
    part(0);
    Index taken = 0;
    for (Index p = claim(); p > 0; p = claim()) {
      part(p);
      ++taken;
    }
    spin_until((std::chrono::nanoseconds::max)(),
               [&] { return unfinished_.load(std::memory_order_acquire) == taken; });
    running_ = false;
  }

  /// Sends the helpers away; the opener's last call.
  void close() {
    claim_.store(kClosed, std::memory_order_relaxed);
    let_go();
  }

 private:
  static constexpr int kPartBits = 16;  // Eigen's pools have fewer than 2^16 threads
  static constexpr std::uint64_t kParts = (std::uint64_t{1} << kPartBits) - 1;
  // no part to take, and a job number that 2^48 jobs would reach
  static constexpr std::uint64_t kClosed = ~kParts;

  ~ThreadTeam() = default;

  /// Enqueues helpers until there are `count`. Those who begin, linger or wait in the pool's queue
  /// count already.
  void summon(Index count) {
    for (Index helpers = users_.load(std::memory_order_relaxed) - 1; helpers < count; ++helpers) {
      users_.fetch_add(1, std::memory_order_relaxed);
      bool started = true;
      eigenformer::detail::attempt([this] { pool_->Schedule([this] { help(); }); },
                                   [&started](const char*) { started = false; });
      if (!started) {
        users_.fetch_sub(1, std::memory_order_relaxed);  // not the last: the opener is one
        return;  // the opener takes the parts that find no helper
      }
    }
  }

  /// The task of a helper. Eigen runs it on the thread that enqueues it where a queue is full: the
  /// opener must not wait for itself.
  void help() {
    if (pool_->CurrentThreadId() >= 0) serve();
    let_go();
  }

  /// Takes parts until the region ends or nothing has happened for `linger_`. A job that ended
  /// before this thread could claim a part counts as an event: the next one may have a part to
  /// spare.
  void serve() {
    const std::chrono::nanoseconds linger = linger_;
    std::uint64_t seen = 0;
    const auto news = [&] {
      const std::uint64_t word = claim_.load(std::memory_order_relaxed);
      return (word & kParts) != 0 || word != seen;
    };
    do {
      for (Index p = claim(); p > 0; p = claim()) {
        call_(part_, p);
        unfinished_.fetch_sub(1, std::memory_order_release);
      }
      seen = claim_.load(std::memory_order_relaxed);
    } while (seen != kClosed && spin_until(linger, news));
  }

  /// A part that is the caller's from now on, 0 where there is none.
  Index claim() {
    std::uint64_t word = claim_.load(std::memory_order_relaxed);
    while ((word & kParts) != 0)
      if (claim_.compare_exchange_weak(word, word - 1, std::memory_order_acquire,
                                       std::memory_order_relaxed))
        return static_cast<Index>(word & kParts);
    return 0;
  }

  void let_go() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  // What the opener writes and helpers poll, what helpers write and the opener polls, and the rest:
  // a cache line each.
  alignas(64) std::atomic<std::uint64_t> claim_{0};
  const void* part_ = nullptr;
  void (*call_)(const void*, Index) = nullptr;
  alignas(64) std::atomic<Index> unfinished_{0};
  alignas(64) std::atomic<Index> users_{1};
  Eigen::ThreadPoolInterface* const pool_;
  const std::chrono::nanoseconds linger_;
  ThreadTeam* const outer_;
  const bool serial_;
  bool running_ = false;
};

/// The team of the region this thread opened last.
inline ThreadTeam*& innermost_team() {
  thread_local ThreadTeam* team = nullptr;
  return team;
}

/// The team on that pool, null where this thread has opened no region there.
inline ThreadTeam* team_on(const Eigen::ThreadPoolInterface* pool) {
  ThreadTeam* team = innermost_team();
  while (team != nullptr && team->pool() != pool) team = team->outer();
  return team;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
