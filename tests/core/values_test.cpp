// Options and lengths: what has a name is viewed, what has none is owned, through copies and moves;
// lengths are integers of any type, and what does not fit an Index reads as the nearest one that
// does.
#include <eigenformer/attention.h>
#include <eigenformer/causal_mask.h>

#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "compare.h"

using namespace eigenformer_test;

namespace {

std::vector<Index> read(const ef::LengthSpan& lengths) {
  std::vector<Index> result;
  for (Index i = 0; i < lengths.size(); ++i) result.push_back(lengths[i]);
  return result;
}
using Expected = std::vector<Index>;

TEST(LengthSpan, TakesBracedListsOfAnyInteger) {
  const int narrow = 3;
  const Index wide = 4;
  const std::size_t size = 5;
  EXPECT_EQ(read({}), Expected{});
  EXPECT_EQ(read({narrow}), Expected{3});
  EXPECT_EQ(read({wide, 1}), (Expected{4, 1}));
  EXPECT_EQ(read({size, size}), (Expected{5, 5}));
  EXPECT_EQ(read({2, 1}), (Expected{2, 1}));
  EXPECT_EQ(read({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}), (Expected{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
}

template <typename T>
void expect_container_of() {
  const std::vector<T> vector{1, 2, 3};
  const std::array<T, 2> array{4, 5};
  T plain[] = {6, 7};
  EXPECT_EQ(read(vector), (Expected{1, 2, 3}));
  EXPECT_EQ(read(std::span<const T>(vector)), (Expected{1, 2, 3}));
  EXPECT_EQ(read(std::vector<T>{8}), (Expected{8}));
  EXPECT_EQ(read(array), (Expected{4, 5}));
  EXPECT_EQ(read(plain), (Expected{6, 7}));
}

TEST(LengthSpan, TakesContainersOfAnyInteger) {
  expect_container_of<int>();
  expect_container_of<unsigned>();
  expect_container_of<long>();
  expect_container_of<long long>();
  expect_container_of<std::size_t>();
  expect_container_of<unsigned long long>();
  expect_container_of<short>();
  expect_container_of<unsigned char>();
  expect_container_of<char>();
  expect_container_of<char32_t>();
  ef::Tensor<std::int32_t, 1> tensor(2);
  tensor.setValues({4, 2});
  EXPECT_EQ(read(tensor), (Expected{4, 2}));
  EXPECT_EQ(read(ef::TensorView<const std::int32_t, 1>(tensor.data(), 2)), (Expected{4, 2}));
}

TEST(LengthSpan, WhatDoesNotFitReadsAsTheNearest) {
  const std::vector<unsigned long long> huge{~0ull};
  EXPECT_EQ(read(huge), Expected{(std::numeric_limits<Index>::max)()});
}

TEST(LengthSpan, ProblemsTakeIndicesWhereTheyLieAndOthersCopiedOnce) {
  const std::vector<Index> indices{3, 1};
  const std::vector<int> others{3, 1};
  const std::vector<unsigned long long> huge{~0ull};
  ef::Workspace workspace;
  for (int call = 0; call < 2; ++call) {
    ef::Workspace::Frame frame(workspace);
    EXPECT_EQ(ef::detail::indices(indices, frame), indices.data());
    const Index* const copy = ef::detail::indices(others, frame);
    EXPECT_EQ(std::vector<Index>(copy, copy + 2), indices);
    EXPECT_EQ(*ef::detail::indices(huge, frame), (std::numeric_limits<Index>::max)());
    const ef::LengthSpan owned{5, 6};
    EXPECT_EQ(ef::detail::indices(owned, frame)[1], 6);
  }
  EXPECT_EQ(workspace.capacity(), 128u);  // grown once: a line for each copy
}

struct Convertible {
  std::vector<Index> values;
  operator std::span<const Index>() const { return values; }
};

TEST(LengthSpan, OwnsWhatHasNoName) {
  const std::vector<Index> many(100, 7);
  ef::AttentionOptions stored{.causal = true, .query_lengths = std::vector<Index>(many)};
  EXPECT_EQ(read(stored.query_lengths), many);
  stored.query_lengths = Convertible{many};
  EXPECT_EQ(read(stored.query_lengths), many);
  ef::AttentionOptions copy = stored;
  stored.query_lengths = {2, 1};
  EXPECT_EQ(read(copy.query_lengths), many);
  const ef::AttentionOptions moved = std::move(copy);
  EXPECT_EQ(read(moved.query_lengths), many);
  EXPECT_EQ(read(stored.query_lengths), (Expected{2, 1}));
}

TEST(Values, OwnWhatHasNoNameAndViewWhatHas) {
  ef::AttentionOptions options{.alibi_slopes = ef::alibi_slopes(12), .sinks = {0.5f, 0.25f}};
  const ef::AttentionOptions copy = options;
  std::vector<float> named{1, 2, 3};
  options.alibi_slopes = named;
  options.sinks = {};
  named[1] = 5;
  EXPECT_EQ(options.alibi_slopes[1], 5.0f);
  EXPECT_EQ(options.alibi_slopes.data(), named.data());
  EXPECT_TRUE(options.sinks.empty());
  ASSERT_EQ(copy.alibi_slopes.size(), 12u);
  EXPECT_EQ(copy.alibi_slopes[0], 0.5f);
  ASSERT_EQ(copy.sinks.size(), 2u);
  EXPECT_EQ(copy.sinks[1], 0.25f);
  options.sinks = {named.data(), 2};  // a view of memory
  EXPECT_EQ(options.sinks.data(), named.data());
  const std::span<const float> span = options.sinks;
  EXPECT_EQ(span.size(), 2u);
}

TEST(Values, AnExpressionOfAMaskKeepsItsSegments) {
  const auto expression = ef::causal_mask_expression<float>(3, 1, {.segment_ids = {0, 0, 1}});
  const ef::Tensor<float, 3> mask = expression;
  EXPECT_EQ(mask(0, 1, 0), 0.0f);
  EXPECT_EQ(mask(0, 2, 1), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(mask(0, 2, 2), 0.0f);
}

}  // namespace
