// Linear layers whose products of many tokens go to a library (cuda/gemm.cuh): cuBLASLt on a GPU, a
// plain product in its place on emulated blocks.
#if !defined(EIGENFORMER_CUBLASLT)
#define EIGENFORMER_CUBLASLT
#endif
#include <eigenformer/linear/backward.h>
#include <eigenformer/quantization.h>
#include <eigenformer/reference/linear.h>

#include "device.h"
#if defined(EIGENFORMER_TEST_BLOCKS)
#include "../emulators/block/gemm.h"
#endif

using namespace eigenformer_test;

namespace {

/// What an emulated device has taken of the library; others do not tell.
template <typename B>
void expect_taken(const B&, int) {}
#if defined(EIGENFORMER_TEST_BLOCKS)
void expect_taken(const EmulatedBench& bench, int count) {
  EXPECT_EQ(bench.stream.products, count);
}
#endif

/// run(bench) on every GPU, where it takes so many products of the library.
template <typename Run>
void expect_products(int count, Run&& run) {
  for_each_gpu([&](const auto& bench) {
    run(bench);
    expect_taken(bench, count);
  });
}

void check_int8(Index tokens, Index in, Index out, int products) {
  const auto x = random_tensor<float, 2>({tokens, in}, 1);
  const auto bias = random_tensor<float, 1>({out}, 3);
  const auto [values, scales] =
      ef::quantize_weights_int8_per_channel(random_tensor<float, 2>({out, in}, 4));
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::int8_linear_into(Eigen::DefaultDevice{}, expected, x, values, scales, bias);
  expect_products(products, [&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_values = on_device(bench, values);
    auto device_scales = on_device(bench, scales);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    ef::int8_linear_into(bench.device, y.view(), device_x.cview(), device_values.cview(),
                         device_scales.cview(), device_bias.cview());
    EXPECT_TRUE(same_bits(y.host(), expected)) << tokens << " x " << in << " x " << out;
  });
}

TEST(Gemm, Int8HasTheBitsOfTheHost) {
  check_int8(64, 48, 20, 1);
  check_int8(63, 48, 20, 0);  // too few tokens
  check_int8(64, 47, 20, 0);  // lines not aligned
  check_int8(64, 48, 19, 0);  // no such product
  check_int8(64, 0, 4, 0);
}

/// A gated pair of int8 or bfloat16 weights, packed with zeros behind their rows.
template <typename S>
void check_gated(Index tokens, Index in, Index out, double allowed) {
  using T = ef::bfloat16;
  const auto x = random_tensor<T, 2>({tokens, in}, 1);
  const auto gate = random_tensor<T, 2>({out, in}, 2), up = random_tensor<T, 2>({out, in}, 3);
  const auto added = random_tensor<float, 2>({tokens, out}, 4);
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::gated_linear_into(Eigen::DefaultDevice{}, expected, x, ef::pack_gated_weight<S>(gate, up),
                        ef::Epilogue{}.relu().residual(added));
  expect_products(2, [&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_gate = on_device(bench, gate);
    auto device_up = on_device(bench, up);
    auto y = on_device(bench, added);
    const auto r = y.cview();
    const auto packed =
        ef::pack_gated_weight<S>(bench.device, device_gate.cview(), device_up.cview());
    ef::gated_linear_into(bench.device, y.view(), device_x.cview(), packed,
                          ef::Epilogue{}.relu().residual(r));
    EXPECT_LE(relative_error(y.host(), expected), allowed);
  });
}

TEST(Gemm, GatedPairsArePackedWithZerosBehind) {
  check_gated<std::int8_t>(65, 33, 12, 0);
  check_gated<ef::bfloat16>(65, 24, 12, tolerance<float>());
}

template <typename T>
void check_gradients(Index tokens, Index in, Index out, int products) {
  const auto grad_y = random_tensor<T, 2>({tokens, out}, 1),
             x = random_tensor<T, 2>({tokens, in}, 2), weight = random_tensor<T, 2>({out, in}, 3);
  const auto held = random_tensor<float, 2>({out, in}, 4);
  auto expected = to_double(held);
  ef::reference::linear_backward_weight(expected, to_double(grad_y), to_double(x));
  const auto expected_x =
      ef::reference::linear_backward_input(to_double(grad_y), to_double(weight));
  expect_products(products, [&](const auto& bench) {
    auto device_grad_y = on_device(bench, grad_y);
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto grad_x = on_device(bench, poisoned_tensor<T, 2>({tokens, in}));
    ef::linear_backward_input_into(bench.device, grad_x.view(), device_grad_y.cview(),
                                   device_weight.cview());
    EXPECT_LE(relative_error(grad_x.host(), expected_x), tolerance<T>());
    auto grad_weight = on_device(bench, held);
    ef::linear_backward_weight_into(bench.device, grad_weight.view(), device_grad_y.cview(),
                                    device_x.cview());
    EXPECT_LE(relative_error(grad_weight.host(), expected), tolerance<T>());
  });
}

TEST(Gemm, Gradients) {
  check_gradients<float>(64, 12, 20, 2);
  check_gradients<ef::bfloat16>(66, 16, 24, 2);
  check_gradients<ef::bfloat16>(64, 15, 24, 0);
}

#if defined(EIGENFORMER_TEST_BLOCKS)
TEST(Gemm, LayersAreCapturedIntoAGraph) {
  const Index tokens = 64, in = 32, out = 8;
  const auto x = random_tensor<float, 2>({tokens, in}, 1),
             w = random_tensor<float, 2>({out, in}, 2);
  auto expected = poisoned_tensor<float, 2>({tokens, out});
  ef::linear_into(Eigen::DefaultDevice{}, expected, x, w, ef::Epilogue{}.relu());
  const EmulatedBench bench{{emulated::Stream({.deferred = true})}, {}};
  auto device_x = on_device(bench, poisoned_tensor<float, 2>({tokens, in}));
  auto device_w = on_device(bench, w);
  auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
  auto& stream = bench.device.stream();
  stream.begin_capture();
  ef::linear_into(bench.device, y.view(), device_x.cview(), device_w.cview(),
                  ef::Epilogue{}.relu());
  const auto graph = stream.end_capture();
  bench.to_device(device_x.view().data(), x.data(), x.size());
  stream.replay(graph);
  EXPECT_LE(relative_error(y.host(), expected), tolerance<float>());
  EXPECT_EQ(stream.products, 1);
}
#endif

}  // namespace
