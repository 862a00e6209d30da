// Laws of PagedKvCache's pages: after any history they are shared, copied and free as in the plain
// model, and every figure of statistics() is the model's; sizes up to the largest there is give
// right answers or clear errors; a cache works to the very end of the program.
#include <eigenformer/paged_kv_cache.h>
#include <eigenformer/reference/paged_kv_cache.h>

#include <cstdlib>
#include <map>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;
constexpr Index kLargest = (std::numeric_limits<Index>::max)();

ef::Tensor<float, 3> rows(Index n, float value = 1.0f) {
  ef::Tensor<float, 3> result(n, 1, 1);
  result.setConstant(value);
  return result;
}

struct History {
  History(unsigned seed, Index page_size, Index pages)
      : cache({.layers = 2,
               .kv_heads = 1,
               .head_dim = 1,
               .page_size = page_size,
               .page_count = pages}),
        model{2, page_size, pages, {}},
        random(seed) {}

  ef::PagedKvCache<float> cache;
  ef::reference::PagedKvPages model;
  std::mt19937 random;
  int refused = 0, shared = 0;

  Index pick(Index n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); }
  SequenceId any() {
    return cache.sequences()[static_cast<std::size_t>(pick(cache.sequence_count()))];
  }

  template <typename F>
  void expect_done(bool done, F&& call) {
    refused += !done;
    if (done)
      ASSERT_NO_THROW(call());
    else
      ASSERT_THROW(call(), std::length_error);
  }

  void event() {
    const Index kind = cache.sequence_count() == 0 ? 0 : pick(20);
    if (kind == 0) {
      ASSERT_EQ(cache.add_sequence(), model.add_sequence());
      return;
    }
    const SequenceId id = any();
    const Index longest = model.sequences.at(id).longest();
    if (kind < 4) {
      const Index length = pick(longest + 1);
      ASSERT_EQ(kind == 1 ? cache.fork(id) : cache.fork(id, length),
                model.fork(id, kind == 1 ? longest : length));
    } else if (kind == 4) {
      const Index length = pick(longest + 3 * model.page_size);
      cache.truncate(id, length);
      model.truncate(id, length);
    } else if (kind < 7) {
      cache.free(id);
      model.free(id);
    } else if (kind == 7) {
      const Index length = pick(longest + 3 * model.page_size);
      expect_done(model.reserve(id, length), [&] { cache.reserve(id, length); });
    } else if (kind == 8 && pick(20) == 0) {
      cache.clear();
      model.sequences.clear();
    } else {
      append();
    }
  }

  void append() {
    std::vector<SequenceId> ids;
    std::vector<Index> counts, offsets{0};
    for (SequenceId id : cache.sequences())
      if (pick(2) == 0) ids.push_back(id);
    std::shuffle(ids.begin(), ids.end(), random);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      counts.push_back(pick(4));
      offsets.push_back(offsets.back() + counts.back());
    }
    const Index layer = pick(2);
    const auto new_rows = rows(offsets.back());
    expect_done(model.append(ids, counts, layer),
                [&] { cache.append(ids, offsets, layer, new_rows, new_rows); });
  }

  void check() {
    const auto figures = cache.statistics();
    ASSERT_EQ(figures.sequences, static_cast<Index>(model.sequences.size()));
    ASSERT_EQ(figures.pages_total, model.page_count);
    ASSERT_EQ(figures.pages_used, model.used());
    ASSERT_EQ(figures.pages_peak, model.peak);
    ASSERT_EQ(figures.pages_shared, model.shared());
    ASSERT_EQ(figures.tokens, model.tokens());
    ASSERT_EQ(figures.slots_used, model.slots_used());
    ASSERT_EQ(figures.copies, model.copies);
    ASSERT_EQ(cache.pages_free(), model.page_count - model.used());
    ASSERT_DOUBLE_EQ(figures.utilisation,
                     model.used() == 0 ? 1.0
                                       : static_cast<double>(model.slots_used()) /
                                             static_cast<double>(model.used() * model.page_size));
    shared += figures.pages_shared > 0;
    // Two sequences hold one page where the model says so, and nowhere else.
    std::map<std::int64_t, std::int32_t> page_of;
    std::map<std::int32_t, std::int64_t> model_of;
    const auto source = cache.source(0);
    for (Index b = 0; b < source.batch; ++b) {
      const SequenceId id = cache.sequences()[static_cast<std::size_t>(b)];
      const auto& sequence = model.sequences.at(id);
      for (Index layer = 0; layer < 2; ++layer)
        ASSERT_EQ(cache.length(id, layer), sequence.lengths[static_cast<std::size_t>(layer)]);
      ASSERT_EQ(cache.length(id), std::min(sequence.lengths[0], sequence.lengths[1]));
      for (std::size_t p = 0; p < sequence.pages.size(); ++p) {
        const std::int32_t page = source.tables[b][p];
        ASSERT_EQ(page_of.emplace(sequence.pages[p], page).first->second, page);
        ASSERT_EQ(model_of.emplace(page, sequence.pages[p]).first->second, sequence.pages[p]);
      }
    }
  }
};

TEST(PagedKvCachePages, RandomHistoriesHaveThePagesOfThePlainModel) {
  int refused = 0, shared = 0;
  std::int64_t copies = 0;
  for (unsigned seed = 1; seed <= 60; ++seed) {
    History history(seed, 1 + static_cast<Index>(seed % 5), seed % 3 == 0 ? 8 : 20);
    for (int i = 0; i < 250; ++i) {
      ASSERT_NO_FATAL_FAILURE(history.event()) << "seed " << seed << " event " << i;
      ASSERT_NO_FATAL_FAILURE(history.check()) << "seed " << seed << " event " << i;
    }
    refused += history.refused;
    shared += history.shared;
    copies += history.model.copies;
  }
  EXPECT_GT(refused, 500);
  EXPECT_GT(shared, 5000);
  EXPECT_GT(copies, 200);
}

TEST(PagedKvCachePages, ThePeakStaysWhenUseFallsAndRisesAgain) {
  ef::PagedKvCache<float> cache(
      {.layers = 1, .kv_heads = 1, .head_dim = 1, .page_size = 2, .page_count = 9});
  const SequenceId a = cache.add_sequence();
  cache.append(a, 0, rows(10), rows(10));
  EXPECT_EQ(cache.statistics().pages_peak, 5);
  cache.truncate(a, 2);
  EXPECT_EQ(cache.statistics().pages_used, 1);
  cache.append(a, 0, rows(2), rows(2));  // at lower use
  EXPECT_EQ(cache.statistics().pages_used, 2);
  EXPECT_EQ(cache.statistics().pages_peak, 5);
  const SequenceId b = cache.fork(a);  // takes none
  cache.free(a);
  EXPECT_EQ(cache.statistics().pages_used, 2);
  cache.reserve(b, 12);
  EXPECT_EQ(cache.statistics().pages_peak, 6);
  cache.clear();
  EXPECT_EQ(cache.statistics().pages_used, 0);
  EXPECT_EQ(cache.statistics().pages_peak, 6);
}

TEST(PagedKvCachePages, SizesUpToTheLargest) {
  ef::PagedKvCache<float> cache(
      {.layers = 2, .kv_heads = 1, .head_dim = 1, .page_size = 4, .page_count = 5});
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  cache.append(a, 0, rows(6), rows(6));
  for (Index size : {kLargest / 2, kLargest - 3, kLargest - 1, kLargest}) {
    expect_throws<std::length_error>([&] { cache.reserve(a, size); }, {"pages needed", "3 of 5"});
    expect_throws<std::invalid_argument>([&] { cache.fork(a, size); },
                                         {std::to_string(size), "6 positions"});
    EXPECT_THROW(cache.truncate(a, -size), std::invalid_argument);
    EXPECT_THROW(cache.reserve(a, -size), std::invalid_argument);
    EXPECT_THROW(cache.fork(a, -size), std::invalid_argument);
    EXPECT_THROW(cache.length(a, size), std::invalid_argument);
    EXPECT_THROW(cache.keys(a, size), std::invalid_argument);
    EXPECT_THROW(cache.source(size), std::invalid_argument);
    EXPECT_THROW(cache.length(static_cast<SequenceId>(size)), std::out_of_range);
    cache.truncate(a, size);
    EXPECT_EQ(cache.length(a, 0), 6);
    // Views of more than there is: refused before anything is read.
    const ef::TensorView<const float, 3> endless(nullptr, size, 1, 1);
    expect_throws<std::length_error>([&] { cache.append(a, 0, endless, endless); },
                                     {std::to_string(size), "the pool has 20"});
    const std::vector<SequenceId> both{b, a};
    const ef::TensorView<const float, 4> nothing(nullptr, 2, size, 0, 1);
    expect_throws<std::invalid_argument>(
        [&] { cache.append(both, 0, nothing, nothing); },
        {size > kLargest / 2 ? "keys (batch, n) of 2 x " + std::to_string(size)
                             : "the cache has 1 heads of 1"});
    const std::vector<Index> offsets{0, size - 1, size};
    EXPECT_THROW(cache.append(both, offsets, 0, endless, endless), std::length_error);
    const auto refuse = [](const ef::PagedKvConfig& config) {
      EXPECT_THROW(ef::PagedKvCache<float>{config}, std::invalid_argument);
    };
    refuse({.layers = size, .kv_heads = 1, .head_dim = 1, .page_size = 1, .page_count = 1});
    refuse({.layers = 1, .kv_heads = size, .head_dim = 1, .page_size = 1, .page_count = 1});
    refuse({.layers = 1, .kv_heads = 1, .head_dim = size, .page_size = 1, .page_count = 1});
    refuse({.layers = 1, .kv_heads = 1, .head_dim = 1, .page_size = size, .page_count = 1});
    refuse(
        {.layers = size, .kv_heads = size, .head_dim = size, .page_size = size, .page_count = 1});
    if (size > Index{(std::numeric_limits<std::int32_t>::max)()})
      refuse({.layers = 1, .kv_heads = 1, .head_dim = 1, .page_size = 1, .page_count = size});
  }
  EXPECT_EQ(cache.statistics().pages_used, 2);
  EXPECT_EQ(cache.length(a, 0), 6);
  EXPECT_EQ(cache.length(b, 0), 0);
  cache.append(a, 0, rows(14), rows(14));  // exactly what the pool has
  expect_throws<std::length_error>([&] { cache.append(a, 0, rows(1), rows(1)); }, {"PagedKvCache"});
}

TEST(PagedKvCachePages, Int8RefusesSizesBeforeItReadsData) {
  ef::PagedKvCache<float, std::int8_t> cache(
      {.layers = 1, .kv_heads = 1, .head_dim = 4, .page_size = 4, .page_count = 5});
  const SequenceId a = cache.add_sequence(), b = cache.add_sequence();
  for (Index size : {kLargest / 8 + 1, kLargest / 2, kLargest}) {
    const ef::TensorView<const float, 3> one(nullptr, size, 1, 4);
    expect_throws<std::length_error>([&] { cache.append(a, 0, one, one); },
                                     {std::to_string(size), "the pool has 20"});
    const ef::TensorView<const float, 4> batch(nullptr, 1, size, 1, 4);
    expect_throws<std::length_error>(
        [&] { ef::update_kv_cache(cache, std::vector<SequenceId>{a}, batch, batch, 0); },
        {std::to_string(size), "the pool has 20"});
    EXPECT_THROW(
        cache.append(std::vector<SequenceId>{b, a}, std::vector<Index>{0, 1, size}, 0, one, one),
        std::length_error);
  }
  const ef::TensorView<const float, 3> negative(nullptr, -1, 1, 4);
  EXPECT_THROW(cache.append(a, 0, negative, negative), std::invalid_argument);
  EXPECT_EQ(cache.statistics().pages_used, 0);
  EXPECT_EQ(cache.length(a) + cache.length(b), 0);
}

void expect_equal(const ef::PagedKvStatistics& a, const ef::PagedKvStatistics& b) {
  EXPECT_EQ(a.sequences, b.sequences);
  EXPECT_EQ(a.pages_total, b.pages_total);
  EXPECT_EQ(a.pages_used, b.pages_used);
  EXPECT_EQ(a.pages_peak, b.pages_peak);
  EXPECT_EQ(a.pages_shared, b.pages_shared);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.slots_used, b.slots_used);
  EXPECT_EQ(a.utilisation, b.utilisation);
  EXPECT_EQ(a.copies, b.copies);
}

TEST(PagedKvCachePages, WhatWasMovedFromIsEmptyAndAMoveToItselfIsNone) {
  ef::PagedKvCache<float> cache(
      {.layers = 2, .kv_heads = 1, .head_dim = 1, .page_size = 4, .page_count = 5});
  const SequenceId a = cache.add_sequence();
  cache.append(a, 0, rows(6), rows(6));
  const SequenceId b = cache.fork(a);
  cache.append(b, 0, rows(1, 2.0f), rows(1));
  const ef::PagedKvStatistics before = cache.statistics();
  EXPECT_EQ(before.copies, 1);
  auto& same = cache;
  cache = std::move(same);
  expect_equal(cache.statistics(), before);
  EXPECT_EQ(cache.keys(b, 0)(6, 0, 0), 2.0f);
  ef::PagedKvCache<float> constructed(std::move(cache));
  const auto expect_empty = [&](ef::PagedKvCache<float>& from) {
    expect_equal(from.statistics(), {});
    EXPECT_EQ(from.config().layers, 0);
    EXPECT_EQ(from.pages_free(), 0);
    EXPECT_TRUE(from.sequences().empty());
    EXPECT_FALSE(from.contains(a));
    EXPECT_THROW(from.keys(a, 0), std::invalid_argument);
    EXPECT_THROW(from.append(a, 0, rows(1), rows(1)), std::invalid_argument);
    EXPECT_THROW(from.source(0), std::invalid_argument);
    const SequenceId c = from.add_sequence();
    EXPECT_EQ(from.length(c), 0);
    EXPECT_THROW(from.reserve(c, 1), std::length_error);
    from.fork(c);
    from.truncate(c, 3);
    from.clear();
    expect_equal(from.statistics(), {});
  };
  expect_empty(cache);
  expect_equal(constructed.statistics(), before);
  cache = std::move(constructed);
  expect_empty(constructed);
  expect_equal(cache.statistics(), before);
  EXPECT_EQ(cache.keys(b, 0)(6, 0, 0), 2.0f);
}

/// A global cache works in its destructor, after main.
struct ToTheEnd {
  ef::PagedKvCache<float> cache{
      {.layers = 1, .kv_heads = 1, .head_dim = 1, .page_size = 4, .page_count = 5}};
  ~ToTheEnd() {
    const SequenceId a = cache.add_sequence(), b = cache.fork(a);
    cache.append(b, 0, rows(9, 2.0f), rows(9, 3.0f));
    cache.free(a);
    if (cache.values(b, 0)(8, 0, 0) != 3.0f || cache.pages_free() != 2) std::_Exit(1);
  }
} to_the_end;

}  // namespace
