// Every operator returns its result too, on the calling thread, on a device and on a backend: with
// the bits of the form that writes it.
#include <eigenformer/eigenformer.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere;
const ef::Tensor<float, 2> kX = random_tensor<float, 2>({3, 14}, 1),
                           kG = random_tensor<float, 2>({3, 14}, 2);
const ef::Tensor<float, 1> kWeight = random_tensor<float, 1>({14}, 3);

TEST(Forms, OfNorms) {
  auto residual = kG;
  ef::Tensor<float, 2> y(3, 14), gx(3, 14);
  ef::add_rms_norm_into(kHere, y, residual, kX, kWeight, {.epsilon = 1e-3f});
  const auto [normalized, sum] = ef::add_rms_norm(kG, kX, kWeight, {.epsilon = 1e-3f});
  EXPECT_TRUE(same_bits(normalized, y) && same_bits(sum, residual));
  ef::Tensor<float, 1> gw(14), gb(14);
  gw.setZero(), gb.setZero();
  ef::rms_norm_backward_into(kHere, gx, gw, kG, kX, kWeight);
  const auto rms = ef::rms_norm_backward(kG, kX, kWeight);
  EXPECT_TRUE(same_bits(rms.grad_x, gx) && same_bits(rms.grad_weight, gw));
  gw.setZero();
  ef::layer_norm_backward_into(kHere, gx, gw, gb, kG, kX, kWeight);
  const auto layer = ef::layer_norm_backward(on(ef::isa::best{}), kG, kX, kWeight);
  EXPECT_TRUE(same_bits(layer.grad_x, gx) && same_bits(layer.grad_weight, gw) &&
              same_bits(layer.grad_bias, gb));
  const ef::Tensor<float, 1> three(3);
  expect_throws<std::invalid_argument>([&] { ef::rms_norm_backward(kG, kX, three); }, {"weight"});
}

TEST(Forms, OfLinearLayers) {
  const auto gate = random_tensor<float, 2>({5, 14}, 4), up = random_tensor<float, 2>({5, 14}, 5);
  const auto dy = random_tensor<float, 2>({3, 5}, 6);
  ef::Tensor<float, 2> y(3, 5), gx(3, 14), gw(5, 14);
  const auto silu = ef::Epilogue{}.silu();
  ef::gated_linear_into(kHere, y, kX, gate, up, silu);
  EXPECT_TRUE(same_bits(ef::gated_linear(kX, gate, up, silu), y));
  EXPECT_TRUE(same_bits(ef::gated_linear(kX, ef::pack_gated_weight<float>(gate, up), silu), y));
  ef::linear_backward_input_into(kHere, gx, dy, gate);
  EXPECT_TRUE(same_bits(ef::linear_backward_input(dy, gate), gx));
  gw.setZero();
  ef::linear_backward_weight_into(kHere, gw, dy, kX);
  EXPECT_TRUE(same_bits(ef::linear_backward_weight(dy, kX), gw));
  ef::Tensor<float, 1> gb(5);
  gb.setZero();
  ef::linear_backward_bias_into(kHere, gb, dy);
  EXPECT_TRUE(same_bits(ef::linear_backward_bias(dy), gb));
  ef::Tensor<std::int8_t, 2> q(3, 14);
  ef::Tensor<float, 1> scales(3);
  ef::quantize_activations_int8_into(kHere, q, scales, kX);
  const auto quantized = ef::quantize_activations_int8(kX);
  EXPECT_TRUE(same_bits(quantized.values, q) && same_bits(quantized.scales, scales));
}

TEST(Forms, OfActivations) {
  ef::Tensor<float, 2> a(3, 14), b(3, 14);
  ef::silu_backward_into(kHere, a, kG, kX);
  EXPECT_TRUE(same_bits(ef::silu_backward(kG, kX), a));
  ef::gelu_backward_into(kHere, a, kG, kX);
  EXPECT_TRUE(same_bits(ef::gelu_backward(kG, kX), a));
  ef::relu_backward_into(kHere, a, kG, kX);
  EXPECT_TRUE(same_bits(ef::relu_backward(kG, kX), a));
  ef::swiglu_backward_into(kHere, a, b, kG, kX, kG);
  const auto swiglu = ef::swiglu_backward(kG, kX, kG);
  EXPECT_TRUE(same_bits(swiglu.grad_gate, a) && same_bits(swiglu.grad_up, b));
  ef::geglu_backward_into(kHere, a, b, kG, kX, kG);
  const auto geglu = ef::geglu_backward(kG, kX, kG);
  EXPECT_TRUE(same_bits(geglu.grad_gate, a) && same_bits(geglu.grad_up, b));
}

TEST(Forms, OfEmbeddingRopeAndLoss) {
  const std::vector<int> ids{2, 0, 2};
  ef::Tensor<float, 2> table(4, 14);
  table.setZero();
  ef::embedding_backward_into(kHere, table, kG, ids);
  EXPECT_TRUE(same_bits(ef::embedding_backward(kG, ids, 4), table));
  const auto heads = random_tensor<float, 3>({3, 2, 6}, 7);
  ef::Tensor<float, 3> turned(3, 2, 6);
  ef::rope_backward_into(kHere, turned, heads, ids);
  EXPECT_TRUE(same_bits(ef::rope_backward(heads, ids), turned));
  ef::Tensor<float, 2> gradient(3, 14);
  const auto loss = ef::cross_entropy_with_gradient_into(kHere, gradient, kX, ids, 0.5);
  const auto both = ef::cross_entropy_with_gradient(kX, ids, 0.5);
  EXPECT_EQ(both.loss.sum, loss.sum);
  EXPECT_TRUE(same_bits(both.gradient, gradient));
}

}  // namespace
