// Laws of attention against a KvSource: dense or in pages of any size, whole or in chunks or token
// by token, the bits are the same; rows past a length are never read; INT8 storage is what its
// scales say.

#include "attention_case.h"

using namespace eigenformer_test;

namespace {

/// Keys and values (batch, length, kv_heads, head_dim) as a cache would hold them: every byte that
/// is not a row is NaN (or 0xff).
template <typename S>
class TestCache {
 public:
  /// page_size 0: dense with spare capacity.
  TestCache(Index batch, Index capacity, Index kv_heads, Index head_dim, Index page_size)
      : source_{.batch = batch, .kv_heads = kv_heads, .head_dim = head_dim},
        lengths_(static_cast<std::size_t>(batch), 0) {
    source_.lengths = lengths_.data();
    if (page_size == 0) {
      dense_keys_ = poisoned_tensor<S, 4>({batch, kv_heads, capacity, head_dim});
      dense_values_ = poisoned_tensor<S, 4>({batch, kv_heads, capacity, head_dim});
      source_.keys = dense_keys_.data(), source_.values = dense_values_.data();
      source_.sequence_stride = source_.value_sequence_stride = kv_heads * capacity * head_dim;
      source_.head_stride = source_.value_head_stride = capacity * head_dim;
      source_.row_stride = source_.value_row_stride = head_dim;
      return;
    }
    source_.page_size = page_size;
    const Index pages = (capacity + page_size - 1) / page_size;
    const auto rows = static_cast<std::size_t>(kv_heads * page_size),
               bytes = (rows * static_cast<std::size_t>(head_dim) * sizeof(S) + 3) / 4 * 4;
    source_.layer_offset = 64;
    source_.value_offset = bytes;
    source_.key_scale_offset = 2 * bytes;
    source_.value_scale_offset = 2 * bytes + rows * sizeof(float);
    for (Index i = 0; i < batch * pages; ++i) {
      storage_.emplace_back(64 + 2 * bytes + 2 * rows * sizeof(float), std::byte{0xff});
      pages_.push_back(storage_.back().data());
    }
    for (Index b = 0; b < batch; ++b) {
      table_storage_.emplace_back();
      for (Index i = 0; i < pages; ++i)
        table_storage_.back().push_back(
            static_cast<std::int32_t>((pages - 1 - i) * batch + b));  // out of order
      tables_.push_back(table_storage_.back().data());
    }
    source_.pages = pages_.data();
    source_.tables = tables_.data();
  }

  /// Position j of sequence b, head h; scales are for INT8.
  void set(Index b, Index h, Index j, const S* key, const S* value, float key_scale = 1,
           float value_scale = 1) {
    std::copy_n(key, source_.head_dim, const_cast<S*>(source_.key_row(b, h, j)));
    std::copy_n(value, source_.head_dim, const_cast<S*>(source_.value_row(b, h, j)));
    if constexpr (std::is_same_v<S, std::int8_t>) {
      const Index page = tables_[static_cast<std::size_t>(b)][j / source_.page_size],
                  row = h * source_.page_size + j % source_.page_size;
      auto* base = storage_[static_cast<std::size_t>(page)].data() + source_.layer_offset;
      reinterpret_cast<float*>(base + source_.key_scale_offset)[row] = key_scale;
      reinterpret_cast<float*>(base + source_.value_scale_offset)[row] = value_scale;
    }
  }
  void set_length(Index b, Index length) { lengths_[static_cast<std::size_t>(b)] = length; }

  const ef::KvSource<S>& source(Index) const { return source_; }

 private:
  ef::KvSource<S> source_;
  std::vector<Index> lengths_;
  ef::Tensor<S, 4> dense_keys_, dense_values_;
  std::vector<std::vector<std::byte>> storage_;
  std::vector<const std::byte*> pages_;
  std::vector<std::vector<std::int32_t>> table_storage_;
  std::vector<const std::int32_t*> tables_;
};

template <typename T>
ef::Tensor<T, 4> rows_of(const ef::Tensor<T, 4>& x, Index begin, Index end) {
  return x.slice(
      Eigen::array<Index, 4>{0, begin, 0, 0},
      Eigen::array<Index, 4>{x.dimension(0), end - begin, x.dimension(2), x.dimension(3)});
}

template <typename T>
class AttentionCache : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionCache, EveryScalar);

TYPED_TEST(AttentionCache, WholeChunksAndTokensGiveTheSameBits) {
  using T = TypeParam;
  const Index length = 141, dim = 21;
  const AttentionCase<T> c({2, length, length, 4, 2, dim, dim}, {length, length});
  for (const auto& named : option_sweep(4)) {
    if (!named.options.causal) continue;
    SCOPED_TRACE(named.name);
    const auto whole =
        ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, named.options);
    using Pair = std::pair<Index, Index>;
    for (const auto& [page_size, chunk] : {Pair{0, 1},
                                           {3, 1},
                                           {5, 2},
                                           {16, 3},
                                           {0, 4},
                                           {1, 7},
                                           {16, 7},
                                           {16, 64},
                                           {64, 64},
                                           {0, 100},
                                           {100, 100}}) {
      if (chunk < 5 && named.name != "causal" && named.name != "all")
        continue;  // the slow ones, once alone and once with everything
      TestCache<T> cache(2, length + 5, 2, dim, page_size);
      ef::Tensor<T, 4> pieces(2, length, 4, dim);
      for (Index begin = 0, end = 0; begin < length; begin = end) {
        // a prefix that all see comes first
        end = std::min(std::max(begin + chunk, named.options.prefix_length), length);
        for (Index b = 0; b < 2; ++b) {
          for (Index j = begin; j < end; ++j)
            for (Index h = 0; h < 2; ++h) cache.set(b, h, j, &c.k(b, j, h, 0), &c.v(b, j, h, 0));
          cache.set_length(b, end);
        }
        const auto part =
            ef::attention_with_kv_cache(rows_of(c.q, begin, end), cache, 0, named.options);
        for (Index b = 0; b < 2; ++b)
          std::copy_n(&part(b, 0, 0, 0), (end - begin) * 4 * dim, &pieces(b, begin, 0, 0));
      }
      ASSERT_TRUE(same_bits(whole, pieces)) << "page size " << page_size << ", chunk " << chunk;
    }
  }
}

TEST(AttentionCacheInt8, IsWhatItsScalesSay) {
  const Index length = 90;
  std::mt19937 generator(3);
  std::uniform_int_distribution<int> integers(-127, 127);
  TestCache<std::int8_t> cache(2, length, 2, 24, 16);
  // its keys become the dequantized ones
  AttentionCase<float> c({2, 5, length, 4, 2, 24, 24}, {length, 37});
  for (Index b = 0; b < 2; ++b) {
    const Index keys = c.key_lengths[static_cast<std::size_t>(b)];
    for (Index j = 0; j < keys; ++j)
      for (Index h = 0; h < 2; ++h) {
        std::vector<std::int8_t> key(24), value(24);
        const float key_scale = 0.01f + 0.0001f * static_cast<float>(j),
                    value_scale = 0.02f - 0.0001f * static_cast<float>(j);
        for (Index d = 0; d < 24; ++d) {
          key[static_cast<std::size_t>(d)] = static_cast<std::int8_t>(integers(generator));
          value[static_cast<std::size_t>(d)] = static_cast<std::int8_t>(integers(generator));
          c.k(b, j, h, d) = key_scale * static_cast<float>(key[static_cast<std::size_t>(d)]);
          c.v(b, j, h, d) = value_scale * static_cast<float>(value[static_cast<std::size_t>(d)]);
        }
        cache.set(b, h, j, key.data(), value.data(), key_scale, value_scale);
      }
    cache.set_length(b, keys);
  }
  const auto out = ef::attention_with_kv_cache(c.q, cache, 0, {.causal = true});
  EXPECT_TRUE(within(out, c.reference({.causal = true}).output, tolerance<float>()));
  // The same bits as float storage of the same numbers.
  ef::AttentionOptions options{.causal = true, .query_lengths = c.query_lengths};
  EXPECT_TRUE(
      same_bits(out, ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options)));
}

TEST(AttentionCacheCalls, MixesChunksAndDecodeSteps) {
  const std::vector<Index> keys{70, 12, 1, 0}, queries{9, 1, 1, 0};
  AttentionCase<float> c({4, 9, 70, 4, 2, 16, 16}, keys, 1, queries);
  TestCache<ef::bfloat16> cache(4, 80, 2, 16, 8);
  for (Index b = 0; b < 4; ++b) {
    for (Index j = 0; j < keys[static_cast<std::size_t>(b)]; ++j)
      for (Index h = 0; h < 2; ++h) {
        std::array<ef::bfloat16, 16> key, value;
        for (std::size_t d = 0; d < 16; ++d) {
          key[d] = static_cast<ef::bfloat16>(c.k(b, j, h, static_cast<Index>(d)));
          value[d] = static_cast<ef::bfloat16>(c.v(b, j, h, static_cast<Index>(d)));
          c.k(b, j, h, static_cast<Index>(d)) = static_cast<float>(key[d]);
          c.v(b, j, h, static_cast<Index>(d)) = static_cast<float>(value[d]);
        }
        cache.set(b, h, j, key.data(), value.data());
      }
    cache.set_length(b, keys[static_cast<std::size_t>(b)]);
  }
  Threads threads(2);
  const auto expected = c.reference({.causal = true});
  auto out = poisoned_tensor<float, 4>({4, 9, 4, 16});
  ef::attention_with_kv_source_into(threads.device, out, c.q, cache.source(0),
                                    {.causal = true, .query_lengths = queries});
  EXPECT_TRUE(within(out, expected.output, tolerance<float>()));
  for (Index i = 1; i < 9; ++i) EXPECT_EQ(out(1, i, 0, 0), 0.0f);  // padding
  EXPECT_TRUE(
      same_bits(out, ef::attention_with_kv_source(threads.device, c.q, cache.source(0),
                                                  {.causal = true, .query_lengths = queries})));
  EXPECT_TRUE(
      same_bits(out, ef::attention_with_kv_source(c.q, cache.source(0),
                                                  {.causal = true, .query_lengths = queries})));
  EXPECT_TRUE(
      same_bits(out, ef::attention_with_kv_cache(threads.device, c.q, cache, 0,
                                                 {.causal = true, .query_lengths = queries})));
  auto again = poisoned_tensor<float, 4>({4, 9, 4, 16});
  ef::attention_with_kv_cache_into(Eigen::DefaultDevice{}, again, c.q, cache, 0,
                                   {.causal = true, .query_lengths = queries});
  EXPECT_TRUE(same_bits(out, again));
}

TEST(AttentionCacheCalls, CompileAsTheContractWritesThemAndRefuse) {
  const auto q4 = random_tensor<float, 4>({2, 1, 4, 8}, 1);
  TestCache<float> cache(2, 10, 2, 8, 4);
  const Index layer_idx = 0;
  ef::Tensor<float, 4> dec = ef::attention_with_kv_cache(q4, cache, layer_idx, {.causal = true});
  for (Index i = 0; i < dec.size(); ++i)
    EXPECT_EQ(dec.data()[i], 0.0f);  // an empty cache shows nothing
  const ef::Tensor<float, 4> three(3, 1, 4, 8), narrow(2, 1, 4, 7), odd(2, 1, 3, 8);
  expect_throws<std::invalid_argument>([&] { ef::attention_with_kv_cache(three, cache, 0); },
                                       {"attention_with_kv_cache", "batch 3", "2 sequences"});
  expect_throws<std::invalid_argument>([&] { ef::attention_with_kv_cache(narrow, cache, 0); },
                                       {"head_dim 7", "has 8"});
  expect_throws<std::invalid_argument>([&] { ef::attention_with_kv_cache(odd, cache, 0); },
                                       {"3 heads"});
}

}  // namespace
