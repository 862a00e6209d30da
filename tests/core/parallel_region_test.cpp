// ParallelRegion: the same parts and bits as without, no allocation once its threads are awake, and
// no call that waits for a thread which others keep busy.
#include <eigenformer/linear.h>
#include <eigenformer/parallel_region.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <optional>
#include <thread>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;
using namespace std::chrono_literals;

namespace {

struct Part {
  Index begin = -1, end = -1;
  int calls = 0;
  bool operator==(const Part&) const = default;
};

// Slot w is what the body was told as worker w.
std::vector<Part> parts_of(const Eigen::ThreadPoolDevice& device, Index count, ef::cpu::Cost cost) {
  std::vector<Part> parts(static_cast<std::size_t>(ef::cpu::worker_count(device)));
  ef::cpu::parallel_for(device, count, cost, [&](Index begin, Index end, int worker) {
    Part& part = parts[static_cast<std::size_t>(worker)];  // exclusive, or TSan says so
    part = {begin, end, part.calls + 1};
  });
  return parts;
}

// Parts whose sums come to count * (count - 1) / 2: a lost or doubled part shows.
Index sum_of_indices(const Eigen::ThreadPoolDevice& device, Index count) {
  std::atomic<Index> sum{0};
  ef::cpu::parallel_for(device, count, ef::cpu::kWorthAThread, [&](Index begin, Index end, int) {
    Index part = 0;
    for (Index i = begin; i < end; ++i) part += i;
    sum.fetch_add(part, std::memory_order_relaxed);
  });
  return sum;
}

// Until the helpers have come: parts are computed on two threads.
bool helpers_come(const Eigen::ThreadPoolDevice& device) {
  const auto opener = std::this_thread::get_id();
  const auto give_up = std::chrono::steady_clock::now() + 20s;
  std::atomic<bool> came{false};
  while (!came && std::chrono::steady_clock::now() < give_up)
    ef::cpu::parallel_for(device, ef::cpu::worker_count(device), ef::cpu::kWorthAThread,
                          [&](Index, Index, int) {
                            if (std::this_thread::get_id() != opener) came = true;
                            std::this_thread::sleep_for(100us);
                          });
  return came;
}

TEST(ParallelRegion, PartsAsWithoutForWorkOfSixteenTimesTheCost) {
  for (int count : {1, 2, 3, 8}) {
    Threads threads(count);
    for (Index n : {0, 1, 2, 7, 8, 9, 100})
      for (Index elements : {0, 1, 47, 300, 999, 1000, 16000}) {
        const auto expected = parts_of(threads.device, n, {16 * elements});
        const ef::ParallelRegion region(threads.device);
        for (int again = 0; again < 3; ++again)
          EXPECT_EQ(parts_of(threads.device, n, {elements}), expected) << n << ' ' << elements;
      }
  }
}

TEST(ParallelRegion, LinearHasTheSameBits) {
  Threads threads(3);
  const auto x = random_tensor<float, 2>({5, 300}, 1),
             weight = random_tensor<float, 2>({700, 300}, 2);
  const auto expected = ef::linear(x, weight);
  const auto packed = ef::pack_weight<std::int8_t>(weight);
  const auto expected8 = ef::linear(Eigen::DefaultDevice{}, x, packed);
  const ef::ParallelRegion region(threads.device);
  for (int again = 0; again < 20; ++again) {
    EXPECT_TRUE(same_bits(ef::linear(threads.device, x, weight), expected));
    EXPECT_TRUE(same_bits(ef::linear(threads.device, x, packed), expected8));
  }
}

TEST(ParallelRegion, AllocatesNothingWhileItsThreadsAreAwake) {
  for (int count : {2, 4}) {
    Threads threads(count);
    const auto x = random_tensor<float, 2>({1, 512}, 1);
    const auto weight = ef::pack_weight<std::int8_t>(random_tensor<float, 2>({1024, 512}, 2));
    ef::Tensor<float, 2> y(1, 1024);
    const ef::ParallelRegion region(threads.device, {.linger = 60s});
    EXPECT_TRUE(helpers_come(threads.device));
    ef::linear_into(threads.device, y, x, weight);
    EXPECT_EQ(count_allocations([&] {
                for (int i = 0; i < 1000; ++i) sum_of_indices(threads.device, 100);
                for (int i = 0; i < 10; ++i) ef::linear_into(threads.device, y, x, weight);
              }),
              0);
  }
}

// Uneven parts: now the opener is late, now its helpers are, so that either takes parts of the
// other.
TEST(ParallelRegion, ManyShortJobs) {
  for (int count : {2, 5}) {
    Threads threads(count);
    const ef::ParallelRegion region(threads.device);
    for (int i = 0; i < 100000; ++i) {
      const Index n = 2 + i % 7;  // now fewer parts than threads, now as many
      std::vector<Index> sums(static_cast<std::size_t>(count), 0);
      ef::cpu::parallel_for(threads.device, n, ef::cpu::kWorthAThread,
                            [&](Index begin, Index end, int worker) {
                              for (int pauses = (worker * 5 + i) % 11 * 4; pauses > 0; --pauses)
                                ef::detail::pause_instruction();
                              for (Index j = begin; j < end; ++j)
                                sums[static_cast<std::size_t>(worker)] += j;
                            });
      ASSERT_EQ(std::accumulate(sums.begin(), sums.end(), Index{0}), n * (n - 1) / 2);
    }
  }
}

TEST(ParallelRegion, OpensAndEndsOftenWithAndWithoutJobs) {
  Threads threads(3);
  for (int i = 0; i < 2000; ++i) {
    const ef::ParallelRegion region(threads.device);
    for (int job = i % 2; job < 1; ++job) EXPECT_EQ(sum_of_indices(threads.device, 10), 45);
  }
}

TEST(ParallelRegion, ASecondOneOnThePoolIsANoOp) {
  Threads threads(3), others(2);
  const Eigen::ThreadPoolDevice same_pool(&threads.pool, 2);
  const ef::ParallelRegion outer(threads.device);
  std::optional<ef::ParallelRegion<Eigen::ThreadPoolDevice>> inner;
  EXPECT_EQ(count_allocations([&] { inner.emplace(threads.device); }), 0);
  EXPECT_EQ(count_allocations([&] { const ef::ParallelRegion third(same_pool); }), 0);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(sum_of_indices(threads.device, 10), 45);
    EXPECT_EQ(sum_of_indices(same_pool, 10), 45);
    const ef::ParallelRegion another(others.device);  // inside of outer, on a pool of its own
    EXPECT_EQ(sum_of_indices(others.device, 10), 45);
    EXPECT_EQ(sum_of_indices(threads.device, 10), 45);
    if (i == 50) inner.reset();
  }
}

TEST(ParallelRegion, NothingToDoOnOneThread) {
  Threads one(1), two(2);
  EXPECT_EQ(count_allocations([&] {
              const ef::ParallelRegion a(one.device);
              const Eigen::DefaultDevice serial;
              const ef::ParallelRegion b(serial, {.linger = 1us});
            }),
            0);
  std::atomic<int> total{0};
  ef::cpu::parallel_for(two.device, 2, ef::cpu::kWorthAThread, [&](Index begin, Index end, int) {
    // on the caller a region, on the pool's thread nothing
    const ef::ParallelRegion region(two.device);
    for (Index i = begin; i < end; ++i) total += static_cast<int>(sum_of_indices(two.device, 10));
  });
  EXPECT_EQ(total.load(), 90);
}

TEST(ParallelRegion, CallsFromWithinAPartRunAlone) {
  Threads threads(3);
  const ef::ParallelRegion region(threads.device);
  for (int i = 0; i < 1000; ++i) {
    std::atomic<Index> total{0};
    ef::cpu::parallel_for(threads.device, 5, ef::cpu::kWorthAThread,
                          [&](Index begin, Index end, int) {
                            for (Index j = begin; j < end; ++j)
                              total += sum_of_indices(threads.device, 10);
                          });
    ASSERT_EQ(total.load(), 225);
  }
}

TEST(ParallelRegion, ASerialOneMakesOnePart) {
  Threads threads(3);
  const std::vector<Part> apart = parts_of(threads.device, 30, ef::cpu::kWorthAThread);
  {
    const ef::ParallelRegion region(threads.device, {.serial = true});
    const std::vector<Part> one{{0, 30, 1}, {}, {}};
    EXPECT_EQ(parts_of(threads.device, 30, ef::cpu::kWorthAThread), one);
    const ef::ParallelRegion second(threads.device);  // a no-op: the outer one decides
    EXPECT_EQ(parts_of(threads.device, 30, ef::cpu::kWorthAThread), one);
  }
  EXPECT_EQ(parts_of(threads.device, 30, ef::cpu::kWorthAThread), apart);
  EXPECT_EQ(apart[2].calls, 1);
}

TEST(ParallelRegion, TwoThreadsTwoPools) {
  const auto serve = [] {
    Threads threads(2);
    for (int i = 0; i < 200; ++i) {
      const ef::ParallelRegion region(threads.device);
      for (int j = 0; j < 20; ++j) EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
    }
  };
  std::thread other(serve);
  serve();
  other.join();
}

TEST(ParallelRegion, TwoThreadsOnePoolBothInARegion) {
  for (int count : {2, 4}) {
    Threads threads(count);
    const auto serve = [&] {
      for (int i = 0; i < 100; ++i) {
        const ef::ParallelRegion region(threads.device);
        for (int j = 0; j < 20; ++j) EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
      }
    };
    std::thread second(serve), third(serve);
    serve();
    second.join();
    third.join();
  }
}

TEST(ParallelRegion, OthersUseThePoolWhileARegionIsIdle) {
  Threads threads(2);
  const ef::ParallelRegion region(threads.device, {.linger = 1ms});
  EXPECT_TRUE(helpers_come(threads.device));
  // This thread's region serves it alone: the other one's parts are ordinary tasks.
  std::thread([&] {
    for (int i = 0; i < 1000; ++i) EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
  }).join();
  EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
}

TEST(ParallelRegion, DoesNotWaitForABusyPool) {
  Threads threads(2);
  std::atomic<bool> release{false};
  Eigen::Barrier begun(2), ended(2);
  for (int i = 0; i < 2; ++i)
    threads.pool.Schedule([&] {
      begun.Notify();
      while (!release) std::this_thread::yield();
      ended.Notify();
    });
  begun.Wait();
  // All parts by the opener, and nobody to wait for at the end. The pool's queues hold 1024 tasks
  // each: they overflow, too.
  for (int i = 0; i < 3000; ++i) {
    const ef::ParallelRegion region(threads.device);
    EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
    EXPECT_EQ(sum_of_indices(threads.device, 50), 1225);
  }
  release = true;
  ended.Wait();
}

TEST(ParallelRegion, ThreadsLeaveWhenIdleAndAreCalledAgain) {
  Threads threads(2);
  const ef::ParallelRegion region(threads.device, {.linger = 200us});
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(helpers_come(threads.device));
    // Both threads of the pool are free again when two tasks of somebody else can be under way at
    // once.
    Eigen::Barrier together(2), ended(2);
    for (int t = 0; t < 2; ++t)
      threads.pool.Schedule([&] {
        together.Notify();
        together.Wait();
        ended.Notify();
      });
    ended.Wait();
  }
}

}  // namespace
