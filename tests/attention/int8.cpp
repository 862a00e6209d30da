// Laws of attention against INT8 storage: scores are exact sums of quantized queries and keys, with
// the same bits on every instruction set and for few rows and many; results are those of the
// numbers that the scales say, and near those of queries that are not quantized.

#include <eigenformer/reference/kv_cache.h>
#include <eigenformer/reference/quantization.h>

#include "cache_case.h"

using namespace eigenformer_test;

namespace {

constexpr Index kHeads = 4, kKvHeads = 2;

/// A cache of random values, -128 among them, and a case whose keys and values are what they mean.
template <typename T>
struct Int8Case {
  TestCache<std::int8_t> cache;
  AttentionCase<T> floats;

  Int8Case(Index queries, Index keys, Index dim, Index page_size)
      : cache(1, keys, kKvHeads, dim, page_size),
        floats({1, queries, keys, kHeads, kKvHeads, dim, dim}, {keys}, 5, {queries}) {
    std::mt19937 generator(3);
    std::uniform_int_distribution<int> integers(-128, 127);
    std::vector<std::int8_t> key(static_cast<std::size_t>(dim)), value(key);
    for (Index j = 0; j < keys; ++j)
      for (Index h = 0; h < kKvHeads; ++h) {
        const float key_scale = 0.01f + 0.0001f * static_cast<float>(j),
                    value_scale = 0.02f - 0.0001f * static_cast<float>(j);
        for (Index d = 0; d < dim; ++d) {
          auto &k = key[static_cast<std::size_t>(d)], &v = value[static_cast<std::size_t>(d)];
          k = static_cast<std::int8_t>(integers(generator));
          v = static_cast<std::int8_t>(integers(generator));
          floats.k(0, j, h, d) = static_cast<T>(key_scale) * static_cast<T>(k);
          floats.v(0, j, h, d) = static_cast<T>(value_scale) * static_cast<T>(v);
        }
        cache.set(0, h, j, key.data(), value.data(), key_scale, value_scale);
      }
    cache.set_length(0, keys);
  }
};

/// score(row, head) of a query with its own key, from the integers.
float score_of(const Int8Case<float>& c, Index row, Index head, float scale) {
  const auto& s = c.floats.shape;
  const Index dim = s.head_dim, position = s.keys - s.queries + row;
  const float* query = &c.floats.q(0, row, head, 0);
  const float query_scale = ef::reference::int8_scale(query, dim);
  std::vector<std::int8_t> values(static_cast<std::size_t>(dim));
  ef::reference::quantize(query, dim, query_scale, values.data());
  const Index kv_head = head * kKvHeads / kHeads;
  const std::int8_t* key = c.cache.source(0).key_row(0, kv_head, position);
  std::int32_t sum = 0;
  for (Index d = 0; d < dim; ++d) sum += values[static_cast<std::size_t>(d)] * key[d];
  return static_cast<float>(sum) *
         ((query_scale * scale) * c.cache.source(0).key_scale(0, kv_head, position));
}

// A row that sees one key has its score as log_sum_exp. 2 and 4 query rows of a KV head read keys
// in place, 6 and 140 pack them; runs of rows in pages of 5 cross every tile.
TEST(AttentionInt8, EveryIsaHasTheScoresOfTheIntegers) {
  for (const Index dim : {1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 130}) {
    Int8Case<float> c(70, 75, dim, 5);
    std::fill_n(&c.floats.q(0, 68, 1, 0), dim, 0.0f);
    c.floats.q(0, 69, 2, dim / 2) = std::numeric_limits<float>::infinity();
    const float scale = 0.3f;
    for (const Index n : {1, 2, 3, 5, 70}) {
      const ef::TensorView<const float, 4> q(&c.floats.q(0, 70 - n, 0, 0), 1, n, kHeads, dim);
      for_each_product_isa([&](auto isa) {
        auto lse = poisoned_tensor<float, 3>({1, kHeads, n});
        ef::attention_with_kv_source(
            on(isa), q, c.cache.source(0),
            {.causal = true, .window = 1, .scale = scale, .log_sum_exp = lse});
        for (Index h = 0; h < kHeads; ++h)
          for (Index i = 0; i < n; ++i) {
            const Index row = 70 - n + i;
            if (row == 69 && h == 2)
              EXPECT_TRUE(std::isnan(lse(0, h, i))) << dim << " " << n;
            else
              EXPECT_EQ(lse(0, h, i), score_of(c, row, h, scale))
                  << "dim " << dim << ", " << n << " rows, head " << h << ", row " << row;
          }
      });
    }
  }
}

template <typename T>
void check_rows_alone(Index dim) {
  Int8Case<T> c(70, 75, dim, 16);
  for (const ef::AttentionOptions& options :
       {ef::AttentionOptions{.causal = true},
        ef::AttentionOptions{.causal = true, .window = 3, .prefix_length = 5}}) {
    c.cache.set_length(0, 75);
    const auto whole = ef::attention_with_kv_cache(c.floats.q, c.cache, 0, options);
    for (const Index row : {0, 1, 37, 69}) {
      c.cache.set_length(0, 75 - 69 + row);
      const ef::TensorView<const T, 4> q(&c.floats.q(0, row, 0, 0), 1, 1, kHeads, dim);
      const auto alone = ef::attention_with_kv_cache(q, c.cache, 0, options);
      const ef::TensorView<const T, 4> same(&whole(0, row, 0, 0), 1, 1, kHeads, dim);
      EXPECT_TRUE(same_bits(alone, same)) << "dim " << dim << ", row " << row;
    }
  }
}

TEST(AttentionInt8, ARowAloneHasTheBitsOfManyRows) {
  check_rows_alone<float>(40);
  check_rows_alone<ef::bfloat16>(64);
  check_rows_alone<double>(24);
}

TEST(AttentionInt8, IsWhatItsScalesSay) {
  const ef::AttentionOptions options{.causal = true};
  for (const Index queries : {2, 70}) {
    Int8Case<float> c(queries, 90, 24, 16);
    const auto out = ef::attention_with_kv_cache(c.floats.q, c.cache, 0, options);
    const auto exact = c.floats.reference(options).output;
    // Each number of a query is off by at most its row's greatest / 254, each score by the sum of
    // that, each weight by e to the power of twice the worst score's.
    double error = 0, largest = 0, keys = 0;
    for (Index i = 0; i < c.floats.q.size(); ++i)
      error = std::max(error, std::abs(static_cast<double>(c.floats.q.data()[i])) / 254);
    for (Index i = 0; i < c.floats.v.size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(c.floats.v.data()[i])));
    for (Index i = 0; i < c.floats.k.size(); i += 24) {
      double sum = 0;
      for (Index d = 0; d < 24; ++d) sum += std::abs(c.floats.k.data()[i + d]);
      keys = std::max(keys, sum);
    }
    const double bound = std::expm1(2 * error * keys / std::sqrt(24.0)) * largest;
    double worst = 0;
    for (Index i = 0; i < out.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(out.data()[i]) - exact.data()[i]));
    EXPECT_LT(worst, bound);
    EXPECT_GT(worst, 0);
    c.floats.q = ef::reference::through_int8(c.floats.q);
    EXPECT_TRUE(within(out, c.floats.reference(options).output, tolerance<float>()));
  }
}

// What a masked key holds, a scale that is no number too, changes nothing.
TEST(AttentionInt8, AMaskedKeyDoesNotReachARow) {
  for (const Index queries : {2, 70}) {
    Int8Case<float> c(queries, 90, 24, 16);
    ef::Tensor<bool, 2> mask(queries, 90);
    for (Index i = 0; i < queries; ++i)
      for (Index j = 0; j < 90; ++j) mask(i, j) = j % 7 != 3 && j < 80;
    const ef::AttentionOptions options{.causal = true, .mask = mask};
    const auto q = c.floats.q;
    const auto expected = ef::attention_with_kv_cache(q, c.cache, 0, options);
    c.floats.q = ef::reference::through_int8(q);
    EXPECT_TRUE(within(expected, c.floats.reference(options).output, tolerance<float>()));
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<std::int8_t> row(24, 127);
    for (Index j = 3; j < 90; j += 7)
      for (Index h = 0; h < kKvHeads; ++h)
        c.cache.set(0, h, j, row.data(), row.data(), nan, j % 2 == 0 ? nan : 1.0f);
    EXPECT_TRUE(same_bits(ef::attention_with_kv_cache(q, c.cache, 0, options), expected));
  }
}

TEST(AttentionInt8, SumsFit32Bits) {
  const Index dim = 132105;
  const TestCache<std::int8_t> cache(1, 0, 1, dim, 1);
  const ef::Tensor<float, 4> q(1, 1, 1, dim);
  expect_throws<std::invalid_argument>([&] { ef::attention_with_kv_cache(q, cache, 0); },
                                       {"head_dim is 132105", "132104"});
}

TEST(AttentionInt8, QueriesOfDoubleAreNotQuantized) {
  for (const Index queries : {2, 70}) {
    const Int8Case<double> c(queries, 90, 24, 16);
    const auto out = ef::attention_with_kv_cache(c.floats.q, c.cache, 0, {.causal = true});
    EXPECT_TRUE(within(out, c.floats.reference({.causal = true}).output, tolerance<double>()));
  }
}

}  // namespace
