// Laws of save and load: what was loaded holds, bit for bit, what was saved, in pages of any size
// and in any memory, and goes on like it; a stream that was cut or changed anywhere is refused,
// and nothing has changed.
#include <eigenformer/attention.h>
#include <eigenformer/paged_kv_cache.h>

#include <iostream>
#include <sstream>

#include "compare.h"

using namespace eigenformer_test;

namespace {

using ef::SequenceId;

ef::PagedKvConfig config(Index page_size, Index pages = 20) {
  return {.layers = 2,
          .kv_heads = 2,
          .head_dim = 8,
          .page_size = page_size,
          .page_count = pages,
          .value_dim = 8};
}

template <typename T, typename Storage>
SequenceId filled(ef::PagedKvCache<T, Storage>& cache, Index first, Index second) {
  const SequenceId id = cache.add_sequence();
  for (Index layer : {0, 1}) {
    const Index n = layer == 0 ? first : second;
    const auto dim = layer == 0 ? 8 : 5;
    const auto seed = static_cast<unsigned>(layer);
    cache.append(id, layer, random_tensor<T, 3>({n, 2, dim}, seed),
                 random_tensor<T, 3>({n, 2, dim - layer}, seed + 5));
  }
  return id;
}

template <typename Cache>
std::string saved(const Cache& cache, SequenceId id) {
  std::ostringstream stream;
  cache.save(id, stream);
  return stream.str();
}
template <typename Cache>
SequenceId loaded(Cache& cache, const std::string& text) {
  std::istringstream stream(text);
  return cache.load(stream);
}

template <typename T, typename Storage>
void round_trip() {
  ef::PagedKvCache<T, Storage> cache(config(4));
  const SequenceId a = filled(cache, 11, 9);
  const std::string text = saved(cache, a);
  for (Index page_size : {1, 3, 4, 16}) {
    ef::PagedKvCache<T, Storage> other(config(page_size));
    other.add_sequence();
    const SequenceId b = loaded(other, text);
    EXPECT_EQ(other.sequence_count(), 2);
    EXPECT_EQ(other.statistics().pages_used, (11 + page_size - 1) / page_size);
    for (Index layer : {0, 1}) {
      EXPECT_TRUE(same_bits(other.keys(b, layer), cache.keys(a, layer)));
      EXPECT_TRUE(same_bits(other.values(b, layer), cache.values(a, layer)));
    }
    EXPECT_EQ(other.shape(1).value_dim, 4);
    EXPECT_EQ(saved(other, b), text);  // scales and all
    const auto more = random_tensor<T, 3>({2, 2, 8}, 3);
    other.append(b, 0, more, more);
    EXPECT_EQ(other.length(b, 0), 13);
  }
}

TEST(PagedKvCacheSave, WhatWasLoadedIsWhatWasSaved) {
  round_trip<float, float>();
  round_trip<double, ef::bfloat16>();
  round_trip<float, std::int8_t>();
  ef::PagedKvCache<float> cache(config(4));
  const SequenceId empty = loaded(cache, saved(cache, cache.add_sequence()));
  EXPECT_EQ(cache.length(empty), 0);
  EXPECT_EQ(cache.shape(1).head_dim, 8);  // no rows fixed it
}

TEST(PagedKvCacheSave, WhatWasGivenUpStaysSo) {
  ef::PagedKvCache<float> cache(config(4));
  const SequenceId a = cache.add_sequence();
  for (Index layer : {0, 1})
    cache.append(a, layer, random_tensor<float, 3>({23, 2, 8}, 1),
                 random_tensor<float, 3>({23, 2, 8}, 2));
  cache.free_before(a, 16, 3);  // positions 4 to 15
  const auto q = random_tensor<float, 4>({1, 1, 2, 8}, 3);
  const ef::AttentionOptions options{.causal = true, .window = 7, .prefix_length = 4};
  const auto expected = ef::attention_with_kv_cache(q, cache, 1, options);
  const std::string text = saved(cache, a);
  for (Index page_size : {1, 2, 6, 64}) {
    ef::PagedKvCache<float> other(config(page_size, 30));
    const SequenceId b = loaded(other, text);
    EXPECT_TRUE(same_bits(ef::attention_with_kv_cache(q, other, 1, options), expected));
    EXPECT_THROW(ef::attention_with_kv_cache(q, other, 1, {.causal = true}), std::invalid_argument);
    EXPECT_THROW(other.keys(b, 0), std::invalid_argument);
    EXPECT_EQ(saved(other, b), text);
    // A page that is here in part only is not made known, and goes when more goes.
    EXPECT_LE(other.keep_prefix(b, std::vector<std::int32_t>(23, 1)), 4);
    const Index used = other.statistics().pages_used;
    other.free_before(b, 20, page_size == 1 ? 4 : 3);
    EXPECT_LE(other.statistics().pages_used, used);
    EXPECT_THROW(ef::attention_with_kv_cache(q, other, 1, {.causal = true, .window = 20}),
                 std::invalid_argument);
    other.clear();
    EXPECT_EQ(other.pages_free(), 30);
  }
}

TEST(PagedKvCacheSave, AnotherCacheRefuses) {
  ef::PagedKvCache<float> cache(config(4));
  const std::string text = saved(cache, filled(cache, 11, 9));
  const auto refuse = [&](auto exception, auto&& other, const std::vector<std::string>& message) {
    expect_throws<decltype(exception)>([&] { loaded(other, text); }, message);
    EXPECT_EQ(other.sequence_count(), 0);
    EXPECT_EQ(other.pages_free(), other.config().page_count);
  };
  const std::invalid_argument argument("");
  refuse(argument, ef::PagedKvCache<float, ef::bfloat16>(config(4)), {"storage 1", "has 3"});
  refuse(argument, ef::PagedKvCache<double>(config(4)), {"storage 1", "has 2"});
  auto c = config(4);
  c.layers = 3;
  refuse(argument, ef::PagedKvCache<float>(c), {"2 layers", "has 3"});
  c = config(4);
  c.head_dim = 4;
  refuse(argument, ef::PagedKvCache<float>(c), {"(11, 2, 8)", "2 heads of 4"});
  c.layer_shapes = {{2, 8}, {1, 5, 4}};
  refuse(argument, ef::PagedKvCache<float>(c), {"(9, 2, 5)", "1 heads of 5"});
  refuse(std::length_error(""), ef::PagedKvCache<float>(config(4, 2)), {"11 positions", "has 8"});
  ef::PagedKvCache<float> full(config(4, 3));
  full.reserve(full.add_sequence(), 4);
  EXPECT_THROW(loaded(full, text), std::length_error);
  EXPECT_EQ(full.sequence_count(), 1);
  EXPECT_EQ(full.pages_free(), 2);
  EXPECT_THROW(cache.save(77, std::cout), std::out_of_range);
  std::ostringstream broken;
  broken.setstate(std::ios::badbit);
  EXPECT_THROW(cache.save(0, broken), std::runtime_error);
  ef::PagedKvCache<float> moved(std::move(cache));
  EXPECT_THROW(loaded(cache, text), std::invalid_argument);
}

// Cut anywhere, and changed in 2,000 ways: always an exception that says so.
TEST(PagedKvCacheSave, DamagedStreamsAreRefused) {
  ef::PagedKvCache<float, std::int8_t> cache(config(4));
  const SequenceId a = filled(cache, 7, 5);
  cache.free_before(a, 4);
  const std::string text = saved(cache, a);
  ef::PagedKvCache<float, std::int8_t> other(config(3));
  const auto refuse = [&](const std::string& damaged) {
    try {
      loaded(other, damaged);
      ADD_FAILURE() << "loaded";
    } catch (const std::invalid_argument&) {
    } catch (const std::length_error&) {
    }
    ASSERT_EQ(other.sequence_count(), 0);
    ASSERT_EQ(other.pages_free(), 20);
    ASSERT_EQ(other.shape(1).head_dim, 8);
  };
  for (std::size_t n = 0; n < text.size(); ++n) refuse(text.substr(0, n));
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    std::string damaged = text;
    // Half of them in the head, whose numbers say how much is to be done.
    const std::size_t reach = i % 2 == 0 ? 144 : text.size();
    const std::size_t at = random() % reach, length = 1 + random() % 8;
    for (std::size_t j = at; j < std::min(at + length, text.size()); ++j)
      damaged[j] = static_cast<char>(i % 3 == 0 ? 0xff : random());
    if (damaged != text) refuse(damaged);
  }
  // Numbers that contradict each other under a checksum that is right.
  for (int field = 0; field < 16; ++field)
    for (const std::int64_t number :
         {std::int64_t{-1}, std::int64_t{0}, std::int64_t{6}, std::int64_t{1} << 40,
          (std::numeric_limits<std::int64_t>::max)()}) {
      std::string damaged = text;
      std::memcpy(damaged.data() + 8 + 8 * field, &number, 8);
      if (damaged == text) continue;
      ef::detail::PagedChecksum sum;
      sum.add(damaged.data(), 8);
      sum.add(damaged.data() + 8, 48);
      sum.add(damaged.data() + 56, 40);
      sum.add(damaged.data() + 96, 40);
      const std::int64_t value = sum.value();
      std::memcpy(damaged.data() + 136, &value, 8);
      refuse(damaged);
    }
  EXPECT_EQ(other.length(loaded(other, text), 0), 7);
}

// Rows that quantization never makes, under checksums that are right.
TEST(PagedKvCacheSave, RowsThatAreNotQuantizedAreRefused) {
  ef::PagedKvCache<float, std::int8_t> cache(config(4)), other(config(3));
  const SequenceId a = filled(cache, 7, 5);
  const auto source = cache.source(0);
  const auto refuse = [&](const auto* place, auto bad, const char* message) {
    auto& element = const_cast<std::remove_cvref_t<decltype(*place)>&>(*place);
    const auto kept = std::exchange(element, bad);
    expect_throws<std::invalid_argument>([&] { loaded(other, saved(cache, a)); }, {message});
    EXPECT_EQ(other.pages_free(), 20);
    element = kept;
  };
  refuse(source.key_row(0, 1, 6) + 7, std::int8_t{-128}, "load: a row of INT8 holds -128");
  refuse(source.value_row(0, 0, 0), std::int8_t{-128}, "load: a row of INT8 holds -128");
  refuse(source.value_scale_row(0, 1, 6), -1.0f, "load: a row has the scale -1");
  refuse(source.key_scale_row(0, 0, 2), INFINITY, "load: a row has the scale inf");
  const_cast<float&>(*source.key_scale_row(0, 0, 2)) = NAN;  // as a GPU writes it
  EXPECT_EQ(other.length(loaded(other, saved(cache, a)), 0), 7);
}

}  // namespace
