// Weights packed on a GPU, emulated or not: rows one below the other, filled up with zeros, with
// the values and scales that the CPU's quantization gives.
#include <eigenformer/linear.h>
#include <eigenformer/quantization.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
Index stride_of(Index columns) {
  const Index step = 16 / Index{sizeof(T)};
  return (columns + step - 1) / step * step;
}

/// What `count` numbers of a device's memory are.
template <typename B, typename T>
ef::Tensor<T, 1> numbers_of(const B& bench, const T* data, Index count) {
  ef::Tensor<T, 1> numbers(count);
  bench.to_host(numbers.data(), data, count);
  return numbers;
}

/// A packed weight holds `rows`, one below the other.
template <typename B, typename T>
void expect_rows(const B& bench, const ef::PackedWeight<T>& packed, const ef::Tensor<T, 2>& rows) {
  ASSERT_EQ(packed.rows(), rows.dimension(0));
  ASSERT_EQ(packed.columns(), rows.dimension(1));
  EXPECT_EQ(packed.layout().backend, "cuda");
  const Index stride = stride_of<T>(packed.columns());
  ASSERT_EQ(packed.bytes(), packed.rows() * stride * Index{sizeof(T)});
  const auto numbers = numbers_of(bench, packed.data(), packed.rows() * stride);
  ef::Tensor<T, 1> expected(numbers.size());
  for (Index r = 0; r < packed.rows(); ++r)
    for (Index j = 0; j < stride; ++j)
      expected(r * stride + j) = j < packed.columns() ? rows(r, j) : T(0);
  EXPECT_TRUE(same_bits(numbers, expected)) << packed.rows() << " x " << packed.columns();
}

template <typename B>
void expect_scales(const B& bench, const ef::PackedWeight<std::int8_t>& packed,
                   const ef::Tensor<float, 2>& scales) {
  const auto numbers = numbers_of(bench, packed.scales(), scales.size());
  EXPECT_TRUE(same_bits(numbers, ef::Tensor<float, 1>(scales.reshape(numbers.dimensions()))));
}

template <typename T, typename W>
ef::Tensor<T, 2> converted(const ef::Tensor<W, 2>& weight) {
  return weight.unaryExpr([](W w) { return static_cast<T>(static_cast<ef::compute_type<T>>(w)); });
}

template <typename T, int Rank>
ef::Tensor<T, 2> stacked(const std::array<ef::Tensor<T, 2>, Rank>& parts) {
  Index rows = 0;
  for (const auto& part : parts) rows += part.dimension(0);
  ef::Tensor<T, 2> all(rows, parts[0].dimension(1));
  T* to = all.data();
  for (const auto& part : parts) to = std::copy_n(part.data(), part.size(), to);
  return all;
}

template <typename T, typename W>
void check(Index rows, Index columns) {
  const auto first = random_tensor<W, 2>({rows, columns}, 1);
  const auto second = random_tensor<W, 2>({rows, columns}, 2);
  const auto third = random_tensor<W, 2>({rows + 2, columns}, 3);
  const std::array one{converted<T>(first), converted<T>(second), converted<T>(third)};
  for_each_gpu([&](const auto& bench) {
    auto a = on_device(bench, first), b = on_device(bench, second), c = on_device(bench, third);
    const auto packed = ef::pack_weight<T>(bench.device, a.cview());
    expect_rows(bench, packed, one[0]);
    expect_rows(bench, ef::PackedWeight<T>(packed), one[0]);  // a copy lies there too
    const auto pair = ef::pack_gated_weight<T>(bench.device, a.cview(), b.cview());
    expect_rows(bench, pair.pair(), stacked<T, 2>({one[0], one[1]}));
    const auto all =
        ef::pack_stacked_weight<T>(bench.device, std::array{a.cview(), b.cview(), c.cview()});
    expect_rows(bench, all, stacked<T, 3>(one));
  });
}

TEST(PackingOnDevice, PutsRowsOneBelowTheOther) {
  for (Index columns : {0, 1, 7, 8, 33, 256})
    for (Index rows : {0, 1, 3}) {
      check<float, float>(rows, columns);
      check<ef::bfloat16, float>(rows, columns);
      check<ef::half, ef::half>(rows, columns);
      check<double, double>(rows, columns);
    }
  check<float, ef::bfloat16>(3, 40);
  check<double, ef::half>(3, 5);
}

/// group 0: one scale per row.
template <typename W>
void check_int8(Index rows, Index columns, Index group) {
  const auto first = random_tensor<W, 2>({rows, columns}, 4);
  const auto second = random_tensor<W, 2>({rows, columns}, 5);
  const Index groups = group == 0 ? 1 : (columns + group - 1) / group;
  std::array<ef::Tensor<std::int8_t, 2>, 2> values;
  std::array<ef::Tensor<float, 2>, 2> scales;
  for (std::size_t m = 0; m < 2; ++m) {
    values[m] = ef::Tensor<std::int8_t, 2>(rows, columns);
    scales[m] = ef::Tensor<float, 2>(rows, groups);
    const auto& weight = m == 0 ? first : second;
    if (group == 0)
      ef::quantize_weights_int8_per_channel_into(Eigen::DefaultDevice{}, values[m],
                                                 ef::TensorView<float, 1>(scales[m].data(), rows),
                                                 weight);
    else
      ef::quantize_weights_int8_grouped_into(Eigen::DefaultDevice{}, values[m], scales[m], weight,
                                             group);
  }
  const ef::Int8Packing options{.group_size = group};
  const auto both = stacked<std::int8_t, 2>(values);
  const auto both_scales = stacked<float, 2>(scales);
  for_each_gpu([&](const auto& bench) {
    auto a = on_device(bench, first), b = on_device(bench, second);
    const auto packed = ef::pack_weight<std::int8_t>(bench.device, a.cview(), options);
    EXPECT_EQ(packed.group_size(), group);
    expect_rows(bench, packed, values[0]);
    expect_scales(bench, packed, scales[0]);
    const auto pair =
        ef::pack_gated_weight<std::int8_t>(bench.device, a.cview(), b.cview(), options);
    expect_rows(bench, pair.pair(), both);
    expect_scales(bench, pair.pair(), both_scales);
    const auto all = ef::pack_stacked_weight<std::int8_t>(
        bench.device, std::array{a.cview(), b.cview()}, options);
    expect_rows(bench, all, both);
    expect_scales(bench, all, both_scales);
    auto q = on_device(bench, values[0]);
    auto s = on_device(bench, scales[0]);
    const ef::TensorView<const float, 1> row_scales(s.view().data(), rows);
    const auto given = group == 0 ? ef::pack_weight(bench.device, q.cview(), row_scales)
                                  : ef::pack_weight(bench.device, q.cview(), s.cview(), options);
    expect_rows(bench, given, values[0]);
    expect_scales(bench, given, scales[0]);
  });
}

TEST(PackingOnDevice, QuantizesAsTheHostDoes) {
  for (Index columns : {0, 1, 17, 128, 257})
    for (Index group : {0, 32, 128}) check_int8<float>(3, columns, group);
  check_int8<float>(0, 40, 32);
  check_int8<double>(2, 70, 64);
  check_int8<ef::bfloat16>(2, 70, 64);
  check_int8<ef::half>(2, 33, 0);
}

#if defined(EIGENFORMER_TEST_BLOCKS)
TEST(PackingOnDevice, ARowThatCannotBeQuantizedHasNoScale) {
  auto weight = random_tensor<float, 2>({3, 70}, 6);
  weight(1, 69) = std::numeric_limits<float>::infinity();
  const EmulatedBench bench{{emulated::Stream()}, {}};
  auto a = on_device(bench, weight);
  const auto packed = ef::pack_weight<std::int8_t>(bench.device, a.cview(), {.group_size = 64});
  const auto scales = numbers_of(bench, packed.scales(), 6);
  const auto values = numbers_of(bench, packed.data(), 3 * 80);
  for (Index i = 0; i < 6; ++i) EXPECT_EQ(std::isnan(scales(i)), i == 3) << i;
  for (Index j = 64; j < 80; ++j) EXPECT_EQ(values(80 + j), 0);
}

TEST(PackingOnDevice, AgainIntoTheSameMemoryAllocatesNothing) {
  const auto weight = random_tensor<float, 2>({5, 70}, 7);
  const EmulatedBench bench{{emulated::Stream({.seed = 3, .deferred = true})}, {}};
  auto a = on_device(bench, weight);
  ef::PackedWeight<std::int8_t> packed;
  ef::PackedGatedWeight<ef::bfloat16> pair;
  const auto pack = [&] {
    ef::pack_weight_into(bench.device, packed, a.cview(), {.group_size = 32});
    ef::pack_gated_weight_into(bench.device, pair, a.cview(), a.cview());
  };
  pack();
  const auto before = emulated::DeviceMemory::instance().allocations();
  pack();
  bench.device.synchronize();
  EXPECT_EQ(emulated::DeviceMemory::instance().allocations(), before);
}
#endif

}  // namespace
