// Step graphs: each run does what f does today, with one copy of what it reads of the host; what f
// throws leaves stream and graph as they were; graphs share a stream; memory is kept. (A decoder's
// steps: decoder_device_test.cpp.)
#include <eigenformer/rope.h>
#include <eigenformer/step_graph.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr Index kMost = 40, kHeads = 2, kDim = 4;

/// A step of two calls, over as many tokens as there are positions: y = x turned twice.
template <typename B>
class Step {
 public:
  explicit Step(const B& bench)
      : bench_(bench),
        x_(bench, random_tensor<float, 3>({kMost, kHeads, kDim}, 1)),
        y_(bench, poisoned_tensor<float, 3>({kMost, kHeads, kDim})) {}

  void operator()(const std::vector<Index>& positions) const {
    const auto n = static_cast<Index>(positions.size());
    const ef::TensorView<float, 3> y(y_.view().data(), n, kHeads, kDim);
    ef::rope_into(bench_.device, y,
                  ef::TensorView<const float, 3>(x_.view().data(), n, kHeads, kDim), positions);
    ef::rope_into(bench_.device, y, y, positions);
  }
  ef::Tensor<float, 3> result() const { return y_.host(); }

 private:
  const B& bench_;
  DeviceTensor<B, float, 3> x_, y_;
};

/// Those of call number c, and what is left in their memory once the call is over.
std::vector<Index> positions_of(Index c) {
  std::vector<Index> positions(static_cast<std::size_t>(1 + 13 * c % kMost));
  for (std::size_t i = 0; i < positions.size(); ++i)
    positions[i] = static_cast<Index>(i) * (c + 1) + 3;
  return positions;
}

TEST(StepGraph, EachRunHasTodaysArguments) {
  for_each_device([&](const auto& bench) {
    const Step plain(bench), step(bench);
    ef::StepGraph graph(bench.device);
    for (Index c = 0; c < 8; ++c) {
      auto positions = positions_of(c);
      plain(positions);
      graph.run([&] { step(positions); });
      std::fill(positions.begin(), positions.end(), -1);
      ASSERT_TRUE(same_bits(step.result(), plain.result())) << c;
    }
    graph.run([] {});  // nothing at all
    ASSERT_TRUE(same_bits(step.result(), plain.result()));
  });
}

// More of them than the device has done: each launch reads its own.
TEST(StepGraph, GraphsOfOneStreamRunInOrder) {
  for_each_device([&](const auto& bench) {
    const Step plain(bench), one(bench), other(bench);
    ef::StepGraph first(bench.device), second(bench.device);
    for (Index c = 0; c < 5; ++c) {
      first.run([&] { one(positions_of(c)); });
      second.run([&] { other(positions_of(c + 1)); });
    }
    for (Index c = 0; c < 5; ++c) plain(positions_of(c));
    EXPECT_TRUE(same_bits(one.result(), plain.result()));
    const Step last(bench);
    for (Index c = 1; c < 6; ++c) last(positions_of(c));
    EXPECT_TRUE(same_bits(other.result(), last.result()));
  });
}

struct Mishap : std::runtime_error {
  using std::runtime_error::runtime_error;
};

TEST(StepGraph, WhatItsFunctionThrowsLeavesTheStreamAsItWas) {
  for_each_gpu([&](const auto& bench) {
    const Step plain(bench), step(bench);
    ef::StepGraph graph(bench.device), inner(bench.device);
    const auto untouched = step.result();
    const auto fails = [&](const auto& why, auto kind, const std::vector<std::string>& text) {
      expect_throws<typename decltype(kind)::type>(
          [&] {
            graph.run([&] {
              step(positions_of(3));
              why();
            });
          },
          text);
    };
    const auto fail_all = [&] {
      fails([] { throw Mishap("the caller's"); }, std::type_identity<Mishap>{}, {"the caller's"});
      const ef::TensorView<float, 3> two(nullptr, 2, kHeads, kDim);
      fails([&] { ef::rope_into(bench.device, two, two, positions_of(0)); },
            std::type_identity<std::invalid_argument>{}, {"rope", "positions"});
      fails([&] { inner.run([] {}); }, std::type_identity<ef::DeviceError>{},
            {"StepGraph", "captured"});
      float number = 0;
      fails([&] { ef::detail::to_host(bench.device, "number", &number, &number, 1); },
            std::type_identity<ef::DeviceError>{}, {"number", "captured"});
    };
    fail_all();
    EXPECT_TRUE(same_bits(step.result(), untouched));
    graph.run([&] { step(positions_of(2)); });
    plain(positions_of(2));
    EXPECT_TRUE(same_bits(step.result(), plain.result()));
    fail_all();
    EXPECT_TRUE(same_bits(step.result(), plain.result()));
    graph.run([&] { step(positions_of(5)); });
    step(positions_of(4));  // and calls without a graph
    plain(positions_of(5));
    plain(positions_of(4));
    EXPECT_TRUE(same_bits(step.result(), plain.result()));
  });
}

#if defined(EIGENFORMER_TEST_BLOCKS)

/// to[0] = the sum of `numbers` and `count`, by way of staged memory, a frame and scratch, each of
/// `count` elements. What comes last is written first, so that memory given twice would show.
void sum_by_all_ways(const emulated::Device& device, double* to, Index count, double value) {
  const ef::cuda::Backend<emulated::Device> on{device};
  const auto n = static_cast<std::size_t>(count);
  const std::vector<double> numbers(n, value), more(n, 1.0);
  const auto [first] = ef::cuda::stage(on, "first", std::span<const double>(numbers));
  auto frame = ef::cuda::scratch_frame(on);
  double* const outer = frame.take<double>(count);
  launch(on, "outer", 1, 1, 0, [=, from = first](auto&) { std::copy_n(from, count, outer); });
  ef::cuda::with_scratch<double>(on, "own", {count}, [&](double* own) {
    launch(on, "own", 1, 1, 0, [=](auto&) { std::copy_n(outer, count, own); });
    auto nested = ef::cuda::scratch_frame(on);
    double* const inner = nested.take<double>(count);
    double* const late = frame.take<double>(count);
    const auto [second] = ef::cuda::stage(on, "second", std::span<const double>(more));
    launch(on, "inner", 1, 1, 0, [=, from = second](auto&) {
      std::copy_n(from, count, inner);
      std::fill_n(late, count, 0.0);
    });
    launch(on, "sum", 1, 1, 0, [=](auto&) {
      *to = 0;
      for (Index i = 0; i < count; ++i) *to += own[i] + inner[i] + outer[i] + late[i];
    });
  });
}

TEST(StepGraph, MemoryGrowsUnderCaptureAndIsKept) {
  for (const bool deferred : {false, true}) {
    emulated::Stream stream({.deferred = deferred});
    const emulated::Device device(&stream);
    auto* const sums = static_cast<double*>(device.allocate(40 * sizeof(double)));
    auto& memory = emulated::DeviceMemory::instance();
    std::vector<double> expected;
    {
      ef::StepGraph graph(device);
      const auto run = [&](Index count) {  // several calls, each of another size
        const int copies = stream.copies, launches = stream.launches;
        graph.run([&] {
          for (Index c = 1; c <= 4; ++c) {
            const auto value = static_cast<double>(expected.size());
            sum_by_all_ways(device, sums + expected.size(), c * count, value);
            expected.push_back(static_cast<double>(c * count) * (2 * value + 1));
          }
        });
        EXPECT_EQ(stream.launches - launches, 16);
        return stream.copies - copies;
      };
      EXPECT_EQ(run(5), 1);
      EXPECT_GT(run(700), 1);  // some 110 KB are staged: more pieces than one
      for (int i = 0; i < 7; ++i) {
        const auto before = memory.allocations();
        EXPECT_EQ(run(i == 4 ? 300 : 700), 1);
        if (i > 0) {
          EXPECT_EQ(memory.allocations(), before) << i;
        }
      }
    }
    std::vector<double> got(expected.size());
    device.memcpyDeviceToHost(got.data(), sums, got.size() * sizeof(double));
    device.synchronize();
    EXPECT_EQ(got, expected);
    device.deallocate(sums);
  }
}

#endif

}  // namespace
