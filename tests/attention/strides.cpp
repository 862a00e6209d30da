// Laws of attention on one QKV projection: queries, keys and values read where they lie in it give
// the bits of copies, whatever stands beside them.
#include <eigenformer/kv_cache.h>

#include "attention_case.h"

using namespace eigenformer_test;

namespace {

template <typename T, int Rank>
ef::Tensor<T, Rank> copy_of(const ef::HeadsView<const T, Rank>& x) {
  Eigen::DSizes<Index, Rank> sizes;
  for (int d = 0; d < Rank; ++d) sizes[d] = x.dimension(static_cast<std::size_t>(d));
  ef::Tensor<T, Rank> copy(sizes);
  const Index width = x.dimension(Rank - 1), heads = x.dimension(Rank - 2);
  for (Index at = 0; at < copy.size(); ++at)
    copy.data()[at] = x.data()[at / width / heads * x.token_stride() +
                               at / width % heads * x.head_stride() + at % width];
  return copy;
}

/// Dense, against a source, and packed: rows in place and copied. `rows` of few (decode) and many.
template <typename T>
void check(const ef::HeadsView<const T, 4>& q, const ef::HeadsView<const T, 4>& k,
           const ef::HeadsView<const T, 4>& v) {
  const Index batch = q.dimension(0), rows = q.dimension(1);
  const auto copied_q = copy_of(q), copied_k = copy_of(k), copied_v = copy_of(v);
  const std::vector<Index> lengths(static_cast<std::size_t>(batch), rows - 1);
  const ef::AttentionOptions options{.causal = true};
  const auto expected =
      ef::batched_attention_with_padding(copied_q, copied_k, copied_v, lengths, options);
  EXPECT_TRUE(same_bits(ef::batched_attention_with_padding(q, k, v, lengths, options), expected));
  EXPECT_TRUE(
      same_bits(ef::batched_attention_with_padding(q, copied_k, v, lengths, options), expected));

  ef::KvCache<T> cache, copied_cache;
  ef::update_kv_cache(cache, k, v, 0);
  ef::update_kv_cache(copied_cache, copied_k, copied_v, 0);
  EXPECT_TRUE(same_bits(cache.keys(0), copied_k));
  EXPECT_TRUE(same_bits(cache.values(0), copied_v));
  EXPECT_TRUE(same_bits(ef::attention_with_kv_cache(q, cache, 0, options),
                        ef::attention_with_kv_cache(copied_q, copied_cache, 0, options)));
}

/// One sequence after the other: views of rank 3.
template <typename T>
void check_packed(const ef::HeadsView<const T>& q, const ef::HeadsView<const T>& k,
                  const ef::HeadsView<const T>& v) {
  const Index tokens = q.dimension(0);
  const std::vector<Index> offsets{0, 1, tokens / 2, tokens};
  const auto expected = ef::variable_length_attention(copy_of(q), copy_of(k), copy_of(v), offsets,
                                                      offsets, {.causal = true});
  EXPECT_TRUE(same_bits(ef::variable_length_attention(q, k, v, offsets, offsets, {.causal = true}),
                        expected));
}

template <typename T>
void check_all(Index rows, Index width) {
  SCOPED_TRACE(::testing::Message() << "rows " << rows << " width " << width);
  const Index batch = 2, heads = 4;
  {
    const auto qkv = random_tensor<T, 5>({batch, rows, 3, heads, width}, 1);
    check<T>(ef::heads_of(qkv, 0, 2), ef::heads_of(qkv, 1, 2), ef::heads_of(qkv, 2, 2));
  }
  {
    const auto qkv = random_tensor<T, 5>({batch, rows, heads, 3, width}, 2);
    check<T>(ef::heads_of(qkv, 0, 3), ef::heads_of(qkv, 1, 3), ef::heads_of(qkv, 2, 3));
  }
  {
    const auto qkv = random_tensor<T, 3>({batch, rows, (heads + 3) * width + 1}, 3);
    check<T>(ef::heads_of(qkv, 1, heads, width), ef::heads_of(qkv, 1 + heads * width, 1, width),
             ef::heads_of(qkv, (heads + 1) * width, 1, 2 * width));
    const ef::TensorView<const T, 2> matrix(qkv.data(), batch * rows, qkv.dimension(2));
    check_packed<T>(ef::heads_of(matrix, 1, heads, width), ef::heads_of(matrix, 0, 2, width),
                    ef::heads_of(matrix, 2 * width, 2, width));
  }
  {
    const auto qkv = random_tensor<T, 4>({batch * rows, heads, 3, width}, 4);
    check_packed<T>(ef::heads_of(qkv, 0, 2), ef::heads_of(qkv, 1, 2), ef::heads_of(qkv, 2, 2));
  }
}

TEST(AttentionStrides, HeadsInPlaceHaveTheBitsOfCopies) {
  for (Index rows : {1, 3, 70})
    for (Index width : {1, 7, 8, 24}) check_all<float>(rows, width);
  check_all<double>(3, 8);
  check_all<ef::bfloat16>(70, 16);
  check_all<ef::half>(2, 5);
}

TEST(AttentionStrides, LargeScoresTooAreThoseOfCopies) {
  auto qkv = random_tensor<float, 5>({1, 9, 2, 3, 8}, 5);
  for (Index i = 0; i < qkv.size(); ++i) qkv.data()[i] *= 30;  // rows in double
  const auto q = ef::heads_of(std::as_const(qkv), 1, 3);
  check<float>(q, ef::heads_of(std::as_const(qkv), 0, 3), q);
}

TEST(AttentionStrides, PartsThatAreNotThereAreRefused) {
  const auto x = random_tensor<float, 5>({1, 2, 3, 4, 5}, 1);
  const auto packed = random_tensor<float, 4>({2, 3, 4, 5}, 1);
  expect_throws<std::invalid_argument>([&] { ef::heads_of(x, 3, 2); },
                                       {"heads_of", "offset is 3", "0 to 2", "(1, 2, 3, 4, 5)"});
  EXPECT_THROW(ef::heads_of(x, -1, 2), std::invalid_argument);
  EXPECT_THROW(ef::heads_of(x, 4, 3), std::invalid_argument);
  EXPECT_THROW(ef::heads_of(x, 0, 1), std::invalid_argument);
  expect_throws<std::invalid_argument>([&] { ef::heads_of(x, 0, 4); },
                                       {"dimension is 4", "2 or 3"});
  EXPECT_THROW(ef::heads_of(packed, 3, 1), std::invalid_argument);
  EXPECT_THROW(ef::heads_of(packed, 0, 3), std::invalid_argument);
  EXPECT_EQ(ef::heads_of(packed, 2, 1).dimension(1), 4);
  EXPECT_EQ(ef::heads_of(packed, 2, 2).dimension(1), 3);
}

TEST(AttentionStrides, Int8FindsWhatItCannotHoldInPlace) {
  auto qkv = random_tensor<float, 5>({1, 2, 2, 3, 4}, 1);
  ef::KvCache<float, std::int8_t> cache;
  const auto k = ef::heads_of(std::as_const(qkv), 0, 3), v = ef::heads_of(std::as_const(qkv), 1, 3);
  ef::update_kv_cache(cache, k, v, 0);
  ef::KvCache<float, std::int8_t> copied;
  ef::update_kv_cache(copied, copy_of(k), copy_of(v), 0);
  EXPECT_TRUE(same_bits(cache.keys(0), copied.keys(0)));
  EXPECT_TRUE(same_bits(cache.values(0), copied.values(0)));
  qkv(0, 1, 1, 1, 2) = NAN;
  expect_throws<std::invalid_argument>([&] { ef::update_kv_cache(cache, k, v, 0); },
                                       {"new_values", "nan", "element 14"});
  EXPECT_EQ(cache.length(0), 2);
}

}  // namespace
