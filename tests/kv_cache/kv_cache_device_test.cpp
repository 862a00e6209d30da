// KV caches on every device: new rows stand where they belong, nothing else is touched, and what is
// read back is what the cache of the host holds, bit for bit.
#include <eigenformer/kv_cache.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

template <typename T, typename Storage>
void check(Index added, std::vector<Index> starts, bool only_gpus = false) {
  const Index batch = static_cast<Index>(starts.size()), capacity = 9, heads = 3, dim = 5;
  const Index value_dim = added % 2 == 0 ? 8 : dim;
  const auto keys = random_tensor<T, 4>({batch, added, heads, dim}, 1),
             values = random_tensor<T, 4>({batch, added, heads, value_dim}, 2);
  ef::Tensor<Index, 1> positions(batch);
  std::copy(starts.begin(), starts.end(), positions.data());
  const auto on = [&](const auto& bench) {
    auto key_buffer = on_device(bench, poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}));
    auto value_buffer =
        on_device(bench, poisoned_tensor<Storage, 4>({batch, capacity, heads, value_dim}));
    auto new_keys = on_device(bench, keys);
    auto new_values = on_device(bench, values);
    auto where = on_device(bench, positions);
    ef::append_kv_into(bench.device, key_buffer.view(), value_buffer.view(), new_keys.cview(),
                       new_values.cview(),
                       std::span<const Index>(where.view().data(), starts.size()));
    const auto is_right = [&](const auto& got, const auto& rows) {
      for (Index b = 0; b < batch; ++b)
        for (Index j = 0; j < capacity; ++j)
          for (Index h = 0; h < heads; ++h)
            for (Index d = 0; d < rows.dimension(3); ++d) {
              const Index start = starts[static_cast<std::size_t>(b)], i = j - start;
              if (start >= 0 && i >= 0 && i < added)
                ASSERT_EQ(static_cast<float>(got(b, j, h, d)),
                          static_cast<float>(static_cast<Storage>(rows(b, i, h, d))));
              else
                ASSERT_TRUE(std::isnan(static_cast<float>(got(b, j, h, d))));
            }
    };
    is_right(key_buffer.host(), keys);
    is_right(value_buffer.host(), values);
  };
  if (only_gpus)
    for_each_gpu(on);
  else
    for_each_device(on);
}

TEST(KvAppendOnDevice, WritesNewRowsAndNothingElse) {
  check<float, float>(1, {0, 8, 3});
  check<float, float>(4, {5, -1, 0, 2});
  check<float, ef::bfloat16>(2, {7, 0});
  check<ef::half, ef::half>(3, {1});
  check<ef::bfloat16, ef::bfloat16>(9, {0, 0});
}

TEST(KvAppendOnDevice, LeavesOutRowsPastTheCapacity) {  // which hosts refuse
  check<float, float>(2, {8, std::numeric_limits<Index>::max(), 9, 0}, true);
}

/// Cache on the host and cache in a device's memory, updated alike. value_dim 0: dim.
template <typename T, typename Storage>
void check_cache(Index batch, Index heads, Index dim, const std::vector<Index>& steps,
                 Index value_dim = 0) {
  if (value_dim == 0) value_dim = dim;
  ef::KvCache<T, Storage> host_cache;
  std::vector<std::pair<ef::Tensor<T, 4>, ef::Tensor<T, 4>>> updates;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const auto seed = static_cast<unsigned>(2 * i);
    updates.emplace_back(random_tensor<T, 4>({batch, steps[i], heads, dim}, seed + 1),
                         random_tensor<T, 4>({batch, steps[i], heads, value_dim}, seed + 2));
    if (i == 0 && updates[0].first.size() > 0)
      std::fill_n(updates[0].first.data(), dim, T(0));  // scale 1
    ef::update_kv_cache(host_cache, updates.back().first, updates.back().second, 3);
  }
  const auto keys = host_cache.keys(3), values = host_cache.values(3);
  for_each_device([&](const auto& bench) {
    ef::KvCache<T, Storage> cache(ef::memory_of(bench.device));
    for (const auto& [new_keys, new_values] : updates) {
      auto k = on_device(bench, new_keys);
      auto v = on_device(bench, new_values);
      ef::update_kv_cache(bench.device, cache, k.cview(), v.cview(), 3);
      k.host();  // a deferred stream has read them before they go
    }
    auto got = on_device(bench, poisoned_tensor<T, 4>({batch, cache.length(3), heads, dim}));
    cache.keys_into(bench.device, got.view(), 3);
    EXPECT_TRUE(same_bits(got.host(), keys)) << dim;
    auto got_values =
        on_device(bench, poisoned_tensor<T, 4>({batch, cache.length(3), heads, value_dim}));
    cache.values_into(bench.device, got_values.view(), 3);
    EXPECT_TRUE(same_bits(got_values.host(), values)) << dim;
  });
}

TEST(KvCacheOnDevice, HoldsWhatTheHostsHolds) {
  check_cache<float, float>(2, 2, 8, {63, 1, 1, 2});
  check_cache<float, float>(1, 3, 33, {5});
  check_cache<float, float>(2, 1, 1, {64, 65});
  check_cache<float, ef::bfloat16>(2, 2, 31, {3, 1});
  check_cache<float, ef::half>(1, 2, 32, {3, 1});
  check_cache<double, float>(1, 1, 5, {7});
  check_cache<double, double>(1, 1, 5, {7});
  check_cache<ef::bfloat16, ef::bfloat16>(3, 1, 64, {2});
  check_cache<ef::half, ef::half>(3, 1, 2, {2});
  check_cache<float, float>(0, 2, 8, {3});
  check_cache<float, float>(2, 1, 8, {3, 1}, 5);
  check_cache<ef::half, std::int8_t>(1, 2, 3, {3, 1}, 33);
}

/// Keys and values of one projection (batch, n, heads, 3, dim), read in place: the bits of copies,
/// in a cache and in buffers.
void check_heads_in_place(Index dim) {
  const auto qkv = random_tensor<float, 5>({2, 3, 2, 3, dim}, 1);
  const ef::Tensor<float, 4> keys = qkv.chip(1, 3), values = qkv.chip(2, 3);
  ef::Tensor<Index, 1> positions(2);
  positions.setZero();
  for_each_device([&](const auto& bench) {
    auto all = on_device(bench, qkv);
    auto where = on_device(bench, positions);
    const auto k = ef::heads_of(all.cview(), 1, 3), v = ef::heads_of(all.cview(), 2, 3);
    ef::KvCache<float> cache(ef::memory_of(bench.device));
    ef::update_kv_cache(bench.device, cache, k, v, 0);
    auto got = on_device(bench, poisoned_tensor<float, 4>({2, 3, 2, dim}));
    auto got_values = on_device(bench, poisoned_tensor<float, 4>({2, 3, 2, dim}));
    cache.keys_into(bench.device, got.view(), 0);
    EXPECT_TRUE(same_bits(got.host(), keys)) << dim;
    cache.values_into(bench.device, got.view(), 0);
    EXPECT_TRUE(same_bits(got.host(), values)) << dim;
    ef::append_kv_into(bench.device, got.view(), got_values.view(), k, v,
                       std::span<const Index>(where.view().data(), 2));
    EXPECT_TRUE(same_bits(got.host(), keys)) << dim;
    EXPECT_TRUE(same_bits(got_values.host(), values)) << dim;
  });
}
TEST(KvCacheOnDevice, TakesHeadsInPlace) {
  for (Index dim : {1, 7, 8}) check_heads_in_place(dim);
}

TEST(KvCacheOnDevice, SelectedRowsAreThoseOfTheHost) {
  const auto first = random_tensor<float, 4>({2, 70, 1, 3}, 1),
             later = random_tensor<float, 4>({3, 2, 1, 3}, 2);
  const std::vector<Index> parents{1, 0, 1};
  const auto update = [&](const auto& device, auto& cache, const auto& a, const auto& b) {
    ef::update_kv_cache(device, cache, a, a, 0);
    cache.select(parents);
    ef::update_kv_cache(device, cache, b, b, 0);
  };
  ef::KvCache<float> host_cache;
  update(Eigen::DefaultDevice{}, host_cache, first, later);
  for_each_device([&](const auto& bench) {
    auto a = on_device(bench, first);
    auto b = on_device(bench, later);
    ef::KvCache<float> cache(ef::memory_of(bench.device));
    update(bench.device, cache, a.cview(), b.cview());
    auto got = on_device(bench, poisoned_tensor<float, 4>({3, 72, 1, 3}));
    cache.keys_into(bench.device, got.view(), 0);
    EXPECT_TRUE(same_bits(got.host(), host_cache.keys(0)));
  });
}

TEST(KvCacheOnDevice, Int8HasTheScalesOfTheHost) {
  for (Index dim : {1, 31, 32, 33, 64, 257}) {
    check_cache<float, std::int8_t>(1, 2, dim, {3, 1});
    check_cache<ef::bfloat16, std::int8_t>(2, 1, dim, {2});
    check_cache<ef::half, std::int8_t>(2, 1, dim, {2});
    check_cache<double, std::int8_t>(1, 1, dim, {2});
  }
}

#if defined(EIGENFORMER_TEST_BLOCKS)
// The host cannot refuse rows that it cannot see: they read as NaN, and no other row does.
TEST(KvCacheOnDevice, Int8RowsWithoutScaleReadAsNaN) {
  for (const bool deferred : {false, true}) {
    const EmulatedBench bench{{emulated::Stream({.seed = 3, .deferred = deferred})}, {}};
    auto keys = random_tensor<float, 4>({1, 3, 2, 5}, 1);
    keys(0, 1, 0, 4) = NAN;
    keys(0, 1, 1, 2) = -INFINITY;
    ef::KvCache<float, std::int8_t> cache(ef::memory_of(bench.device));
    auto k = on_device(bench, keys);
    ef::update_kv_cache(bench.device, cache, k.cview(), k.cview(), 0);
    auto got = on_device(bench, poisoned_tensor<float, 4>({1, 3, 2, 5}));
    cache.values_into(bench.device, got.view(), 0);
    const auto values = got.host();
    for (Index j = 0; j < 3; ++j)
      for (Index h = 0; h < 2; ++h)
        for (Index d = 0; d < 5; ++d) EXPECT_EQ(std::isnan(values(0, j, h, d)), j == 1);
  }
}
#endif

TEST(KvCacheOnDevice, RefusesWhatDoesNotFit) {
  ef::KvCache<float> cache;
  const auto keys = random_tensor<float, 4>({1, 2, 1, 3}, 1);
  ef::update_kv_cache(cache, keys, keys, 0);
  ef::Tensor<float, 4> wrong(1, 3, 1, 3);
  const Eigen::DefaultDevice host;
  EXPECT_THROW(cache.keys_into(host, wrong, 0), std::invalid_argument);
  EXPECT_THROW(cache.keys_into(host, wrong, 1), std::invalid_argument);
  EXPECT_THROW(cache.values_into(host, wrong, -1), std::invalid_argument);
}

}  // namespace
