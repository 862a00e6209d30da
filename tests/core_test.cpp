// The foundation: Philox, workspaces, parallel_for, argument checks.
#include <eigenformer/core/check.h>
#include <eigenformer/core/compiler.h>
#include <eigenformer/core/philox.h>
#include <eigenformer/core/workspace.h>

#include <atomic>
#include <bit>
#include <limits>
#include <utility>

#include "compare.h"

using namespace eigenformer_test;

namespace {

// Random123 kat_vectors, philox4x32-10.
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(ef::philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(
      ef::philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
      (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      ef::philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, DrawIsAFunctionOfSeedPositionRowAndIndex) {
  ef::Philox a(42), b(42, 7);
  EXPECT_NE(a.bits(3), b.bits(3));
  a.advance(7);
  EXPECT_EQ(a.bits(3, 5), b.bits(3, 5));
  EXPECT_NE(a.bits(3, 5), b.bits(5, 3));
  for (std::uint32_t row = 0; row < 10000; ++row) {
    EXPECT_GT(a.uniform(row), 0.0);
    EXPECT_LT(a.uniform(row), 1.0);
  }
  std::uniform_int_distribution<int> die(1, 6);  // usable with <random>
  for (int i = 0; i < 100; ++i) EXPECT_LE(die(a), 6);
  EXPECT_GE(a.position(), 107u);  // how often a distribution asks is the library's affair
}

// Against the exact result in 64 bits, at every 8-bit pair and at the ends of the widest type.
template <typename I>
void expect_exact_bounds() {
  for (int i = std::numeric_limits<I>::min(); i <= std::numeric_limits<I>::max(); ++i)
    for (int j = std::numeric_limits<I>::min(); j <= std::numeric_limits<I>::max(); ++j) {
      const auto a = static_cast<I>(i), b = static_cast<I>(j);
      I sum = 77, product = 77;
      const bool sum_fits = std::in_range<I>(i + j), product_fits = std::in_range<I>(i * j);
      ASSERT_EQ(ef::detail::add_fits(a, b, sum), sum_fits) << i << " + " << j;
      ASSERT_EQ(sum, sum_fits ? static_cast<I>(i + j) : 77) << i << " + " << j;
      ASSERT_EQ(ef::detail::multiply_fits(a, b, product), product_fits) << i << " * " << j;
      ASSERT_EQ(product, product_fits ? static_cast<I>(i * j) : 77) << i << " * " << j;
    }
}
TEST(Compiler, SumsAndProductsFitOrNot) {
  expect_exact_bounds<std::int8_t>();
  expect_exact_bounds<std::uint8_t>();
  constexpr auto largest = (std::numeric_limits<std::int64_t>::max)();
  constexpr auto least = (std::numeric_limits<std::int64_t>::min)();
  std::int64_t result = 0;
  EXPECT_FALSE(ef::detail::add_fits(largest, std::int64_t{1}, result));
  EXPECT_FALSE(ef::detail::add_fits(least, std::int64_t{-1}, result));
  EXPECT_FALSE(ef::detail::multiply_fits(least, std::int64_t{-1}, result));
  EXPECT_FALSE(ef::detail::multiply_fits(std::int64_t{-1}, least, result));
  EXPECT_FALSE(ef::detail::multiply_fits(std::int64_t{1} << 32, std::int64_t{1} << 31, result));
  EXPECT_EQ(result, 0);
  EXPECT_TRUE(ef::detail::multiply_fits(std::int64_t{-1} << 32, std::int64_t{1} << 31, result));
  EXPECT_EQ(result, least);
}

TEST(Workspace, GrowsOnceThenStays) {
  ef::Workspace workspace;
  const auto use = [&] {
    ef::Workspace::Frame frame(workspace);
    float* a = frame.take<float>(1000);
    double* b = frame.take<double>(77);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b) % 64, 0u);
    std::fill(a, a + 1000, 1.0f);
    std::fill(b, b + 77, 2.0);
    {
      ef::Workspace::Frame inner(workspace);
      float* c = inner.take<float>(5000);
      std::fill(c, c + 5000, 3.0f);
    }
    float* d = frame.take<float>(5000);
    std::fill(d, d + 5000, 4.0f);
    EXPECT_EQ(a[999], 1.0f);
    EXPECT_EQ(b[76], 2.0);
  };
  use();
  const std::size_t held = workspace.capacity();
  for (int i = 0; i < 5; ++i) use();
  EXPECT_EQ(workspace.capacity(), held);
  ef::Workspace::Frame frame(workspace);
  EXPECT_THROW(frame.take<double>(std::numeric_limits<Index>::max()), std::bad_alloc);
  EXPECT_THROW(frame.take<double>(-1), std::bad_alloc);
}

TEST(ParallelFor, CoversEveryIndexOnceOnAnyNumberOfThreads) {
  for (int count : {1, 2, 3, 8}) {
    Threads threads(count);
    for (Index n : {0, 1, 2, 7, 100}) {
      for (Index grain : {1, 3, 1000}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
        ef::parallel_for(threads.device, n, grain, [&](Index begin, Index end, int worker) {
          EXPECT_LT(worker, ef::worker_count(threads.device) + count);
          for (Index i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
        });
        for (auto& times : seen) EXPECT_EQ(times.load(), 1);
      }
    }
  }
}

TEST(ParallelFor, MayBeCalledFromAThreadOfThePool) {
  Threads threads(2);
  std::atomic<int> total{0};
  ef::parallel_for(threads.device, 4, 1, [&](Index begin, Index end, int) {
    for (Index i = begin; i < end; ++i)
      ef::parallel_for(threads.device, 10, 1,
                       [&](Index b, Index e, int) { total += static_cast<int>(e - b); });
  });
  EXPECT_EQ(total.load(), 40);
}

TEST(Checks, SayOperatorArgumentExpectedAndGot) {
  expect_throws<std::invalid_argument>(
      [] {
        ef::require_that(false, "linear", "weight has ", Index{96}, " columns, input has ", 128,
                         " features");
      },
      {"linear: weight has 96 columns, input has 128 features"});
  constexpr Index largest = (std::numeric_limits<Index>::max)();
  EXPECT_THROW(ef::checked_product(largest / 2 + 1, 2, "op", "tensor"), std::invalid_argument);
  EXPECT_EQ(ef::checked_product(largest / 2, 2, "op", "tensor"), largest - 1);
  EXPECT_THROW(ef::checked_product(-1, 4, "op", "tensor"), std::invalid_argument);
  ef::Tensor<float, 2> a(2, 3), b(3, 2);
  expect_throws<std::invalid_argument>([&] { ef::require_same_shape("op", "a", a, "b", b); },
                                       {"(2, 3)", "(3, 2)"});
}

}  // namespace
