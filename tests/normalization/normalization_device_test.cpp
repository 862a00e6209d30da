// RMSNorm and LayerNorm on every device, against the double reference.
#include <eigenformer/normalization.h>
#include <eigenformer/reference/normalization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
void check(Index rows, Index features) {
  const auto x = random_tensor<T, 2>({rows, features}, 1);
  const auto weight = random_tensor<float, 1>({features}, 2);
  const auto expected = ef::reference::rms_norm(to_double(x), to_double(weight), 1e-5);
  const auto bias = random_tensor<float, 1>({features}, 3);
  const auto layer =
      ef::reference::layer_norm(to_double(x), to_double(weight), to_double(bias), 1e-5);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    ef::rms_norm_into(bench.device, y.view(), device_x.cview(), device_weight.cview());
    EXPECT_LT(relative_error(y.host(), expected), tolerance<T>()) << rows << " x " << features;
    auto z = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    ef::layer_norm_into(bench.device, z.view(), device_x.cview(), device_weight.cview(),
                        device_bias.cview());
    EXPECT_LT(relative_error(z.host(), layer), tolerance<T>()) << rows << " x " << features;
  });
}

// Sums have the same bits everywhere; the norm is that of the sum, rounded. T: of addend and y.
template <typename T, typename R>
void check_residual(Index rows, Index features) {
  const auto x = random_tensor<T, 2>({rows, features}, 11);
  const auto residual = random_tensor<R, 2>({rows, features}, 12);
  const auto weight = random_tensor<float, 1>({features}, 13);
  ef::Tensor<R, 2> sum(rows, features);
  for (Index i = 0; i < sum.size(); ++i) {
    using C = std::conditional_t<std::is_same_v<R, double>, double, float>;
    sum.data()[i] =
        static_cast<R>(static_cast<C>(residual.data()[i]) + static_cast<C>(x.data()[i]));
  }
  const auto expected = ef::reference::rms_norm(to_double(sum), to_double(weight), double{1e-5f});
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_residual = on_device(bench, residual);
    auto y = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    ef::add_rms_norm_into(bench.device, y.view(), device_residual.view(), device_x.cview(),
                          device_weight.cview());
    EXPECT_TRUE(same_bits(device_residual.host(), sum)) << rows << " x " << features;
    EXPECT_LT(relative_error(y.host(), expected), tolerance<T>()) << rows << " x " << features;
    auto again = on_device(bench, residual);
    ef::add_rms_norm_into(bench.device, device_x.view(), again.view(), device_x.cview(),
                          device_weight.cview());
    EXPECT_TRUE(same_bits(device_x.host(), y.host())) << "in the place of the addend";
  });
}

TEST(NormsOnDevice, OfAResidualSum) {
  for (Index features : {1, 33, 255, 256, 515})
    for (Index rows : {0, 1, 3}) {
      check_residual<float, float>(rows, features);
      check_residual<double, double>(rows, features);
      check_residual<ef::bfloat16, ef::bfloat16>(rows, features);
      check_residual<ef::half, float>(rows, features);
    }
}

// Rows whose squares leave the range of their type, and rows far from zero.
TEST(NormsOnDevice, HardRows) {
  const Index features = 300;
  auto x = random_tensor<float, 2>({5, features}, 4);
  for (Index j = 0; j < features; ++j) {
    x(0, j) *= 1e25f;
    x(1, j) *= 1e-25f;
    x(2, j) += 1e5f;
    x(3, j) = 0.0f;
  }
  const auto weight = random_tensor<float, 1>({features}, 5);
  const auto bias = random_tensor<float, 1>({features}, 6);
  const auto expected = ef::reference::rms_norm(to_double(x), to_double(weight), 1e-30);
  const auto layer =
      ef::reference::layer_norm(to_double(x), to_double(weight), to_double(bias), 1e-30);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<float, 2>({5, features}));
    ef::rms_norm_into(bench.device, y.view(), device_x.cview(), device_weight.cview(),
                      {.epsilon = 1e-30f});
    EXPECT_LT(relative_error(y.host(), expected), tolerance<float>());
    ef::layer_norm_into(bench.device, y.view(), device_x.cview(), device_weight.cview(),
                        device_bias.cview(), {.epsilon = 1e-30f});
    EXPECT_LT(relative_error(y.host(), layer), tolerance<float>());
  });
}

TEST(NormsOnDevice, EqualTheReference) {
  for (Index features : {1, 31, 256, 1000, 4096})
    for (Index rows : {0, 1, 7}) {
      check<float>(rows, features);
      check<ef::bfloat16>(rows, features);
      check<ef::half>(rows, features);
      check<double>(rows, features);
    }
}

TEST(NormsOnDevice, OfHeadsInAWiderMatrix) {
  const Index tokens = 3, heads = 2, width = 24, first = 10;
  const auto matrix = random_tensor<float, 2>({tokens, 70}, 33);
  const auto weight = random_tensor<float, 1>({width}, 34);
  ef::Tensor<double, 2> copies(tokens * heads, width);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < heads * width; ++j)
      copies.data()[t * heads * width + j] = static_cast<double>(matrix(t, first + j));
  const auto expected = ef::reference::rms_norm(copies, to_double(weight), 1e-5);
  for_each_device([&](const auto& bench) {
    auto device_matrix = on_device(bench, matrix);
    auto device_weight = on_device(bench, weight);
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens * heads, width}));
    const ef::TensorView<float, 3> to(y.view().data(), tokens, heads, width);
    ef::rms_norm_into(bench.device, to, ef::heads_of(device_matrix.cview(), first, heads, width),
                      device_weight.cview());
    EXPECT_LT(relative_error(y.host(), expected), tolerance<float>());
  });
}

TEST(NormsOnDevice, OfHeadsWithWeightsOfTheirOwn) {
  const Index tokens = 3, heads = 2, width = 24, first = 10;
  const auto matrix = random_tensor<float, 2>({tokens, 70}, 35);
  const auto weight = random_tensor<float, 2>({heads, width}, 36),
             bias = random_tensor<float, 2>({heads, width}, 37);
  ef::Tensor<float, 3> expected(tokens, heads, width);
  ef::layer_norm_into(Eigen::DefaultDevice{}, expected, ef::heads_of(matrix, first, heads, width),
                      weight, bias);
  for_each_device([&](const auto& bench) {
    auto device_matrix = on_device(bench, matrix);
    auto device_weight = on_device(bench, weight), device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<float, 3>({tokens, heads, width}));
    ef::layer_norm_into(bench.device, y.view(),
                        ef::heads_of(device_matrix.cview(), first, heads, width),
                        device_weight.cview(), device_bias.cview());
    EXPECT_LT(relative_error(y.host(), to_double(expected)), tolerance<float>());
  });
}

// A row that begins at no multiple of 16 bytes, and the same row where it does.
template <typename T>
void check_places(Index features) {
  const auto line = random_tensor<T, 1>({features}, 31);
  ef::Tensor<T, 1> apart(features + 1);
  apart(0) = static_cast<T>(0);
  for (Index j = 0; j < features; ++j) apart(j + 1) = line(j);
  const auto weight = random_tensor<float, 1>({features}, 32);
  for_each_device([&](const auto& bench) {
    auto device_weight = on_device(bench, weight);
    auto aligned = on_device(bench, line);
    auto shifted = on_device(bench, apart);
    auto y = on_device(bench, poisoned_tensor<T, 2>({2, features}));
    const auto norm_of = [&](Index row, const T* x) {
      const ef::TensorView<T, 2> to(y.view().data() + row * features, 1, features);
      ef::rms_norm_into(bench.device, to, ef::TensorView<const T, 2>(x, 1, features),
                        device_weight.cview());
    };
    norm_of(0, aligned.cview().data());
    norm_of(1, shifted.cview().data() + 1);
    const auto norms = y.host();
    for (Index j = 0; j < features; ++j) EXPECT_EQ(norms(0, j), norms(1, j)) << j;
  });
}

TEST(NormsOnDevice, BitsDoNotDependOnWhereARowLies) {
  for (Index features : {33, 520, 2055}) {
    check_places<float>(features);
    check_places<ef::bfloat16>(features);
  }
}

}  // namespace
