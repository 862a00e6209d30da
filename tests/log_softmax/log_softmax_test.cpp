// Laws: right to a float's rounding, however certain a row is; the log-probabilities of sampling;
// the same bits alone, in a batch, on any ISA and threads; rows without a softmax are NaN.
#include <eigenformer/log_softmax.h>
#include <eigenformer/reference/log_softmax.h>
#include <eigenformer/sampling.h>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Each element to what the manual says.
template <typename Y, typename X>
void expect_right(const ef::Tensor<Y, 2>& y, const X& x, const std::string& what) {
  const auto expected = ef::reference::log_softmax(to_double(x));
  for (Index r = 0; r < x.dimension(0); ++r) {
    auto row = to_double(rows_of(x, r, 1));
    std::sort(row.data(), row.data() + row.size(), std::greater<>{});
    const double gap = row.size() > 1 ? row(0, 0) - row(0, 1) : 0;
    const double allowed = std::is_same_v<Y, double> ? 2e-15 : 3e-7 + 1e-7 * gap;
    for (Index i = 0; i < row.size(); ++i) {
      const double own = static_cast<double>(y(r, i)), right = expected(r, i);
      if (std::isinf(right))
        ASSERT_EQ(own, right) << what << " element " << i;
      else
        ASSERT_NEAR(
            own, right,
            allowed * std::abs(right) + static_cast<double>(std::numeric_limits<Y>::denorm_min()))
            << what << " element " << i;
    }
  }
}

template <typename T>
class LogSoftmax : public ::testing::Test {};
TYPED_TEST_SUITE(LogSoftmax, EveryScalar);

TYPED_TEST(LogSoftmax, IsRightToItsRounding) {
  using T = TypeParam;
  Threads threads(3);
  for (const double scale : {0.01, 3.0, 40.0})
    for (Index columns : {1, 2, 127, 128, 129, 1000}) {
      auto x = random_tensor<T, 2>({5, columns}, static_cast<unsigned>(columns), scale);
      if (columns > 2) x(1, 1) = static_cast<T>(-kInfinity);
      x(2, 0) = static_cast<T>(90.0f);  // all but certain
      const auto y = ef::log_softmax(x);
      expect_right(y, x, "columns " + std::to_string(columns));
      EXPECT_TRUE(same_bits(ef::log_softmax(threads.device, x), y));
      for (Index r = 0; r < 5; ++r)
        EXPECT_EQ(std::memcmp(ef::log_softmax(rows_of(x, r, 1)).data(), y.data() + r * columns,
                              static_cast<std::size_t>(columns) * sizeof(*y.data())),
                  0);
      for_each_isa([&](auto isa) {
        auto other = y;
        other.setZero();
        ef::log_softmax_into(on(isa), other, x);
        EXPECT_TRUE(same_bits(other, y)) << isa.name;
      });
    }
}

TEST(LogSoftmaxRows, AreTheLogProbabilitiesOfSampling) {
  const auto x = random_tensor<float, 2>({4, 600}, 3, 2.0);
  const auto y = ef::log_softmax(x);
  for (std::int32_t token : {0, 128, 599}) {
    const auto own = ef::log_probabilities_of(x, std::vector<std::int32_t>(4, token));
    for (Index r = 0; r < 4; ++r) EXPECT_NEAR(own(r), y(r, token), 3e-7f * std::abs(own(r)));
  }
}

TEST(LogSoftmaxRows, WithoutASoftmaxAreNaN) {
  auto x = random_tensor<float, 2>({5, 200}, 4);
  const auto before = ef::log_softmax(x);
  x(0, 199) = std::numeric_limits<float>::quiet_NaN();
  x(2, 7) = kInfinity;
  for (Index i = 0; i < 200; ++i) x(4, i) = -kInfinity;
  const auto y = ef::log_softmax(x);
  for (Index r = 0; r < 5; ++r)
    for (Index i = 0; i < 200; ++i)
      if (r % 2 == 0)
        ASSERT_TRUE(std::isnan(y(r, i)));
      else
        ASSERT_EQ(y(r, i), before(r, i));
}

TEST(LogSoftmaxRows, OfAnyRankAndInPlace) {
  ef::Tensor<float, 3> x = random_tensor<float, 3>({2, 3, 50}, 5);
  const ef::Tensor<float, 3> y = ef::log_softmax(x);
  const ef::TensorView<const float, 2> flat(x.data(), 6, 50);
  EXPECT_TRUE(same_bits(ef::log_softmax(flat), y));
  ef::Workspace workspace;
  const Eigen::DefaultDevice device;
  auto once = x;
  ef::log_softmax_into(device, once, x, workspace);
  EXPECT_EQ(count_allocations([&] { ef::log_softmax_into(device, x, x, workspace); }), 0);
  EXPECT_TRUE(same_bits(x, y));
  EXPECT_EQ(ef::log_softmax(ef::Tensor<ef::half, 2>(0, 7)).dimension(1), 7);
  EXPECT_EQ(ef::log_softmax(ef::Tensor<float, 2>(3, 0)).dimension(0), 3);
}

TEST(LogSoftmaxRows, NameWhatIsWrong) {
  const auto x = random_tensor<float, 2>({2, 5}, 6);
  auto y = poisoned_tensor<float, 2>({2, 4});
  expect_throws<std::invalid_argument>([&] { ef::log_softmax_into(Eigen::DefaultDevice{}, y, x); },
                                       {"log_softmax", "y has shape (2, 4)", "(2, 5)"});
  for (Index i = 0; i < y.size(); ++i) EXPECT_TRUE(std::isnan(y.data()[i]));
}

}  // namespace
