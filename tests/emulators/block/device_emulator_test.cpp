// The emulated device around its blocks: memory that host code cannot touch, launches that a GPU
// would refuse, the order of a stream, graphs, and what the arguments of a call cost.
#include "device.h"

#include <gtest/gtest.h>

#include <csetjmp>
#include <csignal>

#include <eigenformer/normalization.h>

#include "compare.h"

using namespace eigenformer_test;
using emulated::Device;
using emulated::Stream;
using Backend = ef::cuda::Backend<Device>;

namespace {

// ---- memory -------------------------------------------------------------------------------------

sigjmp_buf after_fault;

/// Whether f touches memory that it may not.
template <typename F>
bool segfaults(F&& f) {
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) { siglongjmp(after_fault, 1); };
  sigaction(SIGSEGV, &action, &before);
  const bool faulted = sigsetjmp(after_fault, 1) != 0;
  if (!faulted) f();
  sigaction(SIGSEGV, &before, nullptr);
  return faulted;
}

/// Memory of the device.
template <typename T>
struct Buffer {
  explicit Buffer(const Device& d, std::size_t n)
      : device(d), count(n), data(static_cast<T*>(d.allocate(n * sizeof(T)))) {}
  ~Buffer() { device.deallocate(data); }
  std::vector<T> host() const {
    std::vector<T> result(count);
    device.memcpyDeviceToHost(result.data(), data, count * sizeof(T));
    device.synchronize();
    return result;
  }
  const Device& device;
  std::size_t count;
  T* data;
};

TEST(EmulatedDevice, HostCodeCannotTouchItsMemory) {
  Stream stream;
  const Device device(&stream);
  const Buffer<float> buffer(device, 5);
  volatile float* const memory = buffer.data;
  EXPECT_TRUE(segfaults([&] { static_cast<void>(memory[0]); }));
  EXPECT_TRUE(segfaults([&] { memory[4] = 1; }));
  launch(Backend{device}, "write", 1, 5, 0,
         [memory](auto& block) { memory[block.thread()] = static_cast<float>(block.thread()); });
  EXPECT_TRUE(segfaults([&] { static_cast<void>(memory[0]); }));  // and closed again
  EXPECT_EQ(buffer.host(), (std::vector<float>{0, 1, 2, 3, 4}));
  EXPECT_FALSE(segfaults([] {}));
}

TEST(EmulatedDevice, ItsMemoryBeginsAsNaNAndEndsAtAGuardedPage) {
  Stream stream;
  const Device device(&stream);
  const Buffer<float> buffer(device, 8);
  for (float x : buffer.host()) EXPECT_TRUE(std::isnan(x));
  const emulated::DeviceMemory::Opened opened;
  EXPECT_FALSE(segfaults([&] { static_cast<void>(static_cast<volatile float*>(buffer.data)[7]); }));
  EXPECT_TRUE(segfaults([&] { static_cast<void>(static_cast<volatile float*>(buffer.data)[8]); }));
}

#if !defined(EIGENFORMER_TEST_TSAN)
TEST(EmulatedDevice, AKernelThatLeavesItsMemoryIsAFault) {
  Stream stream({.seed = 4});
  const Device device(&stream);
  const Buffer<float> buffer(device, 64);
  for (int attempt = 0; attempt < 3; ++attempt) {  // the emulator lives on
    expect_throws<emulated::Fault>(
        [&] {
          launch(Backend{device}, "rope", 1, 96, 0, [at = buffer.data](auto& block) {
            if (block.thread() < 64 || block.thread() == 69) at[block.thread()] = 1;
            block.barrier();
          });
        },
        {"rope, block 0: out of bounds: thread 69 touches 20 bytes past the end of 256 bytes"});
  }
  EXPECT_TRUE(segfaults([&] { *static_cast<volatile float*>(buffer.data) = 1; }));
}
#endif

TEST(EmulatedDevice, CopiesNeedMemoryOfTheDevice) {
  Stream stream;
  const Device device(&stream);
  const Buffer<float> buffer(device, 4);
  float host[8] = {};
  expect_throws<ef::DeviceError>([&] { device.memcpyHostToDevice(host, host, 4); },
                                 {"memcpyHostToDevice", "no memory of the device"});
  EXPECT_THROW(device.memcpyHostToDevice(buffer.data, host, 20), ef::DeviceError);
  EXPECT_THROW(device.memcpyDeviceToHost(host, buffer.data + 1, 16), ef::DeviceError);
  EXPECT_NO_THROW(device.memcpyHostToDevice(buffer.data + 1, host, 12));
}

// ---- launches -----------------------------------------------------------------------------------

struct Bounded {
  static constexpr int kThreads = 128;
  void operator()(emulated::Block&) const {}
};

TEST(EmulatedDevice, RefusesLaunchesByName) {
  Stream stream;
  const Device device(&stream);
  const auto nothing = [](auto&) {};
  expect_throws<ef::DeviceError>(
      [&] { launch(Backend{device}, "rope", 7, 1025, 64, nothing); },
      {"rope: launch of 7 blocks of 1025 threads with 64 bytes", "threads must be 1 to 1024"});
  expect_throws<ef::DeviceError>([&] { launch(Backend{device}, "rope", 0, 32, 0, nothing); },
                                 {"rope: launch of 0 blocks"});
  expect_throws<ef::DeviceError>([&] { launch(Backend{device}, "rope", 1, 256, 0, Bounded{}); },
                                 {"threads must be 1 to 128"});
  // Beyond 48 KiB a launch asks for more, up to what the device has.
  EXPECT_NO_THROW(launch(Backend{device}, "rope", 1, 32, 100 * 1024, nothing));
  expect_throws<ef::DeviceError>(
      [&] { launch(Backend{device}, "rope", 1, 32, 228 * 1024, nothing); },
      {"with 233472 bytes of shared memory", "at most 232448"});
  Stream modest({.most_shared_bytes = ef::cuda::kSharedBytes});
  const Device small_device(&modest);
  EXPECT_THROW(launch(Backend{small_device}, "rope", 1, 32, 48 * 1024 + 1, nothing),
               ef::DeviceError);
}

TEST(EmulatedDevice, AFaultNamesKernelAndBlock) {
  Stream stream({.deferred = true});
  const Device device(&stream);
  launch(Backend{device}, "rope", 9, 32, 0, [](auto& block) {
    if (block.index() == 4 && block.thread() == 2) return;
    block.barrier();
  });
  expect_throws<emulated::Fault>([&] { device.synchronize(); },
                                 {"rope, block 4: divergent barrier", "thread 2 has ended"});
  EXPECT_NO_THROW(device.synchronize());
}

// ---- the order of a stream ----------------------------------------------------------------------

TEST(EmulatedDevice, WorkRunsInOrderAndWaitsWhereItIsDeferred) {
  Stream stream({.deferred = true});
  const Device device(&stream);
  std::vector<int> order;
  const auto note = [&](int number) {
    launch(Backend{device}, "note", 1, 1, 0, [&order, number](auto&) { order.push_back(number); });
  };
  note(1);
  note(2);
  EXPECT_TRUE(order.empty());
  device.synchronize();
  note(3);
  device.synchronize();
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST(EmulatedDevice, GraphsAreRecordedAndReplayed) {
  Stream stream;
  const Device device(&stream);
  const Buffer<int> count(device, 1);
  const int zero = 0;
  device.memcpyHostToDevice(count.data, &zero, sizeof(int));
  stream.begin_capture();
  launch(Backend{device}, "count", 2, 32, 0,
         [at = count.data](auto& block) { block.atomic_add(at, 1); });
  EXPECT_THROW(device.synchronize(), ef::DeviceError);
  const Stream::Graph graph = stream.end_capture();
  EXPECT_EQ(count.host()[0], 0);
  stream.replay(graph);
  stream.replay(graph);
  EXPECT_EQ(count.host()[0], 2 * 2 * 32);
}

// A whole public call in a graph: it neither synchronizes nor reads device memory on the host.
TEST(EmulatedDevice, ACallOfAnOperatorIsCaptured) {
  const auto x = random_tensor<float, 2>({3, 100}, 1), w = random_tensor<float, 2>({1, 100}, 2);
  const auto expected = ef::rms_norm(x, ef::TensorView<const float, 1>(w.data(), 100));
  Stream stream({.seed = 5, .deferred = true});
  const Device device(&stream);
  const Buffer<float> in(device, 300), weight(device, 100), out(device, 300);
  device.memcpyHostToDevice(weight.data, w.data(), 400);
  stream.begin_capture();
  ef::rms_norm_into(device, ef::TensorView<float, 2>(out.data, 3, 100),
                    ef::TensorView<const float, 2>(in.data, 3, 100),
                    ef::TensorView<const float, 1>(weight.data, 100));
  const Stream::Graph graph = stream.end_capture();
  EXPECT_EQ(stream.launches, 1);
  device.memcpyHostToDevice(in.data, x.data(), 1200);
  stream.replay(graph);
  const auto got = out.host();
  for (Index i = 0; i < 300; ++i)
    EXPECT_NEAR(got[static_cast<std::size_t>(i)], expected.data()[i], 1e-5f);
}

// ---- arguments in host memory -------------------------------------------------------------------

/// sums[0] = all of `first` and of `second`, staged.
void sum_of_both(const Device& device, double* sums, std::span<const Index> first,
                 std::span<const float> second) {
  const auto [a, b] = ef::cuda::stage(Backend{device}, "sum", first, second);
  launch(Backend{device}, "sum", 1, 1, 0,
         [=, x = a, y = b, n = first.size(), m = second.size()](auto&) {
           sums[0] = 0;
           for (std::size_t i = 0; i < n; ++i) sums[0] += static_cast<double>(x[i]);
           for (std::size_t i = 0; i < m; ++i) sums[0] += static_cast<double>(y[i]);
         });
}

TEST(EmulatedDevice, ArgumentsAreStagedInOneCopy) {
  for (const bool deferred : {false, true}) {
    Stream stream({.deferred = deferred});
    const Device device(&stream);
    const Buffer<double> sums(device, 100);
    for (int call = 0; call < 100; ++call) {  // more calls under way than there are pieces
      std::vector<Index> lengths(static_cast<std::size_t>(1 + call % 7), call);
      std::vector<float> slopes(static_cast<std::size_t>(call * call % 1500), 0.5f);
      sum_of_both(device, sums.data + call, lengths, slopes);
      std::fill(lengths.begin(), lengths.end(), -1);  // the host's arrays are free at once
      std::fill(slopes.begin(), slopes.end(), -1.0f);
    }
    EXPECT_EQ(stream.copies, 100);
    EXPECT_EQ(stream.launches, 100);
    const auto got = sums.host();
    for (int call = 0; call < 100; ++call)
      EXPECT_EQ(got[static_cast<std::size_t>(call)],
                (1 + call % 7) * call + 0.5 * (call * call % 1500));
  }
}

TEST(EmulatedDevice, NothingIsStagedWhereThereIsNothing) {
  Stream stream;
  const Device device(&stream);
  const auto [a, b] =
      ef::cuda::stage(Backend{device}, "none", std::span<const Index>{}, std::span<const float>{});
  EXPECT_EQ(a, nullptr);
  EXPECT_EQ(b, nullptr);
  const Index one = 1;
  const auto [c, d] =
      ef::cuda::stage(Backend{device}, "one", std::span<const float>{}, std::span(&one, 1));
  EXPECT_EQ(c, nullptr);
  EXPECT_NE(d, nullptr);
  EXPECT_EQ(stream.copies, 1);
}

TEST(EmulatedDevice, AGraphKeepsWhatItsArgumentsHeld) {
  Stream stream;
  const Device device(&stream);
  const Buffer<double> sums(device, 2);
  std::vector<Index> lengths{3, 4};
  stream.begin_capture();
  sum_of_both(device, sums.data, lengths, {});
  const Stream::Graph graph = stream.end_capture();
  lengths = {100, 100};
  for (int call = 0; call < 20; ++call) sum_of_both(device, sums.data + 1, lengths, {});
  stream.replay(graph);
  EXPECT_EQ(sums.host(), (std::vector<double>{7, 200}));
}

// ---- scratch, and numbers for the host ----------------------------------------------------------

/// squares[i] = the sum of i + 1 squares of `value`, by way of scratch.
void fetch_squares(const Device& device, std::vector<double>& squares, double value) {
  const auto count = static_cast<Index>(squares.size());
  ef::cuda::fetch(Backend{device}, "squares", squares.data(), count, [&](double* sums) {
    launch(Backend{device}, "squares", 1, 1, 0, [=](auto&) {
      for (Index i = 0; i < count; ++i) sums[i] = static_cast<double>(i + 1) * value * value;
    });
  });
}

TEST(EmulatedDevice, NumbersForTheHostAreThereWhenTheCallReturns) {
  for (const bool deferred : {false, true}) {
    Stream stream({.deferred = deferred});
    const Device device(&stream);
    for (std::size_t count : {1u, 3u, 2000u, 5u}) {
      std::vector<double> squares(count, -1.0);
      fetch_squares(device, squares, 3);
      for (std::size_t i = 0; i < count; ++i)
        ASSERT_EQ(squares[i], 9.0 * static_cast<double>(i + 1));
    }
    std::vector<double> none;
    const int launches = stream.launches;
    fetch_squares(device, none, 3);
    EXPECT_EQ(stream.launches, launches);
  }
}

TEST(EmulatedDevice, ScratchHoldsFromKernelToKernelAndGrowsUnderWork) {
  Stream stream({.deferred = true});
  const Device device(&stream);
  const Buffer<float> results(device, 20);
  for (Index call = 0; call < 20; ++call)
    ef::cuda::with_scratch<float, double>(
        Backend{device}, "two", {call * call * 10 + 1, 1}, [&](float* many, double* one) {
          launch(Backend{device}, "first", 1, 1, 0, [=](auto&) {
            many[call * call * 10] = static_cast<float>(call);
            *one = 0.5;
          });
          launch(Backend{device}, "second", 1, 1, 0, [=, to = results.data](auto&) {
            to[call] = many[call * call * 10] + static_cast<float>(*one);
          });
        });
  const auto got = results.host();
  for (std::size_t call = 0; call < 20; ++call)
    EXPECT_EQ(got[call], static_cast<float>(call) + 0.5f);
}

/// to[0] = value, by way of scratch that both problems of a call see, and one of them has scratch
/// of its own.
void by_way_of_frames(const Device& device, float* to, float value, Index count) {
  auto frame = ef::cuda::scratch_frame(Backend{device});
  float* const outer = frame.take<float>(count);
  launch(Backend{device}, "first", 1, 1, 0, [=](auto&) { outer[count - 1] = value; });
  ef::cuda::with_scratch<float>(Backend{device}, "between", {1}, [&](float* own) {
    launch(Backend{device}, "between", 1, 1, 0, [=](auto&) { *own = outer[count - 1] - 1; });
    auto nested = ef::cuda::scratch_frame(Backend{device});
    float* const inner = nested.take<float>(1);
    launch(Backend{device}, "second", 1, 1, 0, [=](auto&) { *inner = *own + 1; });
    launch(Backend{device}, "third", 1, 1, 0, [=](auto&) { *to = *inner; });
  });
}

TEST(EmulatedDevice, FramesOfTwoStreamsNeverMeet) {
  Stream first({.deferred = true}), second({.deferred = true});
  const Device one(&first), other(&second);
  const Buffer<float> results(one, 12);
  for (int call = 0; call < 6; ++call) {  // the arenas grow under work
    by_way_of_frames(one, results.data + 2 * call, static_cast<float>(call), 1 + call * 1000);
    by_way_of_frames(other, results.data + 2 * call + 1, 10.0f + static_cast<float>(call), 3);
  }
  other.synchronize();
  const auto got = results.host();
  for (std::size_t call = 0; call < 6; ++call) {
    EXPECT_EQ(got[2 * call], static_cast<float>(call));
    EXPECT_EQ(got[2 * call + 1], 10.0f + static_cast<float>(call));
  }
}

TEST(EmulatedDevice, AGraphKeepsItsFrames) {
  Stream stream;
  const Device device(&stream);
  const Buffer<float> results(device, 2);
  stream.begin_capture();
  by_way_of_frames(device, results.data, 4, 10);
  const Stream::Graph graph = stream.end_capture();
  by_way_of_frames(device, results.data + 1, 7, 20000);
  stream.replay(graph);
  EXPECT_EQ(results.host(), (std::vector<float>{4, 7}));
}

TEST(EmulatedDevice, WaitingForNumbersCannotBeCaptured) {
  Stream stream;
  const Device device(&stream);
  std::vector<double> squares(3);
  stream.begin_capture();
  expect_throws<ef::DeviceError>([&] { fetch_squares(device, squares, 3); },
                                 {"squares", "captured"});
  stream.end_capture();
}

}  // namespace
