// Laws: equal to the plain definition for every option, lazily and in memory, on any device and
// ISA; refuses what makes no sense.
#include <eigenformer/causal_mask.h>
#include <eigenformer/reference/causal_mask.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
class CausalMask : public ::testing::Test {};
TYPED_TEST_SUITE(CausalMask, EveryScalar);

template <typename T>
void check(Index queries, Index batch, const ef::CausalMaskOptions& options) {
  const Index keys = options.key_length == -1 ? std::max<Index>(0, queries + options.query_offset)
                                              : options.key_length;
  const auto expected = ef::reference::causal_mask(queries, batch, keys, options);
  const auto mask = ef::create_causal_mask<T>(queries, batch, options);
  ASSERT_EQ(mask.dimension(0), batch);
  ASSERT_EQ(mask.dimension(1), queries);
  ASSERT_EQ(mask.dimension(2), keys);
  for (Index i = 0; i < mask.size(); ++i)
    ASSERT_EQ(static_cast<double>(mask.data()[i]), expected.data()[i]) << i;

  const ef::Tensor<T, 3> lazy = ef::causal_mask_expression<T>(queries, batch, options);
  ASSERT_TRUE(same_bits(mask, lazy));

  Threads threads(3);
  ASSERT_TRUE(same_bits(mask, ef::create_causal_mask<T>(threads.device, queries, batch, options)));
  for_each_isa([&](auto isa) {
    auto other = poisoned_tensor<T, 3>({batch, queries, keys});
    ef::causal_mask_into(on(isa), other, options);
    ASSERT_TRUE(same_bits(mask, other)) << isa.name;
  });
}

TYPED_TEST(CausalMask, EqualsItsDefinitionAtEveryEdge) {
  for (Index queries : {0, 1, 2, 3, 15, 16, 17, 33})
    for (Index batch : {0, 1, 3}) {
      check<TypeParam>(queries, batch, {});
      for (Index window : {1, 2, 16, 100}) check<TypeParam>(queries, batch, {.window = window});
      for (Index offset : {-40, -2, 5})
        check<TypeParam>(queries, batch, {.key_length = 21, .query_offset = offset, .window = 4});
      for (Index prefix : {1, 7, 50})
        check<TypeParam>(
            queries, batch,
            {.key_length = 20, .query_offset = 3, .window = 2, .prefix_length = prefix});
      check<TypeParam>(queries, batch, {.key_length = 0});
    }
}

/// Masks of more than 16 MiB are written around the caches: one of as many sequences as that takes.
/// The first row begins where no vector is aligned, those of odd length at every alignment; the
/// elements before and after are not the mask's own.
template <typename T>
void check_around_caches(Index queries, Index keys, ef::CausalMaskOptions options) {
  options.key_length = keys;
  const Index area = queries * keys, batch = (Index{16} << 20) / (area * Index{sizeof(T)}) + 1;
  const auto one = ef::create_causal_mask<T>(queries, 1, options);
  ef::Tensor<T, 1> memory(batch * area + 2);
  const auto bytes = [](Index count) { return static_cast<std::size_t>(count) * sizeof(T); };
  for_each_isa([&](auto isa) {
    std::memset(static_cast<void*>(memory.data()), 0xff, bytes(memory.size()));  // NaN
    const ef::TensorView<T, 3> mask(memory.data() + 1, batch, queries, keys);
    ef::causal_mask_into(on(isa), mask, options);
    const T* const second = mask.data() + area;
    ASSERT_EQ(std::memcmp(mask.data(), one.data(), bytes(area)), 0) << isa.name;
    // Each sequence equals the one before it.
    ASSERT_EQ(std::memcmp(mask.data(), second, bytes((batch - 1) * area)), 0) << isa.name;
    ASSERT_TRUE(std::isnan(static_cast<double>(memory(0)))) << isa.name;
    ASSERT_TRUE(std::isnan(static_cast<double>(memory(batch * area + 1)))) << isa.name;
  });
}

TYPED_TEST(CausalMask, TheSameBitsAroundTheCaches) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "one thread, and minutes under this sanitizer";
#endif
  // Rows shorter than a vector are millions, so these in one scalar: of one run, two and three.
  if constexpr (sizeof(TypeParam) == 8) {
    check_around_caches<TypeParam>(2, 2, {.window = 1});
    for (Index window : {0, 1}) check_around_caches<TypeParam>(3, 3, {.window = window});
  }
  for (Index length : {15, 16, 17, 33})
    for (Index window : {0, 2, 16})  // one that holds all keys makes the same runs as none
      if (window < length) check_around_caches<TypeParam>(length, length, {.window = window});
  // from queries before the first key to queries past the last one
  check_around_caches<TypeParam>(79, 21, {.query_offset = -40, .window = 4});
  for (Index prefix : {1, 50})
    check_around_caches<TypeParam>(33, 20,
                                   {.query_offset = 3, .window = 2, .prefix_length = prefix});
}

TYPED_TEST(CausalMask, PackedDocumentsSeeOnlyThemselves) {
  const std::vector<std::int32_t> shared{0, 0, 0, 1, 1, 2, 2, 2, 2};
  check<TypeParam>(9, 2, {.segment_ids = shared});
  check<TypeParam>(4, 3, {.key_length = 9, .query_offset = 5, .window = 3, .segment_ids = shared});
  check<TypeParam>(4, 2,
                   {.key_length = 9,
                    .query_offset = 7,
                    .segment_ids = shared});  // two queries past the last key
  std::vector<std::int32_t> own(shared);
  for (std::int32_t id : {5, 5, 5, 5, 5, 5, 6, 6, 7}) own.push_back(id);
  check<TypeParam>(9, 2, {.prefix_length = 2, .segment_ids = own});
}

TEST(CausalMaskShapes, LargerThanTheCaches) {
  check_around_caches<double>(1, 1, {});
  const Index length = 2960;  // 35 MB of float, above 16 MiB: written around the caches
  Threads threads(2);
  const auto mask = ef::create_causal_mask<float>(threads.device, length, 1,
                                                  {.window = 1000, .prefix_length = 3});
  for (Index i = 0; i < length; ++i)
    for (Index j = 0; j < length; ++j)
      ASSERT_EQ(mask(0, i, j),
                j < 3 || (j <= i && j > i - 1000) ? 0.0f : -std::numeric_limits<float>::infinity())
          << i << " " << j;
}

TEST(CausalMaskShapes, NotebookExample) {
  const ef::Tensor<float, 3> mask = ef::create_causal_mask<float>(3, 2);
  const double expected[3][3] = {{0, -kInfinity, -kInfinity}, {0, 0, -kInfinity}, {0, 0, 0}};
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < 3; ++i)
      for (Index j = 0; j < 3; ++j) EXPECT_EQ(mask(b, i, j), expected[i][j]);
}

TEST(CausalMaskShapes, LazyExpressionWorksInsideOthers) {
  const auto scores = random_tensor<float, 3>({2, 5, 5}, 1);
  auto expression = ef::causal_mask_expression<float>(5, 2);
  const ef::Tensor<float, 3> masked = scores + expression;
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < 5; ++i)
      for (Index j = 0; j < 5; ++j)
        EXPECT_EQ(masked(b, i, j),
                  j <= i ? scores(b, i, j) : -std::numeric_limits<float>::infinity());
}

TEST(CausalMaskShapes, AlibiSlopesAndBias) {
  const auto eight = ef::alibi_slopes(8);
  for (int h = 0; h < 8; ++h)
    EXPECT_FLOAT_EQ(eight[static_cast<std::size_t>(h)], std::exp2(-static_cast<float>(h + 1)));
  // the paper's rule for other head counts, as published with BLOOM
  const auto twelve = ef::alibi_slopes(12);
  EXPECT_FLOAT_EQ(twelve[7], std::exp2(-8.0f));
  EXPECT_FLOAT_EQ(twelve[8], std::exp2(-0.5f));
  EXPECT_FLOAT_EQ(twelve[11], std::exp2(-3.5f));
  const std::vector<float> slopes{0.5f, 0.25f};
  const auto mask = ef::create_alibi_mask<float>(2, slopes, {.key_length = 5, .query_offset = 2});
  EXPECT_EQ(mask(0, 0, 0), -1.0f);
  EXPECT_EQ(mask(1, 0, 1), -0.25f);
  EXPECT_EQ(mask(1, 1, 3), 0.0f);
  EXPECT_EQ(mask(1, 0, 3), -std::numeric_limits<float>::infinity());
}

TEST(CausalMaskShapes, RowsWithoutKeysCostNothing) {
  const ef::Tensor<float, 3> mask =
      ef::create_causal_mask<float>(Index{1} << 31, Index{1} << 31, {.key_length = 0});
  EXPECT_EQ(mask.dimension(1), Index{1} << 31);
  EXPECT_EQ(mask.size(), 0);
}

TEST(CausalMaskShapes, RefusesWithTheArgumentNamed) {
  expect_throws<std::invalid_argument>([] { ef::create_causal_mask<float>(-1, 1); },
                                       {"create_causal_mask", "query_length", "-1"});
  expect_throws<std::invalid_argument>([] { ef::create_causal_mask<float>(3, -2); },
                                       {"batch_size", "-2"});
  expect_throws<std::invalid_argument>(
      [] { ef::create_causal_mask<float>(3, 1, {.key_length = -5}); }, {"key_length", "-5"});
  expect_throws<std::invalid_argument>([] { ef::create_causal_mask<float>(3, 1, {.window = -1}); },
                                       {"window", "-1"});
  expect_throws<std::invalid_argument>(
      [] { ef::create_causal_mask<float>(Index{1} << 31, 1 << 20); }, {"overflows"});
  expect_throws<std::invalid_argument>(
      [] { ef::create_causal_mask<float>(Index{1} << 33, Index{1} << 33, {.key_length = 0}); },
      {"overflows"});
  expect_throws<std::invalid_argument>(
      [] { ef::create_causal_mask<float>(0, Index{1} << 40, {.key_length = Index{1} << 40}); },
      {"overflows"});
  const std::vector<std::int32_t> ids{0, 1};
  expect_throws<std::invalid_argument>(
      [&] { ef::create_causal_mask<float>(3, 2, {.segment_ids = ids}); },
      {"segment_ids has 2", "3", "6"});
  ef::Tensor<float, 3> mask(1, 2, 4);
  mask.setConstant(7.0f);
  expect_throws<std::invalid_argument>(
      [&] { ef::causal_mask_into(Eigen::DefaultDevice{}, mask, {.key_length = 5}); },
      {"mask has 4 keys", "5"});
  EXPECT_EQ(mask(0, 0, 0), 7.0f);
}

}  // namespace
