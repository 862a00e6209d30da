/// \file
/// Ranks that are threads of one process: the embedded default. Ranks read each other's memory
/// directly, so a collective costs its copies and two meetings of all ranks; nothing is allocated
/// after the group is made. The concept's manual is communicator.h.
///
/// A collective runs in three steps: (1) every rank publishes its call and its pointer, and all
/// meet; (2) every rank compares the calls and moves its share of the data; (3) all meet again, so
/// that no memory is reused while somebody still reads it. A meeting is left early, with
/// CommunicatorError, only in step 1: after it no user code runs before step 3, so all ranks arrive
/// there.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "collective.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Where the ranks of a group meet.
class ThreadMeeting {
 public:
  explicit ThreadMeeting(int ranks)
      : ranks_(ranks),
        // Spinning helps only where every rank has a core of its own; about 10 us, what a sleeping
        // thread costs to wake.
        polls_(static_cast<unsigned>(ranks) <= std::thread::hardware_concurrency() ? 8192 : 0),
        slots_(static_cast<std::size_t>(ranks) * 2),
        taken_(static_cast<std::size_t>(ranks), false) {}

  int ranks() const { return ranks_; }

  void take_rank(int rank) {
    const std::lock_guard lock(mutex_);
    require_that(!taken_[static_cast<std::size_t>(rank)], "ThreadCommunicatorGroup",
                 "the communicator of rank ", rank, " was taken before");
    taken_[static_cast<std::size_t>(rank)] = true;
  }

  /// Step 1. `round` counts this rank's collectives; two sets of slots alternate, so that a fast
  /// rank overwrites nothing unread.
  void enter(int rank, unsigned round, const CollectiveCall& call, void* data) {
    slot(rank, round) = {call, data};
    if (!meet<true>())
      fail<CommunicatorError>(describe(call) + " on rank " + std::to_string(rank) + ": " +
                              failure());
    require_same_call(ranks_, [&](int r) -> const CollectiveCall& { return slot(r, round).call; });
  }
  void* data(int rank, unsigned round) { return slot(rank, round).data; }

  /// Step 3.
  void leave() noexcept { meet<false>(); }

  /// Wakes every rank that waits in a collective or enters one later; only the first reason is
  /// kept. `what` may be null: the rank ended.
  void stop(int rank, const char* what) noexcept {
    const std::lock_guard lock(mutex_);
    if (state_.load(std::memory_order_relaxed) & kStopped) return;
    stopped_by_ = rank;
    // Where memory runs out the reason is lost; that the group has stopped is not.
    attempt(
        [&] {
          if (what != nullptr) reason_ = what;
        },
        [](const char*) {});
    state_.fetch_or(kStopped, std::memory_order_release);
    state_.notify_all();
  }

 private:
  static constexpr std::uint32_t kStopped = 1, kGeneration = 2;
  struct alignas(64) Slot {  // a cache line of its own
    CollectiveCall call{};
    void* data = nullptr;
  };

  Slot& slot(int rank, unsigned round) {
    return slots_[static_cast<std::size_t>(rank) * 2 + (round & 1)];
  }

  // reason_ and stopped_by_ were written before kStopped was set and never change again.
  std::string failure() const {
    if (stopped_by_ < 0) return "the group was stopped: " + reason_;
    const std::string who = "rank " + std::to_string(stopped_by_);
    return reason_.empty() ? who + " has ended and takes part in no more collectives"
                           : who + " has failed: " + reason_;
  }

  /// Returns when all ranks have called it: true. A stoppable meeting that has not completed when
  /// the group stops never does: false on all ranks, because one atomic word holds both the
  /// generation and the stop.
  template <bool kStoppable>
  bool meet() noexcept {
    const std::uint32_t before = state_.load(std::memory_order_acquire);
    if (kStoppable && (before & kStopped)) return false;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 ==
        static_cast<std::uint32_t>(ranks_)) {
      arrived_.store(0, std::memory_order_relaxed);
      std::uint32_t expected = before;
      if constexpr (kStoppable) {
        if (!state_.compare_exchange_strong(expected, before + kGeneration,
                                            std::memory_order_acq_rel))
          return false;
      } else {
        state_.fetch_add(kGeneration, std::memory_order_acq_rel);
      }
      state_.notify_all();
      return true;
    }
    for (int poll = 0;; ++poll) {
      const std::uint32_t now = state_.load(std::memory_order_acquire);
      if ((now ^ before) >= kGeneration) return true;
      if (kStoppable && (now & kStopped)) return false;
      if (poll >= polls_) state_.wait(now, std::memory_order_acquire);
    }
  }

  const int ranks_, polls_;
  std::vector<Slot> slots_;
  alignas(64) std::atomic<std::uint32_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> state_{
      0};             // kStopped, and the number of meetings so far times kGeneration
  std::mutex mutex_;  // of what follows
  std::vector<bool> taken_;
  int stopped_by_ = -1;
  std::string reason_;
};

}  // namespace detail

/// One rank of a group of threads. Movable, not copyable; used by one thread at a time. Its end is
/// the end of the rank: others that wait for it, or would later, get a CommunicatorError instead of
/// waiting for ever.
class ThreadCommunicator {
 public:
  /// Calls body(communicator) once per rank, rank 0 on the calling thread and each other on a
  /// thread of its own, waits for all of them and rethrows the first exception (in time). A rank
  /// that throws wakes the others. Throws std::invalid_argument for world_size < 1,
  /// std::system_error where a thread cannot be started.
  ///
  ///   ef::ThreadCommunicator::run(2, [&](auto& communicator) { y[communicator.rank()] = ef::column_parallel_linear(x, w,
  ///   communicator); });
  template <typename Body>
  static void run(int world_size, Body&& body);

  ThreadCommunicator(ThreadCommunicator&&) noexcept = default;
  ThreadCommunicator& operator=(ThreadCommunicator&&) = delete;
  ~ThreadCommunicator() {
    if (meeting_ != nullptr) meeting_->stop(rank_, nullptr);
  }

  int rank() const { return rank_; }
  int size() const { return meeting_->ranks(); }

  /// Says why this rank ends; the others find the text in their CommunicatorError.
  void fail(const char* what) noexcept { meeting_->stop(rank_, what); }

  template <detail::ElementRange Part, detail::ElementRange Whole>
  void all_gather(const Part& part, Whole&& whole, std::span<const Index> counts = {}) {
    using T = std::ranges::range_value_t<Whole>;
    static_assert(std::is_same_v<T, std::ranges::range_value_t<Part>>,
                  "eigenformer: part and whole hold different types");
    const std::span<const T> from(part);
    const std::span<T> to(whole);
    const detail::PartSizes parts{counts, static_cast<Index>(from.size())};
    const auto call = detail::all_gather_call<T>(parts, parts.equal, static_cast<Index>(to.size()),
                                                 rank_, size());
    collective<const T>(call, from.data(), [&](auto&& memory) {
      T* target = to.data();
      for (int r = 0; r < size(); target += parts[r], ++r)
        detail::copy_elements(memory(r), target, parts[r]);
    });
  }

  /// Every rank sums a slice of all ranks' values and writes it to all: no scratch memory, 2 * size
  /// reads and writes in parallel.
  template <detail::ElementRange Values>
  void all_reduce_sum(Values&& values) {
    using T = std::ranges::range_value_t<Values>;
    static_assert(detail::Summable<T>);
    const std::span<T> own(values);
    const Index count = static_cast<Index>(own.size());
    collective<T>(detail::all_reduce_call<T>(count), own.data(), [&](auto&& memory) {
      if (size() == 1) return;
      constexpr Index kGrain = 64;  // whole cache lines: two ranks rarely write to the same one
      const ShardRange grains = shard_range((count + kGrain - 1) / kGrain, rank_, size());
      const Index begin = grains.begin * kGrain, end = (std::min)(grains.end * kGrain, count);
      detail::ordered_sum<T>(
          size(), end - begin, [&](int r) { return memory(r) + begin; },
          [&](Index offset, const T* sums, Index n) {
            for (int r = 0; r < size(); ++r)
              detail::copy_elements(sums, memory(r) + begin + offset, n);
          });
    });
  }

  template <detail::ElementRange Values>
  void broadcast(Values&& values, int root) {
    using T = std::ranges::range_value_t<Values>;
    const std::span<T> own(values);
    const Index count = static_cast<Index>(own.size());
    collective<T>(detail::broadcast_call<T>(count, root, size()), own.data(), [&](auto&& memory) {
      detail::copy_elements<T>(memory(root), own.data(), count);
    });
  }

  void barrier() { meeting_->enter(rank_, round_++, detail::kBarrierCall, nullptr); }

 private:
  friend class ThreadCommunicatorGroup;
  ThreadCommunicator(std::shared_ptr<detail::ThreadMeeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}

  template <typename T, typename Transfer>
  void collective(const detail::CollectiveCall& call, T* data, Transfer&& transfer) {
    const unsigned round = round_++;
    meeting_->enter(rank_, round, call, const_cast<std::remove_const_t<T>*>(data));
    transfer([&](int r) { return static_cast<T*>(meeting_->data(r, round)); });
    meeting_->leave();
  }

  std::shared_ptr<detail::ThreadMeeting> meeting_;
  int rank_;
  unsigned round_ = 0;
};

/// A group of long-lived ranks whose threads belong to the caller: each takes its communicator
/// once, from any thread.
///
///   ef::ThreadCommunicatorGroup group(2);
///   std::thread worker([communicator = group.communicator(1)]() mutable { serve(communicator); });
///   auto communicator = group.communicator(0);  // ... and worker.join() in the end
class ThreadCommunicatorGroup {
 public:
  /// Threads of one process: more than this no system starts.
  static constexpr int kMostRanks = 65536;

  /// Throws std::invalid_argument for a world_size outside [1, kMostRanks].
  explicit ThreadCommunicatorGroup(int world_size) {
    detail::require_that(world_size >= 1 && world_size <= kMostRanks, "ThreadCommunicator",
                         "world_size is ", world_size, ", expected 1 to ", kMostRanks);
    meeting_ = std::make_shared<detail::ThreadMeeting>(world_size);
  }

  int size() const { return meeting_->ranks(); }

  /// Throws std::invalid_argument for a rank outside [0, size()) or taken before.
  ThreadCommunicator communicator(int rank) {
    detail::require_that(rank >= 0 && rank < size(), "ThreadCommunicatorGroup", "rank is ", rank,
                         ", expected 0 to ", size() - 1);
    meeting_->take_rank(rank);
    return ThreadCommunicator(meeting_, rank);
  }

  /// Wakes every rank that waits in a collective, or enters one later, with a CommunicatorError.
  /// For good.
  void stop(const char* reason) noexcept { meeting_->stop(-1, reason); }

 private:
  std::shared_ptr<detail::ThreadMeeting> meeting_;
};

namespace detail {

/// Threads that are joined at the end of the scope. libc++ has std::jthread from version 20 on
/// only.
struct JoinedThreads {
  std::vector<std::thread> threads;
  ~JoinedThreads() {
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace detail

template <typename Body>
void ThreadCommunicator::run(int world_size, Body&& body) {
  ThreadCommunicatorGroup group(world_size);
  std::mutex mutex;
  std::exception_ptr first;
  const auto keep = [&](std::exception_ptr error) {
    const std::lock_guard lock(mutex);
    if (first == nullptr) first = std::move(error);
  };
  const auto run_rank = [&](int rank) {
    ThreadCommunicator communicator = group.communicator(rank);
    detail::attempt([&] { body(communicator); },
                    [&](const char* what) {
                      keep(std::current_exception());  // before the others wake and throw
                      communicator.fail(what);
                    });
  };
  {
    detail::JoinedThreads joined;
    std::vector<std::thread>& threads = joined.threads;
    const auto start = [&] {
      threads.reserve(static_cast<std::size_t>(world_size) - 1);
      for (int rank = 1; rank < world_size; ++rank) threads.emplace_back(run_rank, rank);
    };
    detail::attempt(start, [&](const char*) {
      keep(std::current_exception());
      group.stop("a thread could not be started");
    });
    if (static_cast<int>(threads.size()) == world_size - 1) run_rank(0);
  }
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
