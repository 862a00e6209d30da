// Laws: any history of add, append, fork, truncate and free holds what the plain model holds,
// whatever unused slots hold; pages in use are exactly those somebody needs; a refused call changes
// nothing; in steady state nothing is allocated.
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/reference/kv_cache.h>
#include <eigenformer/reference/paged_kv_cache.h>

#include <set>
#include <sstream>

#include "compare.h"
#include "failing_allocations.h"
#include "kv_slots.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;
template <typename T>
using Rows = ef::Tensor<T, 3>;

constexpr Index kHeads = 2, kDim = 5;
template <typename T = float>
Rows<T> rows(Index n, unsigned seed) {
  return random_tensor<T, 3>({n, kHeads, kDim}, seed);
}

template <typename T>
Rows<T> part(const Rows<T>& x, Index begin, Index n) {
  Rows<T> result(n, x.dimension(1), x.dimension(2));
  std::copy_n(x.data() + begin * x.dimension(1) * x.dimension(2), result.size(), result.data());
  return result;
}

ef::PagedKvConfig config(Index layers, Index page_size, Index page_count) {
  return {.layers = layers,
          .kv_heads = kHeads,
          .head_dim = kDim,
          .page_size = page_size,
          .page_count = page_count};
}

template <typename T, typename Storage>
Rows<T> through(const Rows<T>& x) {
  if constexpr (std::is_same_v<Storage, std::int8_t>) return ef::reference::through_int8(x);
  Rows<T> result = x;
  for (Index i = 0; i < x.size(); ++i)
    result.data()[i] = static_cast<T>(static_cast<Storage>(x.data()[i]));
  return result;
}

template <typename T>
Rows<T> tensor_of(const std::vector<std::vector<T>>& list) {
  Rows<T> result(static_cast<Index>(list.size()), kHeads, kDim);
  for (std::size_t i = 0; i < list.size(); ++i)
    std::copy(list[i].begin(), list[i].end(), result.data() + i * kHeads * kDim);
  return result;
}

template <typename T, typename Storage>
void expect_equal(const ef::PagedKvCache<T, Storage>& cache,
                  const ef::reference::PagedKvCache<T>& model) {
  ASSERT_EQ(cache.sequence_count(), static_cast<Index>(model.sequences.size()));
  std::size_t at = 0;
  for (const auto& [id, layers] : model.sequences) {
    ASSERT_EQ(cache.sequences()[at++], id);
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      const Index index = static_cast<Index>(layer);
      ASSERT_EQ(cache.length(id, index), model.length(id, index));
      ASSERT_TRUE(
          same_bits(cache.keys(id, index), through<T, Storage>(tensor_of(layers[layer].keys))))
          << id << " layer " << layer;
      ASSERT_TRUE(
          same_bits(cache.values(id, index), through<T, Storage>(tensor_of(layers[layer].values))));
    }
  }
}

/// Fills every slot of the pool that no sequence's layer holds with NaN: slots past lengths, in
/// pages in use.
template <typename T, typename Storage>
void poison_unused(ef::PagedKvCache<T, Storage>& cache) {
  const Index page_size = cache.config().page_size;
  for (Index layer = 0; layer < cache.config().layers; ++layer) {
    const auto source = cache.source(layer);
    std::set<const Storage*> held;  // first element of each row of head 0 that somebody holds
    for (Index b = 0; b < source.batch; ++b)
      for (Index j = 0; j < source.lengths[b]; ++j) held.insert(source.key_row(b, 0, j));
    for (Index b = 0; b < source.batch; ++b) {
      const SequenceId id = cache.sequences()[static_cast<std::size_t>(b)];
      Index longest = 0;
      for (Index l = 0; l < cache.config().layers; ++l)
        longest = std::max(longest, cache.length(id, l));
      const Index end = (longest + page_size - 1) / page_size * page_size;
      for (Index j = source.lengths[b]; j < end; ++j) {
        if (held.count(source.key_row(b, 0, j)) > 0) continue;  // a sharer is longer
        for (Index h = 0; h < kHeads; ++h) poison_slot(source, b, h, j);
      }
    }
  }
}

/// Pages that the live tables name, counted from outside the cache's own counts.
template <typename Cache>
std::size_t pages_in_tables(const Cache& cache) {
  std::set<std::int32_t> pages;
  const auto source = cache.source(0);
  for (Index b = 0; b < source.batch; ++b) {
    const SequenceId id = cache.sequences()[static_cast<std::size_t>(b)];
    Index longest = 0;
    for (Index l = 0; l < cache.config().layers; ++l)
      longest = std::max(longest, cache.length(id, l));
    for (Index p = 0; p * source.page_size < longest; ++p) pages.insert(source.tables[b][p]);
  }
  return pages.size();
}

template <typename T, typename Storage>
struct RandomHistory {
  RandomHistory(unsigned seed, Index page_size) : cache(config(2, page_size, 40)), random(seed) {}

  ef::PagedKvCache<T, Storage> cache;
  ef::reference::PagedKvCache<T> model;
  std::mt19937 random;
  int out_of_pages = 0, forks = 0;

  Index pick(Index n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); }
  SequenceId any() {
    return cache.sequences()[static_cast<std::size_t>(pick(cache.sequence_count()))];
  }

  void step() {
    const Index kind = cache.sequence_count() == 0 ? 0 : pick(20);
    if (kind == 0) {
      ASSERT_EQ(cache.add_sequence(), model.add_sequence(2));
    } else if (kind == 1) {
      const SequenceId parent = any();
      const Index longest = model.longest(parent),
                  length = pick(2) == 0 ? longest : pick(longest + 1);
      const SequenceId child = length == longest ? cache.fork(parent) : cache.fork(parent, length);
      ASSERT_EQ(child, model.fork(parent, length));
      ++forks;
    } else if (kind == 2) {
      const SequenceId id = any();
      const Index length = pick(model.longest(id) + 3);
      cache.truncate(id, length);
      model.truncate(id, length);
    } else if (kind == 3) {
      const SequenceId id = any();
      cache.free(id);
      model.free(id);
    } else {
      append();
    }
  }

  void append() {
    std::vector<SequenceId> ids;
    std::vector<Index> offsets{0};
    for (SequenceId id : cache.sequences())
      if (pick(2) == 0) {
        ids.push_back(id);
        offsets.push_back(offsets.back() + pick(5));
      }
    std::shuffle(ids.begin(), ids.end(), random);
    const auto keys = rows<T>(offsets.back(), static_cast<unsigned>(random())),
               values = rows<T>(offsets.back(), static_cast<unsigned>(random()));
    // now and then one layer falls behind
    const Index first_layer = pick(2), layers = pick(4) == 0 ? 1 : 2;
    for (Index l = 0; l < layers; ++l) {
      const Index layer = (first_layer + l) % 2;
      try {
        cache.append(ids, offsets, layer, keys, values);
      } catch (const std::length_error&) {
        ++out_of_pages;
        return;
      }
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const Index n = offsets[i + 1] - offsets[i];
        model.append(ids[i], layer, part(keys, offsets[i], n), part(values, offsets[i], n));
      }
    }
  }
};

template <typename T, typename Storage>
void random_history(unsigned seed, Index page_size) {
  RandomHistory<T, Storage> history(seed, page_size);
  for (int i = 0; i < 1200; ++i) {
    history.step();
    if (i % 4 == 0) poison_unused(history.cache);
    ASSERT_NO_FATAL_FAILURE(expect_equal(history.cache, history.model)) << "event " << i;
    const auto figures = history.cache.statistics();
    ASSERT_EQ(figures.pages_used, static_cast<Index>(pages_in_tables(history.cache)));
    ASSERT_EQ(figures.pages_used, 40 - history.cache.pages_free());
    ASSERT_LE(figures.slots_used, figures.pages_used * page_size);
  }
  EXPECT_GT(history.out_of_pages, 0);
  EXPECT_GT(history.forks, 10);
  if (page_size > 1) {
    EXPECT_GT(history.cache.statistics().copies, 5);
  }  // a page of one position is never part full
  history.cache.clear();
  EXPECT_EQ(history.cache.pages_free(), 40);  // every count is back to where it began
  EXPECT_EQ(history.cache.statistics().pages_shared, 0);
}

TEST(PagedKvCache, RandomHistoriesEqualThePlainModel) {
  for (unsigned seed : {1u, 2u, 3u}) random_history<float, float>(seed, 4);
  random_history<float, float>(4, 1);
  random_history<double, double>(5, 3);
  random_history<float, ef::bfloat16>(6, 7);
  random_history<ef::bfloat16, ef::bfloat16>(7, 4);
  random_history<float, std::int8_t>(8, 4);
  random_history<ef::half, std::int8_t>(9, 5);
}

TEST(PagedKvCache, UpdateKvCacheServesAWholeBatch) {
  ef::PagedKvCache<float> cache(config(2, 4, 20));
  const std::vector<SequenceId> ids{cache.add_sequence(), cache.add_sequence(),
                                    cache.add_sequence()};
  const auto keys = random_tensor<float, 4>({3, 6, kHeads, kDim}, 1),
             values = random_tensor<float, 4>({3, 6, kHeads, kDim}, 2);
  for (Index layer : {0, 1}) ef::update_kv_cache(cache, keys, values, layer);
  const std::vector<SequenceId> backwards{ids[2], ids[0]};
  const auto more = random_tensor<float, 4>({2, 1, kHeads, kDim}, 3);
  Threads threads(2);
  ef::update_kv_cache(threads.device, cache, backwards, more, more, 1);
  EXPECT_EQ(cache.length(ids[0]), 6);  // layer 0 has not come so far
  EXPECT_EQ(cache.length(ids[0], 1), 7);
  EXPECT_EQ(cache.length(ids[1], 1), 6);
  for (Index b = 0; b < 3; ++b) {
    const auto held = cache.keys(ids[static_cast<std::size_t>(b)], 1);
    for (Index j = 0; j < 6; ++j) EXPECT_EQ(held(j, 1, 2), keys(b, j, 1, 2));
  }
  EXPECT_EQ(cache.values(ids[2], 1)(6, 0, 3), more(0, 0, 0, 3));
  EXPECT_EQ(cache.values(ids[0], 1)(6, 0, 3), more(1, 0, 0, 3));

  // The sources that attention reads, of all sequences and of some.
  const auto all = cache.source(1);
  ASSERT_EQ(all.batch, 3);
  EXPECT_EQ(all.lengths[0], 7);
  EXPECT_EQ(all.lengths[1], 6);
  EXPECT_EQ(all.key_row(1, 1, 5)[4], keys(1, 5, 1, 4));
  const auto some = cache.source(1, backwards);
  ASSERT_EQ(some.batch, 2);
  EXPECT_EQ(some.key_row(0, 0, 3)[1], keys(2, 3, 0, 1));
  EXPECT_EQ(some.value_row(1, 1, 6)[0], more(1, 0, 1, 0));
  ef::KvSelection mine;
  const auto& unchanging = cache;
  EXPECT_EQ(unchanging.source(0, backwards, mine).lengths[1], 6);
}

TEST(PagedKvCache, ForkSharesUntilSomebodyWrites) {
  ef::PagedKvCache<float> cache(config(1, 4, 10));
  const SequenceId a = cache.add_sequence();
  const auto prompt = rows(10, 1);  // three pages, the last one half full
  cache.append(a, 0, prompt, prompt);
  const SequenceId b = cache.fork(a), c = cache.fork(a, 5);
  EXPECT_EQ(cache.statistics().pages_used, 3);
  EXPECT_EQ(cache.statistics().pages_shared, 3);
  EXPECT_EQ(cache.statistics().tokens, 25);
  EXPECT_EQ(cache.statistics().slots_used, 10);
  EXPECT_DOUBLE_EQ(cache.statistics().utilisation, 10.0 / 12.0);
  EXPECT_EQ(cache.source(0).key_row(1, 0, 9), cache.source(0).key_row(0, 0, 9));
  const auto token = rows(1, 2);
  cache.append(b, 0, token, token);  // copies the page it shares
  EXPECT_EQ(cache.statistics().copies, 1);
  EXPECT_EQ(cache.statistics().pages_used, 4);
  cache.append(a, 0, token, token);  // sole holder by now
  EXPECT_EQ(cache.statistics().copies, 1);
  cache.append(c, 0, token, token);  // the middle page, shared by three
  EXPECT_EQ(cache.statistics().copies, 2);
  EXPECT_EQ(cache.statistics().pages_used, 5);
  EXPECT_EQ(cache.keys(c, 0)(5, 1, 1), token(0, 1, 1));
  EXPECT_EQ(cache.keys(a, 0)(5, 1, 1), prompt(5, 1, 1));
  cache.free(a);
  const auto held = cache.keys(b, 0);
  for (Index j = 0; j < 10; ++j) EXPECT_EQ(held(j, 0, 0), prompt(j, 0, 0));
  cache.free(b);
  cache.free(c);
  EXPECT_EQ(cache.pages_free(), 10);
  EXPECT_EQ(cache.statistics().pages_peak, 5);
  EXPECT_EQ(cache.statistics().utilisation, 1.0);
}

TEST(PagedKvCache, PagesRunOutForTheWholeBatchOrNotAtAll) {
  ef::PagedKvCache<float> cache(config(1, 4, 5));
  ef::reference::PagedKvCache<float> model;
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  model.add_sequence(1), model.add_sequence(1);
  const auto prompt = rows(6, 1);
  for (SequenceId id : {a, b})
    cache.append(id, 0, prompt, prompt), model.append(id, 0, prompt, prompt);
  const std::vector<SequenceId> ids{a, b};
  // a page each, one is free
  const auto too_many = random_tensor<float, 4>({2, 3, kHeads, kDim}, 2);
  expect_throws<std::length_error>([&] { cache.append(ids, 0, too_many, too_many); },
                                   {"PagedKvCache", "2 pages needed", "1 of 5 are free"});
  expect_equal(cache, model);
  EXPECT_EQ(cache.pages_free(), 1);

  // Two sharers of one page both write: one copy, the other keeps it. Exactly one page is free.
  cache.free(b);
  cache.append(a, 0, prompt, prompt);  // 12 positions, 3 pages
  cache.truncate(a, 11);
  const SequenceId c = cache.fork(a);
  cache.reserve(cache.add_sequence(), 4);
  EXPECT_EQ(cache.pages_free(), 1);
  const auto one = random_tensor<float, 4>({2, 1, kHeads, kDim}, 3);
  cache.append(std::vector<SequenceId>{a, c}, 0, one, one);
  EXPECT_EQ(cache.pages_free(), 0);
  EXPECT_EQ(cache.keys(a, 0)(11, 0, 0), one(0, 0, 0, 0));
  EXPECT_EQ(cache.keys(c, 0)(11, 0, 0), one(1, 0, 0, 0));
  EXPECT_EQ(cache.keys(a, 0)(10, 0, 0), cache.keys(c, 0)(10, 0, 0));
  expect_throws<std::length_error>([&] { cache.reserve(a, 13); }, {"1 pages needed", "0 of 5"});
}

TEST(PagedKvCache, ReservedPagesAreThereAndLayersFollow) {
  ef::PagedKvCache<float> cache(config(3, 4, 4));
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  cache.reserve(a, 12);
  const auto prompt = rows(8, 1);
  EXPECT_THROW(cache.append(b, 0, prompt, prompt), std::length_error);
  const auto twelve = rows(12, 2);
  for (Index layer : {2, 0, 1}) {
    cache.append(a, layer, twelve, twelve);
    EXPECT_EQ(cache.pages_free(), 1);
  }
  EXPECT_EQ(cache.length(a), 12);
  cache.truncate(a, 4);
  EXPECT_EQ(cache.pages_free(), 3);
}

TEST(PagedKvCache, RefusalsChangeNothing) {
  ef::PagedKvCache<float, std::int8_t> cache(config(2, 4, 10));
  ef::reference::PagedKvCache<float> model;
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence(), gone = cache.add_sequence();
  for (int i = 0; i < 3; ++i) model.add_sequence(2);
  cache.free(gone);
  model.free(gone);
  const auto prompt = rows(5, 1);
  cache.append(a, 1, prompt, prompt);
  model.append(a, 1, prompt, prompt);
  const auto refuse = [&](auto exception, auto&& call, const std::vector<std::string>& text) {
    expect_throws<decltype(exception)>(call, text);
    expect_equal(cache, model);
    EXPECT_EQ(cache.pages_free(), 8);
  };
  const std::invalid_argument argument("");
  const std::out_of_range unknown("");
  refuse(unknown, [&] { cache.free(gone); }, {"no sequence 2"});  // a double free
  refuse(unknown, [&] { cache.fork(gone); }, {"no sequence 2"});
  refuse(unknown, [&] { cache.truncate(7, 1); }, {"no sequence 7"});
  refuse(unknown, [&] { cache.length(-1); }, {"no sequence -1"});
  refuse(unknown, [&] { cache.keys(gone, 0); }, {"no sequence 2"});
  refuse(unknown, [&] { cache.append(gone, 0, prompt, prompt); }, {"no sequence 2"});
  refuse(unknown, [&] { cache.source(0, std::vector<SequenceId>{a, gone}); }, {"no sequence 2"});
  refuse(argument, [&] { cache.append(a, 2, prompt, prompt); }, {"layer_idx is 2", "0 to 1"});
  refuse(argument, [&] { cache.append(a, -1, prompt, prompt); }, {"layer_idx is -1"});
  refuse(argument, [&] { cache.fork(a, 6); }, {"length 6", "5 positions"});
  refuse(argument, [&] { cache.truncate(a, -1); }, {"-1"});
  refuse(argument, [&] { cache.reserve(a, -1); }, {"-1"});
  refuse(argument, [&] { cache.append(a, 0, prompt, rows(4, 1)); }, {"(5, 2, 5)", "(4, 2, 5)"});
  const auto wide = random_tensor<float, 3>({1, kHeads, kDim + 1}, 1);
  refuse(argument, [&] { cache.append(a, 0, wide, wide); }, {"(1, 2, 6)", "2 heads of 5"});
  const auto two = random_tensor<float, 4>({2, 1, kHeads, kDim}, 1);
  refuse(argument,
         [&] {
           cache.append(std::vector<SequenceId>{a, a}, 0, two, two);
         },
         {"sequence 0 comes twice"});
  refuse(argument, [&] { cache.append(std::vector<SequenceId>{a}, 0, two, two); },
         {"batch of 2", "1 sequences"});
  refuse(unknown,
         [&] {
           cache.append(std::vector<SequenceId>{a, gone}, 0, two, two);
         },
         {"no sequence 2"});
  refuse(argument,
         [&] {
           cache.append(std::vector<SequenceId>{a, b}, std::vector<Index>{0, 3, 2}, 0, rows(2, 1),
                        rows(2, 1));
         },
         {"offsets"});
  refuse(argument,
         [&] {
           cache.append(std::vector<SequenceId>{a, b}, std::vector<Index>{0, 5}, 0, prompt, prompt);
         },
         {"offsets of 2"});
  auto bad = prompt;
  bad(3, 1, 2) = NAN;
  refuse(argument, [&] { cache.append(a, 0, prompt, bad); }, {"values", "element 37"});
  cache.append(b, 0, rows(0, 1), rows(0, 1));  // nothing to append is legal
  expect_equal(cache, model);
  EXPECT_THROW((ef::PagedKvCache<float>(config(0, 4, 4))), std::invalid_argument);
  EXPECT_THROW((ef::PagedKvCache<float>(config(1, 0, 4))), std::invalid_argument);
  EXPECT_THROW((ef::PagedKvCache<float>(config(1, 4, -1))), std::invalid_argument);
  EXPECT_THROW((ef::PagedKvCache<float>(config(Index{1} << 40, Index{1} << 40, 4))),
               std::invalid_argument);
}

TEST(PagedKvCache, OutOfMemoryChangesNothing) {
  ef::PagedKvCache<float> cache(config(2, 2, 60));
  ef::reference::PagedKvCache<float> model;
  const auto check = [&] {
    expect_equal(cache, model);
    EXPECT_EQ(cache.statistics().pages_used, static_cast<Index>(pages_in_tables(cache)));
  };
  int failures = 0;
  for (int i = 0; i < 9; ++i) {
    failures += with_failing_allocations([&] { cache.add_sequence(); }, check);
    model.add_sequence(2);
    const auto prompt = rows(5, 1);
    failures += with_failing_allocations([&] { cache.append(i, 1, prompt, prompt); }, check);
    model.append(i, 1, prompt, prompt);
  }
  const auto batch = random_tensor<float, 4>({9, 2, kHeads, kDim}, 2);
  failures += with_failing_allocations([&] { ef::update_kv_cache(cache, batch, batch, 0); }, check);
  for (Index i = 0; i < 9; ++i) {
    Rows<float> own(2, kHeads, kDim);
    std::copy_n(batch.data() + i * own.size(), own.size(), own.data());
    model.append(i, 0, own, own);
  }
  failures += with_failing_allocations([&] { cache.fork(3); }, check);
  model.fork(3, 5);
  check();
  EXPECT_GT(failures, 20);
}

TEST(PagedKvCache, PrefixesAndStreamsOutOfMemory) {
  ef::PagedKvCache<float> cache(config(1, 4, 10));
  const std::vector<std::int32_t> text{1, 2, 3, 4, 5, 6, 7, 8, 9};
  const ef::PrefixKey key{.salt = "too long for a string to hold by itself"};
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  cache.append(a, 0, rows(9, 1), rows(9, 1));
  int failures = with_failing_allocations([&] { cache.keep_prefix(a, text, key); },
                                          [&] { EXPECT_EQ(cache.find_prefix(text), 0); });
  failures += with_failing_allocations([&] { cache.share_prefix(b, text, key); },
                                       [&] { EXPECT_EQ(cache.statistics().pages_shared, 0); });
  EXPECT_EQ(cache.length(b), 8);
  cache.forget_prefixes();
  EXPECT_EQ(count_allocations([&] { EXPECT_EQ(cache.keep_prefix(a, text), 8); }), 0);
  std::stringstream stream;
  cache.save(a, stream);
  const auto load = [&] { stream.clear(), stream.seekg(0), cache.load(stream); };
  failures += with_failing_allocations(load, [&] { EXPECT_EQ(cache.sequence_count(), 2); });
  EXPECT_GT(failures, 10);
  EXPECT_TRUE(same_bits(cache.keys(cache.sequences().back(), 0), rows(9, 1)));
}

TEST(PagedKvCache, AllocatesNothingInSteadyState) {
  ef::PagedKvCache<float> cache(config(2, 16, 100));
  std::vector<SequenceId> ids;
  for (int i = 0; i < 5; ++i) {
    ids.push_back(cache.add_sequence());
    cache.reserve(ids.back(), 200);
  }
  const auto token = random_tensor<float, 4>({5, 1, kHeads, kDim}, 1);
  const auto step = [&] {
    for (Index layer : {0, 1}) {
      ef::update_kv_cache(cache, ids, token, token, layer);
      EXPECT_EQ(cache.source(layer, ids).batch, 5);
      EXPECT_EQ(cache.source(layer).batch, 5);
    }
  };
  step();
  EXPECT_EQ(count_allocations([&] {
              for (int i = 1; i < 200; ++i) step();
            }),
            0);
}

TEST(PagedKvCache, MovesWhole) {
  ef::PagedKvCache<float> cache(config(1, 4, 10));
  const SequenceId a = cache.add_sequence();
  const auto prompt = rows(9, 1);
  cache.append(a, 0, prompt, prompt);
  ef::PagedKvCache<float> moved(std::move(cache));
  EXPECT_TRUE(same_bits(moved.keys(a, 0), prompt));
  EXPECT_EQ(moved.source(0).lengths[0], 9);
  cache = std::move(moved);
  cache.append(a, 0, prompt, prompt);
  EXPECT_EQ(cache.length(a), 18);
  static_assert(!std::is_copy_constructible_v<ef::PagedKvCache<float>>);
}

}  // namespace
