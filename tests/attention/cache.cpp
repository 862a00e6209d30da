// Laws of attention against a KvSource: dense or in pages of any size, whole or in chunks or token
// by token, the bits are the same; rows past a length are never read. INT8 storage is in int8.cpp.

#include "cache_case.h"

using namespace eigenformer_test;

namespace {

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
