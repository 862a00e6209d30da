// Laws of attention_backward: the derivative of the forward pass for every option, zero where
// nothing was seen, the same bits on any number of threads and in any batch.
#include "gradient_case.h"

using namespace eigenformer_test;

namespace {

double central_difference(GradientCase<double>& c, double& x, const ef::AttentionOptions& options) {
  const double step = 1e-5, kept = x;
  x = kept + step;
  const double above = c.loss(options);
  x = kept - step;
  const double below = c.loss(options);
  x = kept;
  return (above - below) / (2 * step);
}

void expect_derivative(GradientCase<double>& c, ef::Tensor<double, 4>& x,
                       const ef::Tensor<double, 4>& gradient, const ef::AttentionOptions& options) {
  for (Index i = 0; i < x.size(); ++i) {
    if (std::isnan(x.data()[i])) {
      ASSERT_EQ(gradient.data()[i], 0.0) << i;
      continue;
    }
    const double expected = central_difference(c, x.data()[i], options);
    ASSERT_NEAR(gradient.data()[i], expected, 1e-7 * (1 + std::abs(expected))) << i;
  }
}

void check_gradients(GradientCase<double>& c, const NamedOptions& named) {
  SCOPED_TRACE(named.name);
  ef::AttentionOptions options = named.options;
  std::vector<float> sinks(options.sinks.begin(), options.sinks.end()),
      sinks_gradient(sinks.size(), 7.0f);
  options.sinks = sinks;
  options.sinks_gradient = sinks_gradient;
  const auto g = c.gradients(Eigen::DefaultDevice{}, options);
  expect_derivative(c, c.q, g.grad_q, options);
  expect_derivative(c, c.k, g.grad_k, options);
  expect_derivative(c, c.v, g.grad_v, options);
  for (std::size_t h = 0; h < sinks.size(); ++h) {
    const float kept = sinks[h], step = 0x1p-10f;  // exact in float
    sinks[h] = kept + step;
    const double above = c.loss(options);
    sinks[h] = kept - step;
    const double below = c.loss(options);
    sinks[h] = kept;
    ASSERT_NEAR(sinks_gradient[h], (above - below) / (2 * 0x1p-10), 1e-5) << h;
  }
}

TEST(AttentionGradients, AreTheDerivativeForEveryOption) {
  GradientCase<double> padded({2, 7, 7, 4, 2, 3, 5}, {7, 4}),
      chunk({2, 5, 9, 2, 1, 4, 2}, {9, 3}, 3),
      above({1, 9, 5, 2, 1, 3, 4}, {4}, 5);  // rows before the first key
  for (const auto& named : option_sweep(4)) check_gradients(padded, named);
  for (const auto& named : option_sweep(2)) {
    check_gradients(chunk, named);
    check_gradients(above, named);
  }
}

TEST(AttentionGradients, AreTheDefinitionAcrossBlocks) {
  GradientCase<double> square({1, 150, 150, 2, 1, 5, 5}, {140}),
      above({2, 100, 40, 2, 1, 5, 7}, {40, 33}), below({1, 7, 200, 4, 2, 5, 3}, {193}),
      wide({1, 9, 9, 70, 1, 2, 2}, {9});  // more query heads than a block has rows
  for (const auto& named : option_sweep(2)) {
    check_against_definition(square, named);
    check_against_definition(above, named);
  }
  for (const auto& named : option_sweep(4)) check_against_definition(below, named);
  check_against_definition(wide, {"causal, 70 heads", {.causal = true, .window = 3}});
}

TYPED_TEST(AttentionGradientScalars, MeetTheTolerance) {
  GradientCase<TypeParam> c({2, 90, 90, 4, 2, 24, 17}, {90, 33});
  for (const auto& named : option_sweep(4)) check_against_definition(c, named);
}

TEST(AttentionGradients, BitsDoNotDependOnThreadsBatchOrPacking) {
  for (const auto& named : option_sweep(4)) {
    SCOPED_TRACE(named.name);
    GradientCase<float> c({2, 90, 90, 4, 2, 12, 12}, {90, 33});
    const auto g = c.gradients(Eigen::DefaultDevice{}, named.options);
    for (int count : {2, 3}) {
      Threads threads(count);
      const auto other = c.gradients(threads.device, named.options);
      ASSERT_TRUE(same_bits(g.grad_q, other.grad_q) && same_bits(g.grad_k, other.grad_k) &&
                  same_bits(g.grad_v, other.grad_v));
    }
    // The second sequence alone, packed.
    ef::Tensor<float, 3> q(33, 4, 12), k(33, 2, 12), v(33, 2, 12), grad(33, 4, 12);
    std::copy_n(&c.q(1, 0, 0, 0), q.size(), q.data());
    std::copy_n(&c.k(1, 0, 0, 0), k.size(), k.data());
    std::copy_n(&c.v(1, 0, 0, 0), v.size(), v.data());
    std::copy_n(&c.weights(1, 0, 0, 0), grad.size(), grad.data());
    ef::Tensor<float, 2> lse(4, 33);
    ef::AttentionOptions options = named.options;
    options.log_sum_exp = lse;
    const auto out = ef::variable_length_attention(q, k, v, {0, 33}, {0, 33}, options);
    const auto alone =
        ef::variable_length_attention_backward(grad, q, k, v, out, lse, {0, 33}, {0, 33}, options);
    const auto on_device = ef::variable_length_attention_backward(
        Eigen::DefaultDevice{}, grad, q, k, v, out, lse, {0, 33}, {0, 33}, options);
    EXPECT_TRUE(same_bits(alone.grad_q, on_device.grad_q) &&
                same_bits(alone.grad_k, on_device.grad_k) &&
                same_bits(alone.grad_v, on_device.grad_v));
    const auto equal = [](const auto& a, const float* b) {
      return std::memcmp(a.data(), b, static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
    };
    EXPECT_TRUE(equal(alone.grad_q, &g.grad_q(1, 0, 0, 0)));
    EXPECT_TRUE(equal(alone.grad_k, &g.grad_k(1, 0, 0, 0)));
    EXPECT_TRUE(equal(alone.grad_v, &g.grad_v(1, 0, 0, 0)));
  }
}

TEST(AttentionGradients, EveryIsaMeetsTheDerivative) {
  GradientCase<float> c({1, 70, 70, 4, 2, 9, 20}, {70});
  const auto expected = c.reference_gradients({.causal = true, .softcap = 3.0f});
  for_each_isa([&](auto isa) {
    auto gq = poisoned_tensor<float, 4>({1, 70, 4, 9});
    auto gk = poisoned_tensor<float, 4>({1, 70, 2, 9});
    auto gv = poisoned_tensor<float, 4>({1, 70, 2, 20});
    ef::attention_backward_into(on(isa), gq, gk, gv, c.weights, c.q, c.k, c.v, c.out, c.lse,
                                c.key_lengths, {.causal = true, .softcap = 3.0f});
    EXPECT_TRUE(within(gq, expected.grad_q, tolerance<float>())) << isa.name;
    EXPECT_TRUE(within(gk, expected.grad_k, tolerance<float>())) << isa.name;
    EXPECT_TRUE(within(gv, expected.grad_v, tolerance<float>())) << isa.name;
  });
}

TEST(AttentionGradients, RankThreeLengthZeroAndRefusals) {
  const auto q = random_tensor<float, 3>({2, 3, 4}, 1);
  ef::Tensor<float, 2> lse(2, 3);
  const auto out = ef::batched_attention_with_padding(q, q, q, {2, 0}, {.log_sum_exp = lse});
  const auto g = ef::attention_backward(q, q, q, q, out, lse, {2, 0});
  for (Index i = 0; i < 3; ++i) EXPECT_EQ(g.grad_k(1, i, 1), 0.0f);
  EXPECT_EQ(g.grad_q(0, 2, 0), 0.0f);
  EXPECT_NE(g.grad_q(0, 1, 0), 0.0f);
  const ef::Tensor<float, 3> narrow(2, 3, 3);
  const ef::Tensor<float, 2> short_lse(2, 2);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::attention_backward(narrow, q, q, q, out, lse, {2, 0});
      },
      {"attention_backward", "grad_out has shape (2, 3, 3)"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::attention_backward(q, q, q, q, narrow, lse, {2, 0});
      },
      {"out has shape (2, 3, 3)"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::attention_backward(q, q, q, q, out, short_lse, {2, 0});
      },
      {"log_sum_exp has shape (2, 2)"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::attention_backward(q, q, q, q, out, lse, {4, 0});
      },
      {"seq_lengths[0] is 4"});
}

}  // namespace
