// Laws: equal to the definition for every scalar, ISA, width, layout and position; table and
// options give the same bits; the inverse undoes it and is the gradient; lengths are kept, and
// scores depend on distances only; the same bits for any threads, batch and place.
#include <eigenformer/reference/rope.h>
#include <eigenformer/rope.h>

#include "allocations.h"
#include "compare.h"
#include "finite_differences.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};
constexpr auto kInterleaved = ef::RopeLayout::interleaved;
constexpr auto kHalfSplit = ef::RopeLayout::half_split;

template <typename T>
class Rope : public ::testing::Test {};
TYPED_TEST_SUITE(Rope, EveryScalar);

template <typename T>
using TableOf = ef::BasicRopeTable<ef::compute_type<T>>;

TYPED_TEST(Rope, EqualsItsDefinitionAtEveryWidthAndTheTableGivesTheSameBits) {
  using T = TypeParam;
  const std::vector<Index> positions{0, 1, 2, 77, 300, 3};
  for (auto layout : {kHalfSplit, kInterleaved})
    for (Index head_dim : {0, 2, 4, 6, 8, 14, 16, 18, 30, 32, 34, 62, 64, 66, 128, 130})
      for (Index rotary_dim : {Index{0}, head_dim / 4 * 2}) {
        const ef::RopeOptions options{
            .base = 5000.0f, .layout = layout, .rotary_dim = rotary_dim, .scale = 0.5f};
        const auto x = random_tensor<T, 3>({6, 3, head_dim}, 1);
        const auto expected = ef::reference::rope(to_double(x), positions, options);
        const ef::Tensor<T, 3> y = ef::rope(x, positions, options);
        ASSERT_LT(relative_error(y, expected), tolerance<T>()) << head_dim << " " << rotary_dim;
        const TableOf<T> table(301, head_dim, options);
        auto from_table = poisoned_tensor<T, 3>({6, 3, head_dim});
        ef::rope_into(kHere, from_table, x, positions, table);
        ASSERT_TRUE(same_bits(from_table, y));
        for_each_isa([&](auto isa) {
          auto other = poisoned_tensor<T, 3>({6, 3, head_dim});
          ef::rope_into(on(isa), other, x, positions, table);
          ASSERT_LT(relative_error(other, expected), tolerance<T>())
              << isa.name << " " << head_dim << " " << rotary_dim;
        });
      }
}

TYPED_TEST(Rope, FarPositionsKeepTheirPrecision) {
  using T = TypeParam;
  const std::vector<Index> positions{1000000, 999999, 524287, -5};
  const auto x = random_tensor<T, 3>({4, 2, 128}, 2);
  for (float base : {10000.0f, 500000.0f}) {
    const ef::RopeOptions options{.base = base};
    EXPECT_LT(relative_error(ef::rope(x, positions, options),
                             ef::reference::rope(to_double(x), positions, options)),
              std::max(tolerance<T>(), 1e-9));  // double: an angle of 10^6 is known to 1e-10
  }
}

TYPED_TEST(Rope, ScaledPositionsAreNotRounded) {
  using T = TypeParam;
  // 999999 * 0.1f and 16777217 are no floats: an angle from their rounding is off by up to a
  // radian.
  const std::vector<Index> positions{999999, 16777217, -16777217};
  const auto x = random_tensor<T, 3>({3, 2, 64}, 32);
  for (float scale : {0.1f, 0.3f, 1.0f}) {
    const ef::RopeOptions options{.scale = scale};
    EXPECT_LT(relative_error(ef::rope(x, positions, options),
                             ef::reference::rope(to_double(x), positions, options)),
              std::max(tolerance<T>(), 1e-8))
        << scale;
  }
}

TYPED_TEST(Rope, NeverDependsOnThreadsBatchOrPlace) {
  using T = TypeParam;
  const auto x = random_tensor<T, 4>({3, 50, 4, 96}, 3);
  std::vector<std::int32_t> positions;
  for (std::int32_t t = 0; t < 150; ++t) positions.push_back((t * 37) % 151);
  for (auto layout : {kHalfSplit, kInterleaved}) {
    const ef::RopeOptions options{.layout = layout, .rotary_dim = 64};
    const TableOf<T> table(151, 96, options);
    const ef::Tensor<T, 4> y = ef::rope(x, positions, options);
    for (int count : {1, 2, 3}) {
      Threads threads(count);
      ASSERT_TRUE(same_bits(
          y, ef::rope(threads.device, x, std::span<const std::int32_t>(positions), options)));
      ef::Tensor<T, 4> in_place = x;
      ef::rope_into(threads.device, in_place, in_place, positions, table);
      ASSERT_TRUE(same_bits(y, in_place));
    }
    for (Index t : {0, 60, 149}) {  // a token alone, misaligned
      std::vector<T> buffer(4 * 96 + 1);
      std::copy_n(x.data() + t * 4 * 96, 4 * 96, buffer.data() + 1);
      const ef::TensorView<const T, 3> alone(buffer.data() + 1, 1, 4, 96),
          expected(y.data() + t * 4 * 96, 1, 4, 96);
      const std::vector<Index> position{positions[static_cast<std::size_t>(t)]};
      ASSERT_TRUE(same_bits(ef::rope(alone, position, options), expected));
    }
  }
}

TEST(RopeLaws, InverseUndoesItAndIsTheGradient) {
  const std::vector<Index> positions{3, 100, 7};
  for (auto layout : {kHalfSplit, kInterleaved}) {
    const ef::RopeOptions options{.layout = layout, .rotary_dim = 10};
    auto x = random_tensor<double, 3>({3, 2, 14}, 4);
    const auto grad_y = random_tensor<double, 3>({3, 2, 14}, 5);
    auto grad_x = poisoned_tensor<double, 3>({3, 2, 14}), from_table = grad_x;
    ef::rope_backward_into(kHere, grad_x, grad_y, positions, options);
    EXPECT_LT(relative_error(grad_x, ef::reference::rope(grad_y, positions, options, true)), 1e-12);
    EXPECT_LT(relative_error(grad_x,
                             finite_differences(
                                 x, [&] { return dot(ef::rope(x, positions, options), grad_y); })),
              1e-8);
    ef::rope_backward_into(kHere, from_table, grad_y, positions,
                           ef::BasicRopeTable<double>(101, 14, options));
    EXPECT_TRUE(same_bits(from_table, grad_x));
    ef::Tensor<double, 3> back = ef::rope(x, positions, options);
    ef::rope_backward_into(kHere, back, back, positions, options);
    EXPECT_LT(relative_error(back, x), 1e-14);
  }
}

TEST(RopeLaws, ScoresDependOnDistanceOnlyAndLengthsAreKept) {
  const auto q = random_tensor<double, 3>({1, 1, 64}, 6),
             k = random_tensor<double, 3>({1, 1, 64}, 7);
  for (auto layout : {kHalfSplit, kInterleaved}) {
    const auto score = [&](Index i, Index j) {
      return dot(ef::rope(q, std::vector<Index>{i}, {.layout = layout}),
                 ef::rope(k, std::vector<Index>{j}, {.layout = layout}));
    };
    EXPECT_NEAR(score(10, 3), score(1007, 1000), 1e-9);
    EXPECT_GT(std::abs(score(10, 3) - score(10, 4)), 1e-3);
    const auto turned = ef::rope(q, std::vector<Index>{12345}, {.layout = layout});
    EXPECT_NEAR(dot(turned, turned), dot(q, q), 1e-10);
  }
}

TEST(RopeLaws, HandExample) {
  ef::Tensor<double, 3> x(1, 1, 4);
  x.setValues({{{1.0, 2.0, 3.0, 4.0}}});
  const std::vector<Index> position{1};
  const double c = std::cos(1.0), s = std::sin(1.0), c2 = std::cos(0.01), s2 = std::sin(0.01);
  const auto split = ef::rope(x, position);
  EXPECT_NEAR(split(0, 0, 0), 1 * c - 3 * s, 1e-15);
  EXPECT_NEAR(split(0, 0, 2), 3 * c + 1 * s, 1e-15);
  EXPECT_NEAR(split(0, 0, 1), 2 * c2 - 4 * s2, 1e-15);
  const auto pairs = ef::rope(x, position, {.layout = ef::RopeLayout::interleaved});
  EXPECT_NEAR(pairs(0, 0, 0), 1 * c - 2 * s, 1e-15);
  EXPECT_NEAR(pairs(0, 0, 1), 2 * c + 1 * s, 1e-15);
  EXPECT_NEAR(pairs(0, 0, 3), 4 * c2 + 3 * s2, 1e-15);
}

TEST(RopeScalars, MayDiffer) {
  const std::vector<Index> positions{9, 8};
  const auto x = random_tensor<ef::bfloat16, 3>({2, 2, 20}, 8);
  auto y = poisoned_tensor<float, 3>({2, 2, 20});
  ef::rope_into(kHere, y, x, positions, {.rotary_dim = 12});
  EXPECT_LT(relative_error(y, ef::reference::rope(to_double(x), positions, {.rotary_dim = 12})),
            1e-6);
}

TEST(RopeMemory, AllocatesNothing) {
  const std::vector<Index> positions{5, 6};
  const auto x = random_tensor<float, 3>({2, 4, 64}, 9);
  ef::Tensor<float, 3> y(2, 4, 64);
  const ef::RopeTable table(10, 64);
  EXPECT_EQ(count_allocations([&] { ef::rope_into(kHere, y, x, positions, table); }), 0);
  ef::Workspace workspace;
  const auto with_options = [&] { ef::rope_into(kHere, y, x, positions, {}, workspace); };
  EXPECT_GT(count_allocations(with_options), 0);
  with_options();
  EXPECT_EQ(count_allocations(with_options), 0);
}

TEST(RopeErrors, NameTheArgument) {
  const auto x = random_tensor<float, 3>({2, 1, 8}, 10);
  auto y = poisoned_tensor<float, 3>({2, 1, 8}), wrong = poisoned_tensor<float, 3>({2, 2, 8});
  const std::vector<Index> positions{1, 9}, three{1, 2, 3}, negative{0, -1};
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, y, x, three); },
                                       {"rope", "positions has 3", "2 tokens"});
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, wrong, x, positions); },
                                       {"y has shape (2, 2, 8)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::rope_into(kHere, y, x, positions, {.rotary_dim = 3}); },
      {"rotary_dim is 3", "even"});
  expect_throws<std::invalid_argument>(
      [&] { ef::rope_into(kHere, y, x, positions, {.rotary_dim = 10}); },
      {"rotary_dim is 10", "8"});
  expect_throws<std::invalid_argument>(
      [&] { ef::rope_into(kHere, y, x, positions, {.base = 0.0f}); }, {"base is 0"});
  expect_throws<std::invalid_argument>(
      [&] { ef::rope_into(kHere, y, x, positions, {.scale = NAN}); }, {"scale is nan"});
  const ef::RopeTable table(9, 8), narrow(9, 6), none;
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, y, x, positions, table); },
                                       {"positions[1] is 9", "0 to 8"});
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, y, x, negative, table); },
                                       {"positions[1] is -1"});
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, y, x, positions, narrow); },
                                       {"head_dim 6", "head_dim 8"});
  expect_throws<std::invalid_argument>([&] { ef::rope_into(kHere, y, x, positions, none); },
                                       {"head_dim 0"});
  expect_throws<std::invalid_argument>([&] { ef::rope_backward_into(kHere, y, x, three); },
                                       {"rope_backward", "positions has 3"});
  expect_throws<std::invalid_argument>([] { ef::RopeTable(-1, 8); },
                                       {"RopeTable", "max_positions is -1"});
  expect_throws<std::invalid_argument>([] { ef::RopeTable(4, 7); }, {"rotary_dim is 7"});
  expect_throws<std::invalid_argument>([] { ef::RopeTable(Index{1} << 60, 64); }, {"overflows"});
  for (Index i = 0; i < y.size(); ++i) EXPECT_TRUE(std::isnan(y.data()[i]));
}

TEST(RopePositions, ComeInAnyContainer) {
  const auto x = random_tensor<float, 3>({3, 2, 8}, 40);
  const std::vector<Index> positions{5, 0, 2};
  const ef::RopeTable table(6, 8);
  const ef::Tensor<float, 3> y = ef::rope(x, positions);
  ef::Tensor<std::int32_t, 1> tensor(3);
  tensor.setValues({5, 0, 2});
  const auto check = [&](const auto& container) {
    EXPECT_TRUE(same_bits(ef::rope(x, container), y));
    EXPECT_TRUE(same_bits(ef::rope(x, container, table), y));
    auto into = poisoned_tensor<float, 3>({3, 2, 8});
    ef::rope_into(kHere, into, x, container, table);
    EXPECT_TRUE(same_bits(into, y));
    ef::Tensor<float, 3> back(3, 2, 8);
    ef::rope_backward_into(kHere, back, y, container);
    EXPECT_LT(relative_error(back, x), 1e-6);
  };
  check(tensor);
  check(std::vector<std::size_t>{5, 0, 2});
  check(std::vector<long long>{5, 0, 2});
  check(std::vector<std::int32_t>{5, 0, 2});
  check(std::array<unsigned char, 3>{5, 0, 2});
  check(std::span<const Index>(positions));
  EXPECT_TRUE(same_bits(ef::rope(x, {5, 0, 2}), y));
  EXPECT_TRUE(same_bits(ef::rope(x, {5, 0, 2}, table), y));
  EXPECT_TRUE(same_bits(ef::rope(kHere, x, {5, 0, 2}, {.base = 10000.0f}), y));
  const std::vector<std::uint64_t> far{0, 1, ~std::uint64_t{0}};
  expect_throws<std::invalid_argument>([&] { ef::rope(x, far, table); }, {"positions[2]"});
}

}  // namespace
