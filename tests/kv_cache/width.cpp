// Laws of values that are wider or narrower than keys: the cache holds both as they came, attention
// over it has the bits of dense attention, and whoever brings another width is refused.
#include <eigenformer/attention.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/reference/kv_cache.h>

#include "compare.h"
#include "kv_slots.h"

using namespace eigenformer_test;

namespace {

template <typename T>
using Rows = ef::Tensor<T, 4>;

template <typename T, typename Storage>
void check(Index batch, Index heads, Index key_width, Index value_width) {
  SCOPED_TRACE(::testing::Message() << "widths " << key_width << " and " << value_width);
  ef::KvCache<T, Storage> cache;
  ef::reference::KvCache<T> model;
  unsigned seed = 0;
  for (Index n : {3, 1, 70}) {
    const auto keys = random_tensor<T, 4>({batch, n, heads, key_width}, ++seed),
               values = random_tensor<T, 4>({batch, n, heads, value_width}, ++seed);
    ef::update_kv_cache(cache, keys, values, 2);
    ef::reference::update_kv_cache(model, keys, values, 2);
    poison_unused(cache, 2);
  }
  const auto& expected = model.layers.at(2);
  const Index length = cache.length(2);
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    EXPECT_TRUE(same_bits(cache.keys(2), ef::reference::through_int8(expected.keys)));
    EXPECT_TRUE(same_bits(cache.values(2), ef::reference::through_int8(expected.values)));
  } else if constexpr (std::is_same_v<Storage, T>) {
    EXPECT_TRUE(same_bits(cache.keys(2), expected.keys));
    EXPECT_TRUE(same_bits(cache.values(2), expected.values));
    for (Index rows : {Index{1}, length}) {
      const auto q = random_tensor<T, 4>({batch, rows, 2 * heads, key_width}, 99);
      const std::vector<Index> lengths(static_cast<std::size_t>(batch), length);
      const auto dense = ef::batched_attention_with_padding(q, expected.keys, expected.values,
                                                            lengths, {.causal = true});
      EXPECT_TRUE(same_bits(ef::attention_with_kv_cache(q, cache, 2, {.causal = true}), dense));
      const ef::TensorView<const T, 3> packed(q.data(), batch * rows, 2 * heads, key_width);
      std::vector<Index> offsets;
      for (Index b = 0; b <= batch; ++b) offsets.push_back(b * rows);
      const auto ragged =
          ef::attention_with_kv_source(packed, cache.source(2), offsets, {.causal = true});
      EXPECT_EQ(ragged.dimension(2), value_width);
      EXPECT_TRUE(same_bits(ef::Tensor<T, 4>(ragged.reshape(dense.dimensions())), dense));
    }
  }
  const ef::KvCache<T, Storage> copy = cache;
  EXPECT_TRUE(same_bits(copy.values(2), cache.values(2)));
}

TEST(KvCacheWidth, KeysAndValuesOfDifferentWidth) {
  check<float, float>(1, 1, 576, 512);
  check<float, float>(2, 3, 5, 9);
  check<float, float>(2, 1, 1, 40);
  check<float, float>(1, 2, 8, 0);
  check<ef::bfloat16, ef::bfloat16>(1, 1, 24, 16);
  check<float, ef::bfloat16>(2, 2, 7, 3);
  check<float, std::int8_t>(2, 2, 33, 17);
}

TEST(KvCacheWidth, AnotherWidthIsRefused) {
  ef::KvCache<float> cache;
  cache.reserve(2, 1, 10, 2, 6, 4);
  const auto keys = random_tensor<float, 4>({1, 3, 2, 6}, 1),
             values = random_tensor<float, 4>({1, 3, 2, 4}, 2);
  ef::update_kv_cache(cache, keys, values, 0);
  ef::update_kv_cache(cache, keys, values, 1);
  expect_throws<std::invalid_argument>(
      [&] { ef::update_kv_cache(cache, keys, keys, 1); },
      {"update_kv_cache", "layer 1", "(1, 3, 2, 6)", "width 4", "(1, n, 2, 6)", "width 6"});
  expect_throws<std::invalid_argument>([&] { cache.reserve(2, 1, 10, 2, 6); },
                                       {"KvCache::reserve", "layer 0", "width 4", "width 6"});
  EXPECT_THROW(cache.reserve(1, 1, 10, 2, 6, -1), std::invalid_argument);
  const auto other = random_tensor<float, 4>({1, 3, 1, 4}, 2);
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(cache, keys, other, 1); },
                                       {"new_values", "(1, 3, 1, 4)", "width only"});
  EXPECT_EQ(cache.length(1), 3);
  const auto q = random_tensor<float, 4>({1, 1, 2, 6}, 3);
  ef::Tensor<float, 4> wrong(1, 1, 2, 6);
  EXPECT_THROW(ef::attention_with_kv_cache_into(Eigen::DefaultDevice{}, wrong, q, cache, 0),
               std::invalid_argument);
  EXPECT_EQ(ef::attention_with_kv_cache(q, cache, 0).dimension(3), 4);
}

TEST(KvCacheWidth, BuffersOfDifferentWidth) {
  for (const auto& [key_width, value_width] : {std::pair<Index, Index>{6, 4}, {3, 8}, {0, 2}}) {
    auto keys = poisoned_tensor<float, 4>({2, 5, 2, key_width});
    auto values = poisoned_tensor<float, 4>({2, 5, 2, value_width});
    const auto new_keys = random_tensor<float, 4>({2, 2, 2, key_width}, 1),
               new_values = random_tensor<float, 4>({2, 2, 2, value_width}, 2);
    ef::append_kv_into(Eigen::DefaultDevice{}, keys, values, new_keys, new_values,
                       std::vector<Index>{3, -1});
    for (Index j = 0; j < 5; ++j)
      for (Index d = 0; d < value_width; ++d) {
        EXPECT_TRUE(std::isnan(values(1, j, 1, d)));
        if (j < 3)
          EXPECT_TRUE(std::isnan(values(0, j, 1, d)));
        else
          EXPECT_EQ(values(0, j, 1, d), new_values(0, j - 3, 1, d));
      }
    EXPECT_THROW(ef::append_kv_into(Eigen::DefaultDevice{}, keys, keys, new_keys, new_values,
                                    std::vector<Index>{0, 0}),
                 std::invalid_argument);
  }
}

}  // namespace
