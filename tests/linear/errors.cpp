// What does not fit is refused with the argument named, and changes nothing.
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

TEST(LinearErrors, NameTheArgument) {
  const Eigen::DefaultDevice device;
  const ef::Tensor<float, 2> x(3, 8), weight(5, 9);
  ef::Tensor<float, 2> y(3, 5);
  y.setConstant(7.0f);
  expect_throws<std::invalid_argument>([&] { ef::linear(x, weight); },
                                       {"linear", "weight has 9 columns", "8 features"});
  expect_throws<std::invalid_argument>([&] { ef::linear(x, ef::pack_weight<float>(weight)); },
                                       {"weight has 9 columns", "8 features"});
  const auto good = random_tensor<float, 2>({5, 8}, 1);
  ef::Tensor<float, 2> wrong(3, 6);
  expect_throws<std::invalid_argument>([&] { ef::linear_into(device, wrong, x, good); },
                                       {"y has shape (3, 6)", "(3, 5)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(device, y, x, good, ef::Tensor<float, 1>(4)); },
      {"bias has 4", "weight has 5 rows"});
  expect_throws<std::invalid_argument>([&] { ef::linear_backward_input_into(device, y, x, good); },
                                       {"linear_backward_input", "grad_y has 8", "5 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_backward_weight_into(device, wrong, y, x); },
      {"linear_backward_weight", "(3, 6)", "(5, 8)"});
  ef::Tensor<float, 1> grad_bias(2);
  expect_throws<std::invalid_argument>([&] { ef::linear_backward_bias_into(device, grad_bias, y); },
                                       {"linear_backward_bias", "2", "5"});
  EXPECT_EQ(y(0, 0), 7.0f);

  auto bad = good;
  bad(2, 3) = std::numeric_limits<float>::quiet_NaN();
  bad(4, 0) = std::numeric_limits<float>::infinity();
  auto packed = ef::pack_weight<std::int8_t>(good);
  const ef::Tensor<float, 2> input = random_tensor<float, 2>({2, 8}, 3),
                             before = ef::linear(input, packed);
  expect_throws<std::invalid_argument>([&] { ef::pack_weight_into(device, packed, bad); },
                                       {"pack_weight", "weights[2, 3]", "nan"});
  EXPECT_TRUE(same_bits(before, ef::linear(input, packed)));
  ef::Tensor<std::int8_t, 2> q(5, 8);
  q.setZero();
  expect_throws<std::invalid_argument>([&] { ef::pack_weight(q, ef::Tensor<float, 1>(4)); },
                                       {"pack_weight", "scales has 4", "5 rows"});
  ef::Tensor<float, 2> deep(1, 133145);
  deep.setZero();
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<std::int8_t>(deep); },
                                       {"pack_weight", "133145", "133144"});

  if constexpr (!std::is_same_v<ef::isa::best, ef::isa::generic>) {
    const auto foreign = pack_for(ef::isa::generic{}, good, float{});
    const ef::Tensor<float, 2> eight = random_tensor<float, 2>({3, 8}, 2);
    expect_throws<std::invalid_argument>(
        [&] { ef::linear_into(device, y, eight, foreign); },
        {"generic", ef::pack_weight<float>(good).layout().isa.data(), "pack it again"});
  }
}

TEST(LinearErrors, OfEpiloguesPairsAndGroups) {
  const auto x = random_tensor<float, 2>({3, 40}, 1), weight = random_tensor<float, 2>({5, 40}, 2);
  ef::Tensor<float, 2> y(3, 5);
  y.setConstant(7.0f);
  const ef::Tensor<float, 1> short_bias(4);
  const ef::Tensor<float, 2> narrow(3, 4);
  const Eigen::DefaultDevice device;
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(device, y, x, weight, ef::Epilogue{}.bias(short_bias)); },
      {"linear", "bias has 4", "5 rows"});
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(device, y, x, weight, ef::Epilogue{}.residual(narrow)); },
      {"linear", "residual has shape (3, 4)", "(3, 5)"});
  const ef::Tensor<float, 2> other = random_tensor<float, 2>({6, 40}, 3);
  expect_throws<std::invalid_argument>(
      [&] { ef::gated_linear_into(device, y, x, weight, other, ef::Epilogue{}.silu()); },
      {"gated_linear", "gate has shape (5, 40)", "up has shape (6, 40)"});
  expect_throws<std::invalid_argument>([&] { ef::pack_gated_weight<float>(weight, other); },
                                       {"pack_gated_weight", "gate", "up"});
  const ef::Tensor<float, 1> half_bias(5);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::gated_linear_into(device, y, x, weight, weight, ef::Epilogue{}.silu().bias(half_bias));
      },
      {"gated_linear", "bias has 5", "gate has 5 rows", "each of gate and of up"});
  EXPECT_EQ(y(0, 0), 7.0f);
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_weight<std::int8_t>(weight, {.group_size = 48}); },
      {"group_size is 48", "128"});
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<float>(weight, {.group_size = 32}); },
                                       {"only int8 weights"});
  const auto [q, scales] = ef::quantize_weights_int8_grouped(weight, 32);
  expect_throws<std::invalid_argument>(
      [&, &v = q, &s = scales] { ef::pack_weight(v, s, {.group_size = 64}); },
      {"scales has 2 columns", "expected 1"});
  auto bad = other;
  bad(4, 39) = std::numeric_limits<float>::quiet_NaN();
  expect_throws<std::invalid_argument>([&] { ef::pack_gated_weight<std::int8_t>(other, bad); },
                                       {"pack_gated_weight", "up[4, 39]", "nan"});
}

TEST(LinearErrors, ShapesWhoseProductOverflows) {
  const Index huge = Index{1} << 33;
  const ef::TensorView<const float, 2> x(nullptr, huge, 0), weight(nullptr, huge, 0);
  expect_throws<std::invalid_argument>([&] { ef::linear(x, weight); }, {"linear", "overflows"});
  const ef::TensorView<const float, 2> vast(nullptr, Index{1} << 62, 64);
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_grouped(vast, 32); },
                                       {"grouped", "overflows"});
  expect_throws<std::invalid_argument>([&] { ef::quantize_weights_int8_per_channel(vast); },
                                       {"per_channel", "overflows"});
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<std::int8_t>(vast); },
                                       {"pack_weight", "overflows"});
}

}  // namespace
