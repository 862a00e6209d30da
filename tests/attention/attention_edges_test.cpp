// Forward attention at the edges of its numbers: averages of values near the largest, scores up to
// a million, long sequences.
#include "attention_case.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class AttentionEdges : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionEdges, EveryScalar);

TYPED_TEST(AttentionEdges, ScoresOfAMillion) {
  AttentionCase<TypeParam> c({1, 150, 150, 2, 1, 3, 8}, {150});
  set_exact_scores<TypeParam>(c);
  for (const float scale : {8e5f, -8e5f, 8e3f, 48.0f}) {
    ef::Tensor<ef::compute_type<TypeParam>, 3> lse(1, 2, 150);
    const ef::AttentionOptions options{.causal = true, .scale = scale, .log_sum_exp = lse};
    const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options);
    const auto expected = c.reference(options);
    EXPECT_TRUE(within(out, expected.output, tolerance<TypeParam>())) << scale;
    for (Index i = 0; i < lse.size(); ++i) {
      const double e = expected.log_sum_exp.data()[i];
      ASSERT_NEAR(static_cast<double>(lse.data()[i]), e, 1e-6 * (1 + std::abs(e))) << scale;
    }
  }
}

/// Values of a size, some of them negative, in columns of their own; the last column is tiny.
template <typename T>
void set_large_values(AttentionCase<T>& c, T size) {
  const Index width = c.shape.value_dim;
  for (Index j = 0; j < c.v.size() / width; ++j) {
    T* const v = c.v.data() + j * width;
    for (Index d = 0; d < width; ++d) v[d] = d % 2 == 0 || j % 3 != 0 ? size : -size;
    v[width - 1] = static_cast<T>(1e-30f);
  }
}

TEST(AttentionValues, AverageOfTheLargestIsFinite) {
  for (const Index length : {1, 2, 65, 200}) {
    AttentionCase<float> c({1, length, length, 2, 1, 4, 21}, {length});
    for (const float size : {3e38f, (std::numeric_limits<float>::max)()}) {
      set_large_values(c, size);
      for (const auto& named : option_sweep(2)) {
        const auto expected = c.reference(named.options);
        for_each_isa([&](auto isa) {
          auto out = poisoned_tensor<float, 4>({1, length, 2, 21});
          ef::batched_attention_with_padding_into(on(isa), out, c.q, c.k, c.v, c.key_lengths,
                                                  named.options);
          ASSERT_TRUE(within(out, expected.output, tolerance<float>()))
              << isa.name << " " << named.name << " " << length << " " << size;
          for (Index i = 0; i < length; ++i)  // far below what the rest weighs in `within`
            ASSERT_NEAR(out(0, i, 1, 20), expected.output(0, i, 1, 20), 1e-35);
        });
      }
    }
  }
}

TEST(AttentionValues, AverageOfTheLargestInOtherScalars) {
  AttentionCase<double> wide({1, 200, 200, 2, 1, 4, 9}, {200});
  set_large_values(wide, 1.7e308);
  auto scaled = wide;
  for (Index i = 0; i < scaled.v.size(); ++i) scaled.v.data()[i] *= 0x1p-600;
  auto out = ef::batched_attention_with_padding(wide.q, wide.k, wide.v, wide.key_lengths);
  for (Index i = 0; i < out.size(); ++i) out.data()[i] *= 0x1p-600;
  EXPECT_TRUE(within(out, scaled.reference({}).output, tolerance<double>()));

  AttentionCase<ef::bfloat16> narrow({1, 200, 200, 2, 1, 4, 9}, {200});
  set_large_values(narrow, (std::numeric_limits<ef::bfloat16>::max)());
  EXPECT_TRUE(
      within(ef::batched_attention_with_padding(narrow.q, narrow.k, narrow.v, narrow.key_lengths),
             narrow.reference({}).output, tolerance<ef::bfloat16>()));
}

TEST(AttentionValues, RowsBesideOneThatOverflowsKeepTheirBits) {
  AttentionCase<float> c({1, 90, 90, 2, 1, 8, 5}, {90});
  const auto before = ef::batched_attention_with_padding(c.q, c.k, c.v, {90}, {.causal = true});
  for (Index j = 40; j < 90; ++j) c.v(0, j, 0, 2) = 3e38f;
  const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, {90}, {.causal = true});
  for (Index i = 0; i < 90; ++i)
    for (Index h = 0; h < 2; ++h)
      for (Index d = 0; d < 5; ++d) {
        if (d != 2 || i < 40)
          ASSERT_EQ(out(0, i, h, d), before(0, i, h, d)) << i << " " << d;
        else
          ASSERT_TRUE(out(0, i, h, d) > 0 && out(0, i, h, d) <= 3.0001e38f) << i;
      }
  c.v(0, 50, 0, 2) = std::numeric_limits<float>::infinity();  // seen, and told
  c.v(0, 50, 0, 3) = std::numeric_limits<float>::quiet_NaN();
  const auto told = ef::batched_attention_with_padding(c.q, c.k, c.v, {90}, {.causal = true});
  EXPECT_EQ(told(0, 49, 0, 2), out(0, 49, 0, 2));
  EXPECT_EQ(told(0, 50, 0, 2), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(told(0, 50, 0, 3)));
  EXPECT_EQ(told(0, 50, 0, 1), out(0, 50, 0, 1));
}

// A value that is no number reaches its own column in the rows that see it; a column whose sum
// overflows beside it comes out right all the same, and so do the rows that do not see it.
TEST(AttentionValues, OverflowBesideANumberThatIsNone) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const Index at : {Index{0}, Index{70}, Index{199}}) {
      AttentionCase<float> c({1, 200, 200, 2, 1, 8, 8}, {200});
      for (Index j = 0; j < 200; ++j) c.v(0, j, 0, 5) = 3e38f;
      const auto clean =
          ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, {.causal = true});
      c.v(0, at, 0, 2) = bad;
      const auto out =
          ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, {.causal = true});
      for (Index i = 0; i < 200; ++i)
        for (Index h = 0; h < 2; ++h)
          for (Index d = 0; d < 8; ++d) {
            if (d == 2 && i >= at) {
              ASSERT_FALSE(std::isfinite(out(0, i, h, d))) << at << " " << i;
            } else {
              ASSERT_EQ(out(0, i, h, d), clean(0, i, h, d)) << at << " " << i << " " << d;
              ASSERT_TRUE(std::isfinite(out(0, i, h, d)));
            }
          }
    }
}

TEST(AttentionValues, ScoresThatOverflowStayInTheirRow) {
  AttentionCase<float> c({1, 6, 6, 1, 1, 4, 4}, {6});
  const auto before = ef::batched_attention_with_padding(c.q, c.k, c.v, {6}, {.causal = true});
  for (Index d = 0; d < 4; ++d) {
    c.q(0, 2, 0, d) = 1e20f, c.k(0, 1, 0, d) = 1e20f;  // +infinity: the row is NaN
    c.q(0, 4, 0, d) = -1e20f;                          // -infinity: a key without weight
  }
  for (Index i = 0; i < 6; ++i) c.q(0, i, 0, 0) = i == 2 ? 1e20f : i == 4 ? -1e20f : 0.0f;
  const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, {6}, {.causal = true});
  EXPECT_EQ(out(0, 0, 0, 1), before(0, 0, 0, 1));
  EXPECT_TRUE(std::isnan(out(0, 2, 0, 1)));
  EXPECT_TRUE(std::isfinite(out(0, 4, 0, 1)));
}

/// Scores that no float holds: those of a row stand about a number of up to 1.5 * `size`, either
/// sign, and differ by some units.
template <typename T>
void set_offset_scores(AttentionCase<T>& c, float size) {
  const Index width = c.shape.head_dim;
  for (Index r = 0; r < c.q.size() / width; ++r)
    c.q.data()[r * width] =
        static_cast<T>((r % 2 == 0 ? 0.5f : -0.5f) * (1.0f + static_cast<float>(r % 97) / 48));
  for (Index r = 0; r < c.k.size() / width; ++r) c.k.data()[r * width] = static_cast<T>(size);
}

template <typename T>
class AttentionLargeScores : public ::testing::Test {};
using LargeScoreScalars = ::testing::Types<float, ef::bfloat16>;
TYPED_TEST_SUITE(AttentionLargeScores, LargeScoreScalars);

TYPED_TEST(AttentionLargeScores, MeetTheToleranceWhereFloatDoesNotHoldThem) {
  const std::vector<float> sinks{1e3f, -2e5f, 1e4f, 0.5f}, slopes{100.0f, 3000.0f, 1e4f, 1.5f};
  const std::vector<ef::AttentionOptions> every{
      {.causal = true, .scale = 1.0f},
      {.scale = -0.7f},
      {.causal = true, .window = 70, .scale = 1.0f, .sinks = sinks, .prefix_length = 5},
      {.causal = true, .softcap = 2e5f, .scale = 1.0f},
      {.causal = true, .scale = 1.0f, .alibi_slopes = slopes}};
  for (const float size : {70.0f, 1e3f, 2e4f, 1e6f})
    for (std::size_t o = 0; o < every.size(); ++o) {
      AttentionCase<TypeParam> c({2, 150, 150, 4, 2, 24, 19}, {150, 77});
      set_offset_scores(c, size);
      ef::Tensor<float, 3> lse(2, 4, 150);
      ef::AttentionOptions options = every[o];
      options.log_sum_exp = lse;
      const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options);
      const auto expected = c.reference(options);
      EXPECT_LE(relative_error(out, expected.output), tolerance<TypeParam>()) << size << " " << o;
      EXPECT_TRUE(within(out, expected.output, 2 * tolerance<TypeParam>())) << size << " " << o;
      for (Index i = 0; i < lse.size(); ++i) {
        const double e = expected.log_sum_exp.data()[i];
        if (std::isfinite(e)) {
          ASSERT_NEAR(lse.data()[i], e, (3e-7 + tolerance<TypeParam>() / 100) * (20 + std::abs(e)))
              << size << " " << o;
        }
      }
    }
}

TEST(AttentionLargeScores, KeepTheirBitsInChunksBatchesAndThreads) {
  AttentionCase<float> c({3, 150, 150, 4, 2, 20, 9}, {150, 33, 97});
  set_offset_scores(c, 3000.0f);
  for (Index j = 0; j < 33; ++j) c.v(1, j, 1, 3) = 3e38f;  // rows that overflow besides
  const ef::AttentionOptions options{.causal = true, .scale = 1.0f};
  const auto whole = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options);
  EXPECT_TRUE(within(whole, c.reference(options).output, tolerance<float>()));
  Threads threads(3);
  EXPECT_TRUE(same_bits(whole, ef::batched_attention_with_padding(threads.device, c.q, c.k, c.v,
                                                                  c.key_lengths, options)));
  for (Index b = 0; b < 3; ++b)
    for (Index i = 0; i < c.key_lengths[static_cast<std::size_t>(b)]; ++i) {  // row by row
      ef::Tensor<float, 4> q(1, 1, 4, 20), k(1, i + 1, 2, 20), v(1, i + 1, 2, 9);
      std::copy_n(&c.q(b, i, 0, 0), q.size(), q.data());
      std::copy_n(&c.k(b, 0, 0, 0), k.size(), k.data());
      std::copy_n(&c.v(b, 0, 0, 0), v.size(), v.data());
      const auto row = ef::batched_attention_with_padding(q, k, v, {i + 1}, options);
      ASSERT_EQ(std::memcmp(row.data(), &whole(b, i, 0, 0), 36 * sizeof(float)), 0)
          << b << " " << i;
    }
}

// One chain of additions would be 1e-3 off at 100,000 equal values, which round to the same side.
TEST(AttentionValues, AverageOfManyEqualValues) {
  for (const Index keys : {1000, 4097, 100000}) {
    AttentionCase<float> c({1, 1, keys, 2, 1, 2, 3}, {keys});
    for (Index j = 0; j < keys; ++j)
      c.v(0, j, 0, 0) = 1.1f, c.v(0, j, 0, 1) = 3e38f, c.v(0, j, 0, 2) = 1e-38f;
    for (Index x = 0; x < 2; ++x) c.k(0, keys - 1, 0, x) = 100.0f;  // outweighs the folds before
    const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, {keys}, {.scale = 0.0f});
    const auto peaked = ef::batched_attention_with_padding(c.q, c.k, c.v, {keys}, {.scale = 0.1f});
    for (const auto* average : {&out, &peaked})
      for (Index h = 0; h < 2; ++h) {
        EXPECT_NEAR((*average)(0, 0, h, 0), 1.1f, 5e-6f) << keys;
        EXPECT_NEAR((*average)(0, 0, h, 1) / 3e38f, 1.0f, 5e-6f) << keys;
        EXPECT_NEAR((*average)(0, 0, h, 2) / 1e-38f, 1.0f, 5e-6f) << keys;
      }
  }
}

// Bits do not depend on the company, nor on the threads that share the keys of a row: rows of one
// call that begin before, in and after the first 8,192 keys, against the same rows alone.
TEST(AttentionValues, LongRowsKeepTheirBitsInAnyCompany) {
  AttentionCase<float> c({1, 300, 8500, 1, 1, 8, 8}, {8500});
  Threads threads(3);
  const float sink[] = {1.5f};
  for (const ef::AttentionOptions& options :
       {ef::AttentionOptions{.causal = true}, ef::AttentionOptions{.causal = true, .window = 4200},
        ef::AttentionOptions{.causal = true, .window = 150, .sinks = sink},
        ef::AttentionOptions{.causal = true, .sinks = sink},
        ef::AttentionOptions{.causal = true, .window = 40, .prefix_length = 4100}}) {
    const auto whole = ef::batched_attention_with_padding(c.q, c.k, c.v, {8500}, options);
    EXPECT_TRUE(within(whole, c.reference(options).output, tolerance<float>()));
    EXPECT_TRUE(same_bits(
        whole, ef::batched_attention_with_padding(threads.device, c.q, c.k, c.v, {8500}, options)));
    for (Index i = 0; i < 300; i += 23) {
      ef::Tensor<float, 4> q(1, 1, 1, 8), k(1, 8201 + i, 1, 8), v(1, 8201 + i, 1, 8);
      std::copy_n(&c.q(0, i, 0, 0), q.size(), q.data());
      std::copy_n(c.k.data(), k.size(), k.data());
      std::copy_n(c.v.data(), v.size(), v.data());
      const auto alone = ef::batched_attention_with_padding(q, k, v, {8201 + i}, options),
                 shared = ef::batched_attention_with_padding(threads.device, q, k, v, {8201 + i},
                                                             options);
      ASSERT_EQ(std::memcmp(alone.data(), &whole(0, i, 0, 0), 8 * sizeof(float)), 0) << i;
      ASSERT_EQ(std::memcmp(shared.data(), &whole(0, i, 0, 0), 8 * sizeof(float)), 0) << i;
    }
  }
}

}  // namespace
