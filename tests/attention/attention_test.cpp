// Laws: equal to the plain definition for every option, shape, scalar and ISA; keys and rows that
// must not count never do, NaN included; bits do not depend on threads, batch, padding or packing.
// Calls, caches, gradients and the edges of numbers are in the files beside this one.
#include "attention_case.h"
#include "infinity.h"

using namespace eigenformer_test;

namespace {

/// Largest error relative to 1 + |expected|; -infinity must meet -infinity.
template <typename A>
double log_sum_exp_error(const A& actual, const ef::Tensor<double, 3>& expected) {
  double worst = 0;
  for (Index i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(actual.data()[i]), e = expected.data()[i];
    if (a == e) continue;
    const double error = std::abs(a - e) / (1 + std::abs(e));
    worst = std::max(worst, std::isnan(error) ? kInfinity : error);
  }
  return worst;
}

template <typename T>
void check_zero_rows(const AttentionCase<T>& c, const ef::Tensor<T, 4>& out,
                     const ef::reference::AttentionResult& expected) {
  const auto& s = c.shape;
  for (Index b = 0; b < s.batch; ++b)
    for (Index i = 0; i < s.queries; ++i)
      for (Index h = 0; h < s.heads; ++h) {
        if (expected.log_sum_exp(b, h, i) > -kInfinity) continue;
        for (Index d = 0; d < s.value_dim; ++d)
          ASSERT_EQ(static_cast<double>(out(b, i, h, d)), 0.0) << b << " " << i << " " << h;
      }
}

/// Against the reference, on one thread and on three.
template <typename T>
void check(const AttentionCase<T>& c, const NamedOptions& named) {
  SCOPED_TRACE(named.name);
  const auto& s = c.shape;
  ef::AttentionOptions options = named.options;
  const auto expected = c.reference(options);
  auto lse = poisoned_tensor<ef::compute_type<T>, 3>({s.batch, s.heads, s.queries});
  options.log_sum_exp = lse;
  if (s.queries != s.keys || c.query_lengths != c.key_lengths)
    options.query_lengths = c.query_lengths;
  auto out = poisoned_tensor<T, 4>({s.batch, s.queries, s.heads, s.value_dim});
  ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, out, c.q, c.k, c.v, c.key_lengths,
                                          options);
  ASSERT_TRUE(within(out, expected.output, tolerance<T>()));
  ASSERT_LT(log_sum_exp_error(lse, expected.log_sum_exp),
            (std::is_same_v<T, double> ? 1e-12 : 1e-5));
  check_zero_rows(c, out, expected);

  Threads threads(3);
  auto other = poisoned_tensor<T, 4>({s.batch, s.queries, s.heads, s.value_dim});
  auto other_lse = poisoned_tensor<ef::compute_type<T>, 3>({s.batch, s.heads, s.queries});
  options.log_sum_exp = other_lse;
  ef::batched_attention_with_padding_into(threads.device, other, c.q, c.k, c.v, c.key_lengths,
                                          options);
  ASSERT_TRUE(same_bits(out, other));
  ASSERT_TRUE(same_bits(lse, other_lse));
}

template <typename T>
class Attention : public ::testing::Test {};
TYPED_TEST_SUITE(Attention, EveryScalar);

TYPED_TEST(Attention, EqualsItsDefinitionForEveryOption) {
  const AttentionCase<TypeParam> padded({3, 100, 100, 4, 2, 24, 40}, {100, 0, 71});
  // more queries than keys in the second
  const AttentionCase<TypeParam> chunk({2, 13, 140, 4, 1, 16, 16}, {140, 7}, 5);
  const AttentionCase<TypeParam> ragged({4, 9, 80, 2, 2, 8, 8}, {80, 33, 5, 64}, 9, {9, 1, 5, 0});
  for (const auto& options : option_sweep(4)) {
    check(padded, options);
    check(chunk, options);
  }
  for (const auto& options : option_sweep(2)) check(ragged, options);
}

TYPED_TEST(Attention, EqualsItsDefinitionAtEveryEdge) {
  // around every vector width, head_dim and value_dim in opposite directions
  for (Index width = 1; width <= 35; ++width) {
    const AttentionCase<TypeParam> c({2, 6, 6, 2, 1, width, 36 - width}, {6, 3},
                                     static_cast<unsigned>(width));
    check(c, {"width " + std::to_string(width), {.causal = true}});
  }
  // around panels and key blocks
  for (Index length : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193})
    for (Index heads : {1, 3}) {
      const AttentionCase<TypeParam> c({1, length, length, heads, 1, 8, 8}, {length},
                                       static_cast<unsigned>(length));
      check(c, {"length " + std::to_string(length), {.causal = true, .window = 40}});
      check(c, {"length " + std::to_string(length), {}});
    }
}

TYPED_TEST(Attention, EveryIsaMeetsTheDefinition) {
  const AttentionCase<TypeParam> c({2, 70, 70, 6, 2, 20, 33}, {70, 41});
  for (const auto& named : option_sweep(6)) {
    const auto expected = c.reference(named.options);
    for_each_isa([&](auto isa) {
      auto out = poisoned_tensor<TypeParam, 4>({2, 70, 6, 33});
      ef::batched_attention_with_padding_into(on(isa), out, c.q, c.k, c.v, c.key_lengths,
                                              named.options);
      EXPECT_TRUE(within(out, expected.output, tolerance<TypeParam>()))
          << isa.name << " " << named.name;
    });
  }
}

TEST(AttentionBits, RowsDoNotDependOnBatchPaddingOrPacking) {
  const std::vector<Index> lengths{130, 1, 77};
  const AttentionCase<float> c({3, 130, 130, 4, 2, 16, 24}, lengths);
  for (const auto& named : option_sweep(4)) {
    SCOPED_TRACE(named.name);
    ef::AttentionOptions options = named.options;
    auto batch_lse = poisoned_tensor<float, 3>({3, 4, 130});
    options.log_sum_exp = batch_lse;
    const auto batch = ef::batched_attention_with_padding(c.q, c.k, c.v, lengths, options);
    EXPECT_LT(log_sum_exp_error(batch_lse, c.reference(options).log_sum_exp), 1e-5);
    ef::Tensor<float, 3> pq(208, 4, 16), pk(208, 2, 16), pv(208, 2, 24);
    Index token = 0;
    for (Index b = 0; b < 3; ++b) {
      const Index n = lengths[static_cast<std::size_t>(b)];
      ef::Tensor<float, 4> q(1, n, 4, 16), k(1, n, 2, 16), v(1, n, 2, 24);
      std::copy_n(&c.q(b, 0, 0, 0), q.size(), q.data());
      std::copy_n(&c.k(b, 0, 0, 0), k.size(), k.data());
      std::copy_n(&c.v(b, 0, 0, 0), v.size(), v.data());
      std::copy_n(q.data(), q.size(), &pq(token, 0, 0));
      std::copy_n(k.data(), k.size(), &pk(token, 0, 0));
      std::copy_n(v.data(), v.size(), &pv(token, 0, 0));
      token += n;
      const auto alone = ef::batched_attention_with_padding(
          q, k, v, std::vector<int>{static_cast<int>(n)}, named.options);
      EXPECT_EQ(std::memcmp(alone.data(), &batch(b, 0, 0, 0),
                            static_cast<std::size_t>(alone.size()) * sizeof(float)),
                0)
          << b;
    }
    auto lse = poisoned_tensor<float, 2>({4, 208});
    options.log_sum_exp = lse;
    const std::vector<int> offsets{0, 130, 131, 208};
    const ef::Tensor<float, 3> packed =
        ef::variable_length_attention(pq, pk, pv, offsets, offsets, options);
    token = 0;
    for (Index b = 0; b < 3; ++b) {
      const Index n = lengths[static_cast<std::size_t>(b)];
      EXPECT_EQ(std::memcmp(&packed(token, 0, 0), &batch(b, 0, 0, 0),
                            static_cast<std::size_t>(n * 4 * 24) * sizeof(float)),
                0)
          << b;
      for (Index h = 0; h < 4; ++h)
        for (Index i = 0; i < n; ++i)
          ASSERT_EQ(lse(h, token + i), batch_lse(b, h, i)) << b << " " << h << " " << i;
      token += n;
    }
  }
}

TEST(AttentionBits, AKeyNobodySeesMayBeNaN) {
  AttentionCase<float> c({1, 90, 90, 2, 1, 16, 16}, {90});
  const auto clean = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths,
                                                        {.causal = true, .window = 10});
  for (Index x = 0; x < 16; ++x)
    c.k(0, 50, 0, x) = c.v(0, 50, 0, x) = std::numeric_limits<float>::quiet_NaN();
  const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths,
                                                      {.causal = true, .window = 10});
  for (Index i = 0; i < 90; ++i)
    for (Index h = 0; h < 2; ++h) {
      if (i >= 50 && i < 60)
        EXPECT_TRUE(std::isnan(out(0, i, h, 3))) << i;  // and a NaN that is seen is told
      else
        EXPECT_EQ(std::memcmp(&out(0, i, h, 0), &clean(0, i, h, 0), 16 * sizeof(float)), 0) << i;
    }
}

TEST(AttentionValues, InfiniteScores) {
  const float infinity = std::numeric_limits<float>::infinity();
  ef::Tensor<float, 3> q(1, 3, 1), k(1, 3, 1), v(1, 3, 2), lse3(1, 1, 3);
  q.setConstant(1.0f);
  k.setConstant(-infinity);
  v.setConstant(5.0f);
  ef::Tensor<float, 2> lse(1, 3);
  auto out = ef::batched_attention_with_padding(q, k, v, {3}, {.log_sum_exp = lse});
  EXPECT_EQ(out(0, 1, 0), 0.0f);
  EXPECT_EQ(lse(0, 1), -infinity);
  k(0, 1, 0) = 2.0f;  // one finite score takes all the weight
  out = ef::batched_attention_with_padding(q, k, v, {3}, {.log_sum_exp = lse});
  EXPECT_EQ(out(0, 0, 1), 5.0f);
  EXPECT_EQ(lse(0, 0), 2.0f);
  k(0, 2, 0) = infinity;  // rows 0 and 1 do not see it
  out = ef::batched_attention_with_padding(q, k, v, {3}, {.causal = true, .log_sum_exp = lse});
  EXPECT_EQ(out(0, 1, 1), 5.0f);
  EXPECT_TRUE(std::isnan(out(0, 2, 1)));
  EXPECT_TRUE(std::isnan(lse(0, 2)));
  const std::vector<float> sinks{0.5f};
  out = ef::batched_attention_with_padding(q, k, v, {0}, {.sinks = sinks, .log_sum_exp = lse});
  EXPECT_EQ(out(0, 0, 0), 0.0f);
  EXPECT_EQ(lse(0, 0), -infinity);  // no visible key: the sink does not count
  lse.setConstant(7.0f);
  out = ef::batched_attention_with_padding(q, k, v, {0},
                                           {.causal = true,
                                            .sinks = sinks,
                                            .prefix_length = 3,
                                            .log_sum_exp = lse,
                                            .query_lengths = {1}});
  EXPECT_EQ(out(0, 0, 0), 0.0f);
  EXPECT_EQ(lse(0, 0), -infinity);  // nor one that a prefix would show
}

}  // namespace
