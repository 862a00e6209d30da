// The emulated block itself: each kind of bug, planted in a kernel, is found and named, and kernels
// without one pass under every schedule.
#include "device.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include <eigenformer/cuda/collectives.cuh>

#include "compare.h"

using namespace eigenformer_test;
using emulated::Device;
using emulated::Fault;
using emulated::Stream;

namespace {

constexpr std::size_t kShared = 16384;

/// One block of a kernel.
template <typename Kernel>
void run(int threads, const Kernel& kernel, std::uint64_t seed = 0) {
  Stream stream({.seed = seed});
  const Device device(&stream);
  launch(ef::cuda::Backend<Device>{device}, "planted", 1, threads, kShared, kernel);
}

std::string at(int line) { return "block_emulator_test.cpp:" + std::to_string(line); }

/// The bug is found under schedules in order and shuffled.
template <typename Kernel>
void expect_fault(int threads, const Kernel& kernel, std::vector<std::string> fragments) {
  fragments.push_back("planted, block 0: ");
  for (std::uint64_t seed : {0, 1, 2, 3})
    expect_throws<Fault>([&] { run(threads, kernel, seed); }, fragments);
}

// ---- what a block is ----------------------------------------------------------------------------

TEST(EmulatedBlock, ThreadsLanesAndBlocksHaveTheirNumbers) {
  Stream stream({.seed = 3});
  const Device device(&stream);
  std::vector<int> seen(3 * 70);  // of the host: kernels here run in its memory
  launch(ef::cuda::Backend<Device>{device}, "numbers", 3, 70, 0, [&](auto& block) {
    EXPECT_EQ(block.size(), 70);
    EXPECT_EQ(block.count(), 3);
    EXPECT_EQ(block.warp() * 32 + block.lane(), block.thread());
    ++seen[static_cast<std::size_t>(block.index() * 70 + block.thread())];
  });
  EXPECT_EQ(seen, std::vector<int>(3 * 70, 1));
}

TEST(EmulatedBlock, ABarrierShowsWhatOthersWrote) {
  for (std::uint64_t seed = 0; seed < 5; ++seed)
    run(
        256,
        [](auto& block) {
          const auto values = block.template shared<int>(256);
          for (int round = 0; round < 4; ++round) {
            values.store(block.thread(), block.thread() + round);
            block.barrier();
            EXPECT_EQ(values.load(255 - block.thread()), 255 - block.thread() + round);
            block.barrier();
          }
        },
        seed);
}

TEST(EmulatedBlock, SchedulesDiffer) {
  const auto order_of = [](std::uint64_t seed) {
    std::vector<int> order;
    run(
        64, [&](auto& block) { order.push_back(block.thread()); }, seed);
    return order;
  };
  std::vector<int> in_order(64);
  std::iota(in_order.begin(), in_order.end(), 0);
  EXPECT_EQ(order_of(0), in_order);
  EXPECT_NE(order_of(1), in_order);
  EXPECT_NE(order_of(1), order_of(2));
  EXPECT_EQ(order_of(2), order_of(2));
}

TEST(EmulatedBlock, WhatAKernelThrowsLeavesTheLaunchAndStacksAreUnwound) {
  struct Counted {
    int& alive;
    explicit Counted(int& a) : alive(a) { ++alive; }
    ~Counted() { --alive; }
  };
  int alive = 0;
  EXPECT_THROW(run(64,
                   [&](auto& block) {
                     const Counted counted(alive);
                     if (block.thread() == 40) throw std::out_of_range("40");
                     block.barrier();
                   }),
               std::out_of_range);
  EXPECT_EQ(alive, 0);
  run(64, [](auto& block) { block.barrier(); });  // and the next launch is whole
}

// ---- races in shared memory ---------------------------------------------------------------------

TEST(EmulatedBlock, AMissingBarrierIsARace) {
  const int line = __LINE__;  // of the faults, counted from here
  expect_fault(64,
               [](auto& block) {
                 const auto values = block.template shared<int>(64);
                 values.store(block.thread(), block.thread());
                 values.load(63 - block.thread());  // written by nobody yet, or by another thread
               },
               {"shared element", at(line + 5)});
  expect_fault(64,
               [](auto& block) {
                 const auto values = block.template shared<int>(64);
                 values.store(block.thread(), block.thread());
                 block.barrier();
                 const int other = values.load((block.thread() + 1) % 64);
                 values.store(block.thread(), other);
               },
               {"race: thread", at(line + 13), at(line + 14), "no barrier between"});
}

TEST(EmulatedBlock, TwoWritersAreARaceAndAtomicsAreNone) {
  const int line = __LINE__;  // of the faults, counted from here
  expect_fault(
      32,
      [](auto& block) {
        const auto value = block.template shared<unsigned>(1);
        value.store(0, 1u);
      },
      {"race: thread", "writes shared element 0 at " + at(line + 5), "wrote at " + at(line + 5)});
  run(
      96,
      [](auto& block) {
        const auto value = block.template shared<unsigned>(1);
        if (block.thread() == 0) value.store(0, 5);
        block.barrier();
        value.add(0, 2u);
        block.barrier();
        EXPECT_EQ(value.load(0), 5u + 2 * 96);
      },
      9);
  expect_fault(64,
               [](auto& block) {
                 const auto value = block.template shared<unsigned>(1);
                 if (block.thread() == 0) value.store(0, 5);
                 block.barrier();
                 value.add(0, 1u);
                 value.load(0);
               },
               {"race: thread"});
}

TEST(EmulatedBlock, ABarrierOfTheWarpOrdersTheWarpAlone) {
  const auto neighbour = [](int reach) {
    return [reach](auto& block) {
      const auto values = block.template shared<int>(64);
      values.store(block.thread(), block.thread());
      block.warp_barrier();
      const int other = block.thread() ^ reach;
      EXPECT_EQ(values.load(other), other);
    };
  };
  run(64, neighbour(1), 5);
  for (std::uint64_t seed : {0, 1, 2, 3})
    EXPECT_THROW(run(64, neighbour(32), seed), Fault);  // the lane of the other warp
}

TEST(EmulatedBlock, AShuffleOrdersNoMemory) {
  expect_fault(32,
               [](auto& block) {
                 const auto values = block.template shared<int>(32);
                 values.store(block.thread(), block.thread());
                 block.shuffle(1, 0);
                 values.load(block.thread() ^ 1);
               },
               {"race: thread"});
}

TEST(EmulatedBlock, BadAccessesOfSharedMemory) {
  const int line = __LINE__;  // of the faults, counted from here
  expect_fault(64,
               [](auto& block) {
                 const auto values = block.template shared<int>(60);
                 values.store(block.thread(), 0);
               },
               {"out of bounds: thread 6", "of a shared array of 60 at " + at(line + 4)});
  expect_fault(32, [](auto& block) { block.template shared<int>(4).load(-1); },
               {"out of bounds: thread", "reads element -1"});
  expect_fault(32, [](auto& block) { block.template shared<float>(4).load(2); },
               {"reads shared element 2", "which nobody has written"});
  expect_fault(32, [](auto& block) { block.template shared<double>(kShared / 8 + 1); },
               {"out of bounds: shared arrays", "16400 bytes, the launch has 16384"});
  expect_fault(32, [](auto& block) { block.template shared<int>(block.thread() == 9 ? 8 : 4); },
               {"asks for", "another thread for"});
  struct alignas(16) Pack {
    float values[4];
  };
  expect_fault(32, [](auto& block) { block.template shared<float>(64).store_pack(2, Pack{}); },
               {"misaligned: thread", "16 bytes at shared element 2"});
}

// ---- who does not come --------------------------------------------------------------------------

TEST(EmulatedBlock, ADivergentBarrierNamesWhoDidNotCome) {
  const int line = __LINE__;  // of the faults, counted from here
  expect_fault(64,
               [](auto& block) {
                 if (block.thread() == 3 || block.thread() > 61) return;
                 block.barrier();
               },
               {"divergent barrier: threads 0-2, 4-61 at " + at(line + 4), "not threads 3, 62-63",
                "thread 3 has ended"});
  expect_fault(64,
               [](auto& block) {
                 if (block.thread() < 32) {
                   block.barrier();
                 } else {
                   block.barrier();
                 }
               },
               {"divergent barrier: threads 0-31 at " + at(line + 11), "not threads 32-63",
                "thread 32 waits at the barrier of " + at(line + 13)});
}

TEST(EmulatedBlock, WarpOperationsNeedAllLanesOfTheMask) {
  const int line = __LINE__;  // of the faults, counted from here
  expect_fault(64,
               [](auto& block) {
                 if (block.thread() == 37) return;
                 block.shuffle_xor(1.0f, 1);
               },
               {"shuffle_xor at " + at(line + 4), "wait for thread 37", "thread 37 has ended"});
  expect_fault(32,
               [](auto& block) {
                 if (block.lane() == 5) block.barrier();
                 block.any(true);
               },
               {"ballot at " + at(line + 10), "thread 5 waits at the barrier of " + at(line + 9)});
  expect_fault(40, [](auto& block) { block.ballot(true); },
               {"wait for threads 40-63", "thread 40 is not in this block of 40"});
  expect_fault(32, [](auto& block) { block.ballot(true, 0xffff0000u); },
               {"is not in the mask it gives"});
  expect_fault(32,
               [](auto& block) { block.shuffle(1, 20, block.lane() < 16 ? 0xffffu : 0xffff0000u); },
               {"reads lane 20, which is not in the mask"});
  expect_fault(32,
               [](auto& block) {
                 if (block.lane() < 16)
                   block.ballot(true);
                 else
                   block.shuffle(1, 0);
               },
               {"meets lanes of its warp at the"});
}

TEST(EmulatedBlock, ShufflesAndVotes) {
  for (std::uint64_t seed : {0, 1, 2}) {
    run(
        64,
        [](auto& block) {
          const int lane = block.lane();
          EXPECT_EQ(block.shuffle(block.thread(), 7), block.warp() * 32 + 7);
          EXPECT_EQ(block.shuffle_xor(lane * 0.5, 3), (lane ^ 3) * 0.5);
          EXPECT_EQ(block.shuffle_up(lane, 4), lane < 4 ? lane : lane - 4);
          EXPECT_EQ(block.ballot(lane % 2 == 1), 0xaaaaaaaau);
          EXPECT_TRUE(block.any(lane == 31));
          EXPECT_FALSE(block.all(lane == 31));
          const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
          EXPECT_EQ(block.ballot(true, half), half);
          EXPECT_TRUE(block.all(true, half));
        },
        seed);
  }
}

// ---- asynchronous copies ------------------------------------------------------------------------

/// Each thread brings 4 floats from `source`; then they are read as `order` says.
struct Copies {
  const float* source;
  bool wait, barrier;
  template <typename Block>
  void operator()(Block& block) const {
    const auto values = block.template shared<float>(4 * block.size());
    block.copy_async(values, 4 * block.thread(), source + 4 * block.thread());
    block.commit_async();
    if (wait) block.template wait_async<0>();
    if (barrier) block.barrier();
    const int other = block.size() - 1 - block.thread();
    for (int i = 4 * other; i < 4 * other + 4; ++i) EXPECT_EQ(values.load(i), source[i]);
  }
};

TEST(EmulatedBlock, AsynchronousCopiesLandWhenTheyAreWaitedFor) {
  struct alignas(16) Source {
    float values[256];
  } source;
  std::iota(source.values, source.values + 256, 0.0f);
  for (std::uint64_t seed : {0, 1, 2}) run(64, Copies{source.values, true, true}, seed);
  expect_fault(64, Copies{source.values, false, true},
               {"is on its way to: nobody has waited", "asynchronous copy of thread"});
  expect_fault(64, Copies{source.values, true, false}, {"block_emulator_test.cpp"});
  expect_fault(32,
               [&](auto& block) {
                 const auto values = block.template shared<float>(8);
                 block.copy_async(values, 0, source.values + 1);
               },
               {"misaligned: thread", "copies 16 bytes"});
  run(1, [&](auto& block) {  // all but the last group
    const auto values = block.template shared<float>(8);
    for (int i : {0, 4}) {
      block.copy_async(values, i, source.values + i);
      block.commit_async();
    }
    block.template wait_async<1>();
    EXPECT_EQ(values.load(3), 3.0f);
    EXPECT_THROW(values.load(4), Fault);
    block.template wait_async<0>();
    EXPECT_EQ(values.load(4), 4.0f);
  });
}

// ---- bits that depend on the schedule -----------------------------------------------------------

TEST(EmulatedBlock, OtherBitsUnderAnotherScheduleAreFound) {
  const auto sum_of = [](auto&& kernel) {
    return [kernel](const Device& device) {
      std::vector<float> result(1);
      launch(ef::cuda::Backend<Device>{device}, "sum", 4, 64, kShared,
             [&, out = result.data()](auto& block) { kernel(block, out); });
      return result;
    };
  };
  // A sum of floats in device memory, in the order in which threads come.
  const auto wrong = sum_of([](auto& block, float* out) {
    *out += 1.0f / static_cast<float>(3 + block.thread() + 64 * block.index());
  });
  expect_throws<Fault>([&] { emulated::same_bits_for_schedules(8, wrong); },
                       {"element 0 has other bits under schedule"});
  const auto right = sum_of([](auto& block, float* out) {
    const auto scratch = block.template shared<float>(2);
    const float sum =
        ef::cuda::reduce_block(block, scratch, 1.0f / (3.0f + block.thread()), ef::cuda::Add{});
    if (block.thread() == 0 && block.index() == 0) *out = sum;
  });
  EXPECT_NO_THROW(emulated::same_bits_for_schedules(8, right));
}

TEST(EmulatedBlock, ReductionsAndScans) {
  for (int threads : {32, 64, 256, 1024})
    for (std::uint64_t seed : {0, 1, 2})
      run(
          threads,
          [](auto& block) {
            const auto scratch = block.template shared<Index>(32);
            const Index n = block.size(), value = block.thread() * Index{7} % 13;
            Index before = 0, total = 0, largest = 0;
            for (Index t = 0; t < n; ++t) {
              if (t == block.thread()) before = total;
              total += t * 7 % 13;
              largest = std::max(largest, t * 7 % 13);
            }
            EXPECT_EQ(ef::cuda::reduce_block(block, scratch, value, ef::cuda::Add{}), total);
            EXPECT_EQ(ef::cuda::reduce_block(block, scratch, value, ef::cuda::Larger{}), largest);
            const auto scan = ef::cuda::scan_block(block, scratch, value);
            EXPECT_EQ(scan.before, before);
            EXPECT_EQ(scan.total, total);
          },
          seed);
}

// ---- tensor cores -------------------------------------------------------------------------------

// Places in the tiles as the PTX ISA's tables have them, by hand.
TEST(EmulatedBlock, FragmentsLieWhereThePtxIsaSays) {
  using A = ef::cuda::FragmentA<ef::half>;
  using B = ef::cuda::FragmentB<ef::half>;
  using A8 = ef::cuda::FragmentA<std::int8_t>;
  using B8 = ef::cuda::FragmentB<std::int8_t>;
  using D = ef::cuda::FragmentD<ef::half>;
  // T0: {a0,a1} row 0, columns 0-1; {a2,a3} row 8; {a4,a5} row 0, columns 8-9; {a6,a7} row 8
  EXPECT_EQ(A::row(0, 3), 8);
  EXPECT_EQ(A::column(0, 3), 1);
  EXPECT_EQ(A::row(0, 4), 0);
  EXPECT_EQ(A::column(0, 5), 9);
  EXPECT_EQ(A::row(31, 7), 15);  // T31: row 7 and 15, columns 6-7 and 14-15
  EXPECT_EQ(A::column(31, 7), 15);
  EXPECT_EQ(B::row(31, 3), 15);
  EXPECT_EQ(B::column(31, 3), 7);
  EXPECT_EQ(B::row(1, 2), 10);  // T1: {b0,b1} rows 2-3, {b2,b3} rows 10-11, column 0
  EXPECT_EQ(B::column(1, 2), 0);
  EXPECT_EQ(A8::row(0, 4), 8);  // T0: {a4..a7} row 8, columns 0-3; {a8..a11} row 0, columns 16-19
  EXPECT_EQ(A8::column(0, 7), 3);
  EXPECT_EQ(A8::row(0, 8), 0);
  EXPECT_EQ(A8::column(0, 11), 19);
  EXPECT_EQ(A8::column(31, 15), 31);
  EXPECT_EQ(B8::row(1, 5), 21);  // T1: {b4..b7} rows 20-23, column 0
  EXPECT_EQ(B8::column(5, 5), 1);
  EXPECT_EQ(D::row(5, 2), 9);  // T5: {d0,d1} row 1, columns 2-3; {d2,d3} row 9
  EXPECT_EQ(D::column(5, 3), 3);
}

template <typename T>
void check_mma(std::uint64_t seed) {
  using Sum = typename ef::cuda::Tile<T>::sum;
  constexpr int depth = ef::cuda::Tile<T>::kDepth;
  std::mt19937 random(11);
  std::uniform_int_distribution<int> draw(-127, 127);
  const auto number = [&] { return static_cast<T>(static_cast<float>(draw(random))); };
  T a[16][depth], b[depth][8];
  Sum d[16][8], expected[16][8];
  for (auto& row : a)
    for (T& x : row) x = number();
  for (auto& row : b)
    for (T& x : row) x = number();
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      double sum = 100 * r + c;
      for (int k = 0; k < depth; ++k)
        sum += static_cast<double>(a[r][k]) * static_cast<double>(b[k][c]);
      expected[r][c] = static_cast<Sum>(sum);
    }
  run(
      32,
      [&](auto& block) {
        ef::cuda::FragmentA<T> x;
        ef::cuda::FragmentB<T> y;
        ef::cuda::FragmentD<T> z;
        const int lane = block.lane();
        for (int i = 0; i < x.kSize; ++i) x.values[i] = a[x.row(lane, i)][x.column(lane, i)];
        for (int i = 0; i < y.kSize; ++i) y.values[i] = b[y.row(lane, i)][y.column(lane, i)];
        for (int i = 0; i < z.kSize; ++i)
          z.values[i] = static_cast<Sum>(100 * z.row(lane, i) + z.column(lane, i));
        block.mma(z, x, y);
        for (int i = 0; i < z.kSize; ++i) d[z.row(lane, i)][z.column(lane, i)] = z.values[i];
      },
      seed);
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) ASSERT_EQ(d[r][c], expected[r][c]) << r << ' ' << c;
}

template <typename T>
void check_load_rows(std::uint64_t seed) {
  constexpr int stride = 24;
  run(
      32,
      [&](auto& block) {
        const auto rows = block.template shared<T>(16 * stride);
        const int lane = block.lane();
        for (int i = lane; i < 16 * stride; i += 32) rows.store(i, static_cast<T>(float(i)));
        block.barrier();
        ef::cuda::FragmentB<T> b[2];
        block.load_rows(rows, lane % 16 * stride + lane / 16 * 8, b);
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < b[n].kSize; ++i)
            EXPECT_EQ(static_cast<float>(b[n].values[i]),
                      b[n].row(lane, i) * stride + 8 * n + b[n].column(lane, i));
      },
      seed);
}

TEST(EmulatedBlock, RowsOfSharedMemoryBecomeFragments) {
  for (std::uint64_t seed : {0, 1}) check_load_rows<ef::half>(seed);
}

TEST(EmulatedBlock, RoundsPairsAndTakesPowers) {
  run(32, [](auto& block) {
    ef::bfloat16 pair[2];
    block.round_pair(pair, 1.00390625f, -3.0f);  // half of a unit above 1: to the even one
    EXPECT_EQ(static_cast<float>(pair[0]), 1);
    EXPECT_EQ(static_cast<float>(pair[1]), -3);
    EXPECT_EQ(block.exp2(-3.0f), 0.125f);
    EXPECT_EQ(block.exp2(-127.0f), 0);
    EXPECT_EQ(block.exp2(-INFINITY), 0);
    EXPECT_TRUE(std::isnan(block.exp2(NAN)));
  });
}

TEST(EmulatedBlock, TensorCoresMultiplyAndAdd) {
  for (std::uint64_t seed : {0, 1, 2}) {
    check_mma<ef::bfloat16>(seed);
    check_mma<ef::half>(seed);
    check_mma<std::int8_t>(seed);
  }
}

}  // namespace
