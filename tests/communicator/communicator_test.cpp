// Laws: every collective gives its definition on every rank, sums have one order; a rank that
// fails, ends or calls something else is an error on the others and never a hang; nothing is
// allocated in the steady state.
#include "communicator_cases.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

#include "allocations.h"

using namespace eigenformer_test;

namespace {

TEST(SelfCommunicator, IsOneRank) {
  ef::SelfCommunicator communicator;
  EXPECT_EQ(communicator.rank(), 0);
  EXPECT_EQ(communicator.size(), 1);
  check_collectives(communicator);
  check_bad_arguments(communicator);
}

TEST(ThreadCommunicator, CollectivesEqualTheirDefinition) {
  for (int ranks = 1; ranks <= 7; ++ranks)
    ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
      EXPECT_EQ(communicator.size(), ranks);
      check_collectives(communicator);
      check_bad_arguments(communicator);
    });
}

TEST(ThreadCommunicator, DifferentCallsAreAnErrorOnEveryRank) {
  for (int ranks = 2; ranks <= 7; ++ranks)
    ef::ThreadCommunicator::run(ranks, [](auto& communicator) { check_mismatches(communicator); });
}

TEST(ThreadCommunicator, RanksAreDistinctAndAllRun) {
  for (int ranks : {1, 2, 5, 16}) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(ranks));
    ef::ThreadCommunicator::run(
        ranks, [&](auto& communicator) { ++seen[static_cast<std::size_t>(communicator.rank())]; });
    for (auto& count : seen) EXPECT_EQ(count, 1);
  }
}

TEST(ThreadCommunicator, ManyRunsAndManyCollectives) {
  for (int run = 0; run < 150; ++run) {
    const int ranks = 1 + run % 7;
    ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
      std::vector<std::int32_t> values(70), whole(static_cast<std::size_t>(ranks));
      for (int step = 0; step < 30; ++step) {
        values.assign(70, communicator.rank() + step);
        communicator.all_reduce_sum(values);
        for (auto value : values) ASSERT_EQ(value, ranks * (ranks - 1) / 2 + ranks * step);
        const std::array<std::int32_t, 1> own{communicator.rank() * step};
        communicator.all_gather(own, whole);
        for (int r = 0; r < ranks; ++r) ASSERT_EQ(whole[static_cast<std::size_t>(r)], r * step);
        communicator.broadcast(whole, step % ranks);
        if (step % 5 == 0) communicator.barrier();
      }
    });
  }
}

TEST(ThreadCommunicator, AnExceptionStopsAllRanksAndIsRethrown) {
  struct Custom : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  for (int run = 0; run < 100; ++run) {
    const int ranks = 1 + run % 7, thrower = run % ranks;
    std::atomic<int> stopped{0};
    expect_throws<Custom>(
        [&] {
          ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
            std::vector<float> values(100, 1.0f), whole(static_cast<std::size_t>(100 * ranks));
            communicator.all_gather(values, whole);
            if (communicator.rank() == thrower) throw Custom("page fault in layer 3");
            expect_throws<ef::CommunicatorError>(
                [&] {
                  if (run % 3 == 0) communicator.barrier();
                  if (run % 3 == 1) communicator.all_reduce_sum(values);
                  if (run % 3 == 2) communicator.all_gather(values, whole);
                },
                {"rank " + std::to_string(thrower) + " has failed", "page fault in layer 3"});
            ++stopped;
            communicator.barrier();  // throws again: the group is done for
            ADD_FAILURE() << "a collective completed without rank " << thrower;
          });
        },
        {"page fault"});
    EXPECT_EQ(stopped, ranks - 1);
  }
  EXPECT_THROW(ef::ThreadCommunicator::run(3,
                                           [](auto& communicator) {
                                             if (communicator.rank() == 1) throw 42;
                                             communicator.barrier();
                                           }),
               int);
}

#if defined(__linux__)
/// All threads made while it lives share one core.
class OnOneCore {
 public:
  OnOneCore() {
    sched_getaffinity(0, sizeof(before_), &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &before_)) {
        CPU_SET(core, &one);
        break;
      }
    sched_setaffinity(0, sizeof(one), &one);
  }
  ~OnOneCore() { sched_setaffinity(0, sizeof(before_), &before_); }
  OnOneCore(const OnOneCore&) = delete;
  OnOneCore& operator=(const OnOneCore&) = delete;

 private:
  cpu_set_t before_;
};

// The others let the CommunicatorError out that the failure of one brings them. Whoever it wakes
// goes first: they sleep by the time the idle thread runs, and take the core from it at once. So
// its exception is the first kept only where it is kept before that.
TEST(ThreadCommunicator, TheErrorsThatAnExceptionBringsOthersNeverTakeItsPlace) {
  const OnOneCore one_core;
  // none of them spins
  const int ranks = static_cast<int>(std::thread::hardware_concurrency()) + 2;
  for (int run = 0; run < 20; ++run)
    EXPECT_THROW(ef::ThreadCommunicator::run(ranks,
                                             [&](auto& communicator) {
                                               if (communicator.rank() == 1 + run % 2) {
                                                 const sched_param idle{};
                                                 sched_setscheduler(0, SCHED_IDLE, &idle);
                                                 throw std::out_of_range("the cause");
                                               }
                                               communicator.barrier();
                                             }),
                 std::out_of_range);
}
#endif

TEST(ThreadCommunicator, ARankThatEndsEarlyIsAnErrorForThoseWhoWait) {
  for (int run = 0; run < 50; ++run)
    expect_throws<ef::CommunicatorError>(
        [&] {
          ef::ThreadCommunicator::run(3, [&](auto& communicator) {
            communicator.barrier();
            if (communicator.rank() == run % 3) return;
            communicator.barrier();
          });
        },
        {"barrier", "rank " + std::to_string(run % 3) + " has ended"});
  // an end after the last collective disturbs nobody
  ef::ThreadCommunicator::run(4, [](auto& communicator) {
    communicator.barrier();
    if (communicator.rank() != 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(communicator.rank()));
  });
}

TEST(ThreadCommunicator, RefusesEmptyWorlds) {
  for (int ranks : {0, -1, -100})
    expect_throws<std::invalid_argument>(
        [&] { ef::ThreadCommunicator::run(ranks, [](auto&) { FAIL(); }); },
        {"ThreadCommunicator", "world_size is " + std::to_string(ranks), "1 to 65536"});
}

TEST(ThreadCommunicator, SeveralGroupsAtOnce) {
  ef::ThreadCommunicator::run(2, [](auto& outer) {
    ef::ThreadCommunicator::run(3, [&](auto& inner) {
      std::vector<float> values(1, static_cast<float>(outer.rank() * 10 + inner.rank()));
      inner.all_reduce_sum(values);
      EXPECT_EQ(values[0], static_cast<float>(outer.rank() * 30 + 3));
    });
    outer.barrier();
  });
}

TEST(ThreadCommunicator, ReducesTheSameBitsInEveryRun) {
  std::vector<double> first;
  for (int run = 0; run < 20; ++run) {
    std::vector<double> result;
    ef::ThreadCommunicator::run(5, [&](auto& communicator) {
      auto values = values_to_sum<double>(communicator.rank(), 3000);
      communicator.all_reduce_sum(values);
      if (communicator.rank() == run % 5) result = values;
    });
    if (run == 0) first = result;
    ASSERT_EQ(std::memcmp(first.data(), result.data(), first.size() * sizeof(double)), 0);
  }
}

TEST(ThreadCommunicator, AllocatesNothingInTheSteadyState) {
  std::atomic<long> before{0}, after{0};
  ef::ThreadCommunicator::run(3, [&](auto& communicator) {
    std::vector<float> part(500, 1.0f), whole(1500);
    const std::array<Index, 3> counts{500, 500, 500};
    communicator.barrier();
    if (communicator.rank() == 0) before = allocation_count.load();
    communicator.barrier();
    for (int step = 0; step < 50; ++step) {
      communicator.all_gather(part, whole, counts);
      communicator.all_reduce_sum(whole);
      communicator.broadcast(part, step % 3);
    }
    communicator.barrier();
    if (communicator.rank() == 0) after = allocation_count.load();
    communicator.barrier();
  });
  EXPECT_EQ(before, after);
}

TEST(ThreadCommunicatorGroup, ServesThreadsOfTheCaller) {
  ef::ThreadCommunicatorGroup group(3);
  EXPECT_EQ(group.size(), 3);
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int rank = 0; rank < 3; ++rank)
    threads.emplace_back([&good, communicator = group.communicator(rank)]() mutable {
      std::vector<std::int64_t> value(1, communicator.rank());
      communicator.all_reduce_sum(value);
      if (value[0] == 3) ++good;
      communicator.barrier();
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 3);
  expect_throws<std::invalid_argument>([&] { group.communicator(3); }, {"rank is 3", "0 to 2"});
  expect_throws<std::invalid_argument>([&] { group.communicator(1); }, {"rank 1 was taken"});
}

TEST(ThreadCommunicatorGroup, StopWakesThoseWhoWait) {
  for (int run = 0; run < 20; ++run) {
    ef::ThreadCommunicatorGroup group(3);
    auto absent = group.communicator(2);
    std::atomic<int> woken{0};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank)
      threads.emplace_back([&woken, communicator = group.communicator(rank)]() mutable {
        expect_throws<ef::CommunicatorError>([&] { communicator.barrier(); },
                                             {"stopped", "shutting down"});
        ++woken;
      });
    if (run % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    group.stop("shutting down");
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(woken, 2);
    expect_throws<ef::CommunicatorError>([&] { absent.barrier(); }, {"shutting down"});
  }
}

TEST(ShardRange, CoversEverythingOnceFirstRanksTakeTheRemainder) {
  for (Index count : {0, 1, 2, 3, 5, 13, 64, 97})
    for (int ranks = 1; ranks <= 9; ++ranks) {
      Index next = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const ef::ShardRange range = ef::shard_range(count, rank, ranks);
        EXPECT_EQ(range.begin, next);
        EXPECT_EQ(range.size(), count / ranks + (rank < count % ranks ? 1 : 0));
        next = range.end;
      }
      EXPECT_EQ(next, count);
    }
  expect_throws<std::invalid_argument>([] { ef::shard_range(4, 2, 2); },
                                       {"shard_range", "rank is 2", "0 to 1"});
  expect_throws<std::invalid_argument>([] { ef::shard_range(4, -1, 2); }, {"rank is -1"});
  expect_throws<std::invalid_argument>([] { ef::shard_range(4, 0, 0); }, {"world_size is 0"});
  expect_throws<std::invalid_argument>([] { ef::shard_range(-1, 0, 1); }, {"count is -1"});
}

static_assert(ef::Communicator<ef::SelfCommunicator> && ef::Communicator<ef::ThreadCommunicator>);
static_assert(!ef::Communicator<int> && !ef::Communicator<Eigen::DefaultDevice>);
static_assert(std::is_base_of_v<std::runtime_error, ef::CommunicatorError>);

}  // namespace
