/// \file
/// Runs the threads of a block as fibers, one at a time: each until it ends, or waits at a barrier
/// or for lanes of its warp. Then a seed says who is next: seed 0 takes them in order, others
/// shuffle. Where nobody can go on, the block is divergent: the fault names who waits where and who
/// does not come. The first fault ends the launch; the stacks of all threads are unwound, but that
/// of a thread that touched memory of nobody: it is left where it stood.
#pragma once

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/cuda/backend.cuh>

#include "device_memory.h"
#include "fault.h"
#include "fiber.h"
#include "shared_memory.h"

namespace eigenformer_test::emulated {

using ef::cuda::kWarp;

/// What the lanes of a mask bring to one operation of their warp; complete once all have come.
struct Exchange {
  static constexpr std::size_t kBytes = 64;
  const char* operation;
  unsigned mask, arrived;
  int leaving;  // lanes that have yet to read
  Where where;
  alignas(16) std::byte brought[kWarp][kBytes];

  template <typename T>
  T of(int lane) const {
    T value;
    std::memcpy(static_cast<void*>(&value), brought[lane], sizeof(T));
    return value;
  }
};

class BlockRunner {
 public:
  /// What a launch has for each of its blocks.
  struct Launch {
    int threads;
    std::size_t shared_bytes;
    std::uint64_t seed;
    std::function<void(BlockRunner&, int, Index)> body;  // a thread of a block
  };

  /// Runs one block. Throws Fault, or what the kernel throws.
  void run(const Launch& launch, Index block) {
    start(launch, block);
    while (ended_ < launch_->threads && !error_) {
      if (ready_.empty()) {
        try {
          pass_barrier();
        } catch (...) {
          error_ = std::current_exception();
        }
      } else {
        go_on(next());
      }
    }
    if (!error_) return;
    unwinding_ = true;
    for (int t = 0; t < launch_->threads; ++t)
      if (thread(t).state != State::ended) thread(t).resume();
    unwinding_ = false;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  int size() const { return launch_->threads; }

  void barrier(int t, const Where& where) {
    thread(t).state = State::at_barrier;
    thread(t).where = where;
    thread(t).wait();
  }

  /// The n-th array that a thread asks for: the same for all of them.
  SharedArray& array(int t, std::size_t element, Index count, const Where& where) {
    const std::size_t n = thread(t).arrays++;
    if (n == arrays_.size()) arrays_.push_back(std::make_unique<SharedArray>());
    SharedArray& array = *arrays_[n];
    if (n == made_) {
      ++made_;
      shared_used_ += (element * static_cast<std::size_t>(count) + 15) / 16 * 16;
      if (count < 0 || shared_used_ > launch_->shared_bytes)
        throw Fault("out of bounds: shared arrays up to that of " + text_of(where) + " take " +
                    std::to_string(shared_used_) + " bytes, the launch has " +
                    std::to_string(launch_->shared_bytes));
      array.reset(element, count, first_epoch_);
    } else if (array.element() != element || array.count() != count) {
      throw Fault("thread " + std::to_string(t) + " asks for " + std::to_string(count) +
                  " elements of " + std::to_string(element) + " bytes at " + text_of(where) +
                  ", another thread for " + std::to_string(array.count()) + " of " +
                  std::to_string(array.element()));
    }
    return array;
  }

  Access access(int t, const Where& where, bool atomic = false) const {
    return {t, block_epoch_, warps_[static_cast<std::size_t>(t / kWarp)].epoch, where, atomic};
  }

  /// Brings a value to an operation of the lanes of a mask, waits for all of them, and returns
  /// read(exchange).
  template <typename T, typename Read>
  auto exchange(int t, const char* operation, unsigned mask, const T& value, const Where& where,
                Read&& read) {
    static_assert(sizeof(T) <= Exchange::kBytes && std::is_trivially_copyable_v<T>);
    Exchange& exchange = join(t, operation, mask, where);
    std::memcpy(exchange.brought[t % kWarp], &value, sizeof(T));
    if (exchange.arrived == mask)
      complete(t, exchange);
    else
      wait_for_lanes(t, where);
    auto result = read(const_cast<const Exchange&>(exchange));
    if (--exchange.leaving == 0) free_.push_back(&exchange);
    return result;
  }

 private:
  enum class State : std::uint8_t { ready, at_barrier, at_exchange, ended };
  struct Unwind {};

  class Thread : public Fiber {
   public:
    Thread(BlockRunner& owner, int number) : owner_(owner), number_(number) {}
    void wait() {
      suspend();
      if (owner_.unwinding_) throw Unwind();
    }
    void leave(const void* touched) {
      owner_.strayed_ = true;
      owner_.touched_ = touched;
      suspend();
    }
    State state = State::ended;
    Where where;
    std::size_t arrays = 0;

   private:
    void run() override {
      try {
        if (!owner_.unwinding_) owner_.launch_->body(owner_, number_, owner_.block_);
      } catch (const Unwind&) {
      } catch (...) {
        if (!owner_.error_) owner_.error_ = std::current_exception();
      }
      state = State::ended;
      ++owner_.ended_;
    }
    BlockRunner& owner_;
    int number_;
  };

  struct Warp {
    std::uint64_t epoch = 0;
    std::vector<Exchange*> open;
  };

  /// One turn of a thread. Where it touches memory of nobody the signal's handler ends the turn.
  void go_on(int t) {
    static const bool watching = watch_memory();
    static_cast<void>(watching);
    strayed_ = false;
    turn = &thread(t);
    thread(t).resume();
    turn = nullptr;
    if (!strayed_) return;
    error_ =
        std::make_exception_ptr(Fault("out of bounds: thread " + std::to_string(t) + " touches " +
                                      DeviceMemory::instance().describe(touched_)));
    threads_[static_cast<std::size_t>(t)] = std::make_unique<Thread>(*this, t);
    ++ended_;
  }
  static bool watch_memory() {
#if defined(EIGENFORMER_TEST_TSAN)  // which keeps signals for itself
    return false;
#else
    struct sigaction action {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
      if (turn == nullptr) {  // of somebody else: it happens again and meets what it would have met
        sigaction(SIGSEGV, &action_before, nullptr);
        return;
      }
      turn->leave(info->si_addr);
    };
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler never returns to a kernel
    return sigaction(SIGSEGV, &action, &action_before) == 0;
#endif
  }

  Thread& thread(int t) { return *threads_[static_cast<std::size_t>(t)]; }

  void start(const Launch& launch, Index block) {
    launch_ = &launch;
    block_ = block;
    while (static_cast<int>(threads_.size()) < launch.threads)
      threads_.push_back(std::make_unique<Thread>(*this, static_cast<int>(threads_.size())));
    warps_.resize((threads_.size() + kWarp - 1) / kWarp);
    for (Warp& warp : warps_) {
      free_.insert(free_.end(), warp.open.begin(), warp.open.end());
      warp.open.clear();
    }
    for (int t = 0; t < launch.threads; ++t) thread(t).arrays = 0;
    made_ = shared_used_ = 0;
    ended_ = 0;
    first_epoch_ = ++block_epoch_;
    random_ = launch.seed == 0
                  ? 0
                  : launch.seed * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(block) + 1;
    all_ready();
  }

  void all_ready() {
    ready_.clear();
    for (int t = launch_->threads - 1; t >= 0; --t) {
      thread(t).state = State::ready;
      ready_.push_back(t);
    }
  }

  /// One of those that can go on, taken out.
  int next() {
    if (random_ != 0) {  // xorshift64*
      random_ ^= random_ >> 12;
      random_ ^= random_ << 25;
      random_ ^= random_ >> 27;
      const std::uint64_t draw = (random_ * 0x2545f4914f6cdd1du) >> 32;
      std::swap(ready_[(draw * ready_.size()) >> 32], ready_.back());
    }
    const int t = ready_.back();
    ready_.pop_back();
    return t;
  }

  Exchange& join(int t, const char* operation, unsigned mask, const Where& where) {
    Warp& warp = warps_[static_cast<std::size_t>(t / kWarp)];
    const unsigned own = 1u << t % kWarp;
    const auto refuse = [&](const std::string& why) {
      throw Fault(std::string(operation) + " at " + text_of(where) + ": thread " +
                  std::to_string(t) + " " + why);
    };
    if ((mask & own) == 0) refuse("is not in the mask it gives");
    for (Exchange* exchange : warp.open) {
      if ((exchange->mask & mask) == 0) continue;
      if (exchange->mask != mask || std::strcmp(exchange->operation, operation) != 0 ||
          !same_place(exchange->where, where))
        refuse("meets lanes of its warp at the " + std::string(exchange->operation) + " of " +
               text_of(exchange->where));
      exchange->arrived |= own;
      return *exchange;
    }
    if (free_.empty()) {
      exchanges_.push_back(std::make_unique<Exchange>());
      free_.push_back(exchanges_.back().get());
    }
    Exchange& exchange = *free_.back();
    free_.pop_back();
    exchange.operation = operation;
    exchange.mask = mask;
    exchange.arrived = own;
    exchange.leaving = __builtin_popcount(mask);
    exchange.where = where;
    warp.open.push_back(&exchange);
    return exchange;
  }

  void complete(int t, Exchange& exchange) {
    Warp& warp = warps_[static_cast<std::size_t>(t / kWarp)];
    std::erase(warp.open, &exchange);
    if (exchange.mask == ef::cuda::kAllLanes &&
        std::strcmp(exchange.operation, "warp_barrier") == 0)
      ++warp.epoch;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int other = t / kWarp * kWarp + lane;
      if ((exchange.mask >> lane & 1) == 0 || other == t) continue;
      thread(other).state = State::ready;
      ready_.push_back(other);
    }
  }

  void wait_for_lanes(int t, const Where& where) {
    thread(t).state = State::at_exchange;
    thread(t).where = where;
    thread(t).wait();
  }

  /// Nobody can go on: all are at one barrier, or this throws.
  void pass_barrier() {
    for (std::size_t w = 0; w < warps_.size(); ++w)
      for (const Exchange* exchange : warps_[w].open) throw Fault(absent_lanes(*exchange, w));
    std::optional<int> first;
    std::vector<int> there, elsewhere;
    for (int t = 0; t < launch_->threads; ++t) {
      if (thread(t).state == State::at_barrier && !first) first = t;
      const bool at_first = first && thread(t).state == State::at_barrier &&
                            same_place(thread(t).where, thread(*first).where);
      (at_first ? there : elsewhere).push_back(t);
    }
    if (!elsewhere.empty())
      throw Fault("divergent barrier: " + list_of("thread", there) + " at " +
                  text_of(thread(*first).where) + ", not " + list_of("thread", elsewhere) + ": " +
                  whereabouts(elsewhere[0]));
    ++block_epoch_;
    all_ready();
  }

  std::string absent_lanes(const Exchange& exchange, std::size_t warp) {
    std::vector<int> came, absent;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((exchange.mask >> lane & 1) == 0) continue;
      const int t = static_cast<int>(warp) * kWarp + lane;
      ((exchange.arrived >> lane & 1) != 0 ? came : absent).push_back(t);
    }
    return std::string(exchange.operation) + " at " + text_of(exchange.where) + ": " +
           list_of("thread", came) + " wait for " + list_of("thread", absent) + ": " +
           whereabouts(absent[0]);
  }

  std::string whereabouts(int t) {
    const std::string who = "thread " + std::to_string(t);
    if (t >= launch_->threads)
      return who + " is not in this block of " + std::to_string(launch_->threads);
    switch (thread(t).state) {
      case State::ended:
        return who + " has ended";
      case State::at_barrier:
        return who + " waits at the barrier of " + text_of(thread(t).where);
      default:
        return who + " waits for lanes at " + text_of(thread(t).where);
    }
  }

  const Launch* launch_ = nullptr;
  Index block_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<int> ready_;
  int ended_ = 0;
  std::uint64_t random_ = 0, block_epoch_ = 0, first_epoch_ = 0;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;
  std::vector<Exchange*> free_;
  std::vector<std::unique_ptr<SharedArray>> arrays_;
  std::size_t made_ = 0, shared_used_ = 0;
  std::exception_ptr error_;
  bool unwinding_ = false, strayed_ = false;
  const void* touched_ = nullptr;
  static inline thread_local Thread* turn = nullptr;  // whose it is
  static inline struct sigaction action_before {};
};

}  // namespace eigenformer_test::emulated
