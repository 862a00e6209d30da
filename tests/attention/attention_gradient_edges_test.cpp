// Gradients of attention at the edges: sharp and large logits, long rows, and NaN in everything
// that takes no part.
#include <optional>

#include "gradient_case.h"

using namespace eigenformer_test;

namespace {

TYPED_TEST(AttentionGradientScalars, MeetTheToleranceWhereSoftmaxIsSharp) {
  for (const std::optional<float> scale : {std::optional<float>{}, {1.0f}}) {
    if (scale && std::is_same_v<TypeParam, ef::half>) continue;  // below its smallest numbers
    for (const Index length : {2, 4, 96})
      for (unsigned seed = 0; seed < (length == 96 ? 1u : 20u); ++seed) {
        GradientCase<TypeParam> c({6, length, length, 4, 2, 32, 32}, std::vector<Index>(6, length),
                                  10 * seed + 1);
        const std::string name = std::to_string(length) + " positions, seed ";
        check_against_definition(c,
                                 {name + std::to_string(seed), {.causal = true, .scale = scale}});
        if (this->HasFailure()) return;
      }
  }
}

TYPED_TEST(AttentionGradientScalars, MeetTheToleranceForLogitsOfAMillion) {
  const std::vector<float> sinks{1e6f, 999999.0f};
  for (const float scale : {8e5f, -8e5f, 8e3f, 48.0f}) {
    GradientCase<TypeParam> c({1, 150, 150, 2, 1, 3, 8}, {150});
    set_exact_scores<TypeParam>(c);
    if (std::abs(scale) > 48)  // gradients of q carry the scale, and half ends at 65504
      for (Index x = 0; x < c.weights.size(); ++x)
        c.weights.data()[x] = static_cast<TypeParam>(static_cast<float>(c.weights.data()[x]) / 512);
    const std::string name = "scale " + std::to_string(scale);
    check_against_definition(c, {name, {.causal = true, .scale = scale}});
    check_against_definition(c, {name + " and sinks", {.scale = scale, .sinks = sinks}});
    check_against_definition(
        c, {name + " and a window", {.causal = true, .window = 9, .scale = scale}});
  }
}

TEST(AttentionGradients, MeetTheToleranceWhereFloatDoesNotHoldTheScores) {
  const std::vector<float> sinks{100.0f, -3e4f, 2e5f, 0.5f}, slopes{100.0f, 3000.0f, 1e4f, 1.5f};
  for (const float size : {2.5f, 3.0f, 10.0f, 100.0f}) {  // scores to 2e5
    GradientCase<float> c({2, 100, 100, 4, 2, 24, 19}, {100, 77});
    for (Index x = 0; x < c.q.size(); ++x) c.q.data()[x] *= size;
    for (Index x = 0; x < c.k.size(); ++x) c.k.data()[x] *= size;
    const std::string name = "size " + std::to_string(size);
    // Single elements take part in few sums, whose errors cancel less than those of the whole.
    const auto check = [&](const std::string& what, const ef::AttentionOptions& options) {
      check_against_definition(c, {name + what, options}, tolerance<float>(), 3);
    };
    check("", {.causal = true, .scale = 1.0f});
    check(" alibi", {.scale = 1.0f, .alibi_slopes = slopes});
    check(" softcap", {.softcap = 1e4f, .scale = 0.1f});
    check(" window, sinks",
          {.causal = true, .window = 9, .scale = 1.0f, .sinks = sinks, .prefix_length = 3});
  }
}

// Scores of a million that differ by some units, since keys come in pairs: only the gradients of
// keys and values, which do not cancel.
TEST(AttentionGradients, MeetTheToleranceWhereLargeScoresNearlyTie) {
  GradientCase<float> c({1, 100, 100, 2, 1, 24, 19}, {100});
  for (Index x = 0; x < c.q.size(); ++x) c.q.data()[x] *= 300;
  for (Index j = 0; j < 100; ++j)
    for (Index d = 0; d < 24; ++d)
      c.k(0, j, 0, d) =
          j % 2 == 0 ? c.k(0, j, 0, d) * 300 : c.k(0, j - 1, 0, d) + c.k(0, j, 0, d) * 1e-3f;
  const ef::AttentionOptions options{.scale = 1.0f};
  const auto g = c.gradients(Eigen::DefaultDevice{}, options);
  const auto expected = c.reference_gradients(options);
  EXPECT_TRUE(within(g.grad_k, expected.grad_k, tolerance<float>()));
  EXPECT_TRUE(within(g.grad_v, expected.grad_v, tolerance<float>()));
}

TEST(AttentionGradients, MeetTheToleranceForManyKeys) {
  GradientCase<float> c({1, 2, 200000, 2, 1, 4, 4}, {200000});
  check_against_definition(c, {"plain", {}});
}

/// What NaN in one place reaches: rows that see it, and keys that those rows see. Everything else
/// keeps its bits.
struct Reach {
  std::vector<bool> row, key;
};

Reach reach_of_row(const AttentionCase<float>& c, const ef::AttentionOptions& o, Index i) {
  Reach reach{std::vector<bool>(static_cast<std::size_t>(c.shape.queries)),
              std::vector<bool>(static_cast<std::size_t>(c.shape.keys))};
  for (Index j = 0; j < c.shape.keys; ++j)
    if (ef::reference::attention_visible(o, c.key_lengths[0], c.query_lengths[0], i, j))
      reach.row[static_cast<std::size_t>(i)] = reach.key[static_cast<std::size_t>(j)] = true;
  return reach;
}

Reach reach_of_key(const AttentionCase<float>& c, const ef::AttentionOptions& o, Index j) {
  Reach reach{std::vector<bool>(static_cast<std::size_t>(c.shape.queries)),
              std::vector<bool>(static_cast<std::size_t>(c.shape.keys))};
  for (Index i = 0; i < c.shape.queries; ++i) {
    if (!ef::reference::attention_visible(o, c.key_lengths[0], c.query_lengths[0], i, j)) continue;
    const Reach row = reach_of_row(c, o, i);
    for (std::size_t x = 0; x < reach.row.size(); ++x) reach.row[x] = reach.row[x] || row.row[x];
    for (std::size_t x = 0; x < reach.key.size(); ++x) reach.key[x] = reach.key[x] || row.key[x];
  }
  return reach;
}

using Gradients4 = ef::AttentionGradients<float, 4>;

void expect_untouched(const Gradients4& clean, const Gradients4& g, const Reach& reach) {
  const auto check_rows = [](const auto& a, const auto& b, const std::vector<bool>& touched) {
    const Index width = a.dimension(2) * a.dimension(3);
    for (Index i = 0; i < a.dimension(1); ++i)
      if (!touched[static_cast<std::size_t>(i)]) {
        ASSERT_EQ(std::memcmp(&a(0, i, 0, 0), &b(0, i, 0, 0),
                              static_cast<std::size_t>(width) * sizeof(float)),
                  0)
            << i;
      }
  };
  check_rows(clean.grad_q, g.grad_q, reach.row);
  check_rows(clean.grad_k, g.grad_k, reach.key);
  check_rows(clean.grad_v, g.grad_v, reach.key);
}

void check_nan_of_rows(const GradientCase<float>& c, const ef::AttentionOptions& options,
                       const Gradients4& clean, Index i) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Reach reach = reach_of_row(c, options, i);
  for (const bool in_query : {true, false}) {
    SCOPED_TRACE(in_query ? "query" : "grad_out");
    auto dirty = c;
    for (Index h = 0; h < 2; ++h) (in_query ? dirty.q : dirty.weights)(0, i, h, 1) = nan;
    const auto g = dirty.gradients(Eigen::DefaultDevice{}, options);
    expect_untouched(clean, g, reach);
    EXPECT_EQ(std::isnan(g.grad_q(0, i, 0, 0)), bool(reach.row[static_cast<std::size_t>(i)]));
  }
}

void check_nan_of_keys(const GradientCase<float>& c, const ef::AttentionOptions& options,
                       const Gradients4& clean, Index j) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Reach reach = reach_of_key(c, options, j);
  for (const bool in_key : {true, false}) {
    SCOPED_TRACE(in_key ? "key" : "value");
    auto dirty = c;
    (in_key ? dirty.k : dirty.v)(0, j, 0, 1) = nan;
    expect_untouched(clean, dirty.gradients(Eigen::DefaultDevice{}, options), reach);
  }
}

TEST(AttentionGradients, NaNReachesOnlyWhatItTakesPartIn) {
  GradientCase<float> square({1, 140, 140, 2, 1, 8, 9}, {137}),
      above({1, 80, 30, 2, 1, 8, 9}, {30}, 5), chunk({1, 20, 150, 2, 1, 8, 9}, {150}, 7);
  for (const auto& named : option_sweep(2)) {
    SCOPED_TRACE(named.name);
    for (auto* c : {&square, &above, &chunk}) {
      const auto clean = c->gradients(Eigen::DefaultDevice{}, named.options);
      for (const Index i : {0, 1, 19, 63, 64, 70, 136})
        if (i < c->query_lengths[0]) check_nan_of_rows(*c, named.options, clean, i);
      for (const Index j : {0, 5, 29, 63, 64, 70, 136})
        if (j < c->key_lengths[0]) check_nan_of_keys(*c, named.options, clean, j);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(AttentionGradients, RowsWithoutAKeyTakeNoPartWhateverTheyHold) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  GradientCase<float> c({1, 6, 3, 1, 1, 8, 8}, {3});
  const std::vector<float> sinks{0.5f};
  std::vector<float> sinks_gradient(1), clean_sinks(1);
  ef::AttentionOptions options{.causal = true, .sinks = sinks, .sinks_gradient = clean_sinks};
  const auto clean = c.gradients(Eigen::DefaultDevice{}, options);
  EXPECT_NEAR(clean_sinks[0], c.reference_gradients(options).grad_sinks[0], 1e-6);
  options.sinks_gradient = sinks_gradient;
  for (Index i = 0; i < 3; ++i)
    for (Index d = 0; d < 8; ++d)
      c.q(0, i, 0, d) = c.weights(0, i, 0, d) = c.out(0, i, 0, d) = c.lse(0, 0, i) = nan;
  const auto g = ef::attention_backward(c.weights, c.q, c.k, c.v, c.out, c.lse, {3}, options);
  EXPECT_TRUE(same_bits(g.grad_k, clean.grad_k) && same_bits(g.grad_v, clean.grad_v) &&
              same_bits(g.grad_q, clean.grad_q));
  EXPECT_EQ(sinks_gradient[0], clean_sinks[0]);
  for (Index d = 0; d < 8; ++d) EXPECT_EQ(g.grad_q(0, 1, 0, d), 0.0f);
}

TEST(AttentionGradients, RowsWithoutWeightTakeNoPart) {
  ef::Tensor<float, 3> q(1, 1, 1), k(1, 1, 1), v(1, 1, 1), grad_out(1, 1, 1);
  q.setConstant(1e20f), k.setConstant(-1e20f), v.setConstant(2.0f);  // a score of -infinity
  ef::Tensor<float, 2> lse(1, 1);
  const auto out = ef::batched_attention_with_padding(q, k, v, {1}, {.log_sum_exp = lse});
  const std::vector<float> sinks{0.5f};
  std::vector<float> sinks_gradient{7.0f};
  for (const float gradient : {1.0f, std::numeric_limits<float>::quiet_NaN()})
    for (const bool sink : {false, true}) {
      ef::AttentionOptions options;
      if (sink) options.sinks = sinks, options.sinks_gradient = sinks_gradient;
      grad_out.setConstant(gradient);
      const auto g = ef::attention_backward(grad_out, q, k, v, out, lse, {1}, options);
      EXPECT_EQ(g.grad_q(0, 0, 0), 0.0f);
      EXPECT_EQ(g.grad_k(0, 0, 0), 0.0f);
      EXPECT_EQ(g.grad_v(0, 0, 0), 0.0f);
      EXPECT_EQ(sinks_gradient[0], sink ? 0.0f : 7.0f);
      sinks_gradient[0] = 7.0f;
    }
}

TEST(AttentionGradients, OfASinkWithoutWeightIsZeroWhateverTheRowsHold) {
  GradientCase<float> c({1, 5, 5, 2, 1, 8, 8}, {5});
  const std::vector<float> sinks{-std::numeric_limits<float>::infinity(), 0.5f};
  std::vector<float> sinks_gradient(2, 7.0f);
  const ef::AttentionOptions options{
      .causal = true, .sinks = sinks, .sinks_gradient = sinks_gradient};
  for (Index h = 0; h < 2; ++h) c.weights(0, 3, h, 1) = std::numeric_limits<float>::quiet_NaN();
  ef::attention_backward(c.weights, c.q, c.k, c.v, c.out, c.lse, {5}, options);
  const auto expected = c.reference_gradients(options).grad_sinks;
  EXPECT_EQ(sinks_gradient[0], 0.0f);
  EXPECT_EQ(expected[0], 0.0);
  EXPECT_TRUE(std::isnan(sinks_gradient[1]) && std::isnan(expected[1]));  // it takes part
}

TEST(AttentionGradients, ScaleIsWhateverIsGiven) {
  GradientCase<double> c({1, 5, 5, 1, 1, 4, 3}, {5});
  const float quarter = 0.25f;
  const ef::AttentionOptions given{.scale = quarter}, minus{.scale = -quarter},
      four{.scale = 1 / std::sqrt(4.0f)};
  EXPECT_FALSE(same_bits(c.forward(given), c.forward(minus)));
  EXPECT_TRUE(same_bits(c.forward({}), c.forward(four)));  // none is 1 / sqrt(head_dim)
  const auto zero = c.forward({.scale = 0.0f});            // every key weighs the same
  for (Index d = 0; d < 3; ++d) {
    double mean = 0;
    for (Index j = 0; j < 5; ++j) mean += c.v(0, j, 0, d) / 5;
    EXPECT_NEAR(zero(0, 2, 0, d), mean, 1e-15);
  }
  const auto g = c.gradients(Eigen::DefaultDevice{}, {.scale = 0.0f});
  for (Index i = 0; i < g.grad_q.size(); ++i) {
    EXPECT_EQ(g.grad_q.data()[i], 0.0);
    EXPECT_EQ(g.grad_k.data()[i], 0.0);
  }
}

}  // namespace
