// Laws of select: what follows it equals a cache made of the chosen rows from the start, bit for
// bit, however often rows were shared, truncated and written again. Laws of a window: attention has
// the bits of a cache that keeps everything; what is gone is never read, and asking for it is
// refused. Both: a refused call changes nothing, a steady state allocates nothing.
#include <eigenformer/attention.h>
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
Rows<T> chosen(const Rows<T>& x, const std::vector<Index>& rows) {
  Rows<T> result(static_cast<Index>(rows.size()), x.dimension(1), x.dimension(2), x.dimension(3));
  for (std::size_t i = 0; i < rows.size(); ++i)
    result.chip(static_cast<Index>(i), 0) = x.chip(rows[i], 0);
  return result;
}

template <typename T>
Rows<T> first_positions(const Rows<T>& x, Index length) {
  return x.slice(Eigen::array<Index, 4>{0, 0, 0, 0},
                 Eigen::array<Index, 4>{x.dimension(0), length, x.dimension(2), x.dimension(3)});
}

TEST(KvCacheSelect, RandomHistoriesEqualThePlainModel) {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](Index n) {
      return static_cast<Index>(random() % static_cast<unsigned>(n));
    };
    ef::KvCache<float> cache;
    ef::reference::KvCache<float> model;
    Index batch = 1 + pick(3);
    const auto append = [&](Index n) {
      for (Index layer : {0, 1}) {
        const auto data = static_cast<unsigned>(random());
        const auto keys = random_tensor<float, 4>({batch, n, 1, 2}, data),
                   values = random_tensor<float, 4>({batch, n, 1, 3}, data + 1);
        ef::update_kv_cache(cache, keys, values, layer);
        ef::reference::update_kv_cache(model, keys, values, layer);
      }
    };
    append(1 + pick(100));
    for (int event = 0; event < 40; ++event) {
      const Index kind = pick(8);
      if (kind < 4) {
        std::vector<Index> rows(static_cast<std::size_t>(1 + pick(5)));
        for (Index& row : rows) row = pick(batch);
        cache.select(rows);
        for (auto& [index, layer] : model.layers)
          layer = {chosen(layer.keys, rows), chosen(layer.values, rows)};
        batch = static_cast<Index>(rows.size());
      } else if (kind < 7) {
        append(1 + pick(pick(4) == 0 ? 150 : 3));
      } else {
        const Index length = pick(cache.length(0) + 1);
        cache.truncate(length);
        for (auto& [index, layer] : model.layers)
          layer = {first_positions(layer.keys, length), first_positions(layer.values, length)};
      }
      if (event == 20) {
        ef::KvCache<float> copy = cache;
        cache = std::move(copy);
      }
      for (Index layer : {0, 1}) {
        ASSERT_EQ(cache.source(layer).batch, batch);
        ASSERT_TRUE(same_bits(cache.keys(layer), model.layers[layer].keys)) << seed << " " << event;
        ASSERT_TRUE(same_bits(cache.values(layer), model.layers[layer].values));
      }
    }
  }
}

TEST(KvCacheSelect, RowsShareWhatTheyHaveInCommon) {
  ef::KvCache<float> cache;
  const auto rows = random_tensor<float, 4>({1, 100, 1, 2}, 1);
  ef::update_kv_cache(cache, rows, rows, 0);
  cache.select(std::vector<Index>{0, 0, 0});
  auto source = cache.source(0);
  EXPECT_EQ(source.key_row(0, 0, 0), source.key_row(2, 0, 0));
  EXPECT_EQ(source.key_row(0, 0, 99), source.key_row(1, 0, 99));
  const auto more = random_tensor<float, 4>({3, 1, 1, 2}, 2);
  ef::update_kv_cache(cache, more, more, 0);
  source = cache.source(0);
  EXPECT_EQ(source.key_row(0, 0, 63), source.key_row(2, 0, 63));
  EXPECT_NE(source.key_row(0, 0, 64), source.key_row(1, 0, 64));
  EXPECT_NE(source.key_row(0, 0, 64), source.key_row(2, 0, 64));
  EXPECT_NE(source.key_row(1, 0, 64), source.key_row(2, 0, 64));
}

TEST(KvCacheSelect, Int8RowsKeepTheirScales) {
  ef::KvCache<float, std::int8_t> cache;
  const auto rows = random_tensor<float, 4>({3, 70, 2, 5}, 1);
  ef::update_kv_cache(cache, rows, rows, 0);
  const auto before = cache.keys(0);
  const std::vector<Index> order{2, 0, 0};
  cache.select(order);
  const auto more = random_tensor<float, 4>({3, 1, 2, 5}, 2);
  ef::update_kv_cache(cache, more, more, 0);
  cache.truncate(70);
  EXPECT_TRUE(same_bits(cache.keys(0), chosen(before, order)));
}

TEST(KvCacheSelect, BadRowsAndLackOfMemoryChangeNothing) {
  ef::KvCache<float> cache;
  EXPECT_THROW(cache.select(std::vector<Index>{0}), std::invalid_argument);
  cache.select({});
  const auto rows = random_tensor<float, 4>({2, 70, 1, 2}, 1);
  ef::update_kv_cache(cache, rows, rows, 0);
  ef::update_kv_cache(cache, rows, rows, 3);
  const auto unchanged = [&] {
    for (Index layer : {0, 3}) ASSERT_TRUE(same_bits(cache.keys(layer), rows));
  };
  expect_throws<std::invalid_argument>(
      [&] {
        cache.select(std::vector<Index>{1, 2});
      },
      {"KvCache::select", "rows[1] is 2", "batch of 2"});
  EXPECT_THROW(cache.select(std::vector<Index>{-1}), std::invalid_argument);
  unchanged();
  const std::vector<Index> wider{1, 0, 1, 1, 0};
  EXPECT_GT(with_failing_allocations([&] { cache.select(wider); }, unchanged), 5);
  EXPECT_TRUE(same_bits(cache.keys(3), chosen(rows, wider)));
  cache.select({});  // every hypothesis has ended
  EXPECT_EQ(cache.keys(0).dimension(0), 0);
  EXPECT_EQ(cache.length(0), 70);
}

TEST(KvCacheSelect, AllocatesNothingInASteadyState) {
  ef::KvCache<float> cache;
  cache.reserve(2, 4, 300, 1, 8);
  const auto rows = random_tensor<float, 4>({4, 1, 1, 8}, 1);
  const std::vector<Index> parents{1, 1, 3, 0};
  const auto step = [&] {
    for (Index layer : {0, 1}) ef::update_kv_cache(cache, rows, rows, layer);
    cache.select(parents);
  };
  step();
  step();
  EXPECT_EQ(count_allocations([&] {
              for (int i = 0; i < 250; ++i) step();
            }),
            0);
}

// ---- windows ------------------------------------------------------------------------------------

/// Fills what is in the cache's pages and is not held with NaN.
template <typename T, typename Storage>
void poison_gone(const ef::KvCache<T, Storage>& cache, Index layer) {
  const auto source = cache.source(layer);
  const Index length = cache.length(layer), end = (length + 63) / 64 * 64;
  for (Index b = 0; b < source.batch; ++b)
    for (Index h = 0; h < source.kv_heads; ++h)
      for (Index j = length; j < end; ++j) poison_slot(source, b, h, j);
}

template <typename Storage>
void check_window(const ef::KvWindow& window, const std::vector<Index>& steps, Index key_width,
                  Index value_width) {
  SCOPED_TRACE(::testing::Message() << "window " << window.window << " sinks " << window.sinks
                                    << " chunk " << window.chunk);
  ef::KvCache<float, Storage> ring(window), full;
  const ef::AttentionOptions options{
      .causal = true, .window = window.window, .prefix_length = window.sinks};
  unsigned seed = 0;
  for (Index n : steps) {
    const auto keys = random_tensor<float, 4>({2, n, 1, key_width}, ++seed),
               values = random_tensor<float, 4>({2, n, 1, value_width}, ++seed),
               q = random_tensor<float, 4>({2, n, 2, key_width}, ++seed);
    ef::update_kv_cache(ring, keys, values, 0);
    ef::update_kv_cache(full, keys, values, 0);
    poison_gone(ring, 0);
    ASSERT_EQ(ring.length(0), full.length(0));
    if (n > window.chunk) continue;
    ASSERT_TRUE(same_bits(ef::attention_with_kv_cache(q, ring, 0, options),
                          ef::attention_with_kv_cache(q, full, 0, options)))
        << ring.length(0);
    const auto held = ring.held(0);
    const auto all = ring.source(0), whole = full.source(0);
    for (const auto& [begin, end] : {std::pair{Index{0}, held.prefix}, {held.begin, held.end}})
      for (Index j = begin; j < end; ++j)
        ASSERT_EQ(*all.value_row(1, 0, j), *whole.value_row(1, 0, j)) << j;
  }
}

TEST(KvCacheWindow, HasTheBitsOfACacheThatKeepsEverything) {
  const std::vector<Index> tokens(300, 1);
  check_window<float>({.window = 64, .chunk = 1}, tokens, 3, 2);
  check_window<float>({.window = 65, .sinks = 4, .chunk = 1}, tokens, 3, 2);
  check_window<float>({.window = 1, .sinks = 64, .chunk = 2}, tokens, 2, 2);
  const std::vector<Index> chunks{7, 64, 1, 63, 64, 13, 2, 64, 64, 64, 5, 400, 1, 30, 1000, 64};
  check_window<float>({.window = 100, .sinks = 65, .chunk = 64}, chunks, 5, 8);
  check_window<float>({.window = 2, .chunk = 64}, chunks, 1, 1);
  check_window<ef::bfloat16>({.window = 64, .sinks = 1, .chunk = 64}, chunks, 4, 4);
  check_window<std::int8_t>({.window = 64, .sinks = 1, .chunk = 64}, chunks, 4, 4);
  check_window<float>({.window = 10, .sinks = 3}, {1000, 256, 1}, 2, 2);
}

TEST(KvCacheWindow, AskingForWhatIsGoneIsRefused) {
  ef::KvCache<float> cache({.window = 64, .sinks = 4, .chunk = 1});
  const auto rows = random_tensor<float, 4>({1, 1000, 1, 2}, 1),
             q = random_tensor<float, 4>({1, 1, 1, 2}, 2),
             two = random_tensor<float, 4>({1, 2, 1, 2}, 2);
  const auto see = [&](const auto& queries, const ef::AttentionOptions& options) {
    return ef::attention_with_kv_cache(queries, cache, 0, options);
  };
  ef::update_kv_cache(cache, first_positions(rows, 190), first_positions(rows, 190), 0);
  EXPECT_EQ(cache.held(0), (ef::HeldPositions{0, 0, 190}));
  see(q, {});                                 // nothing is gone yet
  ef::update_kv_cache(cache, rows, rows, 0);  // to 1190 = 18 * 64 + 38
  EXPECT_EQ(cache.held(0), (ef::HeldPositions{64, 1088, 1190}));
  EXPECT_EQ(cache.length(0), 1190);
  see(q, {.causal = true, .window = 64, .prefix_length = 4});
  see(q, {.causal = true, .window = 102, .prefix_length = 64});
  expect_throws<std::invalid_argument>(
      [&] { see(q, {.causal = true, .window = 103, .prefix_length = 4}); },
      {"attention_with_kv_cache", "sequence 0", "64 to 1087", "position 1189"});
  EXPECT_THROW(see(two, {.causal = true, .window = 102}), std::invalid_argument);
  EXPECT_THROW(see(q, {.causal = true, .window = 64, .prefix_length = 65}), std::invalid_argument);
  EXPECT_THROW(see(q, {.causal = true}), std::invalid_argument);
  EXPECT_THROW(see(q, {}), std::invalid_argument);
  expect_throws<std::invalid_argument>([&] { cache.keys(0); }, {"[64, 1088) of 1190", "gone"});
  expect_throws<std::invalid_argument>([&] { cache.truncate(1087); },
                                       {"KvCache::truncate", "1087", "layer 0", "[1088, 1190)"});
  EXPECT_EQ(cache.length(0), 1190);
  cache.truncate(1180);
  see(q, {.causal = true, .window = 64, .prefix_length = 4});
  EXPECT_THROW(see(q, {.causal = true, .window = 93}), std::invalid_argument);
  cache.truncate(3);
  EXPECT_EQ(cache.held(0), (ef::HeldPositions{0, 0, 3}));
  EXPECT_TRUE(same_bits(cache.keys(0), first_positions(rows, 3)));
  ef::update_kv_cache(cache, q, q, 0);
  see(q, {});
  for (const ef::KvWindow& bad :
       {ef::KvWindow{.window = -1}, ef::KvWindow{.window = 1, .sinks = -1},
        ef::KvWindow{.window = 1, .chunk = 0}, ef::KvWindow{.sinks = 1}})
    EXPECT_THROW(ef::KvCache<float>{bad}, std::invalid_argument);
}

TEST(KvCacheWindow, TruncatedAndSelectedRowsGoOnAsInACacheThatKeepsEverything) {
  ef::KvCache<float> ring({.window = 70, .sinks = 2, .chunk = 64}), full;
  const ef::AttentionOptions options{.causal = true, .window = 70, .prefix_length = 2};
  std::mt19937 random(7);
  Index batch = 3;
  for (int event = 0; event < 120; ++event) {
    const Index n = 1 + static_cast<Index>(random() % 64);
    const auto seed = static_cast<unsigned>(random());
    const auto rows = random_tensor<float, 4>({batch, n, 1, 3}, seed),
               q = random_tensor<float, 4>({batch, n, 1, 3}, seed + 1);
    for (auto* cache : {&ring, &full}) ef::update_kv_cache(*cache, rows, rows, 0);
    ASSERT_TRUE(same_bits(ef::attention_with_kv_cache(q, ring, 0, options),
                          ef::attention_with_kv_cache(q, full, 0, options)))
        << event;
    if (event % 3 == 0) {  // rejected drafts
      const Index length = ring.length(0) - static_cast<Index>(random() % static_cast<unsigned>(n));
      for (auto* cache : {&ring, &full}) cache->truncate(length);
    }
    if (event % 4 == 0) {
      std::vector<Index> parents(2 + random() % 2);
      for (Index& row : parents) row = static_cast<Index>(random() % static_cast<unsigned>(batch));
      for (auto* cache : {&ring, &full}) cache->select(parents);
      batch = static_cast<Index>(parents.size());
    }
    if (event % 31 == 0) {
      const ef::KvCache<float> copy = ring;
      ring = copy;
    }
  }
}

TEST(KvCacheWindow, MemoryDoesNotGrow) {
  ef::KvCache<float> cache({.window = 128, .sinks = 4, .chunk = 1});
  const auto row = random_tensor<float, 4>({2, 1, 1, 8}, 1);
  cache.reserve(1, 2, 1 << 20, 1, 8);
  EXPECT_EQ(cache.capacity(0), (std::numeric_limits<Index>::max)());
  const auto source = cache.source(0);
  EXPECT_EQ(source.ring.begin + source.ring.pages, 1 + 3);
  EXPECT_EQ(count_allocations([&] {
              for (int i = 0; i < 3000; ++i) ef::update_kv_cache(cache, row, row, 0);
            }),
            0);
  EXPECT_EQ(cache.length(0), 3000);
}

}  // namespace
