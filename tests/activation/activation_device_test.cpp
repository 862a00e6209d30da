// Activations, gated activations, their gradients and the residual sum on every device, against the
// double reference: every tail of a pack, misaligned rows, special values, outputs in place.
#include <eigenformer/activation.h>
#include <eigenformer/reference/activation.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr ef::GeluOptions kTanh{.approximation = ef::GeluApproximation::tanh};

struct Silu {
  static double value(double x) { return ef::reference::silu(x); }
  static double derivative(double x) { return ef::reference::silu_derivative(x); }
  static void into(const auto& device, auto y, auto x) { ef::silu_into(device, y, x); }
  static void backward(const auto& device, auto gx, auto gy, auto x) {
    ef::silu_backward_into(device, gx, gy, x);
  }
  static void gated(const auto& device, auto y, auto... gate_up) {
    ef::swiglu_into(device, y, gate_up...);
  }
  static void gated_backward(const auto& device, auto... tensors) {
    ef::swiglu_backward_into(device, tensors...);
  }
};

template <bool Tanh>
struct Gelu {
  static constexpr ef::GeluOptions kOptions = Tanh ? kTanh : ef::GeluOptions{};
  static double value(double x) { return ef::reference::gelu(x, kOptions); }
  static double derivative(double x) { return ef::reference::gelu_derivative(x, kOptions); }
  static void into(const auto& device, auto y, auto x) { ef::gelu_into(device, y, x, kOptions); }
  static void backward(const auto& device, auto gx, auto gy, auto x) {
    ef::gelu_backward_into(device, gx, gy, x, kOptions);
  }
  static void gated(const auto& device, auto y, auto... gate_up) {
    ef::geglu_into(device, y, gate_up..., kOptions);
  }
  static void gated_backward(const auto& device, auto... tensors) {
    ef::geglu_backward_into(device, tensors..., kOptions);
  }
};

struct Relu {
  static double value(double x) { return ef::reference::relu(x); }
  static double derivative(double x) { return ef::reference::relu_derivative(x); }
  static void into(const auto& device, auto y, auto x) { ef::relu_into(device, y, x); }
  static void backward(const auto& device, auto gx, auto gy, auto x) {
    ef::relu_backward_into(device, gx, gy, x);
  }
};

/// f(i) for i in [0, count).
template <typename F>
ef::Tensor<double, 1> numbers(Index count, F&& f) {
  ef::Tensor<double, 1> result(count);
  for (Index i = 0; i < count; ++i) result(i) = f(i);
  return result;
}
template <typename T, int Rank>
double at(const ef::Tensor<T, Rank>& tensor, Index i) {
  return static_cast<double>(tensor.data()[i]);
}

/// Elements [first, end) of what lies on a device.
template <typename T, typename B>
auto part(const DeviceTensor<B, T, 1>& tensor, Index first) {
  const auto all = tensor.view();
  return ef::TensorView<T, 1>(all.data() + first, all.size() - first);
}

/// `first` of the elements stay out, so that the rest is misaligned; they keep their NaN.
template <typename Case, typename T, typename Y = T>
void check_function(Index count, Index first) {
  const auto x = random_tensor<T, 1>({count}, 1, 3.0), grad_y = random_tensor<T, 1>({count}, 2);
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x), device_grad = on_device(bench, grad_y);
    auto y = on_device(bench, poisoned_tensor<Y, 1>({count}));
    auto grad_x = on_device(bench, poisoned_tensor<Y, 1>({count}));
    Case::into(bench.device, part<Y>(y, first), part<T>(device_x, first));
    Case::backward(bench.device, part<Y>(grad_x, first), part<T>(device_grad, first),
                   part<T>(device_x, first));
    const auto got = y.host();
    const auto got_grad = grad_x.host();
    for (Index i = 0; i < first; ++i) ASSERT_TRUE(std::isnan(at(got, i)));
    const auto rest = [&](const auto& from) {
      return numbers(count - first, [&](Index i) { return at(from, i + first); });
    };
    const auto value =
        numbers(count - first, [&](Index i) { return Case::value(at(x, i + first)); });
    const auto gradient = numbers(count - first, [&](Index i) {
      return at(grad_y, i + first) * Case::derivative(at(x, i + first));
    });
    ASSERT_TRUE(within(rest(got), value, tolerance<T>())) << count << " from " << first;
    ASSERT_TRUE(within(rest(got_grad), gradient, tolerance<T>())) << count << " from " << first;
  });
}

template <typename Case>
void check_function_everywhere() {
  for (Index count : {0, 1, 31, 32, 33, 255, 256, 257, 2049})
    for (Index first : {0, 1}) {
      if (first > count) continue;
      check_function<Case, float>(count, first);
      check_function<Case, ef::bfloat16>(count, first);
    }
  check_function<Case, ef::half>(777, 0);
  check_function<Case, double>(777, 0);
  check_function<Case, ef::bfloat16, float>(777, 0);
}

TEST(ActivationOnDevice, EqualsTheReference) {
  check_function_everywhere<Silu>();
  check_function_everywhere<Gelu<false>>();
  check_function_everywhere<Gelu<true>>();
  check_function_everywhere<Relu>();
}

template <typename Case, typename T>
void check_special_values() {
  using Limits = std::numeric_limits<T>;
  const std::vector<T> special{-Limits::infinity(), Limits::infinity(), Limits::quiet_NaN(),
                               -Limits::max(),      Limits::max(),      T(0)};
  ef::Tensor<T, 1> x(6), ones(6);
  for (Index i = 0; i < 6; ++i) {
    x(i) = special[static_cast<std::size_t>(i)];
    ones(i) = T(1);
  }
  const double infinity = std::numeric_limits<double>::infinity();
  const double values[] = {0, infinity, NAN, 0, static_cast<double>(Limits::max()), 0};
  const double slopes[] = {0, 1, NAN, 0, 1, std::is_same_v<Case, Relu> ? 0.0 : 0.5};
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x), device_ones = on_device(bench, ones);
    auto y = on_device(bench, poisoned_tensor<T, 1>({6}));
    auto grad_x = on_device(bench, poisoned_tensor<T, 1>({6}));
    Case::into(bench.device, y.view(), device_x.cview());
    Case::backward(bench.device, grad_x.view(), device_ones.cview(), device_x.cview());
    const auto got = y.host();
    const auto slope = grad_x.host();
    for (Index i = 0; i < 6; ++i) {
      if (std::isnan(values[i])) {
        EXPECT_TRUE(std::isnan(at(got, i)) && std::isnan(at(slope, i)));
        continue;
      }
      EXPECT_EQ(at(got, i), values[i]) << i;
      EXPECT_NEAR(at(slope, i), slopes[i], 1e-6) << i;
    }
  });
}

TEST(ActivationOnDevice, InfinitiesGiveTheLimitAndNaNGivesNaN) {
  check_special_values<Silu, float>();
  check_special_values<Silu, double>();
  check_special_values<Silu, ef::half>();
  check_special_values<Gelu<false>, float>();
  check_special_values<Gelu<false>, double>();
  check_special_values<Gelu<true>, float>();
  check_special_values<Gelu<true>, ef::bfloat16>();
  check_special_values<Relu, float>();
}

/// Apart and fused; the gradients of the fused tensor lie where it lay.
template <typename Case, typename T>
void check_gated(Index rows, Index features) {
  const auto fused = random_tensor<T, 2>({rows, 2 * features}, 3, 2.0);
  const auto grad_y = random_tensor<T, 2>({rows, features}, 4);
  ef::Tensor<T, 2> gate(rows, features), up(rows, features);
  ef::Tensor<double, 2> expected(rows, features), fused_grad(rows, 2 * features);
  ef::Tensor<double, 2> gate_grad(rows, features), up_grad(rows, features);
  for (Index r = 0; r < rows; ++r)
    for (Index j = 0; j < features; ++j) {
      gate(r, j) = fused(r, j);
      up(r, j) = fused(r, features + j);
      const double a = static_cast<double>(gate(r, j)), b = static_cast<double>(up(r, j)),
                   g = static_cast<double>(grad_y(r, j));
      expected(r, j) = Case::value(a) * b;
      fused_grad(r, j) = gate_grad(r, j) = g * b * Case::derivative(a);
      fused_grad(r, features + j) = up_grad(r, j) = g * Case::value(a);
    }
  for_each_device([&](const auto& bench) {
    auto device_fused = on_device(bench, fused), device_grad = on_device(bench, grad_y);
    auto device_gate = on_device(bench, gate), device_up = on_device(bench, up);
    auto y = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    Case::gated(bench.device, y.view(), device_fused.cview());
    ASSERT_TRUE(within(y.host(), expected, tolerance<T>())) << rows << " x " << features;
    auto z = on_device(bench, poisoned_tensor<T, 2>({rows, features}));
    Case::gated(bench.device, z.view(), device_gate.cview(), device_up.cview());
    ASSERT_TRUE(same_bits(z.host(), y.host()));
    Case::gated_backward(bench.device, device_fused.view(), device_grad.cview(),
                         device_fused.cview());
    ASSERT_TRUE(within(device_fused.host(), fused_grad, tolerance<T>()))
        << rows << " x " << features;
    Case::gated_backward(bench.device, y.view(), device_grad.view(), device_grad.cview(),
                         device_gate.cview(), device_up.cview());
    ASSERT_TRUE(within(y.host(), gate_grad, tolerance<T>())) << rows << " x " << features;
    ASSERT_TRUE(within(device_grad.host(), up_grad, tolerance<T>())) << rows << " x " << features;
  });
}

template <typename Case>
void check_gated_everywhere() {
  for (Index features : {0, 1, 7, 8, 31, 32, 33, 257})
    for (Index rows : {0, 1, 5}) {
      check_gated<Case, float>(rows, features);
      check_gated<Case, ef::bfloat16>(rows, features);
    }
  check_gated<Case, ef::half>(3, 136);
  check_gated<Case, double>(3, 135);
}

TEST(GatedActivationOnDevice, EqualsTheReference) {
  check_gated_everywhere<Silu>();
  check_gated_everywhere<Gelu<false>>();
  check_gated_everywhere<Gelu<true>>();
}

TEST(GatedActivationOnDevice, GradientsPastTheRangeOfAProduct) {
  ef::Tensor<float, 1> gate(2), up(2), grad_y(2);
  gate.setValues({-60.0f, -60.0f});
  up.setValues({1e30f, 1.0f});
  grad_y.setValues({1e20f, 1.0f});
  for_each_device([&](const auto& bench) {
    auto device_gate = on_device(bench, gate), device_up = on_device(bench, up);
    auto device_grad = on_device(bench, grad_y);
    auto grad_gate = on_device(bench, poisoned_tensor<float, 1>({2}));
    auto grad_up = on_device(bench, poisoned_tensor<float, 1>({2}));
    ef::swiglu_backward_into(bench.device, grad_gate.view(), grad_up.view(), device_grad.cview(),
                             device_gate.cview(), device_up.cview());
    const double slope = ef::reference::silu_derivative(-60.0);
    const auto got = grad_gate.host();
    EXPECT_LT(std::abs(at(got, 0) / (1e50 * slope) - 1), 1e-5);
    EXPECT_LT(std::abs(at(got, 1) / slope - 1), 1e-5);
  });
}

template <typename T, typename R>
void check_residual(Index count) {
  const auto x = random_tensor<T, 1>({count}, 5);
  const auto residual = random_tensor<R, 1>({count}, 6);
  const auto sum = numbers(count, [&](Index i) { return at(x, i) + at(residual, i); });
  for_each_device([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_residual = on_device(bench, residual);
    auto y = on_device(bench, poisoned_tensor<R, 1>({count}));
    ef::residual_add_into(bench.device, y.view(), device_x.cview(), device_residual.cview());
    ASSERT_TRUE(within(y.host(), sum, tolerance<R>()));
    ef::residual_add_into(bench.device, device_residual.view(), device_x.cview(),
                          device_residual.cview());
    ASSERT_TRUE(same_bits(device_residual.host(), y.host()));
  });
}

TEST(ResidualAddOnDevice, EqualsTheReference) {
  for (Index count : {0, 1, 31, 32, 33, 255, 256, 257, 2049}) {
    check_residual<float, float>(count);
    check_residual<ef::bfloat16, ef::bfloat16>(count);
    check_residual<ef::half, ef::half>(count);
    check_residual<double, double>(count);
    check_residual<ef::bfloat16, float>(count);
  }
}

}  // namespace
