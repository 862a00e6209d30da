// INT8 storage: one scale per row and head, rounding to even, the same bits on every ISA; what has
// no scale is refused.
#include <eigenformer/kv_cache.h>

#include "compare.h"
#include "kv_slots.h"

using namespace eigenformer_test;

namespace {

/// The scale and the values of x, stored at a position of an INT8 cache: at an address of any
/// alignment where its length is odd. The slot behind it stays as it was.
template <typename Isa>
std::pair<float, std::vector<std::int8_t>> stored(Isa isa, const float* x, Index count,
                                                  Index position = 0) {
  ef::KvCache<float, std::int8_t> cache;
  cache.reserve(1, 1, position + 2, 1, count);
  poison_unused(cache, 0);
  const ef::TensorView<const float, 4> row(x, 1, 1, 1, count);
  for (Index j = 0; j <= position; ++j) ef::update_kv_cache(on(isa), cache, row, row, 0);
  const auto source = cache.source(0);
  const auto scales = [&](Index j) {
    return std::pair(source.key_scale(0, 0, j), source.value_scale(0, 0, j));
  };
  const std::int8_t* values = source.key_row(0, 0, position);
  EXPECT_TRUE(std::equal(values, values + count, source.value_row(0, 0, position)));
  EXPECT_EQ(scales(position).first, scales(position).second);
  for (Index i = 0; i < count; ++i) {
    EXPECT_EQ(source.key_row(0, 0, position + 1)[i], -128);
    EXPECT_EQ(source.value_row(0, 0, position + 1)[i], -128);
  }
  EXPECT_TRUE(std::isnan(scales(position + 1).first) && std::isnan(scales(position + 1).second));
  return {scales(position).first, {values, values + count}};
}
template <typename Isa>
std::pair<float, std::vector<std::int8_t>> stored(Isa isa, const std::vector<float>& x) {
  return stored(isa, x.data(), static_cast<Index>(x.size()));
}

TEST(KvCacheInt8, OneScaleARowRoundingToEven) {
  const auto x = random_tensor<float, 1>({200}, 3, 10.0);
  for (Index count = 0; count < 70; ++count)
    for (Index shift : {0, 1, 3}) {
      const float* row = x.data() + shift;
      const auto [scale, values] = stored(ef::isa::generic{}, row, count, shift);
      for_each_isa([&, &scale = scale, &values = values](auto isa) {
        EXPECT_EQ(stored(isa, row, count, shift), std::pair(scale, values)) << isa.name;
      });
      float largest = 0;
      for (Index i = 0; i < count; ++i) largest = std::max(largest, std::fabs(row[i]));
      EXPECT_EQ(scale, largest == 0 ? 1.0f : largest / 127.0f);
      for (Index i = 0; i < count; ++i) {
        const int q = values[static_cast<std::size_t>(i)];
        EXPECT_GE(q, -127);
        EXPECT_LE(std::fabs(row[i] - static_cast<float>(q) * scale), scale * 0.5001f);
      }
    }
  // max / 127 is zero in float: the smallest float serves, as in quantization.h
  constexpr float least = std::numeric_limits<float>::denorm_min();
  using Values = std::vector<std::int8_t>;
  for_each_isa([&](auto isa) {
    EXPECT_EQ(stored(isa, {127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -63.5f}),
              std::pair(1.0f, Values({127, 0, 2, 2, 0, -64})));
    EXPECT_EQ(stored(isa, {7 * least, -least, 0.0f}), std::pair(least, Values({7, -1, 0})));
    EXPECT_EQ(stored(isa, {0.0f, -0.0f}), std::pair(1.0f, Values({0, 0})));
    EXPECT_EQ(stored(isa, {std::numeric_limits<float>::max()}).second, Values({127}));
  });
  ef::KvCache<double, std::int8_t> doubles;  // finite in double, no scale in float
  ef::Tensor<double, 4> wide(1, 1, 1, 2);
  wide.setConstant(1e300);
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(doubles, wide, wide, 0); },
                                       {"element 0", "range of float"});
  for (const double edge : {4e40, 127 * 0x1.fffffep127}) {  // past float, but not its scale
    wide.setConstant(-edge);
    ef::update_kv_cache(doubles, wide, wide, 0);
    const ef::Tensor<double, 4> read = doubles.keys(0);
    EXPECT_NEAR(read.data()[read.size() - 1] / -edge, 1, 1e-7);
  }
  wide(0, 0, 0, 1) = 127 * 0x1.ffffffp127;  // the scale rounds to infinity
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(doubles, wide, wide, 0); },
                                       {"element 1", "range of float"});
}

TEST(KvCacheInt8, EveryIsaReadsAndWritesTheSameBits) {
  const Index batch = 2, n = 5, heads = 3;
  for (Index dim : {1, 7, 8, 16, 17, 33}) {
    const auto keys = random_tensor<float, 4>({batch, n, heads, dim}, 1);
    ef::KvCache<float, std::int8_t> cache;
    ef::update_kv_cache(cache, keys, keys, 0);
    for_each_isa([&](auto isa) {
      ef::KvCache<float, std::int8_t> other;
      ef::update_kv_cache(on(isa), other, keys, keys, 0);
      EXPECT_TRUE(same_bits(other.values(on(isa), 0), cache.values(0))) << isa.name;
      auto bad = random_tensor<float, 4>({1, 1, 1, dim}, 2);
      bad(0, 0, 0, dim - 1) = NAN;
      expect_throws<std::invalid_argument>(
          [&] { ef::update_kv_cache(on(isa), other, bad, bad, 1); },
          {"element " + std::to_string(dim - 1), "INT8"});
      bad.setConstant(NAN);
      expect_throws<std::invalid_argument>(
          [&] { ef::update_kv_cache(on(isa), other, bad, bad, 1); }, {"element 0", "INT8"});
    });
  }
}

}  // namespace
