// Layers of different shapes in one cache: stated, or fixed by the first append of a layer; values
// of another width than keys. And pages given up behind a window: the bits of attention are those
// of a cache that holds everything, and who would see what is gone is refused.
#include <eigenformer/attention.h>
#include <eigenformer/paged_kv_cache.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;

template <typename Cache>
void expect_holds(const Cache& cache, SequenceId id, Index layer, const ef::Tensor<float, 3>& keys,
                  const ef::Tensor<float, 3>& values) {
  EXPECT_TRUE(same_bits(cache.keys(id, layer), keys)) << layer;
  EXPECT_TRUE(same_bits(cache.values(id, layer), values)) << layer;
}

TEST(PagedKvCacheShapes, EachLayerHasItsOwn) {
  const std::vector<ef::KvLayerShape> shapes{{2, 5, 3}, {1, 7}, {3, 1, 4}};
  ef::PagedKvCache<float> cache(
      {.layers = 3, .page_size = 4, .page_count = 6, .layer_shapes = shapes});
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  std::vector<ef::Tensor<float, 3>> keys, values;
  for (Index l = 0; l < 3; ++l) {
    const auto& s = shapes[static_cast<std::size_t>(l)];
    const Index value_dim = s.value_dim == 0 ? s.head_dim : s.value_dim;
    EXPECT_EQ(cache.shape(l).kv_heads, s.kv_heads);
    EXPECT_EQ(cache.shape(l).value_dim, value_dim);
    keys.push_back(random_tensor<float, 3>({9, s.kv_heads, s.head_dim}, 1));
    values.push_back(random_tensor<float, 3>({9, s.kv_heads, value_dim}, 2));
    cache.append(a, l, keys.back(), values.back());
    // The other sequence, four positions in a batch of one.
    const ef::TensorView<const float, 4> k(keys.back().data(), 1, 4, s.kv_heads, s.head_dim),
        v(values.back().data(), 1, 4, s.kv_heads, value_dim);
    ef::update_kv_cache(cache, std::vector<SequenceId>{b}, k, v, l);
  }
  for (Index l = 0; l < 3; ++l) {
    expect_holds(cache, a, l, keys[static_cast<std::size_t>(l)],
                 values[static_cast<std::size_t>(l)]);
    EXPECT_EQ(cache.keys(b, l)(3, 0, 0), keys[static_cast<std::size_t>(l)](3, 0, 0));
  }
  expect_throws<std::invalid_argument>([&] { cache.append(a, 1, keys[0], values[0]); },
                                       {"(9, 2, 5)", "1 heads of 7", "layer 1"});
  EXPECT_THROW(cache.append(a, 0, keys[0], random_tensor<float, 3>({9, 2, 5}, 1)),
               std::invalid_argument);
  EXPECT_EQ(cache.length(a), 9);
}

// One projection holds a batch's q, k and v: what is stored is what copies of k and v store.
TEST(PagedKvCacheShapes, ABatchReadsPartsOfOneProjection) {
  const ef::PagedKvConfig config{
      .layers = 1, .kv_heads = 2, .head_dim = 5, .page_size = 2, .page_count = 8};
  const auto stacked = random_tensor<float, 5>({2, 3, 3, 2, 5}, 1);
  ef::PagedKvCache<float> cache(config), copies(config);
  const std::vector<SequenceId> ids{cache.add_sequence(), cache.add_sequence()};
  copies.add_sequence(), copies.add_sequence();
  ef::update_kv_cache(cache, ids, ef::heads_of(stacked, 1, 2), ef::heads_of(stacked, 2, 2), 0);
  const ef::Tensor<float, 4> keys = stacked.chip(1, 2), values = stacked.chip(2, 2);
  ef::update_kv_cache(copies, ids, keys, values, 0);
  for (const SequenceId id : ids) {
    EXPECT_TRUE(same_bits(cache.keys(id, 0), copies.keys(id, 0)));
    EXPECT_TRUE(same_bits(cache.values(id, 0), copies.values(id, 0)));
  }
}

TEST(PagedKvCacheShapes, TheFirstAppendFixesOneThatFits) {
  ef::PagedKvCache<float> cache(
      {.layers = 3, .kv_heads = 4, .head_dim = 6, .page_size = 4, .page_count = 5});
  const SequenceId a = cache.add_sequence();
  const auto wide = random_tensor<float, 3>({3, 2, 12}, 1),
             usual = random_tensor<float, 3>({3, 4, 6}, 2),
             narrow = random_tensor<float, 3>({3, 2, 2}, 3),
             deep = random_tensor<float, 3>({3, 2, 9}, 4);
  const auto refuse = [&](Index layer, const auto& keys, const auto& values) {
    EXPECT_THROW(cache.append(a, layer, keys, values), std::invalid_argument);
  };
  refuse(0, random_tensor<float, 3>({3, 2, 13}, 1), random_tensor<float, 3>({3, 2, 13}, 1));
  refuse(0, ef::Tensor<float, 3>(3, 0, 6), ef::Tensor<float, 3>(3, 0, 6));
  const ef::Tensor<float, 3> none(0, 2, 12);
  cache.append(a, 0, none, none);  // no position fixes no shape
  EXPECT_EQ(cache.shape(0).kv_heads, 4);
  EXPECT_THROW(cache.append(a, 0, random_tensor<float, 3>({30, 2, 12}, 1),
                            random_tensor<float, 3>({30, 2, 12}, 1)),
               std::length_error);
  EXPECT_EQ(cache.shape(0).kv_heads, 4);  // nor does a refused append
  cache.append(a, 1, usual, usual);
  cache.append(a, 0, wide, wide);
  cache.append(a, 2, deep, narrow);
  expect_holds(cache, a, 0, wide, wide);
  expect_holds(cache, a, 1, usual, usual);
  expect_holds(cache, a, 2, deep, narrow);
  EXPECT_EQ(cache.shape(0).head_dim, 12);
  refuse(0, usual, usual);
  refuse(1, wide, wide);
  cache.clear();  // shapes stay
  refuse(cache.add_sequence(), usual, wide);
}

TEST(PagedKvCacheShapes, BadConfigsAreRefused) {
  const auto refuse = [](const ef::PagedKvConfig& config) {
    EXPECT_THROW(ef::PagedKvCache<float>{config}, std::invalid_argument);
  };
  constexpr Index large = (std::numeric_limits<Index>::max)() / 400;
  refuse({.layers = 2, .page_count = 1, .layer_shapes = {{1, 1}}});
  refuse({.layers = 1, .page_count = 1, .layer_shapes = {{1, 0}}});
  refuse({.layers = 1, .page_count = 1, .layer_shapes = {{1, 1, -1}}});
  refuse({.layers = 2, .page_count = 0, .layer_shapes = {{1, large}, {1, large}}});
  refuse({.layers = 1, .kv_heads = 1, .head_dim = 1, .page_count = 1, .value_dim = -1});
}

/// Two caches that live alike; `full` gives up nothing.
struct Windowed {
  static constexpr Index kHeads = 2, kDim = 8;
  ef::PagedKvConfig config{
      .layers = 1, .kv_heads = kHeads, .head_dim = kDim, .page_size = 4, .page_count = 60};
  ef::PagedKvCache<float> cache{config}, full{config};
  std::vector<SequenceId> ids, full_ids;

  void add() {
    ids.push_back(cache.add_sequence());
    full_ids.push_back(full.add_sequence());
  }
  void append(Index n, unsigned seed) {
    const Index batch = static_cast<Index>(ids.size());
    const auto k = random_tensor<float, 4>({batch, n, kHeads, kDim}, seed),
               v = random_tensor<float, 4>({batch, n, kHeads, kDim}, seed + 1);
    ef::update_kv_cache(cache, ids, k, v, 0);
    ef::update_kv_cache(full, full_ids, k, v, 0);
  }
  ef::Tensor<float, 4> attend(const ef::Tensor<float, 4>& q, const ef::AttentionOptions& options) {
    return ef::attention_with_kv_source(q, cache.source(0, ids), options);
  }
  /// Leaves NaN in every page that is free, and a sequence of one position where it stays.
  void poison_free_pages(bool stay = false) {
    const SequenceId other = cache.add_sequence();
    ef::Tensor<float, 3> nan(cache.pages_free() * 4, kHeads, kDim);
    nan.setConstant(NAN);
    cache.append(other, 0, nan, nan);
    if (stay)
      cache.truncate(other, 1);
    else
      cache.free(other);
  }
};

TEST(PagedKvCacheWindow, AttentionHasTheBitsOfAFullCache) {
  Windowed w;
  w.poison_free_pages(true);  // the first page, which stands for all that are gone
  w.add(), w.add();
  const ef::AttentionOptions options{.causal = true, .window = 9, .prefix_length = 3};
  for (unsigned step = 0; step < 14; ++step) {
    const Index n = step % 3 == 0 ? 11 : 1;
    w.append(n, 10 * step);
    const auto q = random_tensor<float, 4>({2, n, 4, Windowed::kDim}, 10 * step + 2);
    EXPECT_TRUE(same_bits(w.attend(q, options), ef::attention_with_kv_cache(q, w.full, 0, options)))
        << step;
    for (const SequenceId id : w.ids)  // what the query at the next position sees stays
      w.cache.free_before(id, w.cache.length(id) - 8, 3);
    w.poison_free_pages();
  }
  EXPECT_EQ(w.cache.length(w.ids[0]), w.full.length(w.full_ids[0]));
  EXPECT_EQ(w.cache.statistics().pages_used, 1 + 2 * 3);
  EXPECT_EQ(w.cache.statistics().tokens, w.cache.statistics().slots_used);

  // Who would see what is gone is refused, and nobody else.
  const ef::Tensor<float, 4> q = random_tensor<float, 4>({2, 1, 4, Windowed::kDim}, 1);
  const auto refuse = [&](const ef::AttentionOptions& o) {
    EXPECT_THROW(w.attend(q, o), std::invalid_argument);
  };
  refuse({});
  refuse({.causal = true});
  refuse({.causal = true, .window = 9, .prefix_length = 3});
  refuse({.causal = true, .window = 8, .prefix_length = 5});
  w.attend(q, {.causal = true, .window = 8, .prefix_length = 4});
  EXPECT_THROW(w.cache.keys(w.ids[1], 0), std::invalid_argument);
  EXPECT_THROW(w.cache.values(w.ids[1], 0), std::invalid_argument);
  w.cache.clear();
  EXPECT_EQ(w.cache.pages_free(), 60);
}

TEST(PagedKvCacheWindow, ForksAndTruncationKnowWhatIsGone) {
  Windowed w;
  w.add();
  const SequenceId a = w.ids[0];
  w.append(22, 1);
  w.cache.free_before(a, 6, 1);  // only page 1 might go, and it holds positions past 5
  EXPECT_EQ(w.cache.pages_free(), 54);
  w.cache.free_before(a, 17, 1);  // pages 1 to 3: positions 4 to 15
  EXPECT_EQ(w.cache.pages_free(), 57);
  EXPECT_EQ(w.cache.capacity(a), 24);
  w.cache.free_before(a, 10, 1);  // was gone already
  EXPECT_EQ(w.cache.pages_free(), 57);
  const auto refuse = [&](auto&& call, const std::vector<std::string>& text) {
    expect_throws<std::invalid_argument>(call, text);
    EXPECT_EQ(w.cache.pages_free(), 57);
    EXPECT_EQ(w.cache.length(a), 22);
  };
  refuse([&] { w.cache.free_before(a, 22, 9); }, {"given up positions from 4 on"});
  refuse([&] { w.cache.free_before(a, -1); }, {"-1"});
  refuse([&] { w.cache.free_before(a, 1, -1); }, {"-1"});
  refuse([&] { w.cache.truncate(a, 5); }, {"length 5", "4 to 15"});
  refuse([&] { w.cache.fork(a, 15); }, {"length 15", "4 to 15"});
  EXPECT_THROW(w.cache.free_before(9, 1), std::out_of_range);
  const SequenceId whole = w.cache.fork(a), sinks = w.cache.fork(a, 4);
  EXPECT_THROW(w.cache.keys(whole, 0), std::invalid_argument);
  EXPECT_EQ(w.cache.keys(sinks, 0).dimension(0), 4);
  w.cache.free(a);
  EXPECT_EQ(w.cache.pages_free(), 57);
  w.cache.truncate(whole, 16);
  EXPECT_EQ(w.cache.pages_free(), 59);
  w.cache.truncate(whole, 3);
  EXPECT_EQ(w.cache.keys(whole, 0).dimension(0), 3);
  EXPECT_EQ(w.cache.statistics().tokens, 7);
  w.cache.clear();
  EXPECT_EQ(w.cache.pages_free(), 60);
}

// A layer that is behind still comes to the positions that another has.
TEST(PagedKvCacheWindow, NothingGoesThatALayerHasNotReached) {
  ef::PagedKvCache<float> cache(
      {.layers = 2, .kv_heads = 1, .head_dim = 1, .page_size = 2, .page_count = 9});
  const SequenceId a = cache.add_sequence();
  const auto rows = random_tensor<float, 3>({8, 1, 1}, 1),
             some = random_tensor<float, 3>({5, 1, 1}, 1);
  cache.append(a, 0, rows, rows);
  cache.free_before(a, 8);
  EXPECT_EQ(cache.pages_free(), 5);
  cache.append(a, 1, some, some);
  cache.free_before(a, 8);
  EXPECT_EQ(cache.pages_free(), 7);
  cache.append(a, 1, rows, rows);
  EXPECT_EQ(cache.length(a), 8);
}

}  // namespace
