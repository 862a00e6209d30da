// Laws: equal to concatenation bit for bit (through the storage type), whatever unused slots hold;
// earlier rows never move; a refused or failed update changes nothing; after reserve no allocation.
#include <eigenformer/kv_cache.h>
#include <eigenformer/reference/kv_cache.h>

#include "compare.h"
#include "failing_allocations.h"
#include "kv_slots.h"

using namespace eigenformer_test;

namespace {

template <typename T>
using Rows = ef::Tensor<T, 4>;

template <typename T>
Rows<T> rows(Index batch, Index n, Index heads, Index dim, unsigned seed) {
  return random_tensor<T, 4>({batch, n, heads, dim}, seed);
}

/// What comes back of x after it was stored.
template <typename Storage, typename T>
Rows<T> through(const Rows<T>& x) {
  if constexpr (std::is_same_v<Storage, std::int8_t>) {
    return ef::reference::through_int8(x);
  } else {
    Rows<T> result = x;
    for (Index i = 0; i < x.size(); ++i)
      result.data()[i] = static_cast<T>(static_cast<Storage>(x.data()[i]));
    return result;
  }
}

template <typename T, typename Storage>
void expect_equal(const ef::KvCache<T, Storage>& cache, Index layer,
                  const ef::reference::KvCache<T>& model) {
  const auto& expected = model.layers.at(layer);
  ASSERT_EQ(cache.length(layer), expected.keys.dimension(1));
  const Rows<T> keys = cache.keys(layer);
  for (std::size_t d = 0; d < 4; ++d) ASSERT_EQ(keys.dimension(d), expected.keys.dimension(d));
  ASSERT_TRUE(same_bits(keys, through<Storage>(expected.keys)));
  ASSERT_TRUE(same_bits(cache.values(layer), through<Storage>(expected.values)));
}

template <typename Pair>
class KvCache : public ::testing::Test {};
template <typename T, typename Storage = T>
struct Stored {
  using scalar = T;
  using storage = Storage;
};
#if defined(EIGENFORMER_SANITIZED)
using Pairs =
    ::testing::Types<Stored<float>, Stored<float, ef::bfloat16>, Stored<ef::bfloat16, std::int8_t>>;
#else
using Pairs =
    ::testing::Types<Stored<float>, Stored<double>, Stored<ef::bfloat16>, Stored<ef::half>,
                     Stored<float, ef::bfloat16>, Stored<float, ef::half>, Stored<double, float>,
                     Stored<float, std::int8_t>, Stored<double, std::int8_t>,
                     Stored<ef::bfloat16, std::int8_t>, Stored<ef::half, std::int8_t>>;
#endif
TYPED_TEST_SUITE(KvCache, Pairs);

TYPED_TEST(KvCache, EqualsConcatenation) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  for (Index dim : {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64}) {
    ef::KvCache<T, Storage> cache;
    ef::reference::KvCache<T> model;
    unsigned seed = 1;
    // crosses and meets the ends of pages
    for (Index n : {5, 1, 1, 57, 1, 1, 63, 64, 65, 1, 130}) {
      for (Index layer : {0, 7}) {
        const Index heads = layer == 0 ? 2 : 3;
        const auto keys = rows<T>(2, n, heads, dim, ++seed),
                   values = rows<T>(2, n, heads, dim, ++seed);
        ef::update_kv_cache(cache, keys, values, layer);
        ef::reference::update_kv_cache(model, keys, values, layer);
        poison_unused(cache, layer);
      }
    }
    for (Index layer : {0, 7}) expect_equal(cache, layer, model);
  }
}

TYPED_TEST(KvCache, SameBitsOnAnyThreadsBatchAndChunking) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  const auto keys = rows<T>(3, 150, 4, 80, 1), values = rows<T>(3, 150, 4, 80, 2);
  ef::KvCache<T, Storage> whole;
  ef::update_kv_cache(whole, keys, values, 0);
  for (int count : {1, 2, 3}) {
    Threads threads(count);
    ef::KvCache<T, Storage> threaded;
    ef::update_kv_cache(threads.device, threaded, keys, values, 0);
    EXPECT_TRUE(same_bits(threaded.keys(threads.device, 0), whole.keys(0)));
    EXPECT_TRUE(same_bits(threaded.values(0), whole.values(threads.device, 0)));
  }
  ef::KvCache<T, Storage> chunked, alone;
  for (Index first = 0; first < 150; first += 30) {
    const Rows<T> k =
        keys.slice(Eigen::array<Index, 4>{0, first, 0, 0}, Eigen::array<Index, 4>{3, 30, 4, 80});
    const Rows<T> v =
        values.slice(Eigen::array<Index, 4>{0, first, 0, 0}, Eigen::array<Index, 4>{3, 30, 4, 80});
    ef::update_kv_cache(chunked, k, v, 0);
  }
  EXPECT_TRUE(same_bits(chunked.keys(0), whole.keys(0)));
  const Rows<T> second =
      keys.slice(Eigen::array<Index, 4>{1, 0, 0, 0}, Eigen::array<Index, 4>{1, 150, 4, 80});
  ef::update_kv_cache(alone, second, second, 0);
  const Rows<T> expected = whole.keys(0).slice(Eigen::array<Index, 4>{1, 0, 0, 0},
                                               Eigen::array<Index, 4>{1, 150, 4, 80});
  EXPECT_TRUE(same_bits(alone.keys(0), expected));
}

TYPED_TEST(KvCache, SourceFindsTheRows) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  ef::KvCache<T, Storage> cache;
  ef::update_kv_cache(cache, rows<T>(2, 70, 3, 5, 1), rows<T>(2, 70, 3, 5, 2), 4);
  const auto source = cache.source(4);
  const auto keys = cache.keys(4), values = cache.values(4);
  ASSERT_EQ(source.batch, 2);
  ASSERT_EQ(source.kv_heads, 3);
  ASSERT_EQ(source.head_dim, 5);
  for (Index b = 0; b < 2; ++b) {
    ASSERT_EQ(source.lengths[b], 70);
    for (Index j = 0; j < 70; ++j)
      for (Index h = 0; h < 3; ++h)
        for (Index d = 0; d < 5; ++d) {
          // Exactly what is stored; of INT8, its product with the scale, rounded once.
          using C = ef::compute_type<T>;
          C k = static_cast<C>(source.key_row(b, h, j)[d]),
            v = static_cast<C>(source.value_row(b, h, j)[d]);
          if constexpr (std::is_same_v<Storage, std::int8_t>) {
            k *= static_cast<C>(source.key_scale(b, h, j));
            v *= static_cast<C>(source.value_scale(b, h, j));
          }
          ASSERT_EQ(static_cast<double>(keys(b, j, h, d)), static_cast<double>(static_cast<T>(k)));
          ASSERT_EQ(static_cast<double>(values(b, j, h, d)),
                    static_cast<double>(static_cast<T>(v)));
        }
  }
  EXPECT_EQ(cache.source(3).batch, 0);
}

TYPED_TEST(KvCache, RefusedUpdatesChangeNothing) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  ef::KvCache<T, Storage> cache;
  ef::reference::KvCache<T> model;
  const auto keys = rows<T>(2, 9, 3, 5, 1), values = rows<T>(2, 9, 3, 5, 2);
  ef::update_kv_cache(cache, keys, values, 1);
  ef::reference::update_kv_cache(model, keys, values, 1);
  const auto refuse = [&](const Rows<T>& k, const Rows<T>& v, Index layer,
                          const std::vector<std::string>& text) {
    expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(cache, k, v, layer); }, text);
    expect_equal(cache, 1, model);
    EXPECT_EQ(cache.length(0), 0);
  };
  refuse(rows<T>(3, 1, 3, 5, 3), rows<T>(3, 1, 3, 5, 3), 1,
         {"update_kv_cache", "layer 1", "(2, 9, 3, 5)", "(3, n, 3, 5)"});
  refuse(rows<T>(2, 1, 4, 5, 3), rows<T>(2, 1, 4, 5, 3), 1, {"(2, 9, 3, 5)", "(2, n, 4, 5)"});
  refuse(rows<T>(2, 1, 3, 6, 3), rows<T>(2, 1, 3, 6, 3), 1, {"(2, 9, 3, 5)", "(2, n, 3, 6)"});
  refuse(rows<T>(2, 1, 3, 5, 3), rows<T>(2, 2, 3, 5, 3), 1,
         {"new_keys", "(2, 1, 3, 5)", "new_values", "(2, 2, 3, 5)"});
  refuse(rows<T>(2, 0, 3, 5, 3), rows<T>(2, 0, 3, 5, 3), 1, {"(2, 0, 3, 5)", "n >= 1"});
  refuse(rows<T>(2, 0, 3, 5, 3), rows<T>(2, 0, 3, 5, 3), 0, {"(2, 0, 3, 5)", "n >= 1"});
  refuse(rows<T>(2, 1, 3, 5, 3), rows<T>(2, 1, 3, 5, 3), -1, {"layer_idx is -1"});
  auto bad = rows<T>(2, 2, 3, 5, 3);
  for (double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    bad.data()[17] = static_cast<T>(value);
    if constexpr (std::is_same_v<Storage, std::int8_t>) {
      refuse(bad, rows<T>(2, 2, 3, 5, 3), 1, {"new_keys", "element 17", "INT8"});
      refuse(rows<T>(2, 2, 3, 5, 3), bad, 0, {"new_values", "element 17"});
    } else {
      ef::KvCache<T, Storage> takes;
      ef::update_kv_cache(takes, bad, bad, 0);
      EXPECT_FALSE(std::isfinite(static_cast<double>(takes.keys(0).data()[17])));
    }
  }
}

TYPED_TEST(KvCache, OutOfMemoryChangesNothing) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  ef::KvCache<T, Storage> cache;
  ef::reference::KvCache<T> model;
  for (Index layer : {0, 1, 0}) {  // a new layer, a second one, growth
    const auto keys = rows<T>(2, 64, 2, 5, 1), values = rows<T>(2, 64, 2, 5, 2);
    const int failures =
        with_failing_allocations([&] { ef::update_kv_cache(cache, keys, values, layer); },
                                 [&] {
                                   for (const auto& [index, unused] : model.layers)
                                     expect_equal(cache, index, model);
                                   if (model.layers.count(layer) == 0) {
                                     EXPECT_EQ(cache.length(layer), 0);
                                   }
                                 });
    EXPECT_GT(failures, 3);
    ef::reference::update_kv_cache(model, keys, values, layer);
    expect_equal(cache, layer, model);
  }
}

TYPED_TEST(KvCache, AllocatesNothingWithinTheReservation) {
  using T = typename TypeParam::scalar;
  using Storage = typename TypeParam::storage;
  const auto prompt = rows<T>(2, 100, 2, 16, 1), token = rows<T>(2, 1, 2, 16, 2);
  const auto decode = [&](auto& cache, Index steps) {
    for (Index i = 0; i < steps; ++i)
      for (Index layer = 0; layer < 3; ++layer) ef::update_kv_cache(cache, token, token, layer);
  };
  ef::KvCache<T, Storage> shapeless;  // remembered until the shapes are known
  shapeless.reserve(500);
  for (Index layer = 0; layer < 3; ++layer) ef::update_kv_cache(shapeless, prompt, prompt, layer);
  EXPECT_EQ(count_allocations([&] { decode(shapeless, 400); }), 0);
  EXPECT_EQ(shapeless.length(2), 500);
  shapeless.clear();
  EXPECT_EQ(count_allocations([&] { decode(shapeless, 500); }), 0);

  ef::KvCache<T, Storage> shaped;
  shaped.reserve(3, 2, 500, 2, 16);
  EXPECT_EQ(shaped.length(0), 0);
  EXPECT_EQ(shaped.keys(0).dimension(0), 2);
  EXPECT_EQ(count_allocations([&] {
              for (Index layer = 0; layer < 3; ++layer)
                ef::update_kv_cache(shaped, prompt, prompt, layer);
              decode(shaped, 400);
            }),
            0);
  shaped.reserve(700);
  EXPECT_EQ(count_allocations([&] { decode(shaped, 200); }), 0);
  EXPECT_EQ(count_allocations([&] { shaped.truncate(10), decode(shaped, 300); }), 0);
  expect_throws<std::invalid_argument>(
      [&] { shaped.reserve(1, 3, 10, 2, 16); },
      {"KvCache::reserve", "layer 0", "(2, 310, 2, 16)", "(3, n, 2, 16)"});
  EXPECT_THROW(shaped.reserve(-1), std::invalid_argument);
  EXPECT_THROW(shaped.reserve(std::numeric_limits<Index>::max()), std::exception);
  EXPECT_EQ(shaped.length(1), 310);
}

TEST(KvCacheCalls, ContractCallsCompileAsWritten) {
  const auto new_keys = rows<float>(2, 3, 4, 8, 1), new_values = rows<float>(2, 3, 4, 8, 2);
  const Index layer_idx = 1;
  ef::KvCache<float> cache;
  ef::update_kv_cache(cache, new_keys, new_values, layer_idx);
  Eigen::Index n = cache.length(layer_idx);
  ef::Tensor<float, 4> k = cache.keys(layer_idx), v = cache.values(layer_idx);
  EXPECT_EQ(n, 3);
  EXPECT_TRUE(same_bits(k, new_keys));
  EXPECT_TRUE(same_bits(v, new_values));
  const Index length = 2;
  cache.truncate(length);
  EXPECT_EQ(cache.length(layer_idx), 2);
  cache.clear();
  EXPECT_EQ(cache.length(layer_idx), 0);
  // Views, and int for the layer.
  const ef::TensorView<const float, 4> view(new_keys.data(), 2, 3, 4, 8);
  ef::TensorView<float, 4> mutable_view(k.data(), 2, 3, 4, 8);
  ef::update_kv_cache(cache, view, mutable_view, 0);
  EXPECT_EQ(cache.length(0), 3);
}

TEST(KvCacheCalls, TruncateClearAndUnknownLayers) {
  ef::KvCache<float> cache;
  EXPECT_EQ(cache.length(5), 0);
  EXPECT_EQ(cache.keys(5).size(), 0);
  EXPECT_EQ(cache.keys(5).dimension(3), 0);
  EXPECT_THROW(cache.length(-1), std::invalid_argument);
  EXPECT_THROW(cache.keys(-1), std::invalid_argument);
  const auto keys = rows<float>(1, 100, 2, 4, 1), more = rows<float>(1, 1, 2, 4, 2);
  ef::update_kv_cache(cache, keys, keys, 0);
  ef::update_kv_cache(cache, keys, keys, 1);
  ef::update_kv_cache(cache, more, more, 0);
  cache.truncate(200);  // nothing is that long
  EXPECT_EQ(cache.length(0), 101);
  cache.truncate(100);
  EXPECT_EQ(cache.length(0), 100);
  EXPECT_TRUE(same_bits(cache.keys(0), keys));
  cache.truncate(63);
  const Rows<float> fifth =
      keys.slice(Eigen::array<Index, 4>{0, 5, 0, 0}, Eigen::array<Index, 4>{1, 1, 2, 4});
  ef::update_kv_cache(cache, more, fifth, 1);
  const auto values = cache.values(1);
  EXPECT_EQ(values.dimension(1), 64);
  EXPECT_EQ(values(0, 63, 1, 3), keys(0, 5, 1, 3));
  EXPECT_THROW(cache.truncate(-1), std::invalid_argument);
  cache.truncate(0);
  EXPECT_EQ(cache.keys(0).dimension(2), 2);
  EXPECT_EQ(cache.keys(0).size(), 0);
  const auto other = rows<float>(3, 2, 1, 6, 3);
  EXPECT_THROW(ef::update_kv_cache(cache, other, other, 0), std::invalid_argument);
  cache.clear();
  ef::update_kv_cache(cache, other, other, 0);  // clear() forgets shapes
  EXPECT_TRUE(same_bits(cache.keys(0), other));
  EXPECT_EQ(cache.length(1), 0);
  const auto none = rows<float>(0, 2, 1, 6, 3);  // an empty batch is legal
  ef::update_kv_cache(cache, none, none, 2);
  EXPECT_EQ(cache.length(2), 2);
  EXPECT_EQ(cache.keys(2).size(), 0);
}

TEST(KvCacheCalls, EarlierRowsNeverMoveAndGrowthIsAmortised) {
  ef::KvCache<float> cache;
  const auto token = rows<float>(2, 1, 2, 8, 1);
  ef::update_kv_cache(cache, token, token, 0);
  const float* first = cache.source(0).key_row(1, 1, 0);
  const long allocations = count_allocations([&] {
    for (int i = 1; i < 20000; ++i) ef::update_kv_cache(cache, token, token, 0);
  });
  EXPECT_LT(allocations, 120);  // log(20000 / 64) / log(1.5) growths of a few vectors each
  EXPECT_EQ(cache.source(0).key_row(1, 1, 0), first);
  EXPECT_LE(cache.capacity(0), 20000 * 3 / 2 + 64);
}

TEST(KvCacheCalls, CopiesAreDeepAndMovesAreWhole) {
  ef::KvCache<float, std::int8_t> cache;
  const auto keys = rows<float>(2, 70, 2, 8, 1), more = rows<float>(2, 3, 2, 8, 2);
  ef::update_kv_cache(cache, keys, keys, 3);
  ef::KvCache<float, std::int8_t> copy = cache;
  const auto before = cache.keys(3);
  cache.truncate(60);
  ef::update_kv_cache(cache, more, more, 3);
  EXPECT_TRUE(same_bits(copy.keys(3), before));
  ef::KvCache<float, std::int8_t> moved = std::move(copy);
  EXPECT_TRUE(same_bits(moved.keys(3), before));
  EXPECT_EQ(copy.length(3), 0);  // NOLINT: a moved-from cache is empty
  copy = cache;
  EXPECT_EQ(copy.length(3), 63);
  copy = std::move(moved);
  EXPECT_TRUE(same_bits(copy.values(3), before));
}

template <typename T, typename Storage>
void check_append_into(Index dim) {
  const Index batch = 4, n = 3, heads = 2, capacity = 10;
  const auto keys = rows<T>(batch, n, heads, dim, 1), values = rows<T>(batch, n, heads, dim, 2);
  const std::vector<Index> positions{0, 7, -1, 4};
  auto expected_keys = poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}),
       expected_values = expected_keys;
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < n && positions[static_cast<std::size_t>(b)] >= 0; ++i)
      for (Index h = 0; h < heads; ++h)
        for (Index d = 0; d < dim; ++d) {
          expected_keys(b, positions[static_cast<std::size_t>(b)] + i, h, d) =
              static_cast<Storage>(keys(b, i, h, d));
          expected_values(b, positions[static_cast<std::size_t>(b)] + i, h, d) =
              static_cast<Storage>(values(b, i, h, d));
        }
  auto key_buffer = poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}),
       value_buffer = key_buffer;
  EXPECT_EQ(count_allocations([&] {
              ef::append_kv_into(Eigen::DefaultDevice{}, key_buffer, value_buffer, keys, values,
                                 positions);
            }),
            0);
  EXPECT_TRUE(same_bits(key_buffer, expected_keys));
  EXPECT_TRUE(same_bits(value_buffer, expected_values));
  Threads threads(3);
  auto again = poisoned_tensor<Storage, 4>({batch, capacity, heads, dim}), again_values = again;
  ef::append_kv_into(threads.device, again,
                     ef::TensorView<Storage, 4>(again_values.data(), batch, capacity, heads, dim),
                     keys, values, positions);
  EXPECT_TRUE(same_bits(again, expected_keys));
  EXPECT_TRUE(same_bits(again_values, expected_values));

  const std::vector<Index> past{0, 8, -1, 4};
  expect_throws<std::length_error>(
      [&] { ef::append_kv_into(Eigen::DefaultDevice{}, again, again_values, values, keys, past); },
      {"append_kv_into", "sequence 1", "position 8", "capacity of 10"});
  EXPECT_TRUE(same_bits(again, expected_keys));
  expect_throws<std::invalid_argument>(
      [&] {
        ef::append_kv_into(Eigen::DefaultDevice{}, again, again_values, keys, values,
                           std::vector<Index>{1, 2});
      },
      {"positions has 2"});
  auto narrow = poisoned_tensor<Storage, 4>({batch, capacity, heads + 1, dim});
  expect_throws<std::invalid_argument>(
      [&] { ef::append_kv_into(Eigen::DefaultDevice{}, narrow, narrow, keys, values, positions); },
      {"key_buffer", "(4, 10, 3,", "(4, 3, 2,"});
}

TEST(AppendKvInto, WritesTheRowsAtTheirPositionsAndNoOthers) {
  for (Index dim : {1, 8, 15, 16, 17, 40}) {
    check_append_into<float, float>(dim);
    check_append_into<float, ef::bfloat16>(dim);
    check_append_into<float, ef::half>(dim);
    check_append_into<double, double>(dim);
    check_append_into<double, float>(dim);
    check_append_into<ef::bfloat16, ef::bfloat16>(dim);
  }
}

}  // namespace
