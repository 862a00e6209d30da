// The laws of communicator_test on ranks that have a GPU each: collectives of device memory and of
// the host's, sums in the order of the ranks, and failures that end on every rank within the time
// limit. In C++ on emulated devices and an emulated NCCL, whose failures the tests bring about.
#include "communicator_cases.h"
#include "ranks.h"

using namespace eigenformer_test;

namespace {

TEST(NcclCommunicator, CollectivesOfTheHostsMemoryEqualTheirDefinition) {
  for_each_world(4, {}, [](const auto&, auto& communicator, auto&) {
    check_collectives(communicator);
    check_bad_arguments(communicator);
  });
}

TEST(NcclCommunicator, DifferentCallsAreAnErrorOnEveryRank) {
  for_each_world(3, {.compare_calls = true}, [](const auto&, auto& communicator, auto&) {
    check_mismatches(communicator);
    check_bad_arguments(communicator);
  });
}

/// Memory of a device from element `shift` of an allocation on, with guards on both sides.
template <typename B, typename T>
class Guarded {
 public:
  Guarded(const B& bench, const std::vector<T>& values, Index shift)
      : bench_(bench),
        shift_(shift + kGuard),
        count_(static_cast<Index>(values.size())),
        data_(bench.template allocate<T>(count_ + shift_ + kGuard)) {
    std::vector<T> all(static_cast<std::size_t>(count_ + shift_ + kGuard), guard());
    std::copy(values.begin(), values.end(), all.begin() + shift_);
    bench_.to_device(data_, all.data(), static_cast<Index>(all.size()));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { bench_.deallocate(data_); }

  std::span<T> span() const { return {data_ + shift_, static_cast<std::size_t>(count_)}; }
  /// The values, once the guards were found untouched.
  std::vector<T> host() const {
    std::vector<T> all(static_cast<std::size_t>(count_ + shift_ + kGuard));
    bench_.to_host(all.data(), data_, static_cast<Index>(all.size()));
    const T expected = guard();
    const auto untouched = [&](Index i) {
      return std::memcmp(&all[static_cast<std::size_t>(i)], &expected, sizeof(T)) == 0;
    };
    for (Index i = 0; i < shift_; ++i) EXPECT_TRUE(untouched(i)) << i;
    for (Index i = shift_ + count_; i < static_cast<Index>(all.size()); ++i)
      EXPECT_TRUE(untouched(i)) << i;
    return {all.begin() + shift_, all.begin() + shift_ + count_};
  }

 private:
  static constexpr Index kGuard = 8;
  static T guard() {
    T value;
    std::memset(static_cast<void*>(&value), 0x77, sizeof value);
    return value;
  }
  const B& bench_;
  Index shift_, count_;
  T* data_;
};

template <typename T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T, typename B, typename C>
void check_gathers_on_device(const B& bench, C& communicator) {
  const int ranks = communicator.size(), rank = communicator.rank();
  for (const bool equal : {true, false})
    for (Index largest : {0, 5, 257}) {
      std::vector<Index> counts;
      std::vector<T> whole, own;
      Index before = 0;
      for (int r = 0; r < ranks; ++r) {
        counts.push_back(equal ? largest : (r * 3 + 1) % (largest + 1));
        if (r < rank) before += counts.back();
        for (Index i = 0; i < counts.back(); ++i) {
          whole.push_back(element<T>(r, i));
          if (r == rank) own.push_back(whole.back());
        }
      }
      std::vector<T> only_own(whole.size());
      std::copy(own.begin(), own.end(), only_own.begin() + before);
      const Guarded part(bench, own, 1), target(bench, std::vector<T>(whole.size()), 0),
          in_place(bench, only_own, 3);
      std::vector<T> on_host(whole.size());
      const std::span<const Index> sizes = counts;
      communicator.all_gather(part.span(), target.span(), sizes);
      communicator.all_gather(in_place.span().subspan(static_cast<std::size_t>(before), own.size()),
                              in_place.span(), sizes);
      communicator.all_gather(part.span(), on_host, sizes);
      ASSERT_TRUE(equal_bits(target.host(), whole)) << largest;
      ASSERT_TRUE(equal_bits(in_place.host(), whole)) << largest;
      ASSERT_TRUE(equal_bits(on_host, whole)) << largest;
      const Guarded from_host(bench, std::vector<T>(whole.size()), 0);
      communicator.all_gather(own, from_host.span(), sizes);
      ASSERT_TRUE(equal_bits(from_host.host(), whole)) << largest;
    }
}

template <typename T, typename B, typename C>
void check_sums_on_device(const B& bench, C& communicator) {
  using Sum = std::conditional_t<std::is_integral_v<T>, std::uint64_t, ef::compute_type<T>>;
  for (Index count : {0, 1, 63, 65, 257, 1000})
    for (Index shift : {0, 1}) {
      const std::vector<T> first = values_to_sum<T>(0, count);
      std::vector<Sum> sums(first.begin(), first.end());
      for (int r = 1; r < communicator.size(); ++r) {
        const std::vector<T> other = values_to_sum<T>(r, count);
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += static_cast<Sum>(other[i]);
      }
      std::vector<T> expected;
      for (const Sum sum : sums) expected.push_back(static_cast<T>(sum));
      const Guarded values(bench, values_to_sum<T>(communicator.rank(), count), shift);
      communicator.all_reduce_sum(values.span());
      ASSERT_TRUE(equal_bits(values.host(), expected)) << count << " from " << shift;
    }
}

TEST(NcclCommunicator, CollectivesOfTheDevicesMemoryEqualTheirDefinition) {
  for_each_world(3, {}, [](const auto& bench, auto& communicator, auto&) {
    check_gathers_on_device<float>(bench, communicator);
    check_gathers_on_device<ef::half>(bench, communicator);
    check_sums_on_device<float>(bench, communicator);
    check_sums_on_device<double>(bench, communicator);
    check_sums_on_device<ef::bfloat16>(bench, communicator);
    check_sums_on_device<ef::half>(bench, communicator);
    check_sums_on_device<std::int64_t>(bench, communicator);
    for (int root = 0; root < communicator.size(); ++root) {
      const Guarded values(bench, std::vector<float>(33, 1.0f + communicator.rank()), 1);
      communicator.broadcast(values.span(), root);
      ASSERT_TRUE(equal_bits(values.host(), std::vector<float>(33, 1.0f + root)));
    }
    communicator.wait();
    communicator.barrier();
  });
}

TEST(NcclCommunicator, LongSumsGoInPieces) {
  for_each_world(3, {.largest_scratch = 300}, [](const auto& bench, auto& communicator, auto&) {
    check_sums_on_device<ef::bfloat16>(bench, communicator);
    check_all_gather<double>(communicator);
  });
}

TEST(NcclCommunicator, MovesAndIsMadeOfAnIdToo) {
  for_each_world(2, {}, [](const auto& bench, auto& communicator, auto& threads) {
    using C = std::remove_reference_t<decltype(communicator)>;
    static_assert(ef::Communicator<C>);
    std::array<decltype(C::unique_id()), 1> id{};
    if (threads.rank() == 0) id[0] = C::unique_id();
    threads.broadcast(id, 0);
    C other(bench.device, id[0], threads.rank(), threads.size());
    C moved(std::move(other));
    check_all_gather<float>(moved);
    check_all_gather<float>(communicator);
    expect_throws<ef::CommunicatorError>([&] { other.barrier(); }, {"moved from"});
    expect_throws<std::invalid_argument>([&] { C(bench.device, id[0], 2, 2); }, {"rank is 2"});
    expect_throws<std::invalid_argument>([&] { C(bench.device, id[0], 0, 0); }, {"there are 0"});
    expect_throws<std::invalid_argument>(
        [&] { C(bench.device, id[0], 0, 1, {.time_limit = std::chrono::milliseconds(0)}); },
        {"time_limit is 0 ms"});
    moved.abort();
    expect_throws<ef::CommunicatorError>([&] { moved.wait(); }, {"it was aborted"});
  });
}

#if defined(EIGENFORMER_TEST_BLOCKS)

constexpr NcclOptions kShort{.time_limit = std::chrono::milliseconds(200)};

/// f on each rank, on devices that work at once or wait; no communicator is lost.
template <typename F>
void on_ranks_that_fail(int ranks, bool deferred, F&& f) {
  emulated::StreamOptions stream;
  stream.deferred = deferred;
  on_ranks(ranks, kShort, stream, f);
  EXPECT_EQ(emulated::nccl_communicators, 0);
}

TEST(NcclCommunicator, ARankThatNeverComesIsAnErrorWithinTheLimit) {
  for (int what = 0; what < 4; ++what)
    on_ranks_that_fail(3, what % 2 == 0, [&](const auto& bench, auto& communicator, auto& threads) {
      if (threads.rank() != 1) {
        const Guarded values(bench, std::vector<float>(200, 1.0f), 0);
        expect_throws<ef::CommunicatorError>(
            [&] {
              if (what == 0) communicator.barrier();
              if (what == 1) communicator.all_reduce_sum(values.span());
              if (what == 2) communicator.broadcast(values.span(), 1);
              if (what == 3) communicator.all_gather(values.span(), std::vector<float>(600));
              communicator.wait();
            },
            {"NcclCommunicator: rank " + std::to_string(threads.rank()) + " of 3",
             "no answer within 200 ms", what == 1 ? "all_reduce_sum of 200 float" : ""});
        expect_throws<ef::CommunicatorError>([&] { communicator.all_reduce_sum(values.span()); },
                                             {"the communicator has ended", "no answer"});
        bench.device.synchronize();  // what it had of the communicator has ended
      }
      threads.barrier();
    });
}

TEST(NcclCommunicator, RanksThatAreNotComparedAndCallOtherThingsAreAnErrorToo) {
  on_ranks_that_fail(2, true, [](const auto& bench, auto& communicator, auto& threads) {
    const Guarded values(bench, std::vector<float>(200, 1.0f), 0);
    expect_throws<ef::CommunicatorError>(
        [&] {
          if (threads.rank() == 0) communicator.all_reduce_sum(values.span());
          if (threads.rank() == 1) communicator.broadcast(values.span(), 1);
          communicator.wait();
        },
        {"no answer"});
    threads.barrier();
  });
}

TEST(NcclCommunicator, ARankThatThrowsAbortsAndTheOthersHearOfIt) {
  struct Custom : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  int heard = 0;
  expect_throws<Custom>(
      [&] {
        on_ranks(2, kShort, {}, [&](const auto& bench, auto& communicator, auto& threads) {
          const Guarded values(bench, std::vector<float>(20, 1.0f), 0);
          communicator.all_reduce_sum(values.span());
          if (threads.rank() == 1) throw Custom("page fault in layer 3");
          expect_throws<ef::CommunicatorError>([&] { communicator.barrier(); }, {"no answer"});
          ++heard;
        });
      },
      {"page fault"});
  EXPECT_EQ(heard, 1);
  EXPECT_EQ(emulated::nccl_communicators, 0);
}

TEST(NcclCommunicator, FailuresOfNcclAreExceptions) {
  bool deferred = false;
  for (const char* call :
       {"ncclAllGather", "ncclBroadcast", "ncclSend", "ncclRecv", "ncclGroupEnd"})
    on_ranks_that_fail(
        2, deferred = !deferred, [&](const auto& bench, auto& communicator, auto& threads) {
          const Guarded values(bench, std::vector<float>(200, 1.0f), 0);
          const bool fails = threads.rank() == 1;
          if (fails) emulated::nccl_failures = {.call = call, .result = ncclSystemError};
          expect_throws<ef::CommunicatorError>(
              [&] {
                communicator.all_reduce_sum(values.span());
                communicator.broadcast(values.span(), 0);
                communicator.barrier();
              },
              {fails ? std::string(call) + ": unhandled system error" : "no answer"});
          threads.barrier();
        });
  on_ranks_that_fail(2, false, [&](const auto& bench, auto& communicator, auto& threads) {
    const Guarded values(bench, std::vector<float>(200, 1.0f), 0);
    emulated::nccl_failures = {.asynchronous = ncclRemoteError};
    expect_throws<ef::CommunicatorError>([&] { communicator.all_reduce_sum(values.span()); },
                                         {"ncclGroupEnd: remote error"});
    threads.barrier();
  });
}

TEST(NcclCommunicator, CannotBeMadeWhereNcclFailsOrARankIsAbsent) {
  const auto make = [](int ranks, auto&& before, std::vector<std::string> fragments) {
    ef::ThreadCommunicator::run(ranks, [&](auto& threads) {
      emulated::Stream stream;
      const emulated::Device device(&stream);
      expect_throws<ef::CommunicatorError>(
          [&] {
            before(threads);
            ef::BasicNcclCommunicator communicator(device, threads, kShort);
          },
          fragments);
      emulated::nccl_failures = {};
    });
    EXPECT_EQ(emulated::nccl_communicators, 0);
  };
  make(3,
       [](auto& threads) {  // every rank hears of it
         if (threads.rank() == 0)
           emulated::nccl_failures = {.call = "ncclGetUniqueId", .result = ncclSystemError};
       },
       {"ncclGetUniqueId: unhandled system error"});
  make(2,
       [](auto&) {
         emulated::nccl_failures = {.call = "ncclCommInitRankConfig", .result = ncclInternalError};
       },
       {"creation, ncclCommInitRankConfig: internal error"});
  emulated::Stream stream;
  const emulated::Device device(&stream);
  using C = ef::BasicNcclCommunicator<emulated::Device>;
  expect_throws<ef::CommunicatorError>([&] { C(device, C::unique_id(), 0, 2, kShort); },
                                       {"creation", "no answer within 200 ms"});
  emulated::nccl_failures = {.call = "ncclGetUniqueId", .result = ncclSystemError};
  expect_throws<ef::CommunicatorError>([&] { C::unique_id(); }, {"unhandled system error"});
  EXPECT_EQ(emulated::nccl_communicators, 0);
}

TEST(NcclCommunicator, CollectivesAreCaptured) {
  on_ranks(3, {}, {.deferred = true}, [](const auto& bench, auto& communicator, auto& threads) {
    emulated::Stream& stream = bench.device.stream();
    const Guarded values(bench, std::vector<double>(100, 1.0), 0),
        all(bench, std::vector<double>(300), 0);
    stream.begin_capture();
    communicator.all_reduce_sum(values.span());
    communicator.all_gather(values.span(), all.span());
    expect_throws<ef::DeviceError>([&] { communicator.wait(); }, {"captured"});
    expect_throws<ef::DeviceError>([&] { communicator.barrier(); }, {"captured"});
    std::vector<double> host(4);
    expect_throws<ef::DeviceError>([&] { communicator.broadcast(host, 0); }, {"captured"});
    const emulated::Stream::Graph graph = stream.end_capture();
    ASSERT_TRUE(equal_bits(values.host(), std::vector<double>(100, 1.0)));
    stream.replay(graph);
    stream.replay(graph);
    communicator.wait();
    ASSERT_TRUE(equal_bits(values.host(), std::vector<double>(100, 9.0)));
    ASSERT_TRUE(equal_bits(all.host(), std::vector<double>(300, 9.0)));
    threads.barrier();
  });
}

TEST(NcclCommunicator, TakesNoMemoryOfTheDeviceTwice) {
  std::uint64_t before = 0, after = 0;
  on_ranks(2, {.compare_calls = true}, {},
           [&](const auto& bench, auto& communicator, auto& threads) {
             const Guarded values(bench, std::vector<float>(1000, 1.0f), 0),
                 all(bench, std::vector<float>(2000), 0);
             std::vector<float> host(500);
             for (int step = 0; step < 5; ++step) {
               threads.barrier();
               if (step == 2 && threads.rank() == 0)
                 before = emulated::DeviceMemory::instance().allocations();
               threads.barrier();
               communicator.all_reduce_sum(values.span());
               communicator.all_gather(values.span(), all.span());
               communicator.all_reduce_sum(host);
               communicator.barrier();
             }
             threads.barrier();
             if (threads.rank() == 0) after = emulated::DeviceMemory::instance().allocations();
             threads.barrier();
           });
  EXPECT_GT(before, 0u);
  EXPECT_EQ(before, after);
}

#endif

}  // namespace
