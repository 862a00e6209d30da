// Rows that are hard for their arithmetic: equal numbers, a mean large against the spread, squares
// and sums past the range of the type or among its denormals. What is representable comes out
// right, forwards and backwards, on every ISA. And rows that take no part in a gradient.
#include <eigenformer/normalization.h>
#include <eigenformer/reference/normalization.h>

#include <limits>

#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr float kSmallestFloat = 1e-45f;

/// Rows (each of `features`) that are hard for float, and an epsilon for which they are.
struct HardRows {
  const char* name;
  // normal numbers about the mean; the first element is `first` where that is not 0
  double mean, spread, first;
  float epsilon;
};

const std::vector<HardRows>& hard_rows() {
  static const std::vector<HardRows> cases = {
      {"mean 30000 times the spread", 30000, 1, 0, 1e-5f},
      {"mean a million times the spread", 1e6, 1, 0, 1e-5f},
      {"negative mean", -4e5, 0.5, 0, 1e-5f},
      {"an outlier first", 10, 0.1, 1e4, 1e-5f},
      {"squares overflow", 0, 1e20, 0, 1e-5f},
      {"squares of the sum overflow", 0, 1e18, 0, 1e-5f},
      {"sums overflow", 2e38, 1e37, 0, 1e-5f},
      {"distances overflow", 0, 8e37, -3e38, 1e-5f},
      {"huge mean, small spread", -1e30, 1e25, 0, 1e-5f},
      {"squares underflow", 0, 1e-21, 0, 1e-42f},
      {"squares vanish", 0, 1e-30, 0, kSmallestFloat},
      {"denormals", 0, 1e-40, 0, kSmallestFloat},
      {"small against epsilon", 0, 1e-37, 0, 1e-33f},
  };
  return cases;
}

template <typename T>
ef::Tensor<T, 2> make_rows(const HardRows& hard, Index rows, Index features, unsigned seed) {
  auto x = random_tensor<T, 2>({rows, features}, seed);
  for (Index i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<T>(hard.mean + hard.spread * static_cast<double>(x.data()[i]));
  if (hard.first != 0 && features > 0)
    for (Index r = 0; r < rows; ++r) x(r, 0) = static_cast<T>(hard.first);
  return x;
}

/// max|actual - expected| / max|expected|; infinite where a value is not finite.
template <typename A, typename B>
double largest_error(const A& actual, const B& expected) {
  double difference = 0, largest = 0;
  for (Index i = 0; i < actual.size(); ++i) {
    const double a = static_cast<double>(actual.data()[i]);
    if (!std::isfinite(a)) return std::numeric_limits<double>::infinity();
    difference = (std::max)(difference, std::abs(a - static_cast<double>(expected.data()[i])));
    largest = (std::max)(largest, std::abs(static_cast<double>(expected.data()[i])));
  }
  return largest > 0 ? difference / largest : difference;
}

TEST(HardRows, NormalizeToTheirDefinition) {
  for (const HardRows& hard : hard_rows())
    for (Index features : {2, 7, 64, 255, 4096}) {
      const auto x = make_rows<float>(hard, 3, features, 51);
      const auto weight = random_tensor<float, 1>({features}, 52),
                 bias = random_tensor<float, 1>({features}, 53);
      const auto rms = ef::reference::rms_norm(to_double(x), to_double(weight), hard.epsilon);
      const auto layer =
          ef::reference::layer_norm(to_double(x), to_double(weight), to_double(bias), hard.epsilon);
      for_each_isa([&](auto isa) {
        auto y = poisoned_tensor<float, 2>({3, features});
        ef::rms_norm_into(on(isa), y, x, weight, {.epsilon = hard.epsilon});
        EXPECT_LT(largest_error(y, rms), 2e-6) << isa.name << " " << hard.name << " " << features;
        ef::layer_norm_into(on(isa), y, x, weight, bias, {.epsilon = hard.epsilon});
        EXPECT_LT(largest_error(y, layer), 5e-6) << isa.name << " " << hard.name << " " << features;
      });
      auto residual = make_rows<float>(hard, 3, features, 51);
      ef::Tensor<float, 2> nothing(3, features), y(3, features);
      nothing.setZero();
      ef::add_rms_norm_into(Eigen::DefaultDevice{}, y, residual, nothing, weight,
                            {.epsilon = hard.epsilon});
      EXPECT_LT(largest_error(y, rms), 2e-6) << hard.name << " " << features;
    }
}

TEST(HardRows, HaveTheirGradients) {
  for (const HardRows& hard : hard_rows())
    for (Index features : {7, 64, 515})
      for (double gradient : {1.0, 1e6}) {
        // grad_x is about gradient / spread: kept where float holds it.
        const double scale = gradient * (hard.spread > 1e17 ? hard.spread * 1e-8 : 1.0);
        const auto x = make_rows<float>(hard, 3, features, 54);
        const auto grad_y = random_tensor<float, 2>({3, features}, 55, scale);
        const auto weight = random_tensor<float, 1>({features}, 56);
        ef::Tensor<float, 2> grad_x(3, features);
        ef::Tensor<float, 1> grad_weight(features), grad_bias(features);
        const auto clear = [&] {
          grad_x.setConstant(std::numeric_limits<float>::quiet_NaN());
          grad_weight.setZero();
          grad_bias.setZero();
        };
        const auto what = [&] {
          return std::string(hard.name) + " " + std::to_string(features) + " " +
                 std::to_string(gradient);
        };
        clear();
        const auto rms = ef::reference::rms_norm_backward(to_double(grad_y), to_double(x),
                                                          to_double(weight), hard.epsilon);
        ef::rms_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_y, x, weight,
                                   {.epsilon = hard.epsilon});
        EXPECT_LT(largest_error(grad_x, rms.x), 1e-5) << what();
        EXPECT_LT(largest_error(grad_weight, rms.weight), 1e-5) << what();
        clear();
        const auto layer = ef::reference::layer_norm_backward(to_double(grad_y), to_double(x),
                                                              to_double(weight), hard.epsilon);
        ef::layer_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_bias, grad_y,
                                     x, weight, {.epsilon = hard.epsilon});
        EXPECT_LT(largest_error(grad_x, layer.x), 1e-5) << what();
        EXPECT_LT(largest_error(grad_weight, layer.weight), 1e-5) << what();
        EXPECT_LT(largest_error(grad_bias, layer.bias), 1e-5) << what();
      }
}

template <typename T>
class HardRowsOf : public ::testing::Test {};
TYPED_TEST_SUITE(HardRowsOf, EveryScalar);

TYPED_TEST(HardRowsOf, OneNumberGiveTheBias) {
  using T = TypeParam;
  for (double number : {10.1, -100.1, 1234.567, 30000.7, 1e7, 3e38, -3e38, 1e300, 1e-7, 1e-40})
    for (Index features : {1, 3, 31, 256, 768, 4096, 5000}) {
      const T value = static_cast<T>(number);
      if (!std::isfinite(static_cast<double>(value))) continue;
      ef::Tensor<T, 2> x(2, features);
      x.setConstant(value);
      const auto weight = random_tensor<T, 1>({features}, 57),
                 bias = random_tensor<T, 1>({features}, 58);
      for_each_isa([&](auto isa) {
        auto y = poisoned_tensor<T, 2>({2, features});
        ef::layer_norm_into(on(isa), y, x, weight, bias, {.epsilon = 1e-5f});
        for (Index i = 0; i < y.size(); ++i)
          ASSERT_EQ(static_cast<double>(y.data()[i]), static_cast<double>(bias(i % features)))
              << isa.name << " " << features << " times " << number;
      });
    }
}

TEST(HardRows, OfDoublesPastTheirSquares) {
  const double huge = std::ldexp(1.0, 1020), tiny = std::ldexp(1.0, -1000);
  const auto x = random_tensor<double, 2>({3, 100}, 59),
             grad_y = random_tensor<double, 2>({3, 100}, 60);
  const auto weight = random_tensor<double, 1>({100}, 61),
             bias = random_tensor<double, 1>({100}, 62);
  const ef::Tensor<double, 2> large = x * huge, small_rows = x * tiny;
  // Epsilon is nothing beside the one, everything beside the other.
  EXPECT_LT(relative_error(ef::rms_norm(large, weight), ef::reference::rms_norm(x, weight, 0)),
            1e-12);
  EXPECT_LT(relative_error(ef::layer_norm(large, weight, bias),
                           ef::reference::layer_norm(x, weight, bias, 0)),
            1e-12);
  ef::Tensor<double, 2> expected = small_rows / std::sqrt(double{1e-5f});
  ef::Tensor<double, 1> ones(100);
  ones.setConstant(1);
  EXPECT_LT(largest_error(ef::rms_norm(small_rows, ones), expected), 1e-12);

  ef::Tensor<double, 2> grad_x(3, 100);
  ef::Tensor<double, 1> grad_weight(100), grad_bias(100);
  grad_weight.setZero();
  const ef::Tensor<double, 2> large_gradient = grad_y * 1e300;
  const auto rms = ef::reference::rms_norm_backward(grad_y, x, weight, 0);
  ef::rms_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, large_gradient, large,
                             weight);
  EXPECT_LT(largest_error(ef::Tensor<double, 2>(grad_x * (huge / 1e300)), rms.x), 1e-12);
  EXPECT_LT(largest_error(ef::Tensor<double, 1>(grad_weight * 1e-300), rms.weight), 1e-12);
  grad_weight.setZero();
  grad_bias.setZero();
  const auto layer = ef::reference::layer_norm_backward(grad_y, x, weight, 0);
  ef::layer_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_bias,
                               large_gradient, large, weight);
  EXPECT_LT(largest_error(ef::Tensor<double, 2>(grad_x * (huge / 1e300)), layer.x), 1e-12);
  EXPECT_LT(largest_error(ef::Tensor<double, 1>(grad_weight * 1e-300), layer.weight), 1e-12);
}

TEST(HardRows, GradientsWhoseSumsOverflow) {
  const auto x = random_tensor<float, 2>({2, 64}, 63);
  auto grad_y = random_tensor<float, 2>({2, 64}, 64);
  for (Index i = 0; i < grad_y.size(); ++i) grad_y.data()[i] = 1e37f * (2 + grad_y.data()[i]);
  ef::Tensor<float, 1> weight(64), grad_weight(64), grad_bias(64);
  weight.setConstant(0.5f);
  grad_weight.setZero();
  grad_bias.setZero();
  ef::Tensor<float, 2> grad_x(2, 64);
  ef::rms_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_y, x, weight);
  EXPECT_LT(largest_error(grad_x, ef::reference::rms_norm_backward(to_double(grad_y), to_double(x),
                                                                   to_double(weight), 1e-5f)
                                      .x),
            1e-5);
  ef::layer_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_bias, grad_y, x,
                               weight);
  EXPECT_LT(largest_error(grad_x, ef::reference::layer_norm_backward(
                                      to_double(grad_y), to_double(x), to_double(weight), 1e-5f)
                                      .x),
            1e-5);
}

TYPED_TEST(HardRowsOf, WithoutAGradientTakeNoPart) {
  using T = TypeParam;
  using G = ef::compute_type<T>;
  for (Index features : {5, 64, 100}) {
    auto x = random_tensor<T, 2>({4, features}, 65),
         grad_y = random_tensor<T, 2>({4, features}, 66);
    const auto weight = random_tensor<G, 1>({features}, 67);
    const auto gradients = [&](auto& grad_x, auto& rms_weight, auto& layer_weight,
                               auto& layer_bias) {
      rms_weight.setZero(), layer_weight.setZero(), layer_bias.setZero();
      ef::rms_norm_backward_into(Eigen::DefaultDevice{}, grad_x[0], rms_weight, grad_y, x, weight);
      ef::layer_norm_backward_into(Eigen::DefaultDevice{}, grad_x[1], layer_weight, layer_bias,
                                   grad_y, x, weight);
    };
    for (Index j = 0; j < features; ++j) grad_y(1, j) = grad_y(3, j) = T(0);
    using Matrices = std::array<ef::Tensor<T, 2>, 2>;
    Matrices clean{x, x}, with_nan{x, x};
    ef::Tensor<G, 1> a(features), b(features), c(features), a2(features), b2(features),
        c2(features);
    gradients(clean, a, b, c);
    for (Index j = 0; j < features; ++j) x(1, j) = std::numeric_limits<T>::quiet_NaN();
    x(3, 2) = std::numeric_limits<T>::infinity();
    gradients(with_nan, a2, b2, c2);
    EXPECT_TRUE(same_bits(a, a2));
    EXPECT_TRUE(same_bits(b, b2));
    EXPECT_TRUE(same_bits(c, c2));
    for (int norm = 0; norm < 2; ++norm)
      for (Index j = 0; j < features; ++j) {
        EXPECT_EQ(static_cast<float>(with_nan[static_cast<std::size_t>(norm)](1, j)), 0.0f);
        EXPECT_EQ(static_cast<float>(with_nan[static_cast<std::size_t>(norm)](3, j)), 0.0f);
      }
  }
}

}  // namespace
