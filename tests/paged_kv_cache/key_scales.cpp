// INT8 keys stored by channel: what is stored is what the formula says, attention is that over the
// dequantized keys, few rows or many, and a channel far larger than the others costs them nothing.
#include <eigenformer/attention.h>
#include <eigenformer/paged_kv_cache.h>

#include <sstream>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;
constexpr Index kHeads = 2, kDim = 19, kLength = 150;

ef::PagedKvConfig config() {
  return {.layers = 2, .kv_heads = kHeads, .head_dim = kDim, .page_size = 16, .page_count = 30};
}

/// Keys whose channel 3 is 100 times the others.
template <typename T>
ef::Tensor<T, 3> keys_with_outliers() {
  auto keys = random_tensor<T, 3>({kLength, kHeads, kDim}, 1);
  for (Index j = 0; j < kLength; ++j)
    for (Index h = 0; h < kHeads; ++h)
      keys(j, h, 3) = static_cast<T>(100 * static_cast<float>(keys(j, h, 3)));
  return keys;
}
template <typename T>
ef::Tensor<float, 2> calibrated(const ef::Tensor<T, 3>& keys) {
  ef::Tensor<float, 2> scales(kHeads, kDim);
  scales.setZero();
  for (Index j = 0; j < kLength; ++j)
    for (Index h = 0; h < kHeads; ++h)
      for (Index d = 0; d < kDim; ++d)
        scales(h, d) = std::max(scales(h, d), std::abs(static_cast<float>(keys(j, h, d))) / 127.0f);
  scales(1, 5) /= 4;  // a channel that the calibration set too small: clamped
  return scales;
}

template <typename T>
void check(double tolerance) {
  ef::PagedKvCache<T, std::int8_t> cache(config());
  const auto keys = keys_with_outliers<T>(),
             values = random_tensor<T, 3>({kLength, kHeads, kDim}, 2);
  const auto scales = calibrated(keys);
  for (Index layer : {0, 1}) cache.set_key_scales(layer, scales);
  const SequenceId a = cache.add_sequence();
  cache.append(a, 1, keys, values);
  const auto held = cache.keys(a, 1);
  for (Index j = 0; j < kLength; ++j)
    for (Index h = 0; h < kHeads; ++h)
      for (Index d = 0; d < kDim; ++d) {
        using C = ef::compute_type<T>;
        const C scale = static_cast<C>(scales(h, d)),
                q = std::clamp<C>(std::nearbyint(static_cast<C>(keys(j, h, d)) / scale), -127, 127);
        ASSERT_EQ(held(j, h, d), static_cast<T>(q * scale)) << j << ' ' << h << ' ' << d;
        ASSERT_EQ(cache.source(1).key_row(0, h, j)[d], static_cast<std::int8_t>(q));
      }
  const auto held_values = cache.values(a, 1);
  Threads threads(3);
  for (Index rows : {1, 3, 40}) {
    const auto q = random_tensor<T, 4>({1, rows, 2 * kHeads, kDim}, 4);
    const ef::AttentionOptions options{.causal = true, .scale = 0.02f};
    const auto got = ef::attention_with_kv_cache(q, cache, 1, options);
    EXPECT_TRUE(same_bits(ef::attention_with_kv_cache(threads.device, q, cache, 1, options), got));
    const ef::TensorView<const T, 4> k(held.data(), 1, kLength, kHeads, kDim),
        v(held_values.data(), 1, kLength, kHeads, kDim);
    const auto expected =
        ef::batched_attention_with_padding(q, k, v, std::vector<Index>{kLength}, options);
    double worst = 0;
    for (Index i = 0; i < got.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(got.data()[i]) -
                                       static_cast<double>(expected.data()[i])));
    EXPECT_LT(worst, tolerance) << rows;
  }
}

// Scores are some units: to round queries and their products with the scales to 8 bits costs
// hundredths.
TEST(PagedKvCacheKeyScales, AttentionIsThatOfDequantizedKeys) {
  check<float>(5e-2);
  check<ef::bfloat16>(5e-2);
  check<double>(1e-6);
}

TEST(PagedKvCacheKeyScales, ALargeChannelCostsTheOthersNothing) {
  ef::PagedKvCache<float, std::int8_t> by_channel(config()), by_row(config());
  const auto keys = keys_with_outliers<float>();
  by_channel.set_key_scales(0, calibrated(keys));
  const SequenceId a = by_channel.add_sequence(), b = by_row.add_sequence();
  by_channel.append(a, 0, keys, keys);
  by_row.append(b, 0, keys, keys);
  double channel_error = 0, row_error = 0;
  const auto c = by_channel.keys(a, 0), r = by_row.keys(b, 0);
  for (Index j = 0; j < kLength; ++j) {
    channel_error = std::max(channel_error, std::abs(double{c(j, 0, 1)} - keys(j, 0, 1)));
    row_error = std::max(row_error, std::abs(double{r(j, 0, 1)} - keys(j, 0, 1)));
  }
  EXPECT_LT(channel_error * 20, row_error);
  EXPECT_TRUE(same_bits(by_channel.values(a, 0), by_row.values(b, 0)));  // values are by position
}

TEST(PagedKvCacheKeyScales, RefusalsAndStreams) {
  ef::PagedKvCache<float, std::int8_t> cache(config()), plain(config()), other(config());
  const auto keys = keys_with_outliers<float>();
  auto scales = calibrated(keys);
  const auto refuse = [&](const std::vector<std::string>& text, Index layer = 0) {
    expect_throws<std::invalid_argument>([&] { cache.set_key_scales(layer, scales); }, text);
  };
  refuse({"layer_idx is 2"}, 2);
  for (float bad : {0.0f, -1.0f, INFINITY, NAN}) {
    scales(1, 2) = bad;
    refuse({"key scale 21"});
  }
  scales = ef::Tensor<float, 2>(kHeads, kDim + 1);
  refuse({"(2, 20)", "(2, 19)"});
  scales = calibrated(keys);
  const SequenceId a = cache.add_sequence();
  cache.append(a, 1, keys, keys);
  refuse({"layer 1 has positions"}, 1);
  cache.free(a);
  refuse({"layer 1 has positions"}, 1);
  cache.set_key_scales(0, scales);
  other.set_key_scales(0, scales);
  const auto narrow = random_tensor<float, 3>({1, 1, 2}, 1);
  EXPECT_THROW(cache.append(cache.add_sequence(), 0, narrow, narrow), std::invalid_argument);
  const SequenceId b = cache.add_sequence();
  for (Index layer : {0, 1}) cache.append(b, layer, keys, keys);
  std::stringstream stream;
  cache.save(b, stream);
  std::istringstream again(stream.str());
  EXPECT_TRUE(same_bits(other.keys(other.load(stream), 0), cache.keys(b, 0)));
  expect_throws<std::invalid_argument>([&] { plain.load(again); }, {"other key scales"});
  const_cast<float&>(*cache.source(0).key_scale_row(1, 1, 2)) = 2;  // rows have none of their own
  std::stringstream wrong;
  cache.save(b, wrong);
  expect_throws<std::invalid_argument>([&] { other.load(wrong); }, {"the scale 2"});
}

// Saved on a GPU, loaded on a host: the row is no number on either.
TEST(PagedKvCacheKeyScales, ARowThatAGpuCouldNotQuantizeIsNaN) {
  ef::PagedKvCache<float, std::int8_t> cache(config());
  const auto keys = keys_with_outliers<float>();
  cache.set_key_scales(0, calibrated(keys));
  const SequenceId a = cache.add_sequence();
  cache.append(a, 0, keys, keys);
  const auto before = cache.keys(a, 0);
  const_cast<float&>(*cache.source(0).key_scale_row(0, 1, 2)) = NAN;
  const auto after = cache.keys(a, 0);
  EXPECT_TRUE(std::isnan(after(2, 1, 0)) && std::isnan(after(2, 1, kDim - 1)));
  EXPECT_EQ(after(2, 0, 0), before(2, 0, 0));
  EXPECT_EQ(after(3, 1, 0), before(3, 1, 0));
}

}  // namespace
