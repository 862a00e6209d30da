// Linear layers on a GPU, emulated or not, against the double reference; a token has the same bits
// alone, in every batch, and with plain or packed weights.
#include <eigenformer/linear.h>
#include <eigenformer/reference/linear.h>
#include <eigenformer/cuda/tile/product.cuh>

#include "device.h"

using namespace eigenformer_test;

namespace {

struct Shape {
  Index tokens, in, out;
};

std::string text_of(const Shape& s) {
  return std::to_string(s.tokens) + " tokens, " + std::to_string(s.in) + " -> " +
         std::to_string(s.out);
}

/// Around warps, tiles of 8 tokens and of 16 and 64 rows, segments of 512 inputs and rounds of 8.
const std::vector<Shape> kShapes{{0, 8, 8},    {3, 8, 0},     {1, 0, 5},     {1, 1, 1},
                                 {1, 31, 17},  {2, 33, 16},   {8, 64, 15},   {9, 136, 33},
                                 {33, 72, 65}, {40, 257, 31}, {1, 1032, 20}, {9, 4200, 3}};

/// The product in double of what is multiplied: bfloat16 tokens round a plain float weight.
template <typename X, typename W>
ef::Tensor<double, 2> product(const ef::Tensor<X, 2>& x, const ef::Tensor<W, 2>& weight,
                              const double* bias = nullptr) {
  auto w = to_double(weight);
  if constexpr (std::is_same_v<X, ef::bfloat16> && std::is_same_v<W, float>)
    for (Index i = 0; i < w.size(); ++i)
      w.data()[i] = static_cast<double>(static_cast<ef::bfloat16>(weight.data()[i]));
  return ef::reference::linear(to_double(x), w, bias);
}

/// S: of the packed weight.
template <typename Y, typename X, typename W, typename S>
void check(const Shape& s) {
  const auto x = random_tensor<X, 2>({s.tokens, s.in}, 1);
  const auto weight = random_tensor<W, 2>({s.out, s.in}, 2);
  const auto bias = random_tensor<float, 1>({s.out}, 3);
  const auto expected = product(x, weight, to_double(bias).data());
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, poisoned_tensor<Y, 2>({s.tokens, s.out}));
    ef::linear_into(bench.device, y.view(), device_x.cview(), device_weight.cview(),
                    device_bias.cview());
    const auto plain = y.host();
    EXPECT_TRUE(within(plain, expected, tolerance<Y>(), 4 * tolerance<Y>())) << text_of(s);
    const auto packed = ef::pack_weight<S>(bench.device, device_weight.cview());
    auto z = on_device(bench, poisoned_tensor<Y, 2>({s.tokens, s.out}));
    ef::linear_into(bench.device, z.view(), device_x.cview(), packed, device_bias.cview());
    EXPECT_TRUE(same_bits(z.host(), plain)) << "packed, " << text_of(s);
  });
}

TEST(LinearOnDevice, EqualsTheReference) {
  for (const Shape& s : kShapes) {
    check<float, float, float, float>(s);
    check<float, ef::bfloat16, ef::bfloat16, ef::bfloat16>(s);
    check<ef::half, ef::half, ef::half, ef::half>(s);
  }
  check<float, ef::bfloat16, ef::bfloat16, ef::bfloat16>({600, 8, 65});  // a band, and the next
}

TEST(LinearOnDevice, EqualsTheReferenceOfMixedScalars) {
  for (const Shape& s : {Shape{1, 31, 17}, Shape{9, 136, 33}, Shape{33, 72, 65}}) {
    check<double, double, double, double>(s);
    check<ef::bfloat16, ef::bfloat16, float, ef::bfloat16>(s);  // rounded first
    check<float, float, ef::bfloat16, ef::bfloat16>(s);
  }
}

/// y = h + gelu(x w^T + b), where h is y itself.
template <typename T>
void check_epilogue(const Shape& s) {
  const auto x = random_tensor<T, 2>({s.tokens, s.in}, 4);
  const auto weight = random_tensor<T, 2>({s.out, s.in}, 5, 0.3);
  const auto bias = random_tensor<T, 1>({s.out}, 6);
  const auto residual = random_tensor<float, 2>({s.tokens, s.out}, 7);
  auto expected = product(x, weight, to_double(bias).data());
  for (Index i = 0; i < expected.size(); ++i) {
    const double sum = expected.data()[i];
    expected.data()[i] = residual.data()[i] + sum * 0.5 * std::erfc(-sum * std::sqrt(0.5));
  }
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto device_bias = on_device(bench, bias);
    auto y = on_device(bench, residual);
    ef::linear_into(bench.device, y.view(), device_x.cview(), device_weight.cview(),
                    ef::Epilogue{}.bias(device_bias.cview()).gelu().residual(y.cview()));
    EXPECT_TRUE(within(y.host(), expected, tolerance<float>(), 1e-4)) << text_of(s);
  });
}

TEST(LinearOnDevice, BiasFunctionAndResidual) {
  for (const Shape& s : {Shape{1, 40, 17}, Shape{9, 33, 5}, Shape{35, 64, 20}}) {
    check_epilogue<float>(s);
    check_epilogue<ef::bfloat16>(s);
  }
}

/// silu(x gate^T + b0) * (x up^T + b1).
template <typename Y, typename T>
void check_gated(const Shape& s) {
  const auto x = random_tensor<T, 2>({s.tokens, s.in}, 8);
  const auto gate = random_tensor<T, 2>({s.out, s.in}, 9),
             up = random_tensor<T, 2>({s.out, s.in}, 10);
  const auto bias = random_tensor<float, 1>({2 * s.out}, 11);
  const auto both = to_double(bias);
  auto expected = product(x, gate, both.data());
  const auto other = product(x, up, both.data() + s.out);
  for (Index i = 0; i < expected.size(); ++i)
    expected.data()[i] *= other.data()[i] / (1 + std::exp(-expected.data()[i]));
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_gate = on_device(bench, gate), device_up = on_device(bench, up);
    auto device_bias = on_device(bench, bias);
    const auto epilogue = ef::Epilogue{}.bias(device_bias.cview()).silu();
    auto y = on_device(bench, poisoned_tensor<Y, 2>({s.tokens, s.out}));
    ef::gated_linear_into(bench.device, y.view(), device_x.cview(), device_gate.cview(),
                          device_up.cview(), epilogue);
    const auto plain = y.host();
    EXPECT_TRUE(within(plain, expected, 2 * tolerance<Y>(), 8 * tolerance<Y>())) << text_of(s);
    const auto packed =
        ef::pack_gated_weight<T>(bench.device, device_gate.cview(), device_up.cview());
    auto z = on_device(bench, poisoned_tensor<Y, 2>({s.tokens, s.out}));
    ef::gated_linear_into(bench.device, z.view(), device_x.cview(), packed, epilogue);
    EXPECT_TRUE(same_bits(z.host(), plain)) << "packed, " << text_of(s);
  });
}

TEST(LinearOnDevice, GatedPairs) {
  for (const Shape& s :
       {Shape{0, 8, 8}, Shape{1, 40, 1}, Shape{1, 33, 17}, Shape{9, 600, 9}, Shape{35, 72, 33}}) {
    check_gated<float, float>(s);
    check_gated<ef::bfloat16, ef::bfloat16>(s);
    check_gated<float, ef::half>(s);
  }
}

/// Tokens [first, first + count) and rows [0, rows) of the layer alone; x, y and the weight begin
/// `shift` elements after a multiple of 16 bytes, and around them are NaN.
template <typename B, typename T>
ef::Tensor<float, 2> part_of(const B& bench, const ef::Tensor<T, 2>& x,
                             const ef::Tensor<T, 2>& weight, Index first, Index count, Index rows,
                             Index shift) {
  const Index in = x.dimension(1);
  auto tokens = poisoned_tensor<T, 1>({shift + count * in + 8}),
       weights = poisoned_tensor<T, 1>({shift + rows * in + 8});
  std::copy_n(x.data() + first * in, count * in, tokens.data() + shift);
  std::copy_n(weight.data(), rows * in, weights.data() + shift);
  auto device_tokens = on_device(bench, tokens);
  auto device_weights = on_device(bench, weights);
  auto y = on_device(bench, poisoned_tensor<float, 1>({shift + count * rows + 8}));
  ef::linear_into(bench.device, ef::TensorView<float, 2>(y.view().data() + shift, count, rows),
                  ef::TensorView<const T, 2>(device_tokens.cview().data() + shift, count, in),
                  ef::TensorView<const T, 2>(device_weights.cview().data() + shift, rows, in));
  const auto written = y.host();
  for (Index i = 0; i < written.size(); ++i)
    EXPECT_EQ(std::isnan(written(i)), i < shift || i >= shift + count * rows) << i;
  ef::Tensor<float, 2> part(count, rows);
  std::copy_n(written.data() + shift, part.size(), part.data());
  return part;
}

template <typename T>
void check_bits(Index tokens, Index in, Index out) {
  const auto x = random_tensor<T, 2>({tokens, in}, 12);
  const auto weight = random_tensor<T, 2>({out, in}, 13);
  for_each_gpu([&](const auto& bench) {
    const auto all = part_of(bench, x, weight, 0, tokens, out, 0);
    for (const Index count : {Index{1}, Index{3}, Index{9}, Index{34}})
      for (const Index shift : {0, 1}) {
        const Index rows = out - count % 3, first = (std::min)(count, tokens - count);
        const auto part = part_of(bench, x, weight, first, count, rows, shift);
        for (Index t = 0; t < count; ++t)
          for (Index o = 0; o < rows; ++o)
            ASSERT_EQ(part(t, o), all(first + t, o))
                << "token " << first + t << " of " << tokens << " among " << count << ", row " << o;
      }
  });
}

TEST(LinearOnDevice, BitsDependOnTheTokenAndTheRowAlone) {
  check_bits<float>(66, 264, 21);
  check_bits<ef::bfloat16>(66, 1064, 21);  // 3 segments, the last one short
  check_bits<ef::bfloat16>(66, 523, 21);
}

/// Sums as they are.
struct Store {
  float* y;
  Index out;
  EIGENFORMER_DEVICE void store(Index token, Index row, const float (&sums)[1]) const {
    y[token * out + row] = sums[0];
  }
};

/// The tiles that only large layers take, on a few of them. The kernel is launched as
/// cuda/tile/product.cuh does it: what is as large takes an emulator too long.
TEST(LinearOnDevice, LargeTilesHaveTheBitsOfSmallOnes) {
  using T = ef::bfloat16;
  const Index tokens = 130, in = 520, out = 133;
  const auto x = random_tensor<T, 2>({tokens, in}, 14);
  const auto weight = random_tensor<T, 2>({out, in}, 15);
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto expected = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    ef::linear_into(bench.device, expected.view(), device_x.cview(), device_weight.cview());
    const auto kernel = ef::cuda::tiles_kernel<ef::cuda::LargeTiles<T>>(
        ef::cuda::Operand<T, T>{{device_weight.cview().data()}, out, in, in, true},
        ef::cuda::Operand<T, T>{{device_x.cview().data()}, tokens, in, in, true},
        Store{y.view().data(), out});
    EXPECT_LE(kernel.shared(), std::size_t{99} * 1024);  // of the smallest device
    launch(ef::cuda::Backend<std::remove_cvref_t<decltype(bench.device)>>{bench.device}, "linear",
           3, kernel.kThreads, kernel.shared(), kernel);
    EXPECT_TRUE(same_bits(y.host(), expected.host()));
  });
}

/// NaN in one token, or in one row of the weight, is in its own outputs alone.
template <typename T>
void check_nan(Index tokens) {
  const Index in = 40, out = 20;
  auto x = random_tensor<T, 2>({tokens, in}, 16);
  auto weight = random_tensor<T, 2>({out, in}, 17);
  const Index token = tokens - 1, row = out - 1;  // those that stand in for what is past the end
  x(token, in - 1) = std::numeric_limits<T>::quiet_NaN();
  weight(row, 0) = std::numeric_limits<T>::quiet_NaN();
  for_each_gpu([&](const auto& bench) {
    auto device_x = on_device(bench, x);
    auto device_weight = on_device(bench, weight);
    auto y = on_device(bench, poisoned_tensor<float, 2>({tokens, out}));
    ef::linear_into(bench.device, y.view(), device_x.cview(), device_weight.cview());
    const auto found = y.host();
    for (Index t = 0; t < tokens; ++t)
      for (Index o = 0; o < out; ++o)
        ASSERT_EQ(std::isnan(found(t, o)), t == token || o == row) << t << ' ' << o;
  });
}

TEST(LinearOnDevice, NanStaysWithItsTokenAndItsRow) {
  for (const Index tokens : {2, 9, 33}) {
    check_nan<float>(tokens);
    check_nan<ef::bfloat16>(tokens);
  }
}

#if defined(EIGENFORMER_TEST_BLOCKS)
TEST(LinearOnDevice, RefusesAWeightPackedOnTheHost) {
  const EmulatedBench bench{{emulated::Stream()}, {}};
  const auto packed = ef::pack_weight<float>(random_tensor<float, 2>({4, 8}, 18));
  auto x = on_device(bench, random_tensor<float, 2>({2, 8}, 19));
  auto y = on_device(bench, poisoned_tensor<float, 2>({2, 4}));
  expect_throws<std::invalid_argument>(
      [&] { ef::linear_into(bench.device, y.view(), x.cview(), packed); },
      {"linear: weight was packed for cpu", "pack it there"});
  EXPECT_TRUE(same_bits(y.host(), poisoned_tensor<float, 2>({2, 4})));
}

/// A decoder's two products of a token, recorded once and run again on another token.
TEST(LinearOnDevice, CanBeCapturedIntoAGraph) {
  const EmulatedBench bench{{emulated::Stream({.seed = 5, .deferred = true})}, {}};
  const auto weight = random_tensor<ef::bfloat16, 2>({24, 40}, 20);
  const auto first = random_tensor<ef::bfloat16, 2>({1, 40}, 21),
             second = random_tensor<ef::bfloat16, 2>({1, 40}, 22);
  auto device_weight = on_device(bench, weight);
  auto x = on_device(bench, first), other = on_device(bench, second);
  auto hidden = on_device(bench, poisoned_tensor<ef::bfloat16, 2>({1, 24}));
  auto y = on_device(bench, poisoned_tensor<float, 2>({1, 24}));
  const auto gate_up = ef::pack_gated_weight<ef::bfloat16>(bench.device, device_weight.cview(),
                                                           device_weight.cview());
  const auto down = ef::pack_weight<ef::bfloat16>(
      bench.device, ef::TensorView<const ef::bfloat16, 2>(device_weight.cview().data(), 24, 24));
  const auto step = [&](const auto& input) {
    ef::gated_linear_into(bench.device, hidden.view(), input.cview(), gate_up,
                          ef::Epilogue{}.silu());
    ef::linear_into(bench.device, y.view(), hidden.cview(), down);
  };
  step(other);
  const auto expected = y.host();
  auto& stream = bench.device.stream();
  const auto before = emulated::DeviceMemory::instance().allocations();
  stream.begin_capture();
  step(x);
  const auto graph = stream.end_capture();
  bench.to_device(x.view().data(), second.data(), second.size());
  stream.replay(graph);
  EXPECT_TRUE(same_bits(y.host(), expected));
  EXPECT_EQ(emulated::DeviceMemory::instance().allocations(), before);
}
#endif

}  // namespace
