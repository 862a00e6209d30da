// Laws of the clamped SwiGLU: the definition on every device and ISA, for lengths around a vector;
// limits, infinities and NaN; what it refuses.
#include <eigenformer/activation.h>
#include <eigenformer/reference/activation.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();

template <typename T>
void expect_definition(Index features, const ef::ClampedSwigluOptions& options) {
  const auto x = random_tensor<T, 2>({3, 2 * features}, static_cast<unsigned>(features), 5.0);
  ef::Tensor<double, 2> expected(3, features);
  for (Index r = 0; r < 3; ++r)
    for (Index i = 0; i < features; ++i)
      expected(r, i) = ef::reference::clamped_swiglu(
          static_cast<double>(x(r, i)), static_cast<double>(x(r, features + i)), options);
  for_each_isa([&](auto isa) {
    auto y = poisoned_tensor<T, 2>({3, features});
    ef::clamped_swiglu_into(on(isa), y, x, options);
    EXPECT_LT(relative_error(y, expected), tolerance<T>()) << isa.name << " " << features;
  });
  for_each_device([&](const auto& bench) {
    const auto from = on_device(bench, x);
    const auto y = on_device(bench, poisoned_tensor<T, 2>({3, features}));
    ef::clamped_swiglu_into(bench.device, y.view(), from.cview(), options);
    EXPECT_LT(relative_error(y.host(), expected), tolerance<T>()) << features;
  });
}

TEST(ClampedSwiglu, IsItsDefinition) {
  for (const Index features : {0, 1, 15, 16, 33}) {
    expect_definition<float>(features, {});
    expect_definition<ef::bfloat16>(features, {.alpha = 1.5f, .limit = 2.0f});
  }
  expect_definition<double>(7, {.limit = 3.0f});
}

TEST(ClampedSwiglu, LimitsInfinitiesAndNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ef::Tensor<float, 2> x(1, 12), y(1, 6);
  x.setValues({{kFloatInfinity, -kFloatInfinity, 1, 1, nan, 1, 0, 0, kFloatInfinity,
                -kFloatInfinity, 0, nan}});
  ef::clamped_swiglu_into(Eigen::DefaultDevice{}, y, x);
  const float one = static_cast<float>(1 / (1 + std::exp(-1.702)));
  EXPECT_NEAR(y(0, 0), 7, 1e-4);
  EXPECT_EQ(y(0, 1), 0);
  EXPECT_NEAR(y(0, 2), 8 * one, 1e-5);
  EXPECT_NEAR(y(0, 3), -6 * one, 1e-5);
  EXPECT_TRUE(std::isnan(y(0, 4)));
  EXPECT_TRUE(std::isnan(y(0, 5)));
}

TEST(ClampedSwiglu, BadArgumentsAreRefused) {
  const Eigen::DefaultDevice here;
  const ef::Tensor<float, 2> x(2, 8), odd(2, 7);
  ef::Tensor<float, 2> y(2, 4), narrow(2, 3);
  for (const auto* from : {&odd, &x})
    expect_throws<std::invalid_argument>([&] { ef::clamped_swiglu_into(here, narrow, *from); },
                                         {"clamped_swiglu", "(2, 3)", "twice as many"});
  expect_throws<std::invalid_argument>(
      [&] { ef::clamped_swiglu_into(here, y, x, {.alpha = kFloatInfinity}); }, {"alpha is inf"});
  expect_throws<std::invalid_argument>([&] { ef::clamped_swiglu_into(here, y, x, {.limit = 0}); },
                                       {"limit is 0"});
}

}  // namespace
