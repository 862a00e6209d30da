// The foundation: Philox, workspaces, parallel_for, argument checks.
#include <eigenformer/core/check.h>
#include <eigenformer/core/compiler.h>
#include <eigenformer/core/philox.h>
#include <eigenformer/core/workspace.h>

#include <atomic>
#include <filesystem>
#include <limits>
#include <random>
#include <set>
#include <utility>

#include "compare.h"

using namespace eigenformer_test;

namespace {

// Random123 kat_vectors, philox4x32-10.
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(ef::detail::philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(ef::detail::philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                                      {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(ef::detail::philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                                      {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

void expect_draw(std::uint64_t seed, std::uint64_t position, std::uint32_t row, std::uint32_t index,
                 ef::Philox::Purpose purpose, std::array<std::uint32_t, 4> bits, double uniform) {
  const ef::Philox rng(seed, position);
  EXPECT_EQ(rng.bits(row, index, purpose), bits) << seed << " " << position;
  EXPECT_EQ(rng.uniform(row, index, purpose), uniform) << seed << " " << position;
  EXPECT_EQ(rng.seed(), seed);
  EXPECT_EQ(rng.position(), position);
  ef::Philox advanced(seed);
  advanced.advance(position);
  EXPECT_EQ(advanced.bits(row, index, purpose), bits);
  if (purpose == ef::Philox::Purpose::sampling) {
    EXPECT_EQ(rng.uniform(row, index), uniform);
  }
}

// Computed apart, from the paper's definition: counter {index + purpose * 2^28, row, position low,
// position high}, key {seed low, seed high}.
TEST(Philox, KnownAnswersOfDraws) {
  using enum ef::Philox::Purpose;
  expect_draw(0x2a, 0x0, 0x0, 0x0, sampling, {0x9ceaf053, 0x77f5493b, 0x12bf50ad, 0x5742b3d7},
              0x1.39d5e0a6efea9p-1);
  expect_draw(0x1, 0x0, 0x0, 0x0, sampling, {0xe3e80670, 0xe50a0ebc, 0x95f222c0, 0xb615aa27},
              0x1.c7d00ce1ca141p-1);
  expect_draw(0x1, 0x100000000, 0x0, 0x0, sampling,
              {0x127bee41, 0x1e047488, 0x48842b20, 0x0a393496}, 0x1.27bee411e0478p-4);
  expect_draw(0x100000000, 0x0, 0x0, 0x0, sampling,
              {0xfdde3e0b, 0xfa7e58b6, 0x3380ec46, 0xd8d55c4f}, 0x1.fbbc7c17f4fcbp-1);
  expect_draw(0x100000001, 0x5, 0x9, 0x0, sampling,
              {0xccfdc1e5, 0xcd72ee34, 0x149560b3, 0xc99cfd1e}, 0x1.99fb83cb9ae5dp-1);
  expect_draw(0xfedcba9876543210, 0x123456789abcdef, 0xfffffffe, 0xfffffff, sampling,
              {0x134190de, 0xf9675f18, 0xda6bb091, 0xd763edd4}, 0x1.34190def96758p-4);
  expect_draw(0x2a, 0x7, 0x3, 0x5, sampling, {0x929190ec, 0x344bb197, 0xb89dd1da, 0xcc6a69b8},
              0x1.252321d868977p-1);
  expect_draw(0x2a, 0x7, 0x5, 0x3, sampling, {0xe778ed2d, 0xdcf8f352, 0xb8ffa08c, 0x12b8f6f3},
              0x1.cef1da5bb9f1fp-1);
  expect_draw(0x2a, 0x7, 0x3, 0x5, acceptance, {0x59f677e3, 0x73105f93, 0x97940bcb, 0xe244dd0c},
              0x1.67d9df8dcc416p-2);
  expect_draw(0x2a, 0x7, 0x3, 0x0, last_token, {0x656d03bb, 0x09adfe17, 0xe42b7511, 0xa11d7ac9},
              0x1.95b40eec26b7ep-2);
  expect_draw(0x2a, 0x7, 0x3, 0x5, initialisation, {0xc41404f3, 0x978fe6f0, 0x65e0dba3, 0xaf202c2d},
              0x1.882809e72f1fdp-1);
  expect_draw(0x2a, 0x7, 0x0, 0x0, engine, {0x528739b0, 0x1e34b222, 0x289e0bcb, 0x1c9a9556},
              0x1.4a1ce6c078d2ep-2);
  expect_draw(0x2a, 0x7, 0x3, 0x5, user, {0x60ca95b3, 0x9fdb7c8a, 0xd51a8fde, 0x6d84def7},
              0x1.832a56ce7f6dep-2);
  expect_draw(0x2a, 0xffffffffffffffff, 0xffffffff, 0x0, sampling,
              {0xd2bbea13, 0x488cdabe, 0x694c3c21, 0xafa70807}, 0x1.a577d4269119bp-1);
  ef::Philox random(42);
  for (std::uint32_t expected : {0x7c78fb3eu, 0x0aec3112u, 0xefc42a04u})
    EXPECT_EQ(random(), expected);
  EXPECT_EQ(random.position(), 3u);
}

// Streams of one seed and position: no counter is shared, up to the limits of rows and indices.
TEST(Philox, PurposesNeverMeet) {
  using enum ef::Philox::Purpose;
  const ef::Philox rng(3, std::uint64_t{1} << 32);
  std::set<std::array<std::uint32_t, 4>> seen;
  std::size_t draws = 0;
  for (const auto purpose : {sampling, acceptance, last_token, initialisation, engine, user})
    for (std::uint32_t row : {0u, 1u, 2u, 0x0FFFFFFFu, 0x10000000u, 0xFFFFFFFEu, 0xFFFFFFFFu})
      for (std::uint32_t index : {0u, 1u, 2u, 0x07FFFFFFu, 0x08000000u, 0x0FFFFFFFu}) {
        seen.insert(rng.bits(row, index, purpose));
        ++draws;
      }
  EXPECT_EQ(seen.size(), draws);
  ef::Philox engine_draw = rng;
  EXPECT_EQ(engine_draw(), rng.bits(0, 0, engine)[0]);
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
  std::set<int> faces;
  for (int i = 0; i < 100; ++i) faces.insert(die(a));
  EXPECT_EQ(faces, (std::set<int>{1, 2, 3, 4, 5, 6}));
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
TEST(Isa, CallableTagsAreThoseTheBestInheritsFromAndAvxVnniWhereTheCompilerHasIt) {
  std::vector<std::string> names;
  for_each_tag(ef::isa::Callable{}, [&](auto isa) {
    using Tag = decltype(isa);
    EXPECT_TRUE((std::is_base_of_v<Tag, ef::isa::best>) ||
                (std::is_same_v<Tag, ef::isa::avx_vnni>));
    names.push_back(isa.name);
  });
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.front(), ef::isa::generic::name);
  EXPECT_EQ(names.back(), ef::isa::best::name);
}

#if defined(EIGENFORMER_ISA_DIR)
TEST(Isa, EveryTagHasAFileOfFlagsAndEveryFileATag) {
  std::set<std::string> tags, files;
  for_each_tag(ef::isa::Known{}, [&](auto isa) { tags.insert(isa.name); });
  for (const auto& entry : std::filesystem::directory_iterator(EIGENFORMER_ISA_DIR))
    if (entry.path().stem() != "native") files.insert(entry.path().stem().string());
  EXPECT_EQ(tags, files);
}
#endif

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
      for (int indices : {1, 3, 1000}) {  // that pay for a thread
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
        const ef::cpu::Cost cost{1, ef::cpu::kWakingCycles / indices};
        ef::cpu::parallel_for(threads.device, n, cost, [&](Index begin, Index end, int worker) {
          EXPECT_LT(worker, ef::cpu::worker_count(threads.device) + count);
          for (Index i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
        });
        for (auto& times : seen) EXPECT_EQ(times.load(), 1);
      }
    }
  }
}

TEST(ParallelFor, MakesAsManyPartsAsPayForAThread) {
  Threads threads(4);
  const auto parts = [&](Index count, ef::cpu::Cost cost) {
    return ef::cpu::part_count(threads.device, count, cost);
  };
  EXPECT_EQ(parts(2, {15999}), 1);  // 16000 elements pay for one
  EXPECT_EQ(parts(2, {16000}), 2);
  EXPECT_EQ(parts(100, {16000}), 4);
  EXPECT_EQ(parts(3, {(std::numeric_limits<Index>::max)()}), 3);
  EXPECT_EQ(parts(100, {0}), 1);
  EXPECT_EQ(parts(0, {16000}), 1);
  EXPECT_EQ(ef::cpu::part_count(Eigen::DefaultDevice{}, 100, {16000}), 1);
}

TEST(ParallelFor, MayBeCalledFromAThreadOfThePool) {
  Threads threads(2);
  std::atomic<int> total{0};
  ef::cpu::parallel_for(
      threads.device, 4, ef::cpu::kWorthAThread, [&](Index begin, Index end, int) {
        for (Index i = begin; i < end; ++i)
          ef::cpu::parallel_for(threads.device, 10, ef::cpu::kWorthAThread,
                                [&](Index b, Index e, int) { total += static_cast<int>(e - b); });
      });
  EXPECT_EQ(total.load(), 40);
}

TEST(Checks, SayOperatorArgumentExpectedAndGot) {
  expect_throws<std::invalid_argument>(
      [] {
        ef::detail::require_that(false, "linear", "weight has ", Index{96}, " columns, input has ",
                                 128, " features");
      },
      {"linear: weight has 96 columns, input has 128 features"});
  constexpr Index largest = (std::numeric_limits<Index>::max)();
  EXPECT_THROW(ef::detail::checked_product(largest / 2 + 1, 2, "op", "tensor"),
               std::invalid_argument);
  EXPECT_EQ(ef::detail::checked_product(largest / 2, 2, "op", "tensor"), largest - 1);
  EXPECT_THROW(ef::detail::checked_product(-1, 4, "op", "tensor"), std::invalid_argument);
  ef::Tensor<float, 2> a(2, 3), b(3, 2);
  expect_throws<std::invalid_argument>(
      [&] { ef::detail::require_same_shape("op", "a", a, "b", b); }, {"(2, 3)", "(3, 2)"});
}

}  // namespace
