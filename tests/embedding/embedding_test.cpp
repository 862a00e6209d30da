// Laws: rows are copied exactly, at every width, rank, scalar and ISA; the gradient adds rows in
// the order of tokens whatever the threads; a bad id changes nothing.
#include <eigenformer/embedding.h>
#include <eigenformer/linear.h>
#include <eigenformer/reference/embedding.h>

#include "allocations.h"
#include "compare.h"
#include "finite_differences.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};

ef::Tensor<std::int32_t, 1> random_ids(Index tokens, Index vocab, unsigned seed) {
  std::mt19937 generator(seed);
  ef::Tensor<std::int32_t, 1> ids(tokens);
  for (Index t = 0; t < tokens; ++t)
    ids(t) = static_cast<std::int32_t>(generator() % static_cast<unsigned>(vocab));
  return ids;
}

template <typename T>
class Embedding : public ::testing::Test {};
TYPED_TEST_SUITE(Embedding, EveryScalar);

TYPED_TEST(Embedding, CopiesRowsAtEveryWidth) {
  using T = TypeParam;
  Threads threads(3);
  for (Index features : {0, 1, 3, 8, 15, 16, 17, 33, 64, 1000})
    for (Index tokens : {0, 1, 5, 70}) {
      const auto table = random_tensor<T, 2>({9, features}, 1);
      const auto ids = random_ids(tokens, 9, 2);
      const auto expected = ef::reference::embedding(ids, to_double(table));
      const ef::Tensor<T, 2> y = ef::embedding(ids, table);
      ASSERT_EQ(relative_error(y, expected), 0.0);
      ASSERT_TRUE(same_bits(y, ef::embedding(threads.device, ids, table)));
      for_each_isa([&](auto isa) {
        auto wide = poisoned_tensor<float, 2>({tokens, features});
        auto narrow = poisoned_tensor<ef::bfloat16, 2>({tokens, features});
        ef::embedding_into(on(isa), wide, ids, table);
        ef::embedding_into(on(isa), narrow, ids, table);
        for (Index i = 0; i < y.size(); ++i) {
          ASSERT_EQ(wide.data()[i], static_cast<float>(y.data()[i])) << isa.name;
          ASSERT_EQ(static_cast<float>(narrow.data()[i]),
                    static_cast<float>(static_cast<ef::bfloat16>(static_cast<float>(y.data()[i]))))
              << isa.name;
        }
      });
    }
}

// More rows than a panel has, so that rows lie in the middle and at the end of panels.
constexpr Index kManyRows = 131;

TYPED_TEST(Embedding, RowsOfAPackedWeightAreThoseItWasPackedFrom) {
  using T = TypeParam;
  Threads threads(3);
  for (Index features : {1, 2, 3, 7, 64, 257, 515}) {
    const auto table = random_tensor<T, 2>({kManyRows, features}, 11);
    const auto ids = random_ids(40, kManyRows, 12);
    auto expected = poisoned_tensor<float, 2>({40, features});
    ef::embedding_into(kHere, expected, ids, table);
    for_each_isa([&](auto isa) {
      const auto packed = ef::pack_weight<T>(on(isa), table);
      auto y = poisoned_tensor<float, 2>({40, features});
      ef::embedding_into(on(isa), y, ids, packed);
      ASSERT_TRUE(same_bits(y, expected)) << isa.name << ' ' << features;
    });
    const auto packed = ef::pack_weight<T>(kHere, table);
    auto narrow = poisoned_tensor<ef::bfloat16, 2>({40, features}), same = narrow;
    ef::embedding_into(threads.device, narrow, ids, packed);
    ef::embedding_into(kHere, same, ids, table);
    ASSERT_TRUE(same_bits(narrow, same));
  }
}

TEST(PackedEmbedding, RowsOfInt8TimesTheirScales) {
  for (const Index group : {0, 32, 64, 128})
    for (Index features : {1, 31, 33, 128, 300, 515}) {
      const Index groups = group == 0 ? 1 : (features + group - 1) / group;
      ef::Tensor<std::int8_t, 2> values(kManyRows, features);
      for (Index i = 0; i < values.size(); ++i)
        values.data()[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
      ef::Tensor<float, 2> scales = random_tensor<float, 2>({kManyRows, groups}, 13).abs();
      const bool halves = features % 2 == 1;
      if (halves) scales = ef::Tensor<float, 2>(scales.cast<ef::half>().cast<float>());
      const auto ids = random_ids(40, kManyRows, 14);
      ef::Tensor<float, 2> expected(40, features);
      for (Index t = 0; t < 40; ++t)
        for (Index j = 0; j < features; ++j)
          expected(t, j) =
              static_cast<float>(values(ids(t), j)) * scales(ids(t), group == 0 ? 0 : j / group);
      const ef::TensorView<const float, 1> by_row(scales.data(), kManyRows);
      for_each_isa([&](auto isa) {
        const auto packed = group == 0
                                ? ef::pack_weight(on(isa), values, by_row)
                                : ef::pack_weight(on(isa), values, scales,
                                                  {.group_size = group, .half_scales = halves});
        ASSERT_EQ(packed.half_scales() != nullptr, halves && group > 0);
        auto y = poisoned_tensor<float, 2>({40, features});
        ef::embedding_into(on(isa), y, ids, packed);
        ASSERT_TRUE(same_bits(y, expected)) << isa.name << ' ' << group << ' ' << features;
      });
    }
}

TEST(PackedEmbedding, RefusesOtherShapesIdsAndLayouts) {
  const auto table = random_tensor<float, 2>({5, 6}, 15);
  const auto packed = ef::pack_weight<float>(table);
  const std::vector<std::int32_t> id{4}, foreign{5};
  auto narrow = poisoned_tensor<float, 2>({1, 5}), y = poisoned_tensor<float, 2>({1, 6});
  expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, narrow, id, packed); },
                                       {"embedding: y has shape (1, 5)", "(5, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, y, foreign, packed); },
                                       {"id 5 at position 0"});
  for_each_isa([&](auto isa) {
    if (std::string_view(isa.name) == packed.layout().isa) return;
    const auto other = ef::pack_weight<float>(on(isa), table);
    if (other.layout() == packed.layout()) return;
    expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, y, id, other); },
                                         {"embedding: weight was packed for", isa.name});
  });
  for (Index i = 0; i < y.size(); ++i) EXPECT_TRUE(std::isnan(y.data()[i]));
}

TYPED_TEST(Embedding, GradientAddsInTheOrderOfTokens) {
  using T = TypeParam;
  for (Index features : {0, 1, 16, 31, 700})
    for (Index tokens : {0, 1, 300}) {
      const auto ids = random_ids(tokens, 7, 3);
      const auto grad_y = random_tensor<T, 2>({tokens, features}, 4);
      const auto start = random_tensor<float, 2>({7, features}, 5);
      ef::Tensor<float, 2> expected = start;  // the same additions, one by one
      for (Index t = 0; t < tokens; ++t)
        for (Index j = 0; j < features; ++j)
          expected(ids(t), j) =
              static_cast<float>(static_cast<ef::compute_type<T>>(expected(ids(t), j)) +
                                 static_cast<ef::compute_type<T>>(grad_y(t, j)));
      for (int count : {1, 2, 3}) {
        Threads threads(count);
        ef::Tensor<float, 2> grad_table = start;
        ef::embedding_backward_into(threads.device, grad_table, grad_y, ids);
        ASSERT_TRUE(same_bits(grad_table, expected)) << features << " " << tokens;
      }
      ef::Tensor<double, 2> wide = to_double(start), reference = wide;
      ef::embedding_backward_into(kHere, wide, grad_y, ids);
      ef::reference::embedding_backward(reference, to_double(grad_y), ids);
      ASSERT_TRUE(same_bits(wide, reference));
    }
}

TEST(EmbeddingGradients, EqualFiniteDifferences) {
  auto table = random_tensor<double, 2>({5, 6}, 6);
  const auto ids = random_ids(9, 5, 7);
  const auto grad_y = random_tensor<double, 2>({9, 6}, 8);
  ef::Tensor<double, 2> grad_table(5, 6);
  grad_table.setZero();
  ef::embedding_backward_into(kHere, grad_table, grad_y, ids);
  EXPECT_LT(relative_error(
                grad_table,
                finite_differences(table, [&] { return dot(ef::embedding(ids, table), grad_y); })),
            1e-8);
}

TEST(EmbeddingShapes, BatchesAndWideIds) {
  const auto table = random_tensor<float, 2>({11, 4}, 9);
  ef::Tensor<std::int64_t, 2> ids(2, 3);
  ids.setValues({{1, 10, 0}, {10, 10, 5}});
  const ef::Tensor<float, 3> y = ef::embedding(ids, table);
  ASSERT_EQ(y.dimension(0), 2);
  ASSERT_EQ(y.dimension(1), 3);
  for (Index b = 0; b < 2; ++b)
    for (Index t = 0; t < 3; ++t)
      for (Index j = 0; j < 4; ++j) EXPECT_EQ(y(b, t, j), table(ids(b, t), j));
  ef::Tensor<float, 2> grad_table(11, 4);
  grad_table.setZero();
  ef::embedding_backward_into(kHere, grad_table, y, ids);
  for (Index j = 0; j < 4; ++j) {
    EXPECT_EQ(grad_table(10, j), table(10, j) + table(10, j) + table(10, j));
    EXPECT_EQ(grad_table(5, j), table(5, j));
    EXPECT_EQ(grad_table(7, j), 0.0f);
  }
}

TEST(EmbeddingMemory, DestinationFormsAllocateNothing) {
  auto table = random_tensor<float, 2>({11, 40}, 10);
  const auto ids = random_ids(20, 11, 11);
  ef::Tensor<ef::bfloat16, 2> y(20, 40);
  EXPECT_EQ(count_allocations([&] {
              ef::embedding_into(kHere, y, ids, table);
              ef::embedding_backward_into(kHere, table, y, ids);
            }),
            0);
}

TEST(EmbeddingErrors, NameThePositionTheIdAndTheVocabulary) {
  const auto table = random_tensor<float, 2>({8, 4}, 12);
  auto grad_table = table;
  auto y = poisoned_tensor<float, 2>({3, 4});
  const auto grad_y = random_tensor<float, 2>({3, 4}, 13);
  ef::Tensor<std::int32_t, 1> ids(3);
  for (std::int32_t bad : {-1, 8, std::numeric_limits<std::int32_t>::min(),
                           std::numeric_limits<std::int32_t>::max()}) {
    ids.setValues({0, 7, bad});
    const std::vector<std::string> fragments{"embedding", "id " + std::to_string(bad), "position 2",
                                             "< 8"};
    expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, y, ids, table); },
                                         fragments);
    expect_throws<std::invalid_argument>([&] { ef::embedding(ids, table); }, fragments);
    expect_throws<std::invalid_argument>(
        [&] { ef::embedding_backward_into(kHere, grad_table, grad_y, ids); }, fragments);
  }
  ids.setValues({0, 1, 2});
  auto short_y = poisoned_tensor<float, 2>({2, 4}), narrow = poisoned_tensor<float, 2>({3, 5});
  expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, short_y, ids, table); },
                                       {"y has shape (2, 4)", "ids has shape (3)"});
  expect_throws<std::invalid_argument>([&] { ef::embedding_into(kHere, narrow, ids, table); },
                                       {"y has shape (3, 5)", "table has shape (8, 4)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::embedding_backward_into(kHere, grad_table, narrow, ids); },
      {"embedding_backward", "grad_y"});
  EXPECT_TRUE(same_bits(grad_table, table));
  for (Index i = 0; i < y.size(); ++i) EXPECT_TRUE(std::isnan(y.data()[i]));
}

TEST(EmbeddingIds, ComeInVectorsAndSpans) {
  const auto table = random_tensor<float, 2>({9, 5}, 40);
  const std::vector<std::int32_t> ids{3, 8, 3};
  ef::Tensor<std::int32_t, 1> tensor(3);
  tensor.setValues({3, 8, 3});
  const ef::Tensor<float, 2> y = ef::embedding(tensor, table);
  EXPECT_TRUE(same_bits(ef::embedding(ids, table), y));
  EXPECT_TRUE(same_bits(ef::embedding(std::span<const std::int32_t>(ids), table), y));
  EXPECT_TRUE(same_bits(ef::embedding(kHere, std::vector<std::int64_t>{3, 8, 3}, table), y));
  ef::Tensor<float, 2> into(3, 5), gradient(9, 5), other(9, 5);
  ef::embedding_into(kHere, into, ids, table);
  EXPECT_TRUE(same_bits(into, y));
  gradient.setZero(), other.setZero();
  ef::embedding_backward_into(kHere, gradient, y, ids);
  ef::embedding_backward_into(kHere, other, y, tensor);
  EXPECT_TRUE(same_bits(gradient, other));
  expect_throws<std::invalid_argument>(
      [&] {
        ef::embedding(std::vector<int>{1, 9}, table);
      },
      {"id 9 at position 1"});
}

}  // namespace
