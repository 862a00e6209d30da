// Laws of KvCache's memory: capacity is what the plain model of it says after any history of
// updates and reservations; a reservation that cannot be met is refused at once with nothing
// changed, and none keeps an update from working; sizes up to the largest there is give right
// answers or clear errors; a cache works to the very end of the program.
#include <eigenformer/kv_cache.h>

#include <cstdlib>
#include <map>
#include <optional>

#include "compare.h"
#include "failing_allocations.h"

using namespace eigenformer_test;

namespace {

constexpr Index kLargest = (std::numeric_limits<Index>::max)(), kPage = 64;

ef::Tensor<float, 4> rows(Index batch, Index n, Index heads, Index dim, float value = 1.0f) {
  ef::Tensor<float, 4> result(batch, n, heads, dim);
  result.setConstant(value);
  return result;
}

/// Whole pages; a reservation is exact, an update grows by half at least.
struct Model {
  struct Layer {
    Index batch, dim;
    Index length = 0, pages = 0;
    bool closed = true;  // not since clear()
  };
  std::map<Index, Layer> layers;
  Index reserved = 0;

  static Index pages_of(Index length) { return (length + kPage - 1) / kPage; }
  static void room(Layer& layer, Index length) {
    layer.pages = std::max(layer.pages, pages_of(length));
  }
  void update(Index index, Index batch, Index n, Index dim) {
    auto found = layers.find(index);
    if (found == layers.end() || found->second.batch != batch || found->second.dim != dim)
      layers[index] = {batch, dim};
    Layer& layer = layers[index];
    room(layer, reserved);
    layer.length += n;
    if (pages_of(layer.length) > layer.pages)
      layer.pages = std::max(pages_of(layer.length), layer.pages + layer.pages / 2);
    layer.closed = true;
  }
  void reserve(Index length) {
    for (auto& [index, layer] : layers) room(layer, length);
    reserved = std::max(reserved, length);
  }
  void reserve(Index count, Index batch, Index length, Index dim) {
    for (Index i = 0; i < count; ++i) {
      const auto found = layers.find(i);
      if (found == layers.end() || found->second.batch != batch || found->second.dim != dim)
        layers[i] = {batch, dim};
      room(layers[i], length);
      layers[i].closed = true;
    }
  }
  bool may_have(Index index, Index batch, Index dim) const {
    const auto found = layers.find(index);
    return found == layers.end() || !found->second.closed ||
           (found->second.batch == batch && found->second.dim == dim);
  }
};

void expect_equal(const ef::KvCache<float>& cache, const Model& model) {
  for (Index index = 0; index < 4; ++index) {
    const auto found = model.layers.find(index);
    const Model::Layer layer = found == model.layers.end() ? Model::Layer{0, 0} : found->second;
    ASSERT_EQ(cache.capacity(index), layer.pages * kPage) << index;
    ASSERT_EQ(cache.length(index), layer.length) << index;
    const bool known = found != model.layers.end() && layer.closed;
    const auto keys = cache.keys(index), values = cache.values(index);
    ASSERT_EQ(keys.dimension(0), known ? layer.batch : 0);
    ASSERT_EQ(keys.dimension(1), known ? layer.length : 0);
    ASSERT_EQ(keys.dimension(2), known ? 1 : 0);
    ASSERT_EQ(keys.dimension(3), known ? layer.dim : 0);
    ASSERT_EQ(values.dimension(2), known ? 1 : 0);
    ASSERT_EQ(cache.source(index).batch, known ? layer.batch : 0);
    ASSERT_EQ(cache.source(index).head_dim, known ? layer.dim : 0);
  }
}

TEST(KvCacheMemory, RandomHistoriesHaveTheCapacityOfThePlainModel) {
  for (unsigned seed = 1; seed <= 60; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](Index n) {
      return static_cast<Index>(random() % static_cast<unsigned>(n));
    };
    ef::KvCache<float> cache;
    Model model;
    for (int event = 0; event < 120; ++event) {
      const Index kind = pick(20), layer = pick(4), length = pick(pick(5) == 0 ? 3000 : 300);
      const Index batch = 1 + pick(2), dim = 1 + pick(2);
      if (kind < 10) {
        const auto found = model.layers.find(layer);  // mostly the shape that is there
        const bool fits = found != model.layers.end() && found->second.closed && pick(8) != 0;
        const Index b = fits ? found->second.batch : batch, d = fits ? found->second.dim : dim;
        const auto update = [&] {
          ef::update_kv_cache(cache, rows(b, 1 + length / 2, 1, d), rows(b, 1 + length / 2, 1, d),
                              layer);
        };
        if (model.may_have(layer, b, d)) {
          update();
          model.update(layer, b, 1 + length / 2, d);
        } else {
          ASSERT_THROW(update(), std::invalid_argument);
        }
      } else if (kind < 13) {
        cache.reserve(length);
        model.reserve(length);
      } else if (kind < 16) {
        bool good = true;
        for (Index i = 0; i < layer; ++i) good = good && model.may_have(i, batch, dim);
        if (good) {
          cache.reserve(layer, batch, length, 1, dim);
          model.reserve(layer, batch, length, dim);
        } else {
          ASSERT_THROW(cache.reserve(layer, batch, length, 1, dim), std::invalid_argument);
        }
      } else if (kind < 18) {
        cache.truncate(length);
        for (auto& [index, l] : model.layers) l.length = std::min(l.length, length);
      } else if (kind == 18) {
        cache.clear();
        for (auto& [index, l] : model.layers) l.length = 0, l.closed = false;
      } else {
        const ef::KvCache<float> copy = cache;  // with its capacity, too
        ASSERT_NO_FATAL_FAILURE(expect_equal(copy, model));
        cache = copy;
      }
      ASSERT_NO_FATAL_FAILURE(expect_equal(cache, model)) << "seed " << seed << " event " << event;
    }
  }
}

TEST(KvCacheMemory, CapacitiesByHand) {
  const auto one = rows(1, 1, 1, 2);
  ef::KvCache<float> rising, known, cleared;
  rising.reserve(1000);
  rising.reserve(10);  // less than an earlier one: nothing
  ef::update_kv_cache(rising, one, one, 0);
  EXPECT_EQ(rising.capacity(0), 1024);
  ef::update_kv_cache(known, one, one, 0);
  EXPECT_EQ(known.capacity(0), 64);
  known.reserve(1, 1, 1000, 1, 2);  // a layer that is there grows, too
  EXPECT_EQ(known.capacity(0), 1024);
  ef::update_kv_cache(cleared, one, one, 0);
  cleared.clear();
  EXPECT_EQ(cleared.keys(0).dimension(0), 0);
  EXPECT_EQ(cleared.keys(0).dimension(2), 0);
  EXPECT_EQ(cleared.source(0).batch, 0);
  EXPECT_EQ(cleared.capacity(0), 64);
}

// ---- reservations that cannot be met ------------------------------------------------------------

template <typename Cache>
void expect_usable(Cache& cache, Index layer, Index length) {
  const auto one = rows(1, 1, 1, 2, 3.0f);
  ef::update_kv_cache(cache, one, one, layer);
  EXPECT_EQ(cache.length(layer), length + 1);
  EXPECT_EQ(cache.keys(layer)(0, length, 0, 1), 3.0f);
}

TEST(KvCacheMemory, AReservationThatNothingCouldMeetIsRefusedAtOnce) {
  constexpr Index most = (std::min)(Index{(std::numeric_limits<std::int32_t>::max)()},
                                    kLargest / kPage) *
                         kPage;  // positions of a page table
  for (Index length : {most + 1, most + 63, kLargest / 2, kLargest - 63, kLargest - 1, kLargest}) {
    if (length <= most) continue;  // where Index has 32 bits
    ef::KvCache<float> cache;
    const auto refuse = [&] {
      expect_throws<std::length_error>([&] { cache.reserve(length); },
                                       {"KvCache", std::to_string(length)});
      expect_throws<std::length_error>([&] { cache.reserve(2, 1, length, 1, 2); },
                                       {"KvCache", std::to_string(length)});
      expect_throws<std::length_error>([&] { cache.reserve(2, 0, length, 1, 2); },
                                       {"KvCache", std::to_string(length)});
    };
    refuse();
    expect_usable(cache, 0, 0);
    expect_throws<std::length_error>([&] { cache.reserve(length); }, {std::to_string(length)});
    EXPECT_EQ(cache.capacity(0), kPage);
    EXPECT_EQ(cache.capacity(1), 0);
    expect_usable(cache, 0, 1);
    expect_usable(cache, 1, 0);
  }
  ef::KvCache<float> cache;
  for (Index bad : {Index{65537}, kLargest})
    expect_throws<std::invalid_argument>([&] { cache.reserve(bad, 0, 0, 0, 0); },
                                         {"KvCache::reserve", "layers is " + std::to_string(bad)});
  for (Index size : {kLargest / 4, kLargest}) {
    EXPECT_THROW(cache.reserve(1, size, 1, 1, 2), std::length_error);
    EXPECT_THROW(cache.reserve(1, 1, 1, size, 2), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, 1, 1, 1, size), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, 1, 1, size, size), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, size, size, size, size), std::logic_error);
  }
  for (Index bad : {Index{-1}, -kLargest}) {
    EXPECT_THROW(cache.reserve(bad), std::invalid_argument);
    EXPECT_THROW(cache.reserve(bad, 1, 1, 1, 1), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, bad, 1, 1, 1), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, 1, bad, 1, 1), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, 1, 1, bad, 1), std::invalid_argument);
    EXPECT_THROW(cache.reserve(1, 1, 1, 1, bad), std::invalid_argument);
    EXPECT_THROW(cache.truncate(bad), std::invalid_argument);
    EXPECT_THROW(cache.capacity(bad), std::invalid_argument);
    EXPECT_THROW(cache.source(bad), std::invalid_argument);
  }
  cache.truncate(kLargest);
  EXPECT_EQ(cache.length(kLargest), 0);
  EXPECT_EQ(cache.capacity(kLargest), 0);
  expect_usable(cache, kLargest, 0);
  expect_usable(cache, 0, 0);
}

TEST(KvCacheMemory, AReservationWithoutMemoryIsRefusedForAllLayersOrForNone) {
  ef::KvCache<float> cache;
  const auto narrow = rows(1, 1, 1, 2), wide = rows(1, 1, 1, 64);
  {
    const ScarceMemory scarce(1 << 16);
    EXPECT_THROW(cache.reserve(100'000), std::bad_alloc);  // 781 KiB even for the least layer
    expect_usable(cache, 0, 0);
    EXPECT_EQ(cache.capacity(0), kPage);
    cache.clear();
  }
  ef::update_kv_cache(cache, narrow, narrow, 0);
  ef::update_kv_cache(cache, wide, wide, 1);
  {
    const ScarceMemory scarce(1 << 19);
    EXPECT_THROW(cache.reserve(2000), std::bad_alloc);  // layer 0 is well, layer 1 takes 1 MiB
    EXPECT_EQ(cache.capacity(0), kPage);
    EXPECT_EQ(cache.capacity(1), kPage);
    EXPECT_THROW(cache.reserve(3, 1, 2000, 1, 64), std::logic_error);  // layer 0 has another shape
    EXPECT_EQ(cache.capacity(2), 0);
  }
  const int failures = with_failing_allocations([&] { cache.reserve(2000); },
                                                [&] {
                                                  EXPECT_EQ(cache.capacity(0), kPage);
                                                  EXPECT_EQ(cache.capacity(1), kPage);
                                                });
  EXPECT_GT(failures, 5);
  EXPECT_EQ(cache.capacity(0), 2048);
  EXPECT_EQ(cache.capacity(1), 2048);
  expect_usable(cache, 0, 1);
}

TEST(KvCacheMemory, AReservationThatALaterLayerCannotMeetLeavesUpdatesAlone) {
  ef::KvCache<float> cache;
  cache.reserve(4000);  // 31 KiB for the least layer, 2 MiB for what comes
  const auto wide = rows(1, 1, 1, 64, 2.0f);
  {
    const ScarceMemory scarce(1 << 18);
    for (Index i = 0; i < 100; ++i) {
      ef::update_kv_cache(cache, wide, wide, 0);
      ASSERT_EQ(cache.length(0), i + 1);
    }
    EXPECT_EQ(cache.capacity(0), 128);
    ef::KvCache<float> wider = cache;
    const auto huge = rows(1, 1000, 1, 64);
    EXPECT_THROW(ef::update_kv_cache(wider, huge, huge, 0), std::bad_alloc);
    EXPECT_EQ(wider.length(0), 100);
  }
  ef::update_kv_cache(cache, wide, wide, 0);  // there is memory again
  EXPECT_EQ(cache.capacity(0), 4032);
  EXPECT_EQ(cache.keys(0)(0, 100, 0, 63), 2.0f);
}

TEST(KvCacheMemory, PagesOfAllSequencesTogetherHaveNumbersOf32Bits) {
  const ScarceMemory scarce(1 << 28);  // against tables of 2^32 entries
  const Index batch = Index{1} << 16, length = kPage << 16;
  ef::KvCache<float> cache;
  expect_throws<std::length_error>([&] { cache.reserve(1, batch, length, 0, 1); },
                                   {"KvCache", std::to_string(length), std::to_string(batch)});
  cache.reserve(length);  // of one sequence that is no more than 65536 pages
  const ef::TensorView<const float, 4> nothing(nullptr, batch, 1, 0, 1);
  ef::update_kv_cache(cache, nothing, nothing, 0);
  EXPECT_EQ(cache.length(0), 1);
  EXPECT_EQ(cache.capacity(0), kPage);
  expect_throws<std::length_error>([&] { cache.reserve(length); }, {std::to_string(batch)});
  cache.reserve(kPage * 3);
  EXPECT_EQ(cache.capacity(0), kPage * 3);
  EXPECT_THROW(cache.reserve(kPage << 15), std::length_error);  // 2^31 pages, one too many
}

TEST(KvCacheMemory, EmptyTensorsOfAnySizeAreRefusedOrTaken) {
  ef::KvCache<float> cache;
  const auto append = [&](Index batch, Index n, Index heads, Index dim) {
    const ef::TensorView<const float, 4> nothing(nullptr, batch, n, heads, dim);
    ef::update_kv_cache(cache, nothing, nothing, 0);
  };
  for (Index n : {kLargest / 2, kLargest - 1, kLargest}) {
    EXPECT_THROW(append(1, n, 0, 1), std::length_error);
    EXPECT_THROW(append(n, 1, 0, 1), std::length_error);
    EXPECT_THROW(append(0, n, 1, 1), std::length_error);
    EXPECT_THROW(append(0, 1, n, 2), std::invalid_argument);
    EXPECT_THROW(append(0, 1, 1, n), std::invalid_argument);
    const std::vector<Index> positions{0};
    ef::TensorView<float, 4> buffer(nullptr, 1, n, 0, 1);
    const ef::TensorView<const float, 4> nothing(nullptr, 1, n, 0, 1);
    ef::append_kv_into(Eigen::DefaultDevice{}, buffer, buffer, nothing, nothing, positions);
    EXPECT_THROW(ef::append_kv_into(Eigen::DefaultDevice{}, buffer, buffer, nothing, nothing,
                                    std::vector<Index>{1}),
                 std::length_error);
    EXPECT_THROW(ef::append_kv_into(Eigen::DefaultDevice{}, buffer, buffer, nothing, nothing,
                                    std::vector<Index>{kLargest}),
                 std::length_error);
  }
  append(1, 5, 0, 1);
  EXPECT_THROW(append(1, kLargest, 0, 1), std::length_error);
  EXPECT_THROW(append(1, kLargest - 5, 0, 1), std::length_error);
  EXPECT_EQ(cache.length(0), 5);
}

TEST(KvCacheMemory, Int8RefusesSizesBeforeItReadsData) {
  ef::KvCache<float, std::int8_t> fresh, known;
  const auto row = rows(1, 1, 1, 4);
  ef::update_kv_cache(known, row, row, 0);
  for (auto* cache : {&fresh, &known}) {
    const Index length = cache->length(0);
    const auto append = [&](Index n, Index heads, Index dim) {
      const ef::TensorView<const float, 4> endless(nullptr, 1, n, heads, dim);
      ef::update_kv_cache(*cache, endless, endless, 0);
    };
    for (Index n : {kLargest / 8 + 1, kLargest / 2, kLargest})
      EXPECT_THROW(append(n, 1, 4), std::length_error) << n;
    EXPECT_EQ(cache->length(0), length);
    EXPECT_EQ(cache->capacity(0), length == 0 ? 0 : kPage);
  }
  // Few enough positions for a page table, but not for the bytes of the rows.
  const Index n = Index{1} << (sizeof(Index) > 4 ? 30 : 10), dim = kLargest / n / 4 + 1;
  const ef::TensorView<const float, 4> wide(nullptr, 1, n, 1, dim);
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(fresh, wide, wide, 0); },
                                       {"update_kv_cache", "new_keys", std::to_string(dim)});
  EXPECT_EQ(fresh.capacity(0), 0);
}

TEST(KvCacheMemory, BuffersWhoseSizeOverflowsAreRefused) {
  const auto row = rows(1, 1, 1, 4);
  for (Index capacity : {kLargest / 4 + 1, kLargest / 2 + 1, kLargest}) {
    ef::TensorView<float, 4> buffer(nullptr, 1, capacity, 1, 4);
    for (Index position : {Index{0}, capacity - 1, Index{-1}})
      expect_throws<std::invalid_argument>(
          [&] {
            ef::append_kv_into(Eigen::DefaultDevice{}, buffer, buffer, row, row,
                               std::vector<Index>{position});
          },
          {"append_kv_into", "key_buffer", std::to_string(capacity), "overflows"});
  }
}

// ---- the end of the program ---------------------------------------------------------------------

/// A global cache works in a destructor, after main.
struct ToTheEnd {
  ef::KvCache<float> cache;
  ~ToTheEnd() {
    const auto more = rows(2, 70, 3, 5, 4.0f);
    ef::update_kv_cache(cache, more, more, 0);
    if (cache.length(0) != 70 || cache.values(0)(1, 69, 2, 4) != 4.0f) std::_Exit(1);
  }
} to_the_end;

}  // namespace
