// A paged cache whose pool is a device's memory: ragged appends, forks and truncation give what the
// same calls give on the host, bit for bit; so do layers of different shapes, streams, and
// attention over a cache that has given up pages behind a window.
#include <eigenformer/attention.h>
#include <eigenformer/paged_kv_cache.h>

#include <sstream>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T>
struct Rows {
  ef::Tensor<T, 3> keys, values;
};

template <typename T>
Rows<T> random_rows(Index tokens, Index heads, Index dim, unsigned seed) {
  return {random_tensor<T, 3>({tokens, heads, dim}, seed),
          random_tensor<T, 3>({tokens, heads, dim}, seed + 1)};
}

/// The same life of some sequences, on any cache; append(ids, offsets, layer, rows) is the bench's.
template <typename Cache, typename T, typename Append>
void live(Cache& cache, const std::vector<Rows<T>>& rows, Append&& append) {
  std::vector<ef::SequenceId> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(cache.add_sequence());
  for (Index layer : {0, 1}) append(ids, std::vector<Index>{0, 3, 3, 12, 13}, layer, rows[0]);
  cache.truncate(ids[2], 6);
  const auto fork = cache.fork(ids[2]);  // half of its second page is shared
  const std::vector<ef::SequenceId> some{fork, ids[0]};
  for (Index layer : {0, 1}) append(some, std::vector<Index>{0, 2, 3}, layer, rows[1]);
  cache.free(ids[1]);
}

template <typename T, typename Storage>
void check(Index heads, Index dim) {
  const ef::PagedKvConfig config{
      .layers = 2, .kv_heads = heads, .head_dim = dim, .page_size = 4, .page_count = 12};
  const std::vector<Rows<T>> rows{random_rows<T>(13, heads, dim, 1),
                                  random_rows<T>(3, heads, dim, 3)};
  ef::PagedKvCache<T, Storage> expected(config);
  live(expected, rows, [&](const auto& ids, const auto& offsets, Index layer, const Rows<T>& r) {
    expected.append(ids, offsets, layer, r.keys, r.values);
  });
  for_each_device([&](const auto& bench) {
    ef::PagedKvCache<T, Storage> cache(config, ef::memory_of(bench.device));
    live(cache, rows, [&](const auto& ids, const auto& offsets, Index layer, const Rows<T>& r) {
      auto keys = on_device(bench, r.keys);
      auto values = on_device(bench, r.values);
      cache.append(bench.device, ids, offsets, layer, keys.cview(), values.cview());
      keys.host();  // a deferred stream has read them before they go
    });
    for (const ef::SequenceId id : expected.sequences())
      for (Index layer : {0, 1}) {
        auto got = on_device(bench, poisoned_tensor<T, 3>({cache.length(id, layer), heads, dim}));
        cache.keys_into(bench.device, got.view(), id, layer);
        EXPECT_TRUE(same_bits(got.host(), expected.keys(id, layer))) << id << ' ' << layer;
        cache.values_into(bench.device, got.view(), id, layer);
        EXPECT_TRUE(same_bits(got.host(), expected.values(id, layer))) << id << ' ' << layer;
      }
    ef::Tensor<T, 3> wrong(1, heads, dim + 1);
    EXPECT_THROW(cache.keys_into(bench.device, wrong, expected.sequences()[0], 0),
                 std::invalid_argument);
  });
}

TEST(PagedKvCacheOnDevice, HoldsWhatTheHostsHolds) {
  check<float, float>(2, 8);
  check<float, ef::bfloat16>(1, 33);
  check<ef::half, ef::half>(2, 31);
  check<double, double>(1, 5);
  check<float, std::int8_t>(2, 33);
  check<ef::bfloat16, std::int8_t>(1, 64);
}

// One token for each sequence, as a step of decoding appends it.
TEST(PagedKvCacheOnDevice, StepsOfEqualLength) {
  const ef::PagedKvConfig config{
      .layers = 1, .kv_heads = 2, .head_dim = 6, .page_size = 2, .page_count = 20};
  const auto tokens = random_tensor<float, 4>({3, 1, 2, 6}, 5);
  for_each_device([&](const auto& bench) {
    ef::PagedKvCache<float> cache(config, ef::memory_of(bench.device));
    for (int i = 0; i < 3; ++i) cache.add_sequence();
    auto k = on_device(bench, tokens);
    for (int step = 0; step < 3; ++step)
      ef::update_kv_cache(bench.device, cache, k.cview(), k.cview(), 0);
    for (Index b = 0; b < 3; ++b) {
      auto got = on_device(bench, poisoned_tensor<float, 3>({3, 2, 6}));
      cache.values_into(bench.device, got.view(), cache.sequences()[static_cast<std::size_t>(b)],
                        0);
      const auto values = got.host();
      for (Index j = 0; j < 3; ++j)
        for (Index h = 0; h < 2; ++h)
          for (Index d = 0; d < 6; ++d) EXPECT_EQ(values(j, h, d), tokens(b, 0, h, d));
    }
  });
}

// Layers of two shapes, saved on the host and loaded on the device, and the other way round.
TEST(PagedKvCacheOnDevice, ShapesAndStreams) {
  const ef::PagedKvConfig config{
      .layers = 2, .page_size = 3, .page_count = 8, .layer_shapes = {{2, 9, 4}, {1, 33}}};
  ef::PagedKvCache<float, std::int8_t> expected(config);
  const auto id = expected.add_sequence();
  std::vector<ef::Tensor<float, 3>> keys, values;
  for (Index layer : {0, 1}) {
    const ef::KvLayerShape s = expected.shape(layer);
    keys.push_back(random_tensor<float, 3>({7, s.kv_heads, s.head_dim}, 1));
    values.push_back(random_tensor<float, 3>({7, s.kv_heads, s.value_dim}, 2));
    expected.append(id, layer, keys.back(), values.back());
  }
  std::stringstream stream;
  expected.save(id, stream);
  const std::string text = stream.str();
  for_each_device([&](const auto& bench) {
    ef::PagedKvCache<float, std::int8_t> cache(config, ef::memory_of(bench.device));
    const auto appended = cache.add_sequence();
    for (std::size_t layer : {0u, 1u}) {
      auto k = on_device(bench, keys[layer]);
      auto v = on_device(bench, values[layer]);
      cache.append(bench.device, appended, static_cast<Index>(layer), k.cview(), v.cview());
      k.host();  // a deferred stream has read them before they go
    }
    std::istringstream from(text);
    const auto loaded = cache.load(from);
    for (const auto own : {appended, loaded})
      for (Index layer : {0, 1}) {
        const ef::KvLayerShape s = cache.shape(layer);
        auto got = on_device(bench, poisoned_tensor<float, 3>({7, s.kv_heads, s.value_dim}));
        cache.values_into(bench.device, got.view(), own, layer);
        EXPECT_TRUE(same_bits(got.host(), expected.values(id, layer))) << layer;
      }
    std::ostringstream to;
    cache.save(appended, to);
    EXPECT_EQ(to.str(), text);
  });
}

TEST(PagedKvCacheOnDevice, AttentionBehindAWindow) {
  const ef::PagedKvConfig config{
      .layers = 1, .kv_heads = 1, .head_dim = 8, .page_size = 4, .page_count = 20};
  const ef::AttentionOptions options{.causal = true, .window = 9, .prefix_length = 3};
  const auto rows = random_tensor<float, 3>({70, 1, 8}, 1);
  auto nan = random_tensor<float, 3>({4, 1, 8}, 1);
  nan.setConstant(NAN);
  const auto q = random_tensor<float, 4>({1, 2, 2, 8}, 2);
  for_each_device([&](const auto& bench) {
    auto k = on_device(bench, rows);
    auto hole = on_device(bench, nan);
    auto query = on_device(bench, q);
    const auto attend = [&](bool give_up) {
      ef::PagedKvCache<float> cache(config, ef::memory_of(bench.device));
      // The first page, which stands for those that are gone.
      cache.append(bench.device, cache.add_sequence(), 0, hole.cview(), hole.cview());
      const std::vector<ef::SequenceId> ids{cache.add_sequence()};
      cache.append(bench.device, ids[0], 0, k.cview(), k.cview());
      if (give_up) cache.free_before(ids[0], 60, 3);
      EXPECT_EQ(cache.pages_free(), give_up ? 15 : 1);
      auto output = on_device(bench, poisoned_tensor<float, 4>({1, 2, 2, 8}));
      ef::attention_with_kv_source_into(bench.device, output.view(), query.cview(),
                                        cache.source(0, ids), options);
      return output.host();
    };
    EXPECT_TRUE(same_bits(attend(true), attend(false)));
  });
}

// Keys by channel: stored as on the host, and attention is that over the keys read back.
TEST(PagedKvCacheOnDevice, KeyScalesByChannel) {
  const ef::PagedKvConfig config{
      .layers = 1, .kv_heads = 2, .head_dim = 33, .page_size = 4, .page_count = 9};
  const auto rows = random_tensor<float, 3>({35, 2, 33}, 1);
  ef::Tensor<float, 2> scales(2, 33);
  for (Index i = 0; i < scales.size(); ++i)
    scales.data()[i] = 0.005f * static_cast<float>(1 + i % 7);
  ef::PagedKvCache<float, std::int8_t> expected(config);
  expected.set_key_scales(0, scales);
  const auto id = expected.add_sequence();
  expected.append(id, 0, rows, rows);
  const auto keys = expected.keys(id, 0), values = expected.values(id, 0);
  const auto q = random_tensor<float, 4>({1, 2, 4, 33}, 2);
  for_each_device([&](const auto& bench) {
    ef::PagedKvCache<float, std::int8_t> cache(config, ef::memory_of(bench.device));
    cache.set_key_scales(0, scales);
    const auto own = cache.add_sequence();
    auto new_rows = on_device(bench, rows);
    cache.append(bench.device, own, 0, new_rows.cview(), new_rows.cview());
    auto got = on_device(bench, poisoned_tensor<float, 3>({35, 2, 33}));
    cache.keys_into(bench.device, got.view(), own, 0);
    EXPECT_TRUE(same_bits(got.host(), keys));
    auto query = on_device(bench, q);
    auto output = on_device(bench, poisoned_tensor<float, 4>({1, 2, 4, 33}));
    ef::attention_with_kv_source_into(bench.device, output.view(), query.cview(), cache.source(0),
                                      {.causal = true});
    const ef::TensorView<const float, 4> k(keys.data(), 1, 35, 2, 33),
        v(values.data(), 1, 35, 2, 33);
    const auto dense = ef::batched_attention_with_padding(q, k, v, std::vector<Index>{35},
                                                          ef::AttentionOptions{.causal = true});
    const auto result = output.host();
    for (Index i = 0; i < result.size(); ++i)
      ASSERT_NEAR(result.data()[i], dense.data()[i], 2e-2) << i;
  });
}

}  // namespace
