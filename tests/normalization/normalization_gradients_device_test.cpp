// Gradients of RMSNorm and LayerNorm on every device, against the double reference.
#include <eigenformer/normalization.h>
#include <eigenformer/reference/normalization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// A gradient that is added to begins with this.
constexpr double kBefore = 0.5;

template <typename G>
ef::Tensor<G, 1> beginning(Index features) {
  ef::Tensor<G, 1> gradient(features);
  gradient.setConstant(static_cast<G>(kBefore));
  return gradient;
}

ef::Tensor<double, 1> added(const ef::Tensor<double, 1>& gradient) { return gradient + kBefore; }

// T: of x, grad_y and grad_x; G: of the gradients of weight and bias.
template <typename T, typename G>
void check(const ef::Tensor<T, 2>& x, const ef::Tensor<T, 2>& grad_y, float epsilon = 1e-5f) {
  const Index rows = x.dimension(0), features = x.dimension(1);
  const auto weight = random_tensor<float, 1>({features}, 22);
  const auto rms =
      ef::reference::rms_norm_backward(to_double(grad_y), to_double(x), to_double(weight), epsilon);
  const auto layer = ef::reference::layer_norm_backward(to_double(grad_y), to_double(x),
                                                        to_double(weight), epsilon);
  const double bound = tolerance<T>(), sums = std::is_same_v<T, double> ? 1e-12 : 1e-5;
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_grad_y = on_device(bench, grad_y);
    auto device_weight = on_device(bench, weight);
    auto grad_x = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    auto grad_weight = on_device(bench, beginning<G>(features));
    ef::rms_norm_backward_into(bench.device, grad_x.view(), grad_weight.view(),
                               device_grad_y.cview(), device_x.cview(), device_weight.cview(),
                               {.epsilon = epsilon});
    EXPECT_LT(relative_error(grad_x.host(), rms.x), bound) << rows << " x " << features;
    EXPECT_LT(relative_error(grad_weight.host(), added(rms.weight)), sums)
        << rows << " x " << features;

    auto layer_x = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    auto layer_weight = on_device(bench, beginning<G>(features));
    auto layer_bias = on_device(bench, beginning<G>(features));
    ef::layer_norm_backward_into(bench.device, layer_x.view(), layer_weight.view(),
                                 layer_bias.view(), device_grad_y.cview(), device_x.cview(),
                                 device_weight.cview(), {.epsilon = epsilon});
    EXPECT_LT(relative_error(layer_x.host(), layer.x), bound) << rows << " x " << features;
    EXPECT_LT(relative_error(layer_weight.host(), added(layer.weight)), sums)
        << rows << " x " << features;
    EXPECT_LT(relative_error(layer_bias.host(), added(layer.bias)), sums)
        << rows << " x " << features;

    // in the place of grad_y, and of x
    auto other_weight = on_device(bench, beginning<G>(features));
    auto other_bias = on_device(bench, beginning<G>(features));
    auto other_grad_y = on_device(bench, grad_y);
    ef::rms_norm_backward_into(bench.device, other_grad_y.view(), other_weight.view(),
                               other_grad_y.cview(), device_x.cview(), device_weight.cview(),
                               {.epsilon = epsilon});
    EXPECT_TRUE(same_bits(other_grad_y.host(), grad_x.host()));
    EXPECT_TRUE(same_bits(other_weight.host(), grad_weight.host()));
    ef::layer_norm_backward_into(bench.device, device_x.view(), other_weight.view(),
                                 other_bias.view(), device_grad_y.cview(), device_x.cview(),
                                 device_weight.cview(), {.epsilon = epsilon});
    EXPECT_TRUE(same_bits(device_x.host(), layer_x.host()));
    EXPECT_TRUE(same_bits(other_bias.host(), layer_bias.host()));
  });
}

template <typename T, typename G>
void check(Index rows, Index features) {
  check<T, G>(random_tensor<T, 2>({rows, features}, 20), random_tensor<T, 2>({rows, features}, 21));
}

TEST(NormGradientsOnDevice, EqualTheReference) {
  for (Index features : {5, 33, 256, 515})
    for (Index rows : {1, 3}) {
      check<float, float>(rows, features);
      check<double, double>(rows, features);
      check<ef::bfloat16, float>(rows, features);
      check<ef::half, float>(rows, features);
    }
  for (Index rows : {0, 63, 64, 65, 130}) check<float, double>(rows, 7);
}

// Rows whose squares and products leave the range of float, and rows far from zero.
TEST(NormGradientsOnDevice, OfHardRows) {
  const Index features = 300;
  const auto rows_of = [&](double scale, double shift, double gradient) {
    auto x = random_tensor<float, 2>({2, features}, 23),
         g = random_tensor<float, 2>({2, features}, 24);
    for (Index i = 0; i < x.size(); ++i) {
      x.data()[i] = static_cast<float>(shift + scale * static_cast<double>(x.data()[i]));
      g.data()[i] *= static_cast<float>(gradient);
    }
    check<float, float>(x, g, scale < 1 ? 1e-42f : 1e-5f);
  };
  rows_of(1e25, 0, 1e18);
  rows_of(1e-21, 0, 1e-3);
  rows_of(1, 3e4, 1);
  rows_of(1, 0, 1e36);
}

// A row that holds NaN and whose grad_y is all zero takes no part.
TEST(NormGradientsOnDevice, ARowWithoutGradientTakesNoPart) {
  const Index features = 40;
  auto x = random_tensor<float, 2>({3, features}, 25),
       grad_y = random_tensor<float, 2>({3, features}, 26);
  const auto weight = random_tensor<float, 1>({features}, 27);
  for (Index j = 0; j < features; ++j) grad_y(1, j) = 0;
  x(1, 5) = std::numeric_limits<float>::quiet_NaN();
  x(1, 6) = std::numeric_limits<float>::infinity();
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_grad_y = on_device(bench, grad_y);
    auto device_weight = on_device(bench, weight);
    auto grad_x = on_device(bench, poisoned_tensor<float, 2>({3, features}));
    auto grad_weight = on_device(bench, beginning<float>(features));
    auto grad_bias = on_device(bench, beginning<float>(features));
    const auto look = [&] {
      const auto found = grad_x.host();
      for (Index r = 0; r < 3; ++r)
        for (Index j = 0; j < features; ++j) {
          ASSERT_TRUE(std::isfinite(found(r, j))) << r << ", " << j;
          ASSERT_EQ(found(r, j) == 0, r == 1) << r << ", " << j;
        }
      for (const auto& sums : {grad_weight.host(), grad_bias.host()})
        for (Index j = 0; j < features; ++j) ASSERT_TRUE(std::isfinite(sums(j))) << j;
    };
    ef::rms_norm_backward_into(bench.device, grad_x.view(), grad_weight.view(),
                               device_grad_y.cview(), device_x.cview(), device_weight.cview());
    look();
    ef::layer_norm_backward_into(bench.device, grad_x.view(), grad_weight.view(), grad_bias.view(),
                                 device_grad_y.cview(), device_x.cview(), device_weight.cview());
    look();
  });
}

}  // namespace
