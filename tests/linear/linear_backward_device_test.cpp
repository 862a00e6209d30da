// Gradients of the linear layer on a GPU: those of the definition, for pairs of scalars and around
// the edges of tiles; micro-batches and single rows give the bits of the whole.
#include <eigenformer/linear/backward.h>
#include <eigenformer/reference/linear.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

/// What a GPU adds to a gradient as one: tokens of 16-bit pairs.
constexpr Index kLink = 16;

template <typename Y, typename X, typename W, typename G>
void check(Index tokens, Index in, Index out) {
  const double allowed = std::max({tolerance<Y>(), tolerance<X>(), tolerance<W>(), tolerance<G>()});
  const auto grad_y = random_tensor<Y, 2>({tokens, out}, 1);
  const auto x = random_tensor<X, 2>({tokens, in}, 2);
  const auto weight = random_tensor<W, 2>({out, in}, 3);
  const auto held = random_tensor<G, 2>({out, in}, 4);
  const auto held_bias = random_tensor<G, 1>({out}, 5);
  auto expected = to_double(held);
  ef::reference::linear_backward_weight(expected, to_double(grad_y), to_double(x));
  auto expected_bias = to_double(held_bias);
  ef::reference::linear_backward_bias(expected_bias, to_double(grad_y));
  const auto expected_x =
      ef::reference::linear_backward_input(to_double(grad_y), to_double(weight));
  const std::string shape =
      std::to_string(tokens) + " x " + std::to_string(in) + " x " + std::to_string(out);
  for_each_gpu([&](const auto& bench) {
    auto device_grad_y = on_device(bench, grad_y);
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    const auto gy = device_grad_y.cview();

    auto grad_x = on_device(bench, poisoned_tensor<Y, 2>({tokens, in}));
    ef::linear_backward_input_into(bench.device, grad_x.view(), gy, device_weight.cview());
    const auto whole_x = grad_x.host();
    EXPECT_LE(relative_error(whole_x, expected_x), allowed) << shape;

    auto grad_weight = on_device(bench, held);
    ef::linear_backward_weight_into(bench.device, grad_weight.view(), gy, device_x.cview());
    const auto whole_weight = grad_weight.host();
    EXPECT_LE(relative_error(whole_weight, expected), allowed) << shape;

    auto grad_bias = on_device(bench, held_bias);
    ef::linear_backward_bias_into(bench.device, grad_bias.view(), gy);
    const auto whole_bias = grad_bias.host();
    EXPECT_LE(relative_error(whole_bias, expected_bias), allowed) << shape;

    if (tokens <= kLink) return;
    const auto rows = [&](const auto& view, Index first, Index count) {
      using T = ef::scalar_of<decltype(view)>;
      return ef::TensorView<const T, 2>(view.data() + first * view.dimension(1), count,
                                        view.dimension(1));
    };
    auto one_x = on_device(bench, poisoned_tensor<Y, 2>({1, in}));
    ef::linear_backward_input_into(bench.device, one_x.view(), rows(gy, tokens - 1, 1),
                                   device_weight.cview());
    EXPECT_TRUE(same_bits(one_x.host(), ef::Tensor<Y, 2>(rows_of(whole_x, tokens - 1, 1))))
        << shape;
    auto in_turn = on_device(bench, held);
    auto bias_in_turn = on_device(bench, held_bias);
    for (const auto& [first, count] : {std::pair{Index{0}, kLink}, {kLink, tokens - kLink}}) {
      ef::linear_backward_weight_into(bench.device, in_turn.view(), rows(gy, first, count),
                                      rows(device_x.cview(), first, count));
      ef::linear_backward_bias_into(bench.device, bias_in_turn.view(), rows(gy, first, count));
    }
    EXPECT_TRUE(same_bits(in_turn.host(), whole_weight)) << shape;
    EXPECT_TRUE(same_bits(bias_in_turn.host(), whole_bias)) << shape;
  });
}

TEST(LinearBackwardOnDevice, EqualsItsDefinition) {
  using ef::bfloat16;
  check<float, float, float, float>(1, 1, 1);
  check<float, float, float, float>(37, 65, 70);
  check<bfloat16, bfloat16, bfloat16, float>(19, 33, 131);
  check<bfloat16, bfloat16, bfloat16, float>(34, 136, 64);  // rows in packs of 16 bytes
}

TEST(LinearBackwardOnDevice, EveryScalar) {
  check<double, double, double, double>(33, 66, 5);
  check<ef::half, ef::half, ef::half, float>(35, 7, 40);
  check<ef::bfloat16, ef::bfloat16, float, float>(5, 16, 33);
}

TEST(LinearBackwardOnDevice, NothingToSum) {
  for (const auto& [tokens, in, out] :
       {std::array<Index, 3>{0, 4, 5}, {4, 0, 5}, {4, 5, 0}, {17, 1, 257}})
    check<float, float, float, float>(tokens, in, out);
}

TEST(LinearBackwardOnDevice, BiasesSumManyTokens) {
  check<ef::half, ef::half, ef::half, float>(257, 1, 33);
}

}  // namespace
