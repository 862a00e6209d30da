// Laws: the ids of a stable sort, at every width, k, scalar and ISA; ties by lowest index; a row of
// NaN harms no other.
#include <eigenformer/reference/top_k.h>
#include <eigenformer/top_k.h>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr ef::TopKOptions kEveryOption[] = {
    {}, {.sorted = false}, {.largest = false}, {.largest = false, .sorted = false}};

/// Many equals, both zeros, both infinities.
template <typename T>
ef::Tensor<T, 2> hard_rows(Index rows, Index columns) {
  auto x = random_tensor<T, 2>({rows, columns}, static_cast<unsigned>(columns), 4.0);
  for (Index i = 0; i < x.size(); ++i) {
    if (i % 3 != 0) x.data()[i] = static_cast<T>(std::round(static_cast<float>(x.data()[i])));
    if (i % 19 == 5) x.data()[i] = static_cast<T>(-0.0f);
    if (i % 23 == 7) x.data()[i] = static_cast<T>(-kInfinity);
    if (i % 41 == 9) x.data()[i] = static_cast<T>(kInfinity);
  }
  return x;
}

template <typename T>
class TopK : public ::testing::Test {};
TYPED_TEST_SUITE(TopK, EveryScalar);

TYPED_TEST(TopK, IsTheBeginningOfAStableSort) {
  using T = TypeParam;
  Threads threads(3);
  for (Index columns : {1, 5, 127, 128, 129, 1000})
    for (Index k : {0, 1, 2, 7, 64, 300, 1000})
      for (const ef::TopKOptions& options : kEveryOption) {
        if (k > columns) continue;
        const auto x = hard_rows<T>(3, columns);
        const auto expected = ef::reference::top_k(to_double(x), k, options);
        const auto [values, ids] = ef::top_k(threads.device, x, k, options);
        ASSERT_TRUE(same_bits(ids, expected)) << columns << " " << k << " " << options.largest;
        for (Index i = 0; i < ids.size(); ++i)
          ASSERT_EQ(std::memcmp(values.data() + i, &x(i / k, ids.data()[i]), sizeof(T)), 0);
        for_each_isa([&](auto isa) {
          const auto again = ef::top_k(on(isa), x, k, options);
          ASSERT_TRUE(same_bits(again.ids, expected)) << isa.name;
        });
      }
}

TEST(TopKRows, OfOneNumber) {
  ef::Tensor<float, 2> x(1, 700);
  for (float number : {0.f, -kInfinity, kInfinity}) {
    x.setConstant(number);
    for (const ef::TopKOptions& options : kEveryOption) {
      const auto ids = ef::top_k(x, 300, options).ids;
      for (Index i = 0; i < 300; ++i) ASSERT_EQ(ids(0, i), i);
    }
  }
}

TEST(TopKRows, OfNaNHarmNoOther) {
  auto x = random_tensor<float, 2>({3, 300}, 2);
  const auto expected = ef::top_k(x, 4);
  x(1, 200) = std::numeric_limits<float>::quiet_NaN();
  for (bool largest : {true, false})
    expect_throws<std::invalid_argument>([&] { ef::top_k(x, 4, {.largest = largest}); },
                                         {"top_k", "row 1 of x holds NaN"});
  ef::Tensor<float, 2> values(3, 4);
  ef::Tensor<std::int32_t, 2> ids(3, 4);
  std::vector<ef::SampleStatus> statuses(3);
  ef::top_k_into(Eigen::DefaultDevice{}, values, ids, x, {}, statuses);
  for (Index r = 0; r < 3; ++r) {
    EXPECT_EQ(statuses[static_cast<std::size_t>(r)],
              r == 1 ? ef::SampleStatus::nan : ef::SampleStatus::ok);
    for (Index i = 0; i < 4; ++i) {
      EXPECT_EQ(ids(r, i), r == 1 ? -1 : expected.ids(r, i));
      EXPECT_EQ(std::isnan(values(r, i)), r == 1);
    }
  }
}

TEST(TopKMemory, NothingIsAllocatedTheSecondTime) {
  const auto x = random_tensor<float, 2>({3, 3000}, 3);
  ef::Tensor<float, 2> values(3, 40);
  ef::Tensor<std::int32_t, 2> ids(3, 40);
  ef::Workspace workspace;
  const auto call = [&] {
    for (const ef::TopKOptions& options : kEveryOption)
      ef::top_k_into(Eigen::DefaultDevice{}, values, ids, x, options, {}, workspace);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
}

TEST(TopKErrors, NameTheArgument) {
  const auto x = random_tensor<float, 2>({3, 20}, 4);
  for (Index k : {-1, 21})
    expect_throws<std::invalid_argument>([&] { ef::top_k(x, k); },
                                         {"top_k", "k is " + std::to_string(k), "0 to 20"});
  const Eigen::DefaultDevice device;
  ef::Tensor<float, 2> values(3, 4), few(2, 4), wide(3, 21);
  ef::Tensor<std::int32_t, 2> ids(3, 4), narrow(3, 3), wide_ids(3, 21);
  std::vector<ef::SampleStatus> statuses(2);
  ids.setConstant(-7);
  expect_throws<std::invalid_argument>([&] { ef::top_k_into(device, few, ids, x); },
                                       {"values has 2 rows, x has 3"});
  expect_throws<std::invalid_argument>([&] { ef::top_k_into(device, values, narrow, x); },
                                       {"ids has shape (3, 3)", "values", "(3, 4)"});
  expect_throws<std::invalid_argument>([&] { ef::top_k_into(device, wide, wide_ids, x); },
                                       {"k is 21, expected 0 to 20"});
  expect_throws<std::invalid_argument>(
      [&] { ef::top_k_into(device, values, ids, x, {}, statuses); }, {"statuses has 2 elements"});
  for (Index i = 0; i < ids.size(); ++i) EXPECT_EQ(ids.data()[i], -7);
  EXPECT_EQ(ef::top_k(ef::Tensor<float, 2>(0, 9), 3).ids.dimension(1), 3);
}

}  // namespace
