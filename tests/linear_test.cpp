// Laws: equal to the plain definition for every pair of scalars, tail and ISA; a row's bits do not
// depend on its neighbours, threads, shards or packing; nothing is allocated twice; refuses what
// does not fit. Gradients, epilogues, pairs and groups have headers of their own.
#include <eigenformer/linear.h>
#include <eigenformer/parallel_region.h>
#include <eigenformer/reference/linear.h>

#include <thread>

#include "allocations.h"
#include "compare.h"
#include "linear_backward_cases.h"
#include "linear_fused_cases.h"

using namespace eigenformer_test;

namespace {

template <typename X, typename W>
struct Pair {
  using Activation = X;
  using Weight = W;
};
template <typename P>
class Linear : public ::testing::Test {};
using Pairs =
    ::testing::Types<Pair<float, float>, Pair<double, double>, Pair<ef::bfloat16, ef::bfloat16>,
                     Pair<ef::half, ef::half>, Pair<float, ef::bfloat16>, Pair<float, ef::half>,
                     Pair<ef::bfloat16, float>, Pair<ef::half, float>>;
TYPED_TEST_SUITE(Linear, Pairs);

template <typename Isa, typename X, typename Weight>
ef::Tensor<X, 2> run(Isa isa, const ef::Tensor<X, 2>& x, const Weight& weight, Index out,
                     const ef::Tensor<float, 1>* bias = nullptr) {
  auto y = poisoned_tensor<X, 2>({x.dimension(0), out});
  const ef::Epilogue<> epilogue = bias == nullptr ? ef::Epilogue{} : ef::Epilogue{}.bias(*bias);
  ef::linear_into(on(isa), y, x, weight, epilogue);
  return y;
}

template <typename T, typename Isa, typename W>
ef::PackedWeight<T> packed_for(Isa isa, const ef::Tensor<W, 2>& weight) {
  return ef::pack_weight<T>(on(isa), weight);
}

/// What a plain weight is packed as, to compare with.
template <typename X, typename W>
using Packing = std::conditional_t<std::is_same_v<X, ef::bfloat16>, ef::bfloat16, W>;

TYPED_TEST(Linear, EqualsItsDefinitionAtEveryTail) {
  using X = typename TypeParam::Activation;
  using W = typename TypeParam::Weight;
  constexpr double allowed = std::max(tolerance<X>(), std::is_same_v<X, ef::bfloat16> ? 1e-2 : 0.0);
  unsigned seed = 1;
  for (Index in : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130})
    for (Index out : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
      const Index tokens = seed % 30 == 0 ? 0 : 1 + seed % 29;
      const auto x = random_tensor<X, 2>({tokens, in}, ++seed);
      const auto weight = random_tensor<W, 2>({out, in}, ++seed);
      const auto bias = random_tensor<float, 1>({out}, ++seed);
      const auto wide_bias = to_double(bias);
      const auto expected =
          ef::reference::linear(to_double(x), to_double(weight), wide_bias.data());
      for_each_isa([&](auto isa) {
        const auto y = run(isa, x, weight, out, &bias);
        ASSERT_LE(relative_error(y, expected), allowed)
            << isa.name << " " << tokens << " x " << in << " x " << out;
        const auto packed = packed_for<Packing<X, W>>(isa, weight);
        ASSERT_TRUE(same_bits(y, run(isa, x, packed, out, &bias)))
            << isa.name << " " << tokens << " x " << in << " x " << out;
        ASSERT_TRUE(same_bits(run(isa, x, weight, out), run(isa, x, packed, out)))
            << isa.name << " without bias";
      });
    }
}

// Blocks of k are 256, 512 or 1024 steps of 1, 2 or 4 inputs: sizes around each, whose last block
// is one element.
TYPED_TEST(Linear, EqualsItsDefinitionAroundEveryBlock) {
  using X = typename TypeParam::Activation;
  using W = typename TypeParam::Weight;
  constexpr double allowed = std::max(tolerance<X>(), std::is_same_v<X, ef::bfloat16> ? 1e-2 : 0.0);
  for (Index block : {32, 128, 256, 512, 1024, 2048, 4096})
    for (Index in : {block - 1, block, block + 1, block + 2})
      for (Index tokens : {1, 13}) {
        constexpr Index out = 9;
        auto x = random_tensor<X, 2>({tokens, in}, 71);
        auto weight = random_tensor<W, 2>({out, in}, 72);
        // The last input outweighs the others together: without it nothing is right.
        for (Index t = 0; t < tokens; ++t) x(t, in - 1) = X(8);
        for (Index o = 0; o < out; ++o) weight(o, in - 1) = W(static_cast<float>(8 + o));
        const auto expected = ef::reference::linear(to_double(x), to_double(weight));
        for_each_isa([&](auto isa) {
          ASSERT_LE(relative_error(run(isa, x, weight, out), expected), allowed)
              << isa.name << " " << tokens << " x " << in;
          ASSERT_LE(
              relative_error(run(isa, x, packed_for<Packing<X, W>>(isa, weight), out), expected),
              allowed)
              << isa.name << " packed " << tokens << " x " << in;
        });
      }
}

template <typename Weight, typename X>
void expect_rows_alone(const ef::Tensor<X, 2>& x, Index out) {
  for_each_isa([&](auto isa) {
    const Index in = x.dimension(1);
    auto packed = packed_for<Weight>(isa, random_tensor<float, 2>({out, in}, 3));
    ef::Tensor<X, 2> alone(x.dimension(0), out);
    for (Index t = 0; t < x.dimension(0); ++t) {
      const ef::Tensor<X, 2> row = rows_of(x, t, 1);
      const auto y = run(isa, row, packed, out);
      std::copy_n(y.data(), out, alone.data() + t * out);
    }
    for (Index tokens = 1; tokens <= x.dimension(0); ++tokens) {
      const ef::Tensor<X, 2> batch = rows_of(x, 0, tokens);
      const ef::Tensor<X, 2> expected = rows_of(alone, 0, tokens);
      ASSERT_TRUE(same_bits(run(isa, batch, packed, out), expected)) << isa.name << " " << tokens;
    }
  });
}

TEST(LinearBits, OfARowDoNotDependOnItsBatch) {
  expect_rows_alone<float>(random_tensor<float, 2>({70, 301}, 1), 70);
  expect_rows_alone<ef::bfloat16>(random_tensor<ef::bfloat16, 2>({70, 301}, 1), 70);
  expect_rows_alone<ef::bfloat16>(random_tensor<float, 2>({70, 301}, 1), 70);
  expect_rows_alone<ef::half>(random_tensor<ef::half, 2>({70, 301}, 1), 70);
  expect_rows_alone<std::int8_t>(random_tensor<float, 2>({70, 301}, 1), 70);
  expect_rows_alone<std::int8_t>(random_tensor<ef::bfloat16, 2>({70, 301}, 1), 70);
  expect_rows_alone<double>(random_tensor<double, 2>({20, 301}, 1), 70);
}

template <typename X, typename T>
void expect_blocks_and_threads(Index tokens, Index in, Index out) {
  const auto x = random_tensor<X, 2>({tokens, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  const auto packed = ef::pack_weight<T>(weight);
  ef::Tensor<X, 2> y(tokens, out);
  ef::linear_into(Eigen::DefaultDevice{}, y, x, packed);
  for (Index t : {Index{0}, tokens / 2, tokens - 1}) {
    const ef::Tensor<X, 2> row = rows_of(x, t, 1), expected = rows_of(y, t, 1);
    ef::Tensor<X, 2> alone(1, out);
    ef::linear_into(Eigen::DefaultDevice{}, alone, row, packed);
    ASSERT_TRUE(same_bits(alone, expected)) << t;
  }
  for (int count : {1, 2, 3}) {
    Threads threads(count);
    auto other = poisoned_tensor<X, 2>({tokens, out});
    ef::linear_into(threads.device, other, x, packed);
    ASSERT_TRUE(same_bits(y, other)) << count << " threads";
    ef::PackedWeight<T> repacked;
    ef::pack_weight_into(threads.device, repacked, weight);
    ASSERT_EQ(
        0, std::memcmp(packed.data(), repacked.data(), static_cast<std::size_t>(packed.bytes())));
    if constexpr (std::is_same_v<X, T>) {
      other.setZero();
      ef::linear_into(threads.device, other, x, weight);
      if (std::is_same_v<T, float> || std::is_same_v<T, ef::bfloat16>) {
        ASSERT_TRUE(same_bits(y, other)) << count << " threads, plain";
      }
    }
  }
}

TEST(LinearBits, DoNotDependOnBlocksOrThreads) {
  expect_blocks_and_threads<float, float>(400, 1201,
                                          300);  // more than a block of rows, of k and of panels
  expect_blocks_and_threads<ef::bfloat16, ef::bfloat16>(400, 2401, 300);
  expect_blocks_and_threads<ef::half, ef::half>(100, 1201, 300);
  expect_blocks_and_threads<float, std::int8_t>(400, 4802, 300);
  expect_blocks_and_threads<float, float>(100, 301,
                                          20);  // fewer panels than threads: rows are shared out
  expect_blocks_and_threads<float, float>(1, 4000, 600);
  expect_blocks_and_threads<float, std::int8_t>(3, 4000, 600);
}

// Outputs of more than 4 MiB are written around the caches where every row starts at a
// line.
TEST(LinearBits, DoNotDependOnTheSizeOfTheOutput) {
  const Index tokens = 1100, in = 40;
  for (Index out : {Index{1024}, Index{1023}}) {
    ASSERT_GT(tokens * out * Index{sizeof(float)},
              ef::cpu::streaming_threshold(ef::cpu::ReadsBeside::operands));
    const auto x = random_tensor<float, 2>({tokens, in}, 1);
    const auto weight = random_tensor<float, 2>({out, in}, 2),
               residual = random_tensor<float, 2>({tokens, out}, 3);
    const auto packed = ef::pack_weight<std::int8_t>(weight);
    const auto check = [&](const auto& w, const auto& end_of) {
      Threads threads(2);
      auto whole = poisoned_tensor<float, 2>({tokens, out});
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(whole.data()) % 64, 0u);
      ef::linear_into(threads.device, whole, x, w, end_of(0, tokens));
      for (Index first = 0; first < tokens; first += 100) {
        auto part = poisoned_tensor<float, 2>({100, out});
        ef::linear_into(Eigen::DefaultDevice{}, part, rows_of(x, first, 100), w,
                        end_of(first, 100));
        ASSERT_TRUE(same_bits(part, rows_of(whole, first, 100)))
            << out << " columns, row " << first;
      }
    };
    const auto plain = [](Index, Index) { return ef::Epilogue{}; };
    check(weight, plain);
    check(packed, plain);
    check(weight, [&](Index first, Index count) {
      return ef::Epilogue{}.residual(rows_of(residual, first, count));
    });
  }
}

TEST(LinearBits, DoNotDependOnTheShard) {
  const Index out = 40, in = 37;
  const auto weight = random_tensor<float, 2>({out, in}, 1);
  const auto x = random_tensor<float, 2>({5, in}, 2);
  const auto check = [&](auto scalar) {
    using T = decltype(scalar);
    const ef::Tensor<float, 2> whole = ef::linear(x, ef::pack_weight<T>(weight));
    for (Index split = 0; split <= out; ++split)
      for (const auto& [first, count] :
           {std::pair{Index{0}, split}, std::pair{split, out - split}}) {
        const ef::Tensor<float, 2> part =
            ef::linear(x, ef::pack_weight<T>(rows_of(weight, first, count)));
        for (Index t = 0; t < 5; ++t)
          for (Index o = 0; o < count; ++o) ASSERT_EQ(part(t, o), whole(t, first + o)) << split;
      }
  };
  check(float{});
  check(ef::bfloat16{});
  check(ef::half{});
  check(std::int8_t{});
}

TEST(LinearBits, NothingOutsideIsReadOrWritten) {
  const Index tokens = 5, in = 19, out = 21;
  for (Index shift : {0, 1, 3, 5}) {
    auto x_memory = poisoned_tensor<float, 1>({tokens * in + 64});
    auto w_memory = poisoned_tensor<float, 1>({out * in + 64});
    auto y_memory = poisoned_tensor<float, 1>({tokens * out + 64});
    const auto x = random_tensor<float, 2>({tokens, in}, 1),
               weight = random_tensor<float, 2>({out, in}, 2);
    std::copy_n(x.data(), x.size(), x_memory.data() + shift);
    std::copy_n(weight.data(), weight.size(), w_memory.data() + shift);
    ef::TensorView<float, 2> y(y_memory.data() + shift, tokens, out);
    ef::linear_into(Eigen::DefaultDevice{}, y,
                    ef::TensorView<const float, 2>(x_memory.data() + shift, tokens, in),
                    ef::TensorView<const float, 2>(w_memory.data() + shift, out, in));
    ASSERT_TRUE(same_bits(y, ef::linear(x, weight)));
    for (Index i = 0; i < y_memory.size(); ++i)
      ASSERT_EQ(std::isnan(y_memory(i)), i < shift || i >= shift + tokens * out) << i;
  }
}

TEST(LinearInt8, SumsAreExactToTheLimit) {
  const Index in =
      ef::detail::kLargestInt8Depth;  // 128 times the sum of these activations leaves 32 bits
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
  auto x = random_tensor<float, 2>({14, 50}, 1);
  const auto packed = ef::pack_weight<std::int8_t>(random_tensor<float, 2>({40, 50}, 2));
  const ef::Tensor<float, 2> before = ef::linear(x, packed);
  x(3, 7) = std::numeric_limits<float>::quiet_NaN();
  x(12, 49) = -std::numeric_limits<float>::infinity();
  const ef::Tensor<float, 2> after = ef::linear(x, packed);
  for (Index t = 0; t < 14; ++t)
    for (Index o = 0; o < 40; ++o) {
      if (t == 3 || t == 12)
        ASSERT_TRUE(std::isnan(after(t, o)));
      else
        ASSERT_EQ(after(t, o), before(t, o));
    }
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

TEST(LinearMemory, ManyThreadsAtOnce) {
  const auto x = random_tensor<float, 2>({9, 64}, 1), weight = random_tensor<float, 2>({50, 64}, 2);
  const auto packed = ef::pack_weight<float>(weight);
  const ef::Tensor<float, 2> expected = ef::linear(x, packed);
  std::vector<ef::Tensor<float, 2>> results(4);
  std::vector<std::thread> callers;
  for (auto& result : results) callers.emplace_back([&] { result = ef::linear(x, packed); });
  for (auto& caller : callers) caller.join();
  for (const auto& result : results) EXPECT_TRUE(same_bits(result, expected));
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
  ef::Tensor<float, 2> deep(1, ef::detail::kLargestInt8Depth + 1);
  deep.setZero();
  expect_throws<std::invalid_argument>([&] { ef::pack_weight<std::int8_t>(deep); },
                                       {"pack_weight", "133145", "133144"});

  if constexpr (!std::is_same_v<ef::isa::best, ef::isa::generic>) {
    const auto foreign = packed_for<float>(ef::isa::generic{}, good);
    const ef::Tensor<float, 2> eight = random_tensor<float, 2>({3, 8}, 2);
    expect_throws<std::invalid_argument>(
        [&] { ef::linear_into(device, y, eight, foreign); },
        {"generic", ef::pack_weight<float>(good).layout().isa.data(), "pack it again"});
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
