// Laws: calls compile as the contract writes them; int8 sums are exact; nothing is allocated twice;
// packed weights are values. The other laws are in the files beside this one.
#include <eigenformer/linear.h>
#include <eigenformer/parallel_region.h>
#include <eigenformer/reference/linear.h>

#include "allocations.h"
#include "linear_support.h"

using namespace eigenformer_test;

namespace {

TEST(LinearInt8, SumsAreExactToTheLimit) {
  // The most inputs: 127 * 127 times as many are below 2^31. 128 times the sum of these activations
  // leaves 32 bits.
  const Index in = 133144;
  ef::Tensor<float, 2> x(1, in);
  x.setConstant(1.0f);
  ef::Tensor<std::int8_t, 2> q(2, in);
  for (Index i = 0; i < in; ++i) q(0, i) = 127, q(1, i) = -127;
  ef::Tensor<float, 1> scales(2);
  scales.setConstant(1.0f);
  const ef::Tensor<float, 2> y = ef::linear(x, ef::pack_weight(q, scales));
  const float expected = static_cast<float>(127 * 127 * in) * (1.0f / 127.0f);
  EXPECT_EQ(y(0, 0), expected);
  EXPECT_EQ(y(0, 1), -expected);
}

TEST(LinearInt8, ATokenWithNanHurtsOnlyItself) {
  expect_nan_stays_with_its_token(
      ef::pack_weight<std::int8_t>(random_tensor<float, 2>({40, 50}, 2)));
}

TEST(LinearMemory, NothingIsAllocatedTwice) {
  const Eigen::DefaultDevice device;
  const auto x = random_tensor<ef::bfloat16, 2>({30, 90}, 1);
  const auto weight = random_tensor<float, 2>({70, 90}, 2);
  const auto bias = random_tensor<float, 1>({70}, 3);
  auto w16 = ef::pack_weight<ef::bfloat16>(weight);
  auto w8 = ef::pack_weight<std::int8_t>(weight);
  ef::Tensor<ef::bfloat16, 2> y(30, 70), grad_x(30, 90);
  ef::Tensor<float, 2> grad_weight(70, 90);
  ef::Tensor<float, 1> grad_bias(70);
  grad_weight.setZero();
  grad_bias.setZero();
  y.setZero();
  ef::Workspace workspace;
  const auto all = [&] {
    ef::pack_weight_into(device, w16, weight);
    ef::pack_weight_into(device, w8, weight);
    ef::linear_into(device, y, x, weight, workspace);
    ef::linear_into(device, y, x, weight, bias, workspace);
    ef::linear_into(device, y, x, w16, bias);
    ef::linear_into(device, y, x, w8);
    ef::linear_backward_input_into(device, grad_x, y, weight);
    ef::linear_backward_weight_into(device, grad_weight, y, x);
    ef::linear_backward_bias_into(device, grad_bias, y);
  };
  EXPECT_GT(count_allocations(all), 0);
  EXPECT_EQ(count_allocations(all), 0);
}

TEST(LinearMemory, NothingAtAllWithAWorkspaceNorOnAnAwakePool) {
  const auto x = random_tensor<float, 2>({14, 90}, 1),
             weight = random_tensor<float, 2>({70, 90}, 2);
  const auto gate_up = ef::pack_gated_weight<ef::bfloat16>(weight, weight);
  const auto w8 = ef::pack_weight<std::int8_t>(weight),
             groups = ef::pack_weight<std::int8_t>(weight, {.group_size = 32});
  ef::Tensor<float, 2> y(14, 70);
  ef::Workspace workspace(std::size_t{16} << 20);
  const auto all = [&](const auto& device) {
    ef::linear_into(device, y, x, w8, workspace);
    ef::linear_into(device, y, x, groups, ef::Epilogue{}.gelu(), workspace);
    ef::linear_into(device, y, x, weight, workspace);
    ef::gated_linear_into(device, y, x, gate_up, ef::Epilogue{}.silu(), workspace);
  };
  const Eigen::DefaultDevice one;
  EXPECT_EQ(count_allocations([&] { all(one); }), 0);  // the first call already
  Threads threads(2);
  const ef::ParallelRegion region(threads.device, {.linger = std::chrono::seconds(5)});
  all(threads.device);  // wakes the threads
  EXPECT_EQ(count_allocations([&] { all(threads.device); }), 0);
}

TEST(LinearPacked, CopiesMovesAndRepacks) {
  const auto x = random_tensor<float, 2>({3, 20}, 1), first = random_tensor<float, 2>({33, 20}, 2),
             second = random_tensor<float, 2>({17, 20}, 3);
  ef::PackedWeight<float> packed = ef::pack_weight<float>(first);
  const ef::PackedWeight<float> copy = packed;
  EXPECT_EQ(copy.rows(), 33);
  EXPECT_EQ(copy.columns(), 20);
  ef::pack_weight_into(Eigen::DefaultDevice{}, packed, second);
  const ef::Tensor<float, 2> y1 = ef::linear(x, first), y2 = ef::linear(x, second);
  EXPECT_TRUE(same_bits(y1, ef::linear(x, copy)));
  EXPECT_TRUE(same_bits(y2, ef::linear(x, packed)));
  const ef::PackedWeight<float> moved = std::move(packed);
  EXPECT_TRUE(same_bits(y2, ef::linear(x, moved)));
  EXPECT_EQ(
      ef::linear(x, ef::PackedWeight<float>(ef::pack_weight<float>(ef::Tensor<float, 2>(0, 20))))
          .dimension(1),
      0);
}

TEST(LinearPacked, MovesAndCopiesKeepShapeAndMemoryTogether) {
  const auto weight = random_tensor<float, 2>({40, 30}, 1),
             small = random_tensor<float, 2>({3, 30}, 2);
  const auto x = random_tensor<float, 2>({2, 30}, 3);
  auto packed = ef::pack_weight<std::int8_t>(weight);
  const auto copy = packed;
  const ef::Tensor<float, 2> expected = ef::linear(x, copy);
  auto moved = std::move(packed);
  EXPECT_EQ(packed.rows(), 0);  // NOLINT(bugprone-use-after-move): what is left is an empty weight
  EXPECT_TRUE(same_bits(ef::linear(x, moved), expected));
  packed = ef::pack_weight<std::int8_t>(small);
  packed = copy;
  EXPECT_TRUE(same_bits(ef::linear(x, packed), expected));
  ef::pack_weight_into(Eigen::DefaultDevice{}, packed, small, {.group_size = 32});
  // the same memory, from groups back to rows
  ef::pack_weight_into(Eigen::DefaultDevice{}, packed, weight);
  EXPECT_EQ(packed.group_size(), 0);
  EXPECT_TRUE(same_bits(ef::linear(x, packed), expected));
}

TEST(LinearPacked, AWeightThatCannotBeQuantizedChangesNothing) {
  const auto x = random_tensor<float, 2>({2, 30}, 1);
  auto packed = ef::pack_weight<std::int8_t>(random_tensor<float, 2>({40, 30}, 2));
  const ef::Tensor<float, 2> expected = ef::linear(x, packed);
  for (Index rows : {3, 400}) {  // within the memory of `packed`, and past it
    auto bad = random_tensor<float, 2>({rows, 30}, 3);
    bad(rows - 1, 7) = std::numeric_limits<float>::quiet_NaN();
    EXPECT_THROW(ef::pack_weight_into(Eigen::DefaultDevice{}, packed, bad), std::invalid_argument);
    EXPECT_THROW(ef::pack_stacked_weight_into(Eigen::DefaultDevice{}, packed,
                                              std::array{ef::input_view<2>(bad)}),
                 std::invalid_argument);
    EXPECT_TRUE(same_bits(ef::linear(x, packed), expected));
  }
}

TEST(LinearContract, CallsCompileAsWritten) {
  Threads threads(2);
  const auto& device = threads.device;
  const auto weight = random_tensor<float, 2>({24, 16}, 1);
  const auto bias = random_tensor<float, 1>({24}, 2);
  const auto check = [&](const auto& x, auto& y) {
    ef::PackedWeight<Eigen::bfloat16> w = ef::pack_weight<Eigen::bfloat16>(weight);
    ef::PackedWeight<std::int8_t> w8 = ef::pack_weight<std::int8_t>(weight);
    ef::PackedWeight<float> w32 = ef::pack_weight<float>(device, weight);
    ef::Tensor<float, 2> y3 = ef::linear(device, x, w8, bias);
    ef::linear_into(device, y, x, w8);
    ef::linear_into(device, y, x, w8, bias);
    EXPECT_LE(relative_error(y, to_double(y3)), 1e-2);
    y3 = ef::linear(device, x, w32, bias);
    EXPECT_LE(relative_error(ef::Tensor<float, 2>(ef::linear(device, x, w, bias)), to_double(y3)),
              1e-2);
    y3 = ef::linear(x, w8);
  };
  const auto x = random_tensor<float, 2>({3, 16}, 3);
  const auto x16 = random_tensor<Eigen::bfloat16, 2>({3, 16}, 3);
  ef::Tensor<float, 2> y(3, 24);
  ef::Tensor<Eigen::bfloat16, 2> y16(3, 24);
  check(x, y);
  check(x, y16);
  check(x16, y);
  check(x16, y16);
  ef::Tensor<float, 2> y2 = ef::linear(x, weight, bias);
  EXPECT_LE(relative_error(
                y2, ef::reference::linear(to_double(x), to_double(weight), to_double(bias).data())),
            1e-5);
  ef::Tensor<Eigen::bfloat16, 2> narrow = ef::linear(x16, weight, bias);
  EXPECT_LE(relative_error(narrow, to_double(y2)), 1e-2);
}

}  // namespace
