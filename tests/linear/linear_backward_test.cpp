// Laws of the linear layer's gradients: those of the definition, for every scalar and ISA; they
// accumulate, and micro-batches in turn give the bits of one batch; the derivative of the layer.
#include <eigenformer/linear.h>
#include <eigenformer/linear/backward.h>
#include <eigenformer/reference/linear.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

TEST(LinearBackward, EqualsItsDefinitionAndAccumulates) {
  const auto check = [](auto y_scalar, auto x_scalar, auto w_scalar, auto g_scalar) {
    using Y = decltype(y_scalar);
    using X = decltype(x_scalar);
    using W = decltype(w_scalar);
    using G = decltype(g_scalar);
    const double allowed =
        std::max({tolerance<Y>(), tolerance<X>(), tolerance<W>(), tolerance<G>()});
    unsigned seed = 1;
    for (const auto& [tokens, in, out] : {std::array<Index, 3>{1, 1, 1},
                                          {7, 33, 5},
                                          {13, 1, 40},
                                          {20, 65, 1},
                                          {37, 50, 70},
                                          {301, 66, 131},
                                          {33, 9, 257},
                                          {257, 7, 513},
                                          {1025, 3, 1025},
                                          {0, 4, 5},
                                          {4, 0, 5},
                                          {4, 5, 0}}) {
      const auto grad_y = random_tensor<Y, 2>({tokens, out}, ++seed);
      const auto x = random_tensor<X, 2>({tokens, in}, ++seed);
      const auto weight = random_tensor<W, 2>({out, in}, ++seed);
      auto grad_x = poisoned_tensor<Y, 2>({tokens, in});
      ef::linear_backward_input_into(Eigen::DefaultDevice{}, grad_x, grad_y, weight);
      ASSERT_LE(relative_error(grad_x, ef::reference::linear_backward_input(to_double(grad_y),
                                                                            to_double(weight))),
                allowed);
      auto grad_weight = random_tensor<G, 2>({out, in}, ++seed);
      auto expected = to_double(grad_weight);
      const auto before = grad_weight;
      ef::linear_backward_weight_into(Eigen::DefaultDevice{}, grad_weight, grad_y, x);
      ef::reference::linear_backward_weight(expected, to_double(grad_y), to_double(x));
      ASSERT_LE(relative_error(grad_weight, expected), allowed);
      auto grad_bias = random_tensor<G, 1>({out}, ++seed);
      auto expected_bias = to_double(grad_bias);
      const auto bias_before = grad_bias;
      ef::linear_backward_bias_into(Eigen::DefaultDevice{}, grad_bias, grad_y);
      ef::reference::linear_backward_bias(expected_bias, to_double(grad_y));
      ASSERT_LE(relative_error(grad_bias, expected_bias), allowed);
      for (int count : {2, 3}) {
        Threads threads(count);
        auto other_x = poisoned_tensor<Y, 2>({tokens, in});
        ef::linear_backward_input_into(threads.device, other_x, grad_y, weight);
        ASSERT_TRUE(same_bits(grad_x, other_x));
        auto other_weight = before;
        ef::linear_backward_weight_into(threads.device, other_weight, grad_y, x);
        ASSERT_TRUE(same_bits(grad_weight, other_weight));
        auto other_bias = bias_before;
        ef::linear_backward_bias_into(threads.device, other_bias, grad_y);
        ASSERT_TRUE(same_bits(grad_bias, other_bias));
      }
      const Index half_way = tokens / 4 * 2;  // even, for pairs of bfloat16
      auto in_turn = before;
      for (const auto& [first, count] :
           {std::pair{Index{0}, half_way}, std::pair{half_way, tokens - half_way}})
        ef::linear_backward_weight_into(Eigen::DefaultDevice{}, in_turn,
                                        rows_of(grad_y, first, count), rows_of(x, first, count));
      ASSERT_TRUE(same_bits(grad_weight, in_turn));
    }
  };
  check(float{}, float{}, float{}, float{});
  check(double{}, double{}, double{}, double{});
  check(ef::bfloat16{}, ef::bfloat16{}, float{}, float{});
  check(ef::bfloat16{}, ef::bfloat16{}, ef::bfloat16{}, float{});
  check(ef::half{}, ef::half{}, float{}, float{});
  check(float{}, ef::bfloat16{}, ef::half{}, float{});
  check(float{}, float{}, float{}, double{});
}

TEST(LinearBackward, HoldsForEveryIsaAndMicroBatchesOfWholeLinks) {
  // a link of a sum's chain is 1, 2 or, with AMX, 32 tokens
  const Index tokens = 100, in = 66, out = 41, cut = 64;
  const auto check = [&](auto scalar) {
    using T = decltype(scalar);
    const auto grad_y = random_tensor<T, 2>({tokens, out}, 1),
               x = random_tensor<T, 2>({tokens, in}, 2);
    const auto weight = random_tensor<float, 2>({out, in}, 3),
               start = random_tensor<float, 2>({out, in}, 4);
    auto expected = to_double(start);
    ef::reference::linear_backward_weight(expected, to_double(grad_y), to_double(x));
    for_each_product_isa([&](auto isa) {
      auto grad_x = poisoned_tensor<T, 2>({tokens, in});
      ef::linear_backward_input_into(on(isa), grad_x, grad_y, weight);
      ASSERT_LE(relative_error(grad_x, ef::reference::linear_backward_input(to_double(grad_y),
                                                                            to_double(weight))),
                tolerance<T>())
          << isa.name;
      const auto add = [&](ef::Tensor<float, 2>& gradient, Index first, Index count) {
        ef::linear_backward_weight_into(on(isa), gradient, rows_of(grad_y, first, count),
                                        rows_of(x, first, count));
      };
      auto at_once = start, in_turn = start;
      add(at_once, 0, tokens);
      add(in_turn, 0, cut);
      add(in_turn, cut, tokens - cut);
      ASSERT_LE(relative_error(at_once, expected), tolerance<T>()) << isa.name;
      ASSERT_TRUE(same_bits(at_once, in_turn)) << isa.name;
    });
  };
  check(float{});
  check(ef::half{});
  check(ef::bfloat16{});
}

TEST(LinearBackward, IsTheDerivativeOfTheLayer) {
  // y is linear in each argument, so a difference quotient is exact up to rounding.
  const auto x = random_tensor<double, 2>({4, 6}, 1), weight = random_tensor<double, 2>({5, 6}, 2),
             grad_y = random_tensor<double, 2>({4, 5}, 3);
  const auto loss = [&](const auto& a, const auto& b) {
    const ef::Tensor<double, 2> y = ef::linear(a, b);
    double sum = 0;
    for (Index i = 0; i < y.size(); ++i) sum += y.data()[i] * grad_y.data()[i];
    return sum;
  };
  ef::Tensor<double, 2> grad_x(4, 6), grad_weight(5, 6);
  grad_weight.setZero();
  ef::linear_backward_input_into(Eigen::DefaultDevice{}, grad_x, grad_y, weight);
  ef::linear_backward_weight_into(Eigen::DefaultDevice{}, grad_weight, grad_y, x);
  for (Index i = 0; i < x.size(); ++i) {
    auto up = x, down = x;
    up.data()[i] += 0.5, down.data()[i] -= 0.5;
    EXPECT_NEAR(loss(up, weight) - loss(down, weight), grad_x.data()[i], 1e-12);
  }
  for (Index i = 0; i < weight.size(); ++i) {
    auto up = weight, down = weight;
    up.data()[i] += 0.5, down.data()[i] -= 0.5;
    EXPECT_NEAR(loss(x, up) - loss(x, down), grad_weight.data()[i], 1e-12);
  }
}

}  // namespace
