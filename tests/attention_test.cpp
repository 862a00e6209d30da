// Laws: equal to the plain definition for every option, shape, scalar and ISA; keys and rows that
// must not count never do, NaN included; bits do not depend on threads, batch, padding, packing or
// chunks; what makes no sense is refused with the argument named.
#include <atomic>
#include <cstdlib>
#include <new>

#include "attention_cache_cases.h"
#include "attention_edge_cases.h"
#include "attention_golden.h"
#include "attention_gradient_cases.h"
#include "attention_gradient_edges.h"

using namespace eigenformer_test;

namespace {

std::atomic<long> allocations{0};

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto a = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  std::free(p);
}

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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
using Scalars = ::testing::Types<float, double, ef::bfloat16, ef::half>;
TYPED_TEST_SUITE(Attention, Scalars);

TYPED_TEST(Attention, EqualsItsDefinitionForEveryOption) {
  const AttentionCase<TypeParam> padded({3, 100, 100, 4, 2, 24, 40}, {100, 0, 71});
  const AttentionCase<TypeParam> chunk({2, 13, 140, 4, 1, 16, 16}, {140, 7},
                                       5);  // more queries than keys in the second
  const AttentionCase<TypeParam> ragged({4, 9, 80, 2, 2, 8, 8}, {80, 33, 5, 64}, 9, {9, 1, 5, 0});
  for (const auto& options : option_sweep(4)) {
    check(padded, options);
    check(chunk, options);
  }
  for (const auto& options : option_sweep(2)) check(ragged, options);
}

TYPED_TEST(Attention, EqualsItsDefinitionAtEveryEdge) {
  for (Index width = 1; width <= 35;
       ++width) {  // around every vector width, head_dim and value_dim in opposite directions
    const AttentionCase<TypeParam> c({2, 6, 6, 2, 1, width, 36 - width}, {6, 3},
                                     static_cast<unsigned>(width));
    check(c, {"width " + std::to_string(width), {.causal = true}});
  }
  for (Index length : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129,
                       193})  // around panels and key blocks
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

TEST(AttentionCalls, OfTheContract) {
  const auto query = random_tensor<float, 3>({2, 4, 8}, 1),
             key = random_tensor<float, 3>({2, 4, 8}, 2),
             value = random_tensor<float, 3>({2, 4, 8}, 3);
  const auto q4 = random_tensor<float, 4>({2, 4, 4, 8}, 1),
             k4 = random_tensor<float, 4>({2, 4, 2, 8}, 2),
             v4 = random_tensor<float, 4>({2, 4, 2, 8}, 3);
  const auto q = random_tensor<float, 3>({5, 2, 8}, 4), k = random_tensor<float, 3>({5, 2, 8}, 5),
             v = random_tensor<float, 3>({5, 2, 8}, 6);
  const auto call = [&](const auto& seq_lengths) {
    ef::Tensor<float, 3> out = ef::batched_attention_with_padding(query, key, value, seq_lengths);
    ef::Tensor<float, 4> o4 =
        ef::batched_attention_with_padding(q4, k4, v4, seq_lengths, {.causal = true});
    EXPECT_EQ(out(0, 3, 7), 0.0f);  // the notebook's example: lengths 3 and 2
    EXPECT_EQ(out(1, 2, 0), 0.0f);
    EXPECT_NE(out(1, 1, 0), 0.0f);
    EXPECT_EQ(o4(1, 0, 3, 2), v4(1, 0, 1, 2));  // the first query sees itself only
    return out;
  };
  const int array[]{3, 2};
  const std::vector<Index> wide{3, 2};
  const std::vector<int> narrow{3, 2};
  const auto expected = call(wide);
  EXPECT_TRUE(same_bits(expected, call(narrow)));
  EXPECT_TRUE(same_bits(expected, call(std::span<const Index>(wide))));
  EXPECT_TRUE(same_bits(expected, call(std::span<const int>(narrow))));
  EXPECT_TRUE(same_bits(expected, call(std::array<int, 2>{3, 2})));
  EXPECT_TRUE(same_bits(expected, call(array)));
  EXPECT_TRUE(same_bits(expected, ef::batched_attention_with_padding(query, key, value, {3, 2})));

  const std::vector<int> q_offsets{0, 2, 5};
  const std::vector<Index> kv_offsets{0, 1, 5};
  ef::Tensor<float, 3> packed =
      ef::variable_length_attention(q, k, v, q_offsets, kv_offsets, {.causal = true});
  EXPECT_EQ(packed(0, 0, 0), 0.0f);  // two queries, one key: the first is before it
  EXPECT_EQ(packed(1, 0, 0), v(0, 0, 0));

  Threads threads(2);
  ef::TensorView<const float, 3> view(query.data(), 2, 4, 8);
  EXPECT_TRUE(same_bits(
      expected, ef::batched_attention_with_padding(threads.device, view, key, value, wide)));
  EXPECT_TRUE(same_bits(packed, ef::variable_length_attention(threads.device, q, k, v, q_offsets,
                                                              kv_offsets, {.causal = true})));
}

TEST(AttentionCalls, EmptyTensorsAreLegal) {
  const std::vector<Index> none;
  EXPECT_EQ(ef::batched_attention_with_padding(ef::Tensor<float, 3>(0, 4, 8),
                                               ef::Tensor<float, 3>(0, 4, 8),
                                               ef::Tensor<float, 3>(0, 4, 8), none)
                .size(),
            0);
  EXPECT_EQ(ef::batched_attention_with_padding(ef::Tensor<float, 3>(2, 0, 8),
                                               ef::Tensor<float, 3>(2, 0, 8),
                                               ef::Tensor<float, 3>(2, 0, 8), {0, 0})
                .size(),
            0);
  const ef::Tensor<float, 4> q = random_tensor<float, 4>({1, 2, 2, 8}, 1);
  const auto out = ef::batched_attention_with_padding(q, ef::Tensor<float, 4>(1, 0, 2, 8),
                                                      ef::Tensor<float, 4>(1, 0, 2, 8), {0});
  for (Index i = 0; i < out.size(); ++i) EXPECT_EQ(out.data()[i], 0.0f);
  EXPECT_EQ(
      ef::variable_length_attention(ef::Tensor<float, 3>(0, 2, 8), ef::Tensor<float, 3>(0, 2, 8),
                                    ef::Tensor<float, 3>(0, 2, 8), {0, 0, 0}, {0, 0, 0})
          .size(),
      0);
}

TEST(AttentionCalls, OutputMayBeTheQuery) {
  auto q = random_tensor<float, 4>({2, 150, 4, 16}, 1);
  const auto k = random_tensor<float, 4>({2, 150, 2, 16}, 2),
             v = random_tensor<float, 4>({2, 150, 2, 16}, 3);
  const auto expected = ef::batched_attention_with_padding(q, k, v, {150, 90}, {.causal = true});
  Threads threads(2);
  ef::batched_attention_with_padding_into(threads.device, q, q, k, v, {150, 90}, {.causal = true});
  EXPECT_TRUE(same_bits(q, expected));
}

TEST(AttentionCalls, IntoFormAllocatesNothingTheSecondTime) {
  const AttentionCase<ef::bfloat16> c({2, 70, 70, 4, 2, 16, 16}, {70, 30});
  ef::Tensor<ef::bfloat16, 4> out(2, 70, 4, 16);
  ef::Workspace workspace;
  const auto call = [&] {
    ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, out, c.q, c.k, c.v,
                                            c.key_lengths, {.causal = true}, workspace);
  };
  call();
  const long before = allocations;
  call();
  EXPECT_EQ(allocations, before);
}

TEST(AttentionCalls, BackwardAllocatesNothingTheSecondTime) {
  GradientCase<float> c({2, 40, 40, 2, 1, 8, 8}, {40, 13});
  const auto expected = c.gradients(Eigen::DefaultDevice{}, {.causal = true});
  auto gq = poisoned_tensor<float, 4>({2, 40, 2, 8});
  auto gk = poisoned_tensor<float, 4>({2, 40, 1, 8});
  auto gv = poisoned_tensor<float, 4>({2, 40, 1, 8});
  ef::Workspace workspace;
  const auto call = [&] {
    ef::attention_backward_into(Eigen::DefaultDevice{}, gq, gk, gv, c.weights, c.q, c.k, c.v, c.out,
                                c.lse, c.key_lengths, {.causal = true}, workspace);
  };
  call();
  const long before = allocations;
  call();
  EXPECT_EQ(allocations, before);
  EXPECT_TRUE(same_bits(gq, expected.grad_q) && same_bits(gk, expected.grad_k) &&
              same_bits(gv, expected.grad_v));
}

TEST(AttentionCalls, RefusesWithTheArgumentNamed) {
  const auto q = random_tensor<float, 4>({2, 4, 4, 8}, 1),
             k = random_tensor<float, 4>({2, 4, 2, 8}, 2),
             v = random_tensor<float, 4>({2, 4, 2, 8}, 3);
  const auto refuses = [&](const ef::AttentionOptions& options, std::initializer_list<int> lengths,
                           const std::vector<std::string>& words) {
    ef::Tensor<float, 4> out(2, 4, 4, 8);
    out.setConstant(7.0f);
    expect_throws<std::invalid_argument>(
        [&] {
          ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, out, q, k, v, lengths,
                                                  options);
        },
        words);
    for (Index i = 0; i < out.size(); ++i) ASSERT_EQ(out.data()[i], 7.0f);
  };
  const std::vector<float> three(3, 1.0f), bad(4, std::numeric_limits<float>::quiet_NaN());
  refuses({}, {5, 1}, {"batched_attention_with_padding", "seq_lengths[0] is 5", "0 to 4"});
  refuses({}, {4, -1}, {"seq_lengths[1] is -1"});
  refuses({}, {4}, {"seq_lengths has 1", "2 (batch)"});
  refuses({.causal = true, .window = -2}, {4, 4}, {"window is -2"});
  refuses({.window = 2}, {4, 4}, {"window is 2 without causal"});
  refuses({.softcap = -1.0f}, {4, 4}, {"softcap"});
  refuses({.scale = std::nanf("")}, {4, 4}, {"scale is nan"});
  refuses({.scale = -static_cast<float>(kInfinity)}, {4, 4}, {"scale is -inf", "a finite value"});
  refuses({.alibi_slopes = three}, {4, 4}, {"alibi_slopes has 3", "4 (heads)"});
  refuses({.sinks = three}, {4, 4}, {"sinks has 3"});
  refuses({.sinks = bad}, {4, 4}, {"sinks holds nan"});
  refuses({.causal = true, .prefix_length = -1}, {4, 4}, {"prefix_length is -1"});
  const std::vector<int> ragged{5, 0};
  refuses({.query_lengths = ragged}, {4, 4}, {"query_lengths[0] is 5"});
  ef::Tensor<float, 3> lse(2, 4, 5);
  refuses({.log_sum_exp = lse}, {4, 4}, {"log_sum_exp has shape (2, 4, 5)", "(2, 4, 4)"});
  ef::Tensor<double, 3> wide(2, 4, 4);
  refuses({.log_sum_exp = wide}, {4, 4}, {"log_sum_exp is a tensor of double", "float"});

  const auto call = [](const auto& a, const auto& b, const auto& c) {
    return ef::batched_attention_with_padding(a, b, c, {1, 1});
  };
  const ef::Tensor<float, 4> narrow(2, 4, 2, 7), three_heads(2, 4, 3, 8), short_keys(2, 3, 2, 8),
      one(1, 4, 2, 8);
  expect_throws<std::invalid_argument>([&] { call(q, narrow, v); },
                                       {"key has shape (2, 4, 2, 7)", "width 8"});
  expect_throws<std::invalid_argument>([&] { call(q, three_heads, three_heads); },
                                       {"query has 4 heads", "multiple of the 3"});
  expect_throws<std::invalid_argument>([&] { call(q, k, short_keys); },
                                       {"value has shape (2, 3, 2, 8)"});
  expect_throws<std::invalid_argument>([&] { call(q, one, one); }, {"query has batch 2, key 1"});
  ef::Tensor<float, 4> small(2, 4, 4, 7);
  expect_throws<std::invalid_argument>(
      [&] {
        ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, small, q, k, v, {1, 1});
      },
      {"output has shape (2, 4, 4, 7)"});

  const ef::Tensor<float, 3> p = random_tensor<float, 3>({5, 2, 8}, 4);
  const auto packed = [&](std::initializer_list<int> a, std::initializer_list<int> b) {
    return ef::variable_length_attention(p, p, p, a, b);
  };
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 4}, {0, 5});
      },
      {"variable_length_attention", "q_offsets ends at 4", "5 (tokens)"});
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 3, 5}, {0, 5});
      },
      {"kv_offsets has 2", "3"});
  expect_throws<std::invalid_argument>(
      [&] {
        packed({0, 3, 2, 5}, {0, 1, 2, 5});
      },
      {"q_offsets falls from 3 to 2"});
  expect_throws<std::invalid_argument>([&] { packed({1, 5}, {0, 5}); }, {"q_offsets starts at 1"});
  expect_throws<std::invalid_argument>([&] { packed({}, {}); }, {"q_offsets is empty"});
}

}  // namespace
