// Laws of the prefix index: a random life of sequences finds what a plain list of (tokens, key)
// says, whatever the hash; what is found holds the rows that were computed for those tokens; pages
// give way leaf first, longest unused first, and only where no other page is free.
#include <eigenformer/paged_kv_cache.h>

#include <map>
#include <set>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;
using Cache = ef::PagedKvCache<float>;
using Tokens = std::vector<std::int32_t>;

std::uint64_t same_for_all(std::uint64_t, std::span<const std::int32_t>) { return 7; }
std::uint64_t last_bit(std::uint64_t before, std::span<const std::int32_t> tokens) {
  return (before + static_cast<std::uint64_t>(tokens.back())) & 1;
}

ef::PagedKvConfig config(Index page_size, Index pages, ef::PrefixHash hash = nullptr) {
  return {.layers = 2,
          .kv_heads = 1,
          .head_dim = 1,
          .page_size = page_size,
          .page_count = pages,
          .prefix_hash = hash};
}

/// What a model would compute for the last of some tokens: it depends on all of them and the key.
float row_of(const Tokens& tokens, std::size_t length, const ef::PrefixKey& key) {
  std::uint32_t h = static_cast<std::uint32_t>(17 * key.adapter.size() + 5 * key.salt.size());
  for (std::size_t i = 0; i < length; ++i) h = h * 31u + static_cast<std::uint32_t>(tokens[i]) + 1u;
  return static_cast<float>(h % 1000003u);
}

ef::Tensor<float, 3> rows_of(const Tokens& tokens, Index begin, Index end,
                             const ef::PrefixKey& key) {
  ef::Tensor<float, 3> rows(end - begin, 1, 1);
  for (Index j = begin; j < end; ++j)
    rows(j - begin, 0, 0) = row_of(tokens, static_cast<std::size_t>(j) + 1, key);
  return rows;
}

/// Computes positions [length, tokens.size()).
void compute(Cache& cache, SequenceId id, const Tokens& tokens, const ef::PrefixKey& key = {}) {
  const auto rows = rows_of(tokens, cache.length(id), static_cast<Index>(tokens.size()), key);
  for (Index layer : {0, 1}) cache.append(id, layer, rows, rows);
}

void expect_rows(const Cache& cache, SequenceId id, const Tokens& tokens,
                 const ef::PrefixKey& key = {}) {
  for (Index layer : {0, 1})
    ASSERT_TRUE(
        same_bits(cache.values(id, layer), rows_of(tokens, 0, cache.length(id, layer), key)));
}

Tokens part(const Tokens& tokens, std::size_t count) {
  return {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(count)};
}

TEST(PagedKvCachePrefix, LaterSequencesTakeOverPages) {
  Cache cache(config(4, 10));
  const Tokens prompt{1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const SequenceId a = cache.add_sequence();
  EXPECT_EQ(cache.share_prefix(a, prompt), 0);
  compute(cache, a, prompt);
  EXPECT_EQ(cache.find_prefix(prompt), 0);
  EXPECT_EQ(cache.keep_prefix(a, prompt), 8);  // the last page is not full
  const SequenceId b = cache.add_sequence(), c = cache.add_sequence();
  Tokens other = prompt;
  other[6] = 0;  // in the second page
  EXPECT_EQ(cache.share_prefix(b, other), 4);
  EXPECT_EQ(cache.share_prefix(c, part(prompt, 8)), 4);  // its last token is left
  EXPECT_EQ(cache.statistics().pages_shared, 1);
  EXPECT_EQ(cache.statistics().pages_used, 3);
  EXPECT_EQ(cache.statistics().prefix_hits, 2);
  EXPECT_EQ(cache.statistics().prefix_misses, 3);
  compute(cache, b, other);
  compute(cache, c, part(prompt, 8));
  expect_rows(cache, b, other);
  EXPECT_EQ(cache.statistics().pages_used, 6);
  // Two that computed the same end up with one copy.
  EXPECT_EQ(cache.keep_prefix(c, prompt), 8);
  EXPECT_EQ(cache.statistics().pages_used, 5);
  EXPECT_EQ(cache.source(0).key_row(2, 0, 7), cache.source(0).key_row(0, 0, 7));
  expect_rows(cache, c, prompt);
  // Gone, and found all the same.
  cache.clear();
  EXPECT_EQ(cache.pages_free(), 10);
  EXPECT_EQ(cache.statistics().pages_cached, 2);
  const SequenceId d = cache.add_sequence();
  cache.reserve(d, 12);
  EXPECT_EQ(cache.statistics().pages_used, 3);
  EXPECT_EQ(cache.share_prefix(d, prompt), 8);  // in place of reserved pages
  EXPECT_EQ(cache.statistics().pages_used, 3);
  expect_rows(cache, d, prompt);
  compute(cache, d, prompt);
  EXPECT_EQ(cache.statistics().pages_used, 3);
  cache.forget_prefixes();
  EXPECT_EQ(cache.find_prefix(prompt), 0);
  expect_rows(cache, d, prompt);
  cache.clear();
  EXPECT_EQ(cache.pages_free(), 10);
  EXPECT_EQ(cache.statistics().pages_cached, 0);
}

TEST(PagedKvCachePrefix, KeysKeepApart) {
  Cache cache(config(2, 20, same_for_all));
  const Tokens prompt{1, 1, 1, 1, 1};
  const std::vector<ef::PrefixKey> keys{{},          {.adapter = "a"}, {.salt = "a"}, {"a", "bc"},
                                        {"ab", "c"}, {"abc", ""},      {"", "3:abc"}};
  for (const auto& key : keys) {
    const SequenceId id = cache.add_sequence();
    EXPECT_EQ(cache.share_prefix(id, prompt, key), 0);
    compute(cache, id, prompt, key);
    EXPECT_EQ(cache.keep_prefix(id, prompt, key), 4);
    cache.free(id);
  }
  for (const auto& key : keys) {
    const SequenceId id = cache.add_sequence();
    EXPECT_EQ(cache.share_prefix(id, prompt, key), 4);
    expect_rows(cache, id, prompt, key);
  }
}

TEST(PagedKvCachePrefix, PagesGiveWayLeafFirstAndLongestUnusedFirst) {
  Cache cache(config(2, 6));
  const Tokens one{1, 2, 3, 4, 5, 6, 0}, two{1, 2, 7, 8, 9, 9, 0};
  const SequenceId a = cache.add_sequence();
  compute(cache, a, part(one, 6));
  cache.keep_prefix(a, one);
  cache.free(a);  // 3 rest
  const SequenceId b = cache.add_sequence();
  EXPECT_EQ(cache.share_prefix(b, two), 2);
  compute(cache, b, part(two, 6));
  cache.keep_prefix(b, two);
  cache.free(b);  // 5 rest; [1 2] was used last, [3 4] and [5 6] longest ago
  EXPECT_EQ(cache.statistics().pages_cached, 5);
  const SequenceId c = cache.add_sequence();
  const auto expect_found = [&](Index of_one, Index of_two, std::int64_t evictions) {
    EXPECT_EQ(cache.find_prefix(one), of_one);
    EXPECT_EQ(cache.find_prefix(two), of_two);
    EXPECT_EQ(cache.statistics().prefix_evictions, evictions);
  };
  cache.reserve(c, 2);  // there is a page that nobody knows
  expect_found(6, 6, 0);
  cache.reserve(c, 4);
  expect_found(4, 6, 1);
  cache.reserve(c, 6);
  expect_found(2, 6, 2);
  cache.reserve(c, 8);
  expect_found(2, 4, 3);
  EXPECT_EQ(cache.statistics().pages_cached, 2);
  EXPECT_EQ(cache.pages_free(), 2);
  expect_throws<std::length_error>([&] { cache.reserve(c, 14); }, {"3 pages needed", "2 of 6"});
  expect_found(2, 4, 3);
  cache.reserve(c, 12);
  expect_found(0, 0, 5);
}

// What a sequence gave up behind its window rests before what comes behind it.
TEST(PagedKvCachePrefix, APageBelowThatIsHeldLeavesTheTree) {
  Cache cache(config(2, 4));
  const Tokens tokens{1, 2, 3, 4, 5, 6, 7};
  const SequenceId a = cache.add_sequence();
  compute(cache, a, part(tokens, 6));
  EXPECT_EQ(cache.keep_prefix(a, tokens), 6);
  cache.free_before(a, 2);
  EXPECT_EQ(cache.find_prefix(tokens), 6);
  EXPECT_EQ(cache.pages_free(), 2);
  const SequenceId b = cache.add_sequence();
  cache.reserve(b, 4);  // takes the page of [1 2], and without it nobody finds the others
  EXPECT_EQ(cache.find_prefix(tokens), 0);
  EXPECT_EQ(cache.pages_free(), 0);
  EXPECT_EQ(cache.statistics().prefix_evictions, 1);
  EXPECT_EQ(cache.keep_prefix(a, tokens), 0);
  cache.clear();
  EXPECT_EQ(cache.pages_free(), 4);
  EXPECT_EQ(cache.statistics().pages_cached, 0);
}

TEST(PagedKvCachePrefix, WritingIntoAKnownPageMakesItUnknown) {
  Cache cache(config(4, 3));
  const Tokens prompt{1, 2, 3, 4, 5, 6, 7, 8, 9};
  const SequenceId a = cache.add_sequence();
  compute(cache, a, part(prompt, 8));
  EXPECT_EQ(cache.keep_prefix(a, prompt), 8);
  cache.truncate(a, 2);
  EXPECT_EQ(cache.find_prefix(prompt), 8);  // nothing was written
  const Tokens other{1, 2, 8, 8, 8};
  compute(cache, a, other);
  EXPECT_EQ(cache.find_prefix(prompt), 0);
  EXPECT_EQ(cache.pages_free(), 1);
  EXPECT_EQ(cache.keep_prefix(a, other), 4);
  // Held by two: whoever writes gets a copy, and the other stays known.
  const SequenceId b = cache.add_sequence();
  EXPECT_EQ(cache.share_prefix(b, other), 4);
  cache.truncate(b, 3);
  compute(cache, b, {1, 2, 8, 7});
  EXPECT_EQ(cache.find_prefix(other), 4);
  expect_rows(cache, a, other);
  expect_rows(cache, b, {1, 2, 8, 7});
}

TEST(PagedKvCachePrefix, RefusalsChangeNothing) {
  Cache cache(config(4, 10));
  const Tokens prompt{1, 2, 3, 4, 5};
  const SequenceId a = cache.add_sequence();
  compute(cache, a, prompt);
  EXPECT_EQ(cache.keep_prefix(a, prompt), 4);
  expect_throws<std::invalid_argument>([&] { cache.share_prefix(a, prompt); },
                                       {"share_prefix", "5 positions"});
  EXPECT_THROW(cache.share_prefix(7, prompt), std::out_of_range);
  EXPECT_THROW(cache.keep_prefix(7, prompt), std::out_of_range);
  EXPECT_EQ(cache.find_prefix({}), 0);
  EXPECT_EQ(cache.keep_prefix(a, {}), 0);
  const SequenceId b = cache.add_sequence();
  EXPECT_EQ(cache.share_prefix(b, {}), 0);
  cache.append(b, 0, rows_of(prompt, 0, 5, {}), rows_of(prompt, 0, 5, {}));
  EXPECT_EQ(cache.keep_prefix(b, prompt), 0);  // layer 1 has nothing yet
  EXPECT_EQ(cache.statistics().pages_used, 4);
  cache.clear();
  EXPECT_EQ(cache.pages_free(), 10);
}

/// Prefixes that were kept, and what of them a cache without limits would find.
struct History {
  History(unsigned seed, ef::PrefixHash hash)
      : cache(config(1 + static_cast<Index>(seed % 3), 24, hash)), random(seed) {}

  struct Sequence {
    Tokens tokens;
    ef::PrefixKey key;
  };
  Cache cache;
  std::mt19937 random;
  std::map<SequenceId, Sequence> live;
  std::set<std::pair<std::string, Tokens>> kept;  // whole pages
  Index found = 0;

  Index pick(Index n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); }
  std::string name(const ef::PrefixKey& key) { return std::string(key.salt); }

  void add() {
    Sequence s;
    for (Index n = 1 + pick(12); n > 0; --n) s.tokens.push_back(static_cast<std::int32_t>(pick(2)));
    if (pick(3) == 0) s.key.salt = "salt";
    const SequenceId id = cache.add_sequence();
    const Index size = cache.config().page_size, free = cache.pages_free();
    const Index expected = cache.find_prefix(s.tokens, s.key);
    const Index shared = cache.share_prefix(id, s.tokens, s.key);
    ASSERT_EQ(shared, expected);
    ASSERT_LT(shared, static_cast<Index>(s.tokens.size()));
    ASSERT_EQ(shared % size, 0);
    ASSERT_LE(free - cache.pages_free(), shared / size);
    if (shared > 0) {
      ASSERT_TRUE(kept.count({name(s.key), part(s.tokens, static_cast<std::size_t>(shared))}) > 0);
    }
    found += shared;
    try {
      compute(cache, id, s.tokens, s.key);
    } catch (const std::length_error&) {
      cache.free(id);
      return;
    }
    live[id] = s;
  }
  void event() {
    if (live.empty() || pick(3) == 0) return add();
    auto at = live.begin();
    std::advance(at, pick(static_cast<Index>(live.size())));
    auto& [id, s] = *at;
    const Index kind = pick(6), size = cache.config().page_size;
    if (kind < 2) {
      const Index length = cache.keep_prefix(id, s.tokens, s.key);
      ASSERT_EQ(length, static_cast<Index>(s.tokens.size()) / size * size);
      for (Index n = size; n <= length; n += size)
        kept.insert({name(s.key), part(s.tokens, static_cast<std::size_t>(n))});
      Tokens more = s.tokens;
      more.push_back(0);
      ASSERT_EQ(cache.find_prefix(more, s.key), length);
    } else if (kind < 4) {
      cache.free(id);
      live.erase(at);
    } else if (kind == 4) {
      s.tokens.resize(static_cast<std::size_t>(pick(static_cast<Index>(s.tokens.size()) + 1)));
      cache.truncate(id, static_cast<Index>(s.tokens.size()));
      if (pick(2) == 0) s.tokens.push_back(static_cast<std::int32_t>(pick(2)));
      try {
        compute(cache, id, s.tokens, s.key);
      } catch (const std::length_error&) {
        s.tokens.pop_back();
      }
    } else if (pick(10) == 0) {
      cache.forget_prefixes();
      kept.clear();
      ASSERT_EQ(cache.find_prefix(s.tokens, s.key), 0);
    }
  }
  void check() {
    for (const auto& [id, s] : live) expect_rows(cache, id, s.tokens, s.key);
    std::set<std::int32_t> held;
    const auto source = cache.source(0);
    for (Index b = 0; b < source.batch; ++b)
      for (Index p = 0; p * source.page_size < source.lengths[b]; ++p)
        held.insert(source.tables[b][p]);
    const auto figures = cache.statistics();
    ASSERT_EQ(figures.pages_used, static_cast<Index>(held.size()));
    ASSERT_EQ(figures.pages_used + cache.pages_free(), 24);
    ASSERT_LE(figures.pages_cached, cache.pages_free());
  }
};

TEST(PagedKvCachePrefix, RandomHistoriesFindWhatWasComputed) {
  Index found = 0;
  std::int64_t evictions = 0;
  for (unsigned seed = 1; seed <= 24; ++seed) {
    // The same life, whatever the hash: of what is there, what gives way does not depend on it.
    std::vector<Index> counts;
    for (const auto hash : {ef::PrefixHash{nullptr}, &same_for_all, &last_bit}) {
      History history(seed, hash);
      for (int i = 0; i < 150; ++i) {
        ASSERT_NO_FATAL_FAILURE(history.event()) << "seed " << seed << " event " << i;
        ASSERT_NO_FATAL_FAILURE(history.check()) << "seed " << seed << " event " << i;
      }
      counts.push_back(history.found);
      evictions += history.cache.statistics().prefix_evictions;
      history.cache.clear();
      EXPECT_EQ(history.cache.pages_free(), 24);
    }
    EXPECT_EQ(counts[0], counts[1]) << seed;
    EXPECT_EQ(counts[0], counts[2]) << seed;
    found += counts[0];
  }
  EXPECT_GT(found, 500);
  EXPECT_GT(evictions, 100);
}

}  // namespace
