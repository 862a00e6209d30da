// Laws of attention where all is bfloat16, on every instruction set: some multiply pairs of it,
// with weights rounded to bfloat16, and multiply what a row does not see by weights of 0.

#include "cache_case.h"

using namespace eigenformer_test;

namespace {

using Scalar = ef::bfloat16;

TEST(AttentionBfloat16, EveryIsaMeetsTheDefinition) {
  for (const AttentionShape& s : {AttentionShape{2, 70, 70, 4, 2, 21, 33},
                                  {1, 1, 130, 4, 1, 64, 64},
                                  {2, 3, 67, 8, 2, 128, 40},
                                  {1, 5, 5, 1, 1, 1, 1},
                                  {1, 140, 140, 2, 1, 32, 16}}) {
    std::vector<Index> lengths(static_cast<std::size_t>(s.batch), s.keys);
    if (s.batch == 2) lengths[1] -= 3;
    const AttentionCase<Scalar> c(s, lengths);
    for (const auto& named : option_sweep(s.heads)) {
      if (s.batch == 1 && named.name != "causal" && named.name != "all") continue;
      SCOPED_TRACE(named.name + ", head " + std::to_string(s.head_dim));
      const auto expected = c.reference(named.options).output;
      auto options = named.options;
      options.query_lengths = c.query_lengths;
      for_each_product_isa([&](auto isa) {
        EXPECT_TRUE(within(
            ef::batched_attention_with_padding(on(isa), c.q, c.k, c.v, c.key_lengths, options),
            expected, tolerance<Scalar>()));
      });
    }
  }
}

TEST(AttentionBfloat16, ChunksHaveTheSameBits) {
  const Index length = 141, dim = 21;
  const AttentionCase<Scalar> c({1, length, length, 4, 2, dim, dim}, {length});
  const auto chunks_of = [&](auto isa, Index chunk, const ef::AttentionOptions& options) {
    TestCache<Scalar> cache(1, length, 2, dim, 5);
    ef::Tensor<Scalar, 4> pieces(1, length, 4, dim);
    for (Index begin = 0, end = 0; begin < length; begin = end) {
      end = std::min(begin + std::max(chunk, begin == 0 ? options.prefix_length : 0), length);
      for (Index j = begin; j < end; ++j)
        for (Index h = 0; h < 2; ++h) cache.set(0, h, j, &c.k(0, j, h, 0), &c.v(0, j, h, 0));
      cache.set_length(0, end);
      const ef::TensorView<const Scalar, 4> q(&c.q(0, begin, 0, 0), 1, end - begin, 4, dim);
      const auto part = ef::attention_with_kv_source(on(isa), q, cache.source(0), options);
      std::copy_n(part.data(), part.size(), &pieces(0, begin, 0, 0));
    }
    return pieces;
  };
  for (const ef::AttentionOptions& options :
       {ef::AttentionOptions{.causal = true},
        ef::AttentionOptions{.causal = true, .window = 70, .prefix_length = 4}})
    for_each_product_isa([&](auto isa) {
      const auto whole =
          ef::batched_attention_with_padding(on(isa), c.q, c.k, c.v, c.key_lengths, options);
      for (const Index chunk : {1, 2, 7, 64})
        EXPECT_TRUE(same_bits(chunks_of(isa, chunk, options), whole)) << "chunk " << chunk;
    });
}

// Key 71, in the middle of a block and of a pair.
TEST(AttentionBfloat16, WhatARowDoesNotSeeMayBeNaN) {
  const AttentionCase<Scalar> c({1, 100, 100, 4, 2, 24, 40}, {100});
  AttentionCase<Scalar> bad = c;
  const Scalar nan = std::numeric_limits<Scalar>::quiet_NaN(),
               infinity = std::numeric_limits<Scalar>::infinity();
  for (Index h = 0; h < 2; ++h)
    for (Index d = 0; d < 40; ++d) bad.v(0, 71, h, d) = d % 2 == 0 ? nan : infinity;
  for (const Index window : {0, 5})
    for_each_product_isa([&](auto isa) {
      const auto attend = [&](const AttentionCase<Scalar>& x) {
        return ef::batched_attention_with_padding(on(isa), x.q, x.k, x.v, x.key_lengths,
                                                  {.causal = true, .window = window});
      };
      const auto clean = attend(c), out = attend(bad);
      for (Index i = 0; i < 100; ++i) {
        const Scalar *const a = &clean(0, i, 0, 0), *const b = &out(0, i, 0, 0);
        if (i < 71 || (window > 0 && i >= 71 + window))
          EXPECT_EQ(std::memcmp(a, b, 4 * 40 * sizeof(Scalar)), 0) << i;
        else
          for (Index x = 0; x < 4 * 40; ++x)
            EXPECT_FALSE(std::isfinite(static_cast<float>(b[x]))) << i << " " << x;
      }
    });
}

}  // namespace
