// Laws: a row's bits do not depend on its neighbours, blocks, threads, shards or packing; memory
// around the operands is neither read nor written. A program of its own, since it has the layer's
// threads, which the thread sanitizer watches.
#include <eigenformer/linear.h>

#include <thread>

#include "linear_support.h"

using namespace eigenformer_test;

namespace {

template <typename Weight, typename X>
void expect_rows_alone(const ef::Tensor<X, 2>& x, Index out) {
  for_each_product_isa([&](auto isa) {
    const Index in = x.dimension(1);
    auto packed = pack_for(isa, random_tensor<float, 2>({out, in}, 3), Weight{});
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
  // more than a block of rows, of k and of panels
  expect_blocks_and_threads<float, float>(400, 1201, 300);
  expect_blocks_and_threads<ef::bfloat16, ef::bfloat16>(400, 2401, 300);
  expect_blocks_and_threads<ef::half, ef::half>(100, 1201, 300);
  expect_blocks_and_threads<float, std::int8_t>(400, 4802, 300);
  // fewer panels than threads: rows are shared out
  expect_blocks_and_threads<float, float>(100, 301, 20);
  expect_blocks_and_threads<float, float>(1, 4000, 600);
  expect_blocks_and_threads<float, std::int8_t>(3, 4000, 600);
}

// Outputs of more than 4 MiB are written around the caches where every row starts at a
// line.
TEST(LinearBits, DoNotDependOnTheSizeOfTheOutput) {
  const Index tokens = 1100, in = 40;
  for (Index out : {Index{1024}, Index{1023}}) {
    ASSERT_GT(tokens * out * Index{sizeof(float)}, Index{4} << 20);
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

template <typename Weight, typename X>
void expect_blocks_and_threads_of_isa(Index in) {
  // more rows than a block of AMX has, more of k than a block of any ISA
  const Index tokens = 140, out = 40;
  const auto x = random_tensor<X, 2>({tokens, in}, 1);
  const auto weight = random_tensor<float, 2>({out, in}, 2);
  for_each_product_isa([&](auto isa) {
    using Isa = decltype(isa);
    const auto packed = pack_for(isa, weight, Weight{});
    const auto y = linear_by<Isa, float>(isa, x, packed, out, ef::Epilogue{});
    for (Index t : {0, 15, 16, 31, 32, 127, 128, 139}) {
      const ef::Tensor<X, 2> row = ef::TensorView<const X, 2>(x.data() + t * in, 1, in);
      const auto alone = linear_by<Isa, float>(isa, row, packed, out, ef::Epilogue{});
      for (Index o = 0; o < out; ++o)
        ASSERT_EQ(alone(0, o), y(t, o)) << isa.name << " " << t << " " << o;
    }
    Threads threads(2);
    auto other = poisoned_tensor<float, 2>({tokens, out});
    ef::linear_into(ef::cpu::backend(threads.device, isa), other, x, packed);
    ASSERT_TRUE(same_bits(y, other)) << isa.name;
  });
}

TEST(LinearBits, DoNotDependOnBlocksOrThreadsOnAnyIsa) {
  expect_blocks_and_threads_of_isa<ef::bfloat16, ef::bfloat16>(2100);
  expect_blocks_and_threads_of_isa<std::int8_t, float>(4200);
  expect_blocks_and_threads_of_isa<float, float>(1200);
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

TEST(LinearAmx, IsWhatTheTagRuns) {
#if defined(EIGENFORMER_ISA_AMX)
  provide_amx();
  const auto before = amx_emulated_instructions();
  const auto weight = random_tensor<float, 2>({33, 70}, 1);
  const ef::Tensor<ef::bfloat16, 2> x = random_tensor<ef::bfloat16, 2>({3, 70}, 2);
  linear_by<ef::isa::amx, float>(
      ef::isa::amx{}, x, pack_for(ef::isa::amx{}, weight, ef::bfloat16{}), 33, ef::Epilogue{});
  const auto between = amx_emulated_instructions();
  linear_by<ef::isa::amx, float>(ef::isa::amx{}, x, pack_for(ef::isa::amx{}, weight, std::int8_t{}),
                                 33, ef::Epilogue{});
  EXPECT_TRUE(amx_in_hardware() || (between > before && amx_emulated_instructions() > between));
#else
  GTEST_SKIP() << "this build has no AMX kernels";
#endif
}

}  // namespace
