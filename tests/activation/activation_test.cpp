// Laws: equal to the definition for every scalar, ISA, length and special value; gradients equal
// the derivative and finite differences; fused tensors are the two tensors; the same bits for any
// threads, place and aliasing; refuses what makes no sense.
#include <eigenformer/activation.h>
#include <eigenformer/reference/activation.h>

#include "allocations.h"
#include "compare.h"
#include "finite_differences.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr ef::GeluOptions kTanh{.approximation = ef::GeluApproximation::tanh};

// One activation under test: the calls, and the definition in double.
struct SiluCase {
  static double value(double x) { return ef::reference::silu(x); }
  static double derivative(double x) { return ef::reference::silu_derivative(x); }
  static void into(const auto& device, auto& y, const auto& x) { ef::silu_into(device, y, x); }
  static void backward(const auto& device, auto& gx, const auto& gy, const auto& x) {
    ef::silu_backward_into(device, gx, gy, x);
  }
};
struct GeluCase {
  static double value(double x) { return ef::reference::gelu(x); }
  static double derivative(double x) { return ef::reference::gelu_derivative(x); }
  static void into(const auto& device, auto& y, const auto& x) { ef::gelu_into(device, y, x); }
  static void backward(const auto& device, auto& gx, const auto& gy, const auto& x) {
    ef::gelu_backward_into(device, gx, gy, x);
  }
};
struct GeluTanhCase {
  static double value(double x) { return ef::reference::gelu(x, kTanh); }
  static double derivative(double x) { return ef::reference::gelu_derivative(x, kTanh); }
  static void into(const auto& device, auto& y, const auto& x) {
    ef::gelu_into(device, y, x, {.approximation = ef::GeluApproximation::tanh});
  }
  static void backward(const auto& device, auto& gx, const auto& gy, const auto& x) {
    ef::gelu_backward_into(device, gx, gy, x, kTanh);
  }
};
struct ReluCase {
  static double value(double x) { return ef::reference::relu(x); }
  static double derivative(double x) { return ef::reference::relu_derivative(x); }
  static void into(const auto& device, auto& y, const auto& x) { ef::relu_into(device, y, x); }
  static void backward(const auto& device, auto& gx, const auto& gy, const auto& x) {
    ef::relu_backward_into(device, gx, gy, x);
  }
};

template <typename F>
void for_each_case(F&& f) {
  f(SiluCase{});
  f(GeluCase{});
  f(GeluTanhCase{});
  f(ReluCase{});
}

template <typename X, typename F>
ef::Tensor<double, 1> map(const X& x, F&& f) {
  ef::Tensor<double, 1> y(x.size());
  for (Index i = 0; i < x.size(); ++i) y(i) = f(static_cast<double>(x.data()[i]));
  return y;
}

template <typename T>
class Activation : public ::testing::Test {};
TYPED_TEST_SUITE(Activation, EveryScalar);

TYPED_TEST(Activation, EqualsItsDefinitionAtEveryLength) {
  using T = TypeParam;
  for_each_case([](auto c) {
    for (Index n = 0; n <= 70; ++n) {
      const auto x = random_tensor<T, 1>({n}, 1, 2.0), grad_y = random_tensor<T, 1>({n}, 2);
      const auto value = map(x, c.value);
      ef::Tensor<double, 1> derivative = map(x, c.derivative);
      for (Index i = 0; i < n; ++i) derivative(i) *= static_cast<double>(grad_y(i));
      for_each_isa([&](auto isa) {
        auto y = poisoned_tensor<T, 1>({n});
        c.into(on(isa), y, x);
        ASSERT_LT(relative_error(y, value), tolerance<T>()) << isa.name << " " << n;
        auto grad_x = poisoned_tensor<T, 1>({n});
        c.backward(on(isa), grad_x, grad_y, x);
        ASSERT_LT(relative_error(grad_x, derivative), tolerance<T>()) << isa.name << " " << n;
      });
    }
  });
}

TYPED_TEST(Activation, NeverDependsOnThreadsOrPlace) {
  using T = TypeParam;
  for_each_case([](auto c) {
    const auto x = random_tensor<T, 3>({3, 41, 801}, 3, 3.0),
               grad_y = random_tensor<T, 3>({3, 41, 801}, 4);
    auto y = poisoned_tensor<T, 3>({3, 41, 801}), grad_x = y;
    c.into(kHere, y, x);
    c.backward(kHere, grad_x, grad_y, x);
    for (int count : {2, 3}) {
      Threads threads(count);
      ef::Tensor<T, 3> in_place = x, gradient_in_place = grad_y;
      c.into(threads.device, in_place, in_place);
      c.backward(threads.device, gradient_in_place, gradient_in_place, x);
      ASSERT_TRUE(same_bits(in_place, y));
      ASSERT_TRUE(same_bits(gradient_in_place, grad_x));
    }
    for (Index at : {0, 1, 777, 80000}) {  // one element alone
      const ef::TensorView<const T, 1> alone(x.data() + at, 1), expected(y.data() + at, 1);
      ef::Tensor<T, 1> one(1);
      c.into(kHere, one, alone);
      ASSERT_TRUE(same_bits(one, expected));
    }
  });
}

TEST(ActivationValues, FloatErrorIsWhatTheHeaderSays) {
  for_each_case([](auto c) {
    for_each_isa([&](auto isa) {
      const Index n = 100001;
      ef::Tensor<float, 1> x(n), y(n);
      for (Index i = 0; i < n; ++i)
        x(i) = static_cast<float>(static_cast<double>(i - n / 2) * 5e-4);  // [-25, 25]
      c.into(on(isa), y, x);
      for (Index i = 0; i < n; ++i) {
        const double exact = c.value(static_cast<double>(x(i)));
        ASSERT_LE(std::abs(static_cast<double>(y(i)) - exact),
                  std::max(5e-7 * std::abs(exact), 2e-7 * std::abs(static_cast<double>(x(i)))))
            << isa.name << " x = " << x(i) << ", " << y(i) << " and " << exact;
      }
    });
  });
}

TEST(ActivationValues, InfinitiesGiveTheLimitAndNaNGivesNaN) {
  for_each_case([](auto c) {
    for_each_isa([&]<typename Isa>(Isa isa) {
      const auto run = [&]<typename T>(T) {
        const T infinity = std::numeric_limits<T>::infinity(),
                largest = std::numeric_limits<T>::max();
        const std::vector<T> x{-infinity, infinity, std::numeric_limits<T>::quiet_NaN(),
                               T(0),      -largest, largest,
                               T(-100),   T(100),   T(-800)};
        const std::vector<double> value{0, kInfinity, NAN, 0, 0, static_cast<double>(largest),
                                        0, 100,       0};
        const double at_zero = std::is_same_v<decltype(c), ReluCase> ? 0.0 : 0.5;
        const std::vector<double> derivative{0, 1, NAN, at_zero, 0, 1, 0, 1, 0};
        std::vector<T> ones(x.size(), T(1)), y(x.size()), grad(x.size());
        const Index n = static_cast<Index>(x.size());
        const ef::TensorView<const T, 1> at(x.data(), n), one(ones.data(), n);
        ef::TensorView<T, 1> values(y.data(), n), slopes(grad.data(), n);
        c.into(on(isa), values, at);
        c.backward(on(isa), slopes, one, at);
        for (std::size_t i = 0; i < x.size(); ++i) {
          if (std::isnan(value[i])) {
            EXPECT_TRUE(std::isnan(y[i]) && std::isnan(grad[i])) << isa.name << " " << x[i];
          } else {
            EXPECT_TRUE(y[i] == static_cast<T>(value[i]) ||
                        std::abs(static_cast<double>(y[i]) - value[i]) < 1e-40)
                << isa.name << " " << x[i] << " gives " << y[i];
            EXPECT_NEAR(static_cast<double>(grad[i]), derivative[i], 1e-7)
                << isa.name << " " << x[i];
          }
        }
      };
      run(float{});
      run(double{});
    });
  });
}

TYPED_TEST(Activation, GatedFormsEqualTheirDefinition) {
  using T = TypeParam;
  Threads threads(3);
  for (Index rows : {0, 1, 5, 40})
    for (Index n : {0, 1, 7, 16, 33, 1000}) {
      const auto gate = random_tensor<T, 2>({rows, n}, 5), up = random_tensor<T, 2>({rows, n}, 6),
                 grad_y = random_tensor<T, 2>({rows, n}, 7);
      ef::Tensor<T, 2> fused(rows, 2 * n);
      ef::Tensor<double, 2> swiglu(rows, n), geglu(rows, n), grad_gate(rows, n), grad_up(rows, n);
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < n; ++j) {
          fused(i, j) = gate(i, j);
          fused(i, j + n) = up(i, j);
          const double a = static_cast<double>(gate(i, j)), b = static_cast<double>(up(i, j)),
                       g = static_cast<double>(grad_y(i, j));
          swiglu(i, j) = ef::reference::swiglu(a, b);
          geglu(i, j) = ef::reference::geglu(a, b, kTanh);
          grad_gate(i, j) = g * b * ef::reference::silu_derivative(a);
          grad_up(i, j) = g * ef::reference::silu(a);
        }
      const ef::Tensor<T, 2> y = ef::swiglu(gate, up);
      ASSERT_LT(relative_error(y, swiglu), tolerance<T>());
      ASSERT_TRUE(same_bits(y, ef::swiglu(fused)));
      ASSERT_TRUE(same_bits(y, ef::swiglu(threads.device, gate, up)));
      ASSERT_TRUE(same_bits(y, ef::swiglu(threads.device, fused)));
      const ef::Tensor<T, 2> z =
          ef::geglu(gate, up, {.approximation = ef::GeluApproximation::tanh});
      ASSERT_LT(relative_error(z, geglu), tolerance<T>());
      ASSERT_TRUE(same_bits(z, ef::geglu(fused, kTanh)));
      ASSERT_TRUE(same_bits(ef::geglu(gate, up), ef::geglu(threads.device, fused)));

      auto gg = poisoned_tensor<T, 2>({rows, n}), gu = gg;
      ef::swiglu_backward_into(kHere, gg, gu, grad_y, gate, up);
      ASSERT_LT(relative_error(gg, grad_gate), tolerance<T>());
      ASSERT_LT(relative_error(gu, grad_up), tolerance<T>());
      ef::Tensor<T, 2> fused_gradient = fused, gate_in_place = gate, up_in_place = up;
      ef::swiglu_backward_into(threads.device, fused_gradient, grad_y, fused_gradient);
      ef::swiglu_backward_into(threads.device, gate_in_place, up_in_place, grad_y, gate_in_place,
                               up_in_place);
      ASSERT_TRUE(same_bits(gate_in_place, gg));
      ASSERT_TRUE(same_bits(up_in_place, gu));
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < n; ++j) {
          ASSERT_EQ(fused_gradient(i, j), gg(i, j));
          ASSERT_EQ(fused_gradient(i, j + n), gu(i, j));
        }
    }
}

TEST(ActivationGradients, EqualFiniteDifferences) {
  auto x = random_tensor<double, 1>({40}, 8, 1.5);
  const auto grad_y = random_tensor<double, 1>({40}, 9);
  for_each_case([&](auto c) {
    ef::Tensor<double, 1> y(40), grad_x(40);
    c.backward(kHere, grad_x, grad_y, x);
    const auto loss = [&] {
      c.into(kHere, y, x);
      return dot(y, grad_y);
    };
    EXPECT_LT(relative_error(grad_x, finite_differences(x, loss)), 1e-8);
  });
  auto up = random_tensor<double, 1>({40}, 10);
  ef::Tensor<double, 1> grad_gate(40), grad_up(40);
  const auto check = [&](auto loss) {
    EXPECT_LT(relative_error(grad_gate, finite_differences(x, loss)), 1e-8);
    EXPECT_LT(relative_error(grad_up, finite_differences(up, loss)), 1e-8);
  };
  ef::swiglu_backward_into(kHere, grad_gate, grad_up, grad_y, x, up);
  check([&] { return dot(ef::swiglu(x, up), grad_y); });
  ef::geglu_backward_into(kHere, grad_gate, grad_up, grad_y, x, up);
  check([&] { return dot(ef::geglu(x, up), grad_y); });
  ef::geglu_backward_into(kHere, grad_gate, grad_up, grad_y, x, up,
                          {.approximation = ef::GeluApproximation::tanh});
  check([&] { return dot(ef::geglu(x, up, kTanh), grad_y); });

  auto fused = random_tensor<double, 2>({5, 16}, 11);
  const auto grad_fused_y = random_tensor<double, 2>({5, 8}, 12);
  ef::Tensor<double, 2> grad_fused(5, 16);
  ef::geglu_backward_into(kHere, grad_fused, grad_fused_y, fused, kTanh);
  EXPECT_LT(relative_error(grad_fused,
                           finite_differences(
                               fused, [&] { return dot(ef::geglu(fused, kTanh), grad_fused_y); })),
            1e-8);
}

TYPED_TEST(Activation, ResidualAddRoundsOnce) {
  using T = TypeParam;
  using C = ef::compute_type<T>;
  Threads threads(2);
  for (Index n : {0, 1, 15, 16, 17, 50000}) {
    const auto x = random_tensor<T, 2>({1, n}, 13), residual = random_tensor<T, 2>({1, n}, 14);
    ef::Tensor<T, 2> expected(1, n), y = residual;
    for (Index i = 0; i < n; ++i)
      expected(0, i) = static_cast<T>(static_cast<C>(x(0, i)) + static_cast<C>(residual(0, i)));
    ASSERT_TRUE(same_bits(ef::residual_add(x, residual), expected));
    ef::residual_add_into(threads.device, y, x, y);  // in place
    ASSERT_TRUE(same_bits(y, expected));
  }
}

TEST(ActivationScalars, MayDiffer) {
  const auto gate = random_tensor<ef::bfloat16, 2>({3, 50}, 15);
  const auto up = random_tensor<float, 2>({3, 50}, 16);
  auto y = poisoned_tensor<double, 2>({3, 50});
  ef::swiglu_into(kHere, y, gate, up);
  for (Index i = 0; i < y.size(); ++i)
    EXPECT_NEAR(y.data()[i],
                ef::reference::swiglu(static_cast<double>(gate.data()[i]),
                                      static_cast<double>(up.data()[i])),
                1e-13);
  auto sum = poisoned_tensor<float, 2>({3, 50});
  ef::residual_add_into(kHere, sum, gate, up);
  for (Index i = 0; i < y.size(); ++i)
    EXPECT_EQ(sum.data()[i], static_cast<float>(gate.data()[i]) + up.data()[i]);
}

TEST(ActivationMemory, DestinationFormsAllocateNothing) {
  const auto fused = random_tensor<float, 2>({10, 100}, 17);
  const auto gate = random_tensor<float, 2>({10, 50}, 18),
             up = random_tensor<float, 2>({10, 50}, 19);
  ef::Tensor<float, 2> y(10, 50), grad(10, 50), grad_fused(10, 100);
  EXPECT_EQ(count_allocations([&] {
              ef::gelu_into(kHere, y, gate);
              ef::silu_backward_into(kHere, grad, up, gate);
              ef::swiglu_into(kHere, y, gate, up);
              ef::geglu_into(kHere, y, fused, kTanh);
              ef::swiglu_backward_into(kHere, grad_fused, up, fused);
              ef::residual_add_into(kHere, y, y, up);
            }),
            0);
}

TEST(ActivationErrors, NameTheArgument) {
  const auto x = random_tensor<float, 2>({2, 6}, 20), other = random_tensor<float, 2>({3, 6}, 21),
             odd = random_tensor<float, 2>({2, 5}, 22);
  auto y = poisoned_tensor<float, 2>({2, 6});
  expect_throws<std::invalid_argument>([&] { ef::silu_into(kHere, y, other); },
                                       {"silu", "y has shape (2, 6)", "x has shape (3, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::gelu_backward_into(kHere, y, other, x); },
                                       {"gelu_backward", "grad_y has shape (3, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::swiglu(x, other); },
                                       {"swiglu", "up has shape (3, 6)", "gate has shape (2, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::swiglu(odd); }, {"swiglu", "5 columns", "even"});
  expect_throws<std::invalid_argument>([&] { ef::geglu_into(kHere, y, x); },
                                       {"geglu", "y has shape (2, 6)", "gate_up has shape (2, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::swiglu_backward_into(kHere, y, x, x); },
                                       {"swiglu_backward", "grad_y has shape (2, 6)"});
  expect_throws<std::invalid_argument>([&] { ef::residual_add_into(kHere, y, x, other); },
                                       {"residual_add", "residual has shape (3, 6)"});
  for (Index i = 0; i < y.size(); ++i) EXPECT_TRUE(std::isnan(y.data()[i]));
}

// grad_y * up passes the range of the type where the derivative brings it back, or takes it to 0.
template <typename T>
void check_huge_gradients(T huge) {
  for (const float at : {-1000.0f, -80.0f, -20.0f, -1.0f, 0.0f, 3.0f}) {
    ef::Tensor<T, 1> gate(9), up(9), grad_y(9), grad_gate(9), grad_up(9);
    gate.setConstant(T(at));
    up.setConstant(huge);
    grad_y.setConstant(-huge);
    ef::swiglu_backward_into(kHere, grad_gate, grad_up, grad_y, gate, up);
    const long double x = at, s = 1 / (1 + std::exp(-x)), derivative = s * (1 + x * (1 - s)),
                      expected = -static_cast<long double>(huge) * huge * derivative;
    for (Index i = 0; i < 9; ++i) {
      if (std::abs(expected) > static_cast<long double>((std::numeric_limits<T>::max)())) {
        EXPECT_EQ(std::abs(grad_gate(i)), std::numeric_limits<T>::infinity()) << at;
      } else if (std::abs(expected) < (std::numeric_limits<T>::min)()) {
        EXPECT_EQ(grad_gate(i), T(0)) << at;
      } else {
        EXPECT_NEAR(static_cast<double>(grad_gate(i) / expected), 1, 1e-5) << at;
      }
    }
    ef::geglu_backward_into(kHere, grad_gate, grad_up, grad_y, gate, up);
    for (Index i = 0; i < 9; ++i) {
      EXPECT_FALSE(std::isnan(grad_gate(i))) << at;
      if (at <= -80) {
        EXPECT_EQ(grad_gate(i), T(0)) << at;
      }
    }
  }
}

TEST(GatedGradients, WhoseProductsOverflow) {
  check_huge_gradients(1e20f);
  check_huge_gradients(1e38f);
}

}  // namespace
