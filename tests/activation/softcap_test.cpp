// Laws of softcap, on every device and ISA: equal to the definition at every length and scalar, in
// place, at infinities; refuses what makes no sense.
#include <eigenformer/activation.h>
#include <eigenformer/reference/activation.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class Softcap : public ::testing::Test {};
TYPED_TEST_SUITE(Softcap, EveryScalar);

TYPED_TEST(Softcap, EqualsItsDefinition) {
  using T = TypeParam;
  for (Index count : {0, 1, 15, 16, 33, 300})
    for (const ef::SoftcapOptions& options :
         {ef::SoftcapOptions{.cap = 30}, ef::SoftcapOptions{.cap = 2, .scale = 0.5f},
          ef::SoftcapOptions{.scale = 0.0625f}}) {
      const auto x = random_tensor<T, 1>({count}, 1, 4.0);
      ef::Tensor<double, 1> expected(count);
      for (Index i = 0; i < count; ++i)
        expected(i) = ef::reference::softcap(static_cast<double>(x(i)), options);
      for_each_isa([&](auto isa) {
        auto y = poisoned_tensor<T, 1>({count});
        ef::softcap_into(on(isa), y, x, options);
        ASSERT_LT(relative_error(y, expected), tolerance<T>()) << isa.name << " " << count;
        ef::Tensor<T, 1> in_place = x;
        ef::softcap_into(on(isa), in_place, in_place, options);
        ASSERT_TRUE(same_bits(in_place, y));
      });
      for_each_device([&](const auto& bench) {
        auto device_x = on_device(bench, x);
        auto y = on_device(bench, poisoned_tensor<T, 1>({count}));
        ef::softcap_into(bench.device, y.view(), device_x.cview(), options);
        ASSERT_LT(relative_error(y.host(), expected), tolerance<T>()) << count;
      });
    }
}

TEST(SoftcapValues, InfinitiesGiveTheCapAndNaNGivesNaN) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  ef::Tensor<float, 1> x(4);
  x.setValues({-infinity, infinity, std::nanf(""), 0.0f});
  const ef::Tensor<float, 1> y = ef::softcap(x, {.cap = 30});
  EXPECT_EQ(y(0), -30.0f);
  EXPECT_EQ(y(1), 30.0f);
  EXPECT_TRUE(std::isnan(y(2)));
  EXPECT_EQ(y(3), 0.0f);
}

TEST(SoftcapErrors, NameTheArgument) {
  const auto x = random_tensor<float, 1>({3}, 2);
  auto y = poisoned_tensor<float, 1>({4});
  const Eigen::DefaultDevice here;
  expect_throws<std::invalid_argument>([&] { ef::softcap_into(here, y, x, {.cap = 1}); },
                                       {"softcap", "y", "(4)"});
  expect_throws<std::invalid_argument>([&] { ef::softcap(x, {.cap = -1}); }, {"cap is -1"});
  expect_throws<std::invalid_argument>(
      [&] { ef::softcap(x, {.scale = std::numeric_limits<float>::infinity()}); }, {"scale is inf"});
}

}  // namespace
