// Laws: equal to the definition for every scalar, ISA and width; gradients equal finite
// differences; the same bits for any threads, for a row alone and in place; add_rms_norm is the two
// steps; refuses what makes no sense.
#include <eigenformer/normalization.h>
#include <eigenformer/reference/normalization.h>

#include "allocations.h"
#include "compare.h"
#include "finite_differences.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere{};
constexpr float kEpsilon = 1e-5f;
constexpr float kLeastEpsilon = 1e-45f;  // the smallest float

template <typename T>
class RmsNorm : public ::testing::Test {};
TYPED_TEST_SUITE(RmsNorm, EveryScalar);

std::vector<Index> edge_widths() {
  std::vector<Index> widths;
  for (Index n = 0; n <= 33; ++n) widths.push_back(n);
  for (Index n : {63, 64, 65, 127, 128, 129, 1000, 4096}) widths.push_back(n);
  return widths;
}

TYPED_TEST(RmsNorm, EqualsItsDefinitionAtEveryWidth) {
  using T = TypeParam;
  for (Index features : edge_widths())
    for (Index rows : {0, 1, 3}) {
      const auto x = random_tensor<T, 2>({rows, features}, 1);
      const auto weight = random_tensor<T, 1>({features}, 2);
      const auto expected = ef::reference::rms_norm(to_double(x), to_double(weight), kEpsilon);
      const ef::Tensor<T, 2> y = ef::rms_norm(x, weight, {.epsilon = 1e-5f});
      ASSERT_LT(relative_error(y, expected), tolerance<T>()) << rows << " x " << features;
      for_each_isa([&](auto isa) {
        auto other = poisoned_tensor<T, 2>({rows, features});
        ef::rms_norm_into(on(isa), other, x, weight, {.epsilon = kEpsilon});
        ASSERT_LT(relative_error(other, expected), tolerance<T>())
            << isa.name << " " << rows << " x " << features;
      });
    }
}

TYPED_TEST(RmsNorm, NeverDependsOnThreadsBatchOrPlace) {
  using T = TypeParam;
  const auto x = random_tensor<T, 3>({3, 17, 515}, 3);
  const auto weight = random_tensor<float, 1>({515}, 4);
  const ef::Tensor<T, 3> y = ef::rms_norm(x, weight);
  for (int count : {1, 2, 3}) {
    Threads threads(count);
    ASSERT_TRUE(same_bits(y, ef::rms_norm(threads.device, x, weight)));
  }
  ef::Tensor<T, 3> in_place = x;
  ef::rms_norm_into(kHere, in_place, in_place, weight);
  ASSERT_TRUE(same_bits(y, in_place));
  for (Index row : {0, 20, 50}) {  // alone, and misaligned
    std::vector<T> buffer(516);
    std::copy_n(x.data() + row * 515, 515, buffer.data() + 1);
    const ef::TensorView<const T, 2> alone(buffer.data() + 1, 1, 515);
    const ef::TensorView<const T, 2> expected(y.data() + row * 515, 1, 515);
    ASSERT_TRUE(same_bits(ef::rms_norm(alone, weight), expected));
  }
}

TYPED_TEST(RmsNorm, OfHeadsInAWiderMatrixIsThatOfTheirCopies) {
  using T = TypeParam;
  const Index tokens = 5, heads = 3, width = 20;
  const auto matrix = random_tensor<T, 2>({tokens, 100}, 7);
  const auto weight = random_tensor<T, 1>({width}, 8);
  ef::Tensor<T, 2> copies(tokens * heads, width);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < heads * width; ++j)
      copies.data()[t * heads * width + j] = matrix(t, 17 + j);
  const ef::Tensor<T, 2> expected = ef::rms_norm(copies, weight);
  for_each_isa([&](auto isa) {
    auto y = poisoned_tensor<T, 3>({tokens, heads, width});
    ef::rms_norm_into(on(isa), y, ef::heads_of(matrix, 17, heads, width), weight);
    ef::Tensor<T, 2> plain(tokens * heads, width);
    ef::rms_norm_into(on(isa), plain, copies, weight);
    ASSERT_TRUE(same_bits(ef::TensorView<const T, 2>(y.data(), tokens * heads, width), plain));
  });
  // every second head, as a model with [query | key] pairs leaves them
  ef::Tensor<T, 4> pairs(tokens, heads, 2, width);
  for (Index i = 0; i < pairs.size(); ++i) pairs.data()[i] = matrix.data()[i % matrix.size()];
  for (Index r = 0; r < tokens * heads; ++r)
    std::copy_n(copies.data() + r * width, width, pairs.data() + (2 * r + 1) * width);
  auto y = poisoned_tensor<T, 3>({tokens, heads, width});
  ef::rms_norm_into(kHere, y, ef::heads_of(pairs, 1, 2), weight);
  EXPECT_TRUE(same_bits(ef::TensorView<const T, 2>(y.data(), tokens * heads, width), expected));
}

TYPED_TEST(RmsNorm, FusedResidualIsTheTwoSteps) {
  using T = TypeParam;
  for (Index features : {1, 15, 64, 257, 2000}) {
    const auto x = random_tensor<T, 2>({40, features}, 5);
    const auto start = random_tensor<T, 2>({40, features}, 6);
    const auto weight = random_tensor<float, 1>({features}, 7);
    ef::Tensor<T, 2> sum(40, features);
    using C = ef::compute_type<T>;
    for (Index i = 0; i < x.size(); ++i)
      sum.data()[i] = static_cast<T>(static_cast<C>(start.data()[i]) + static_cast<C>(x.data()[i]));
    for (int count : {1, 2, 3}) {
      Threads threads(count);
      ef::Tensor<T, 2> residual = start;
      auto y = poisoned_tensor<T, 2>({40, features});
      ef::add_rms_norm_into(threads.device, y, residual, x, weight, {.epsilon = 1e-6f});
      ASSERT_TRUE(same_bits(residual, sum));
      ASSERT_TRUE(same_bits(y, ef::rms_norm(sum, weight, {.epsilon = 1e-6f})));
    }
    ef::Tensor<T, 2> residual = start, y = x;
    ef::add_rms_norm_into(kHere, y, residual, y, weight);  // y takes the place of x
    ASSERT_TRUE(same_bits(y, ef::rms_norm(sum, weight)));
  }
}

TYPED_TEST(RmsNorm, GradientsEqualTheReference) {
  using T = TypeParam;
  using G = ef::compute_type<T>;
  for (Index features : {0, 1, 5, 16, 31, 64, 65, 200})
    for (Index rows : {0, 1, 7, 64, 65, 130}) {
      // one feature: the gradient is what epsilon leaves of it
      const float epsilon = features == 1 ? 1.0f : kEpsilon;
      const auto x = random_tensor<T, 2>({rows, features}, 8),
                 grad_y = random_tensor<T, 2>({rows, features}, 9);
      const auto weight = random_tensor<G, 1>({features}, 10);
      auto expected = ef::reference::rms_norm_backward(to_double(grad_y), to_double(x),
                                                       to_double(weight), epsilon);
      auto grad_x = poisoned_tensor<T, 2>({rows, features});
      auto grad_weight = random_tensor<G, 1>({features}, 11);
      for (Index j = 0; j < features; ++j)
        expected.weight(j) += static_cast<double>(grad_weight(j));
      ef::rms_norm_backward_into(kHere, grad_x, grad_weight, grad_y, x, weight,
                                 {.epsilon = epsilon});
      ASSERT_LT(relative_error(grad_x, expected.x), tolerance<T>()) << rows << " x " << features;
      ASSERT_LT(relative_error(grad_weight, expected.weight), tolerance<G>())
          << rows << " x " << features;
      for (int count : {2, 3}) {
        Threads threads(count);
        ef::Tensor<T, 2> in_place = grad_y;
        auto again = random_tensor<G, 1>({features}, 11);
        ef::rms_norm_backward_into(threads.device, in_place, again, in_place, x, weight,
                                   {.epsilon = epsilon});
        ASSERT_TRUE(same_bits(in_place, grad_x));
        ASSERT_TRUE(same_bits(again, grad_weight));
      }
    }
}

TEST(RmsNormGradients, EqualFiniteDifferences) {
  auto x = random_tensor<double, 2>({4, 9}, 12);
  auto weight = random_tensor<double, 1>({9}, 13);
  const auto grad_y = random_tensor<double, 2>({4, 9}, 14);
  const auto loss = [&] { return dot(ef::rms_norm(x, weight), grad_y); };
  ef::Tensor<double, 2> grad_x(4, 9);
  ef::Tensor<double, 1> grad_weight(9);
  grad_weight.setZero();
  ef::rms_norm_backward_into(kHere, grad_x, grad_weight, grad_y, x, weight);
  EXPECT_LT(relative_error(grad_x, finite_differences(x, loss)), 1e-8);
  EXPECT_LT(relative_error(grad_weight, finite_differences(weight, loss)), 1e-8);
}

TEST(RmsNormGradients, ManyRowsKeepTheirPrecision) {
  const auto x = random_tensor<float, 2>({30000, 20}, 15),
             grad_y = random_tensor<float, 2>({30000, 20}, 16);
  const auto weight = random_tensor<float, 1>({20}, 17);
  const auto expected = ef::reference::rms_norm_backward(to_double(grad_y), to_double(x),
                                                         to_double(weight), kEpsilon);
  ef::Tensor<float, 2> grad_x(30000, 20);
  ef::Tensor<float, 1> grad_weight(20);
  grad_weight.setZero();
  Threads threads(3);
  ef::rms_norm_backward_into(threads.device, grad_x, grad_weight, grad_y, x, weight);
  EXPECT_LT(relative_error(grad_x, expected.x), 1e-5);
  EXPECT_LT(relative_error(grad_weight, expected.weight), 1e-6);
}

TEST(RmsNormScalars, MayDiffer) {
  const auto x = random_tensor<ef::bfloat16, 2>({3, 50}, 18);
  const auto weight = random_tensor<float, 1>({50}, 19);
  const auto expected = ef::reference::rms_norm(to_double(x), to_double(weight), kEpsilon);
  auto y = poisoned_tensor<float, 2>({3, 50});
  ef::rms_norm_into(kHere, y, x, weight);
  EXPECT_LT(relative_error(y, expected), 1e-5);  // nothing is rounded to bfloat16 on the way
  auto wide = poisoned_tensor<double, 2>({3, 50});
  ef::rms_norm_into(kHere, wide, x, weight);
  EXPECT_LT(relative_error(wide, expected), 1e-12);

  auto residual = random_tensor<float, 2>({3, 50}, 20);
  auto narrow = poisoned_tensor<ef::bfloat16, 2>({3, 50});
  ef::Tensor<double, 2> sum = to_double(residual) + to_double(x);
  ef::add_rms_norm_into(kHere, narrow, residual, x, weight);
  EXPECT_LT(relative_error(residual, sum), 1e-6);
  EXPECT_LT(relative_error(narrow, ef::reference::rms_norm(sum, to_double(weight), kEpsilon)),
            1e-2);
}

TEST(RmsNormValues, ZerosGiveZerosAndNaNStaysInItsRow) {
  auto x = random_tensor<float, 2>({3, 20}, 21);
  ef::Tensor<float, 1> weight(20);
  weight.setConstant(1.0f);
  x(1, 7) = std::numeric_limits<float>::quiet_NaN();
  for (Index j = 0; j < 20; ++j) x(2, j) = 0.0f;
  const auto y = ef::rms_norm(x, weight);
  for (Index j = 0; j < 20; ++j) {
    EXPECT_TRUE(std::isfinite(y(0, j)));
    EXPECT_TRUE(std::isnan(y(1, j)));
    EXPECT_EQ(y(2, j), 0.0f);
  }
}

// One chain of additions would be 1e-4 off: equal terms round to the same side.
TEST(RmsNormValues, AMillionEqualFeatures) {
  ef::Tensor<float, 2> x(1, 1000000);
  x.setConstant(1.1f);
  ef::Tensor<float, 1> weight(1000000), bias(1000000);
  weight.setConstant(1.0f);
  bias.setConstant(0.0f);
  const auto y = ef::rms_norm(x, weight, {.epsilon = 1e-10f});
  for (const Index at : {0, 31, 999999}) EXPECT_NEAR(y(0, at), 1.0f, 1e-5f);
  for (Index i = 1; i < 1000000; i += 2) x(0, i) = -1.1f;
  const auto z = ef::layer_norm(x, weight, bias, {.epsilon = 1e-10f});
  for (const Index at : {0, 31, 999999}) EXPECT_NEAR(std::abs(z(0, at)), 1.0f, 1e-5f);
}

TEST(RmsNormMemory, DestinationFormsAllocateNothing) {
  const auto x = random_tensor<float, 2>({10, 100}, 22),
             grad_y = random_tensor<float, 2>({10, 100}, 23);
  const auto weight = random_tensor<float, 1>({100}, 24);
  auto residual = random_tensor<float, 2>({10, 100}, 25);
  ef::Tensor<float, 2> y(10, 100);
  ef::Tensor<float, 1> grad_weight(100);
  grad_weight.setZero();
  ef::Workspace workspace;
  const auto all = [&] {
    ef::rms_norm_into(kHere, y, x, weight);
    ef::add_rms_norm_into(kHere, y, residual, x, weight);
    ef::rms_norm_backward_into(kHere, y, grad_weight, grad_y, x, weight, {}, workspace);
  };
  EXPECT_GT(count_allocations(all), 0);  // the workspace grows
  all();
  EXPECT_EQ(count_allocations(all), 0);
}

TEST(RmsNormErrors, NameTheArgument) {
  const auto x = random_tensor<float, 2>({2, 8}, 26);
  const auto weight = random_tensor<float, 1>({8}, 27),
             short_weight = random_tensor<float, 1>({7}, 28);
  auto y = poisoned_tensor<float, 2>({2, 8}), wrong = poisoned_tensor<float, 2>({3, 8});
  expect_throws<std::invalid_argument>([&] { ef::rms_norm(x, short_weight); },
                                       {"rms_norm", "weight has 7", "8 features"});
  expect_throws<std::invalid_argument>([&] { ef::rms_norm_into(kHere, wrong, x, weight); },
                                       {"y has shape (3, 8)", "(2, 8)"});
  for (float epsilon : {0.0f, -1e-5f, std::numeric_limits<float>::quiet_NaN(),
                        std::numeric_limits<float>::infinity()}) {
    expect_throws<std::invalid_argument>(
        [&] { ef::rms_norm_into(kHere, y, x, weight, {.epsilon = epsilon}); },
        {"rms_norm", "epsilon"});
    auto grad_weight = weight;
    expect_throws<std::invalid_argument>(
        [&] {
          ef::rms_norm_backward_into(kHere, y, grad_weight, x, x, weight, {.epsilon = epsilon});
        },
        {"rms_norm_backward", "epsilon"});
    EXPECT_TRUE(same_bits(grad_weight, weight));
  }
  expect_throws<std::invalid_argument>([&] { ef::add_rms_norm_into(kHere, y, wrong, x, weight); },
                                       {"add_rms_norm", "residual has shape (3, 8)"});
  auto grad_weight = short_weight;
  expect_throws<std::invalid_argument>(
      [&] { ef::rms_norm_backward_into(kHere, y, grad_weight, x, x, weight); },
      {"grad_weight has 7"});
  EXPECT_TRUE(std::isnan(y(0, 0)));
}

template <typename T>
class LayerNorm : public ::testing::Test {};
TYPED_TEST_SUITE(LayerNorm, EveryScalar);

TYPED_TEST(LayerNorm, EqualsItsDefinitionAtEveryWidth) {
  using T = TypeParam;
  for (Index features : edge_widths())
    for (Index rows : {0, 1, 3}) {
      // two nearly equal features are all cancellation
      const float epsilon = features == 2 ? 0.1f : kEpsilon;
      auto x = random_tensor<T, 2>({rows, features}, 31);
      for (Index i = 0; i < x.size(); ++i)
        x.data()[i] = static_cast<T>(static_cast<float>(x.data()[i]) + 2.0f);
      const auto weight = random_tensor<T, 1>({features}, 32),
                 bias = random_tensor<T, 1>({features}, 33);
      const auto expected =
          ef::reference::layer_norm(to_double(x), to_double(weight), to_double(bias), epsilon);
      const ef::Tensor<T, 2> y = ef::layer_norm(x, weight, bias, {.epsilon = epsilon});
      ASSERT_LT(relative_error(y, expected), tolerance<T>()) << rows << " x " << features;
      for_each_isa([&](auto isa) {
        auto other = poisoned_tensor<T, 2>({rows, features});
        ef::layer_norm_into(on(isa), other, x, weight, bias, {.epsilon = epsilon});
        ASSERT_LT(relative_error(other, expected), tolerance<T>())
            << isa.name << " " << rows << " x " << features;
      });
    }
}

TYPED_TEST(LayerNorm, NeverDependsOnThreadsBatchOrPlace) {
  using T = TypeParam;
  const auto x = random_tensor<T, 3>({3, 17, 515}, 34);
  const auto weight = random_tensor<float, 1>({515}, 35), bias = random_tensor<float, 1>({515}, 36);
  const ef::Tensor<T, 3> y = ef::layer_norm(x, weight, bias);
  for (int count : {2, 3}) {
    Threads threads(count);
    ef::Tensor<T, 3> in_place = x;
    ef::layer_norm_into(threads.device, in_place, in_place, weight, bias);
    ASSERT_TRUE(same_bits(y, in_place));
  }
  const ef::TensorView<const T, 2> alone(x.data() + 20 * 515, 1, 515),
      expected(y.data() + 20 * 515, 1, 515);
  ASSERT_TRUE(same_bits(ef::layer_norm(alone, weight, bias), expected));
}

TYPED_TEST(LayerNorm, OfHeadsHasTheBitsOfEachAlone) {
  using T = TypeParam;
  const Index tokens = 5, heads = 3, width = 20;
  const auto matrix = random_tensor<T, 2>({tokens, 100}, 37);
  const auto weight = random_tensor<float, 2>({heads, width}, 38),
             bias = random_tensor<float, 2>({heads, width}, 39);
  const auto of_head = [&](const ef::Tensor<float, 2>& x, Index h) {
    return ef::TensorView<const float, 1>(x.data() + h * width, width);
  };
  for_each_isa([&](auto isa) {
    auto own = poisoned_tensor<T, 3>({tokens, heads, width}),
         shared = poisoned_tensor<T, 3>({tokens, heads, width});
    const auto x = ef::heads_of(matrix, 17, heads, width);
    ef::layer_norm_into(on(isa), own, x, weight, bias);
    ef::layer_norm_into(on(isa), shared, x, of_head(weight, 0), of_head(bias, 0));
    for (Index t = 0; t < tokens; ++t)
      for (Index h = 0; h < heads; ++h) {
        const Index at = (t * heads + h) * width;
        const ef::TensorView<const T, 2> row(matrix.data() + t * 100 + 17 + h * width, 1, width);
        ef::Tensor<T, 2> alone(1, width);
        ef::layer_norm_into(on(isa), alone, row, of_head(weight, h), of_head(bias, h));
        ASSERT_TRUE(same_bits(ef::TensorView<const T, 2>(own.data() + at, 1, width), alone));
        ef::layer_norm_into(on(isa), alone, row, of_head(weight, 0), of_head(bias, 0));
        ASSERT_TRUE(same_bits(ef::TensorView<const T, 2>(shared.data() + at, 1, width), alone));
      }
  });
}

TYPED_TEST(LayerNorm, GradientsEqualTheReference) {
  using T = TypeParam;
  using G = ef::compute_type<T>;
  for (Index features : {0, 3, 16, 31, 64, 65, 200})
    for (Index rows : {0, 1, 7, 65, 130}) {
      const float epsilon = features == 3 ? 0.1f : kEpsilon;
      const auto x = random_tensor<T, 2>({rows, features}, 37),
                 grad_y = random_tensor<T, 2>({rows, features}, 38);
      const auto weight = random_tensor<G, 1>({features}, 39);
      const auto expected = ef::reference::layer_norm_backward(to_double(grad_y), to_double(x),
                                                               to_double(weight), epsilon);
      auto grad_x = poisoned_tensor<T, 2>({rows, features});
      ef::Tensor<G, 1> grad_weight(features), grad_bias(features);
      grad_weight.setConstant(G(1));
      grad_bias.setConstant(G(-1));
      ef::layer_norm_backward_into(kHere, grad_x, grad_weight, grad_bias, grad_y, x, weight,
                                   {.epsilon = epsilon});
      ASSERT_LT(relative_error(grad_x, expected.x), tolerance<T>()) << rows << " x " << features;
      for (Index j = 0; j < features; ++j) {
        ASSERT_NEAR(static_cast<double>(grad_weight(j)), 1 + expected.weight(j), 1e-4);
        ASSERT_NEAR(static_cast<double>(grad_bias(j)), -1 + expected.bias(j), 1e-4);
      }
      Threads threads(3);
      ef::Tensor<T, 2> in_place = grad_y;
      ef::Tensor<G, 1> weight_again(features), bias_again(features);
      weight_again.setConstant(G(1));
      bias_again.setConstant(G(-1));
      ef::layer_norm_backward_into(threads.device, in_place, weight_again, bias_again, in_place, x,
                                   weight, {.epsilon = epsilon});
      ASSERT_TRUE(same_bits(in_place, grad_x));
      ASSERT_TRUE(same_bits(weight_again, grad_weight));
      ASSERT_TRUE(same_bits(bias_again, grad_bias));
    }
}

TEST(LayerNormGradients, EqualFiniteDifferences) {
  auto x = random_tensor<double, 2>({4, 9}, 40);
  auto weight = random_tensor<double, 1>({9}, 41), bias = random_tensor<double, 1>({9}, 42);
  const auto grad_y = random_tensor<double, 2>({4, 9}, 43);
  const auto loss = [&] { return dot(ef::layer_norm(x, weight, bias), grad_y); };
  ef::Tensor<double, 2> grad_x(4, 9);
  ef::Tensor<double, 1> grad_weight(9), grad_bias(9);
  grad_weight.setZero();
  grad_bias.setZero();
  ef::layer_norm_backward_into(kHere, grad_x, grad_weight, grad_bias, grad_y, x, weight);
  EXPECT_LT(relative_error(grad_x, finite_differences(x, loss)), 1e-8);
  EXPECT_LT(relative_error(grad_weight, finite_differences(weight, loss)), 1e-8);
  EXPECT_LT(relative_error(grad_bias, finite_differences(bias, loss)), 1e-8);
}

TEST(LayerNormErrors, NameTheArgument) {
  const auto x = random_tensor<float, 2>({2, 8}, 44);
  const auto weight = random_tensor<float, 1>({8}, 45),
             short_bias = random_tensor<float, 1>({7}, 46);
  expect_throws<std::invalid_argument>([&] { ef::layer_norm(x, weight, short_bias); },
                                       {"layer_norm", "bias has 7", "8 features"});
  expect_throws<std::invalid_argument>(
      [&] { ef::layer_norm(x, weight, weight, {.epsilon = 0.0f}); }, {"layer_norm", "epsilon"});
  auto y = poisoned_tensor<float, 3>({2, 2, 4});
  const auto of_three = random_tensor<float, 2>({3, 4}, 47),
             own = random_tensor<float, 2>({2, 4}, 48);
  const auto heads = ef::heads_of(x, 0, 2, 4);
  expect_throws<std::invalid_argument>([&] { ef::layer_norm_into(kHere, y, heads, of_three, own); },
                                       {"layer_norm", "weight has shape (3, 4)", "2 heads of 4"});
  expect_throws<std::invalid_argument>([&] { ef::layer_norm_into(kHere, y, heads, own, of_three); },
                                       {"layer_norm", "bias has shape (3, 4)", "2 heads of 4"});
  EXPECT_TRUE(std::isnan(y(0, 0, 0)));
}

// Gradients of rows whose x is large and whose grad_y is small: no factor of the formula leaves the
// range though their product is an ordinary number.
TEST(RmsNormBackward, OfLargeRowsAndSmallGradients) {
  struct Case {
    float x, grad;
  };
  for (const Case c : {Case{1e17f, 1e-10f}, Case{1e18f, 1e-5f}, Case{1e15f, 1e-12f},
                       Case{1e15f, 1e-20f}, Case{1e18f, 1e-26f}, Case{1e-15f, 1e10f}}) {
    ef::Tensor<float, 2> x(1, 3), grad_y(1, 3), grad_x(1, 3);
    ef::Tensor<float, 1> weight(3), grad_weight(3);
    x.setValues({{c.x, 2 * c.x, -0.5f * c.x}});
    grad_y.setValues({{c.grad, 1.9f * c.grad, 0.3f * c.grad}});
    weight.setValues({1.0f, 0.5f, 2.0f});
    grad_weight.setZero();  // it is added to
    const ef::RmsNormOptions options{.epsilon = 1e-38f};
    ef::rms_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_y, x, weight,
                               options);
    double squares = 0, projection = 0;
    for (Index i = 0; i < 3; ++i) {
      squares += static_cast<double>(x(0, i)) * x(0, i);
      projection += static_cast<double>(grad_y(0, i)) * weight(i) * x(0, i);
    }
    const double inverse = 1 / std::sqrt(squares / 3 + 1e-38);
    for (Index i = 0; i < 3; ++i) {
      const double normalised = x(0, i) * inverse,
                   right = inverse * (static_cast<double>(grad_y(0, i)) * weight(i) -
                                      normalised * (projection * inverse / 3));
      EXPECT_NEAR(grad_x(0, i), right, 2e-6 * std::abs(inverse * c.grad) + kLeastEpsilon)
          << c.x << " " << c.grad;
      const double right_weight = normalised * grad_y(0, i);
      EXPECT_NEAR(grad_weight(i), right_weight, 2e-6 * std::abs(right_weight)) << c.x;
    }
  }
}

TEST(LayerNormRows, ConstantOnesGiveTheBiasWhateverEpsilon) {
  for (const float value : {3.4e38f, -7e19f, 1e-40f, 0.0f})
    for (const float epsilon : {1e-5f, 1e-31f, 1e-38f, kLeastEpsilon})
      for (const Index features : {1, 3, 100, 1000}) {
        ef::Tensor<float, 2> x(1, features), grad_y(1, features), grad_x(1, features);
        ef::Tensor<float, 1> weight(features), bias(features), grad_weight(features),
            grad_bias(features);
        x.setConstant(value);
        grad_y.setConstant(1e-3f);
        weight.setConstant(2.0f);
        bias.setConstant(0.25f);
        grad_weight.setZero();
        grad_bias.setZero();
        const ef::LayerNormOptions options{.epsilon = epsilon};
        const auto y = ef::layer_norm(x, weight, bias, options);
        ef::layer_norm_backward_into(Eigen::DefaultDevice{}, grad_x, grad_weight, grad_bias, grad_y,
                                     x, weight, options);
        for (Index i = 0; i < features; ++i) {
          ASSERT_EQ(y(0, i), 0.25f) << value << " " << epsilon << " " << features;
          ASSERT_EQ(grad_weight(i), 0.0f) << value << " " << epsilon << " " << features;
          ASSERT_FALSE(std::isnan(grad_x(0, i))) << value << " " << epsilon << " " << features;
        }
      }
}

}  // namespace
