// The scores of attention at every stage and on every device, against the double reference, and
// against attention itself.
#include <eigenformer/reference/attention_scores.h>

#include "attention_case.h"
#include "device.h"

using namespace eigenformer_test;
using Stage = ef::AttentionScoreStage;

namespace {

constexpr Stage kStages[]{Stage::scaled, Stage::capped, Stage::masked, Stage::probabilities};

/// Infinities stand where they are expected, the rest is within `bound` of the greatest number.
template <typename C>
::testing::AssertionResult near(const ef::Tensor<C, 4>& got, const ef::Tensor<double, 4>& expected,
                                double bound) {
  double greatest = 1;
  for (Index i = 0; i < expected.size(); ++i)
    if (std::isfinite(expected.data()[i]))
      greatest = std::max(greatest, std::abs(expected.data()[i]));
  for (Index i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(got.data()[i]), e = expected.data()[i];
    if (std::isfinite(e) ? !(std::abs(a - e) <= bound * greatest) : a != e)
      return ::testing::AssertionFailure() << "element " << i << " is " << a << ", expected " << e;
  }
  return ::testing::AssertionSuccess();
}

template <typename T>
void check(const AttentionCase<T>& c, const NamedOptions& named) {
  using C = ef::compute_type<T>;
  const AttentionShape& s = c.shape;
  for (const Stage stage : kStages) {
    const auto expected = ef::reference::attention_scores(
        to_double(c.q), to_double(c.k), c.key_lengths, c.query_lengths, stage, named.options);
    for_each_device([&](const auto& bench) {
      auto q = on_device(bench, c.q);
      auto k = on_device(bench, c.k);
      auto out = on_device(bench, poisoned_tensor<C, 4>({s.batch, s.heads, s.queries, s.keys}));
      ef::attention_scores_into(bench.device, out.view(), q.cview(), k.cview(), c.key_lengths,
                                stage, named.options);
      ASSERT_TRUE(near(out.host(), expected, sizeof(C) == 8 ? 1e-14 : 2e-7))
          << named.name << ", stage " << static_cast<int>(stage);
    });
  }
}

TEST(AttentionScoresOnDevice, EqualTheReferenceAtEveryStage) {
  const AttentionCase<float> c({2, 3, 70, 4, 2, 5, 1}, {70, 66});
  for (const NamedOptions& named : option_sweep(4)) check(c, named);
  check(AttentionCase<ef::bfloat16>({2, 9, 9, 2, 1, 33, 1}, {9, 4}), {"causal", {.causal = true}});
  check(AttentionCase<double>({1, 2, 3, 2, 1, 8, 1}, {3}), {"plain", {}});
  check(AttentionCase<float>({2, 5, 3, 1, 1, 3, 1}, {3, 0}), {"causal", {.causal = true}});
  check(AttentionCase<float>({2, 5, 0, 1, 1, 3, 1}, {0, 0}), {"plain", {}});
}

// Rows that see +infinity, NaN or nothing but -infinity, alone and beside other scores.
TEST(AttentionScoresOnDevice, InfinitiesStayInTheirRows) {
  ef::Tensor<float, 4> q(1, 4, 1, 1), k(1, 4, 1, 1);
  q.setConstant(1.0f);
  k.setValues({{{{2.0f}}, {{INFINITY}}, {{-INFINITY}}, {{NAN}}}});
  for_each_device([&](const auto& bench) {
    auto device_q = on_device(bench, q), device_k = on_device(bench, k);
    for (const Index window : {1, 3}) {
      auto out = on_device(bench, poisoned_tensor<float, 4>({1, 1, 4, 4}));
      ef::attention_scores_into(bench.device, out.view(), device_q.cview(), device_k.cview(), {4},
                                Stage::probabilities, {.causal = true, .window = window});
      const auto got = out.host();
      for (Index i = 0; i < 4; ++i)
        for (Index j = 0; j < 4; ++j) {
          const bool seen = j <= i && j > i - window;
          if (seen && i > 0 && j != 2)
            EXPECT_TRUE(std::isnan(got(0, 0, i, j))) << window << ' ' << i << ' ' << j;
          else
            EXPECT_EQ(got(0, 0, i, j), i == 0 && j == 0 ? 1.0f : 0.0f) << i << ' ' << j;
        }
    }
  });
}

// Probabilities times V are the output; their sum is 1 but for the sink.
TEST(AttentionScores, TimesValuesAreAttention) {
  const std::span<const float> sinks(test_sinks().data(), 4);
  const AttentionCase<float> c({2, 7, 75, 4, 2, 16, 6}, {75, 66});
  const ef::AttentionOptions options{.causal = true, .softcap = 2.0f, .sinks = sinks};
  const auto out = ef::batched_attention_with_padding(c.q, c.k, c.v, c.key_lengths, options);
  const auto p = ef::attention_scores(c.q, c.k, c.key_lengths, Stage::probabilities, options);
  ef::Tensor<double, 4> expected(out.dimensions());
  expected.setZero();
  for (Index b = 0; b < 2; ++b)
    for (Index h = 0; h < 4; ++h)
      for (Index i = 0; i < 7; ++i)
        for (Index j = 0; j < c.key_lengths[static_cast<std::size_t>(b)]; ++j)
          for (Index d = 0; d < 6; ++d)
            expected(b, i, h, d) +=
                static_cast<double>(p(b, h, i, j)) * static_cast<double>(c.v(b, j, h / 2, d));
  EXPECT_LT(relative_error(out, expected), 1e-5);
}

TEST(AttentionScores, OfPartsOfOneProjection) {
  const auto stacked = random_tensor<float, 5>({1, 4, 3, 2, 8}, 1);
  ef::Tensor<float, 4> q(1, 4, 2, 8), k(1, 4, 2, 8);
  for (Index i = 0; i < 4; ++i) {
    std::copy_n(&stacked(0, i, 0, 0, 0), 16, &q(0, i, 0, 0));
    std::copy_n(&stacked(0, i, 1, 0, 0), 16, &k(0, i, 0, 0));
  }
  EXPECT_TRUE(same_bits(ef::attention_scores(q, k, {3}, Stage::masked),
                        ef::attention_scores(ef::heads_of(stacked, 0, 2),
                                             ef::heads_of(stacked, 1, 2), {3}, Stage::masked)));
}

TEST(AttentionScores, OfOneHeadHaveRank3AndRefusalsNameTheArgument) {
  const auto q = random_tensor<float, 3>({2, 4, 8}, 1), k = random_tensor<float, 3>({2, 5, 8}, 2);
  const ef::Tensor<float, 3> scores = ef::attention_scores(q, k, {5, 3}, Stage::masked);
  EXPECT_EQ(scores(1, 3, 3), -INFINITY);
  double dot = 0;
  for (Index d = 0; d < 8; ++d) dot += static_cast<double>(q(1, 3, d)) * k(1, 2, d);
  EXPECT_NEAR(scores(1, 3, 2), dot / std::sqrt(8.0), 1e-6);
  ef::Tensor<float, 3> narrow(2, 4, 4);
  const auto into = [&](const ef::LengthSpan& lengths, const ef::AttentionOptions& options) {
    return [&, options] {
      ef::attention_scores_into(Eigen::DefaultDevice{}, narrow, q, k, lengths, Stage::scaled,
                                options);
    };
  };
  expect_throws<std::invalid_argument>(
      into({5, 3}, {}), {"attention_scores", "scores has shape (2, 4, 4)", "(2, 4, 5)"});
  expect_throws<std::invalid_argument>(into({6, 3}, {}), {"seq_lengths[0] is 6"});
  expect_throws<std::invalid_argument>(into({5, 3}, {.softcap = -1.0f}), {"softcap is -1"});
}

}  // namespace
