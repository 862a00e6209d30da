// Laws: every filter keeps exactly the tokens that its rule names, at ties, at thresholds and where
// sums are rounded.
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

template <typename T>
class SamplingZeros : public ::testing::Test {};
TYPED_TEST_SUITE(SamplingZeros, EveryScalar);

TEST(SamplingTies, LowestIndexFirst) {
  const auto uniform = row_of({0, 0, 0, 0});
  EXPECT_EQ(kept_by(uniform, {.top_k = 2}), (Set{0, 1}));
  EXPECT_EQ(kept_by(uniform, {.top_k = 2, .top_k_ties = ef::TopKTies::keep_all}),
            (Set{0, 1, 2, 3}));
  EXPECT_EQ(kept_by(uniform, {.top_p = .5}), (Set{0, 1}));
  EXPECT_EQ(kept_by(uniform, {.top_p = .75}), (Set{0, 1, 2}));
  EXPECT_EQ(kept_by(uniform, {.top_p = .7500001}), (Set{0, 1, 2, 3}));
  EXPECT_EQ(kept_by(uniform, {.top_p = 0}), (Set{0}));
  EXPECT_EQ(kept_by(uniform, {.top_p = -1}), (Set{0}));
  EXPECT_EQ(kept_by(uniform, {.min_p = 1}), (Set{0, 1, 2, 3}));
  EXPECT_EQ(kept_by(uniform, {.temperature = 0}), (Set{0}));
  EXPECT_EQ(kept_by(row_of({1, 3, 2, 3, 2, 2}), {.top_k = 3}), (Set{1, 2, 3}));
  EXPECT_EQ(kept_by(row_of({1, 3, 2, 3, 2, 2}), {.top_k = 4, .top_p = .99}), (Set{1, 2, 3, 4}));
  EXPECT_EQ(kept_by(row_of({-0.0, 0.0, -0.0}), {.top_k = 2}), (Set{0, 1}));  // both zeros are equal
  EXPECT_EQ(kept_by(row_of({0, -kInfinity, 0}), {.top_k = 3}), (Set{0, 2}));
}

/// {0, ..., count - 1}
Set first(Index count) {
  Set tokens;
  for (Index v = 0; v < count; ++v) tokens.insert(v);
  return tokens;
}

// Beyond 256 candidates, where the radix select bins them by their keys.
TYPED_TEST(SamplingZeros, BothZerosAreEqualInLargeVocabularies) {
  for (bool negative_first : {true, false}) {
    ef::Tensor<TypeParam, 2> zeros(1, 400);
    for (Index v = 0; v < 400; ++v)
      zeros(0, v) = static_cast<TypeParam>((v < 200) == negative_first ? -0.0f : 0.0f);
    EXPECT_EQ(kept_by(zeros, {.top_k = 300}), first(300));
    EXPECT_EQ(kept_by(zeros, {.top_p = .75}), first(300));
    EXPECT_EQ(kept_by(zeros, {.top_k = 300, .top_k_ties = ef::TopKTies::keep_all}), first(400));
    EXPECT_EQ(kept_by(zeros, {.min_p = 1}), first(400));
    EXPECT_EQ(kept_by(zeros, {.typical_p = .1}), first(400));
    EXPECT_EQ(kept_by(zeros, {.temperature = 0}), first(1));
  }
}

// One token above ties of equal weight: the number of ties kept where their sum just reaches p, or
// just misses it.
TEST(SamplingTies, CountsOfTiesWhereTheSumIsRounded) {
  EXPECT_EQ(kept_by(row_of<double>({.595, 0, 0, 0, 0}), {.top_p = .82797270314430538}).size(), 4u);
  // Quotients (p * total - 1) / weight that round to one tie too many or one too few, whether
  // products and sums are fused or not.
  struct Case {
    double best, p;
    std::size_t kept;
  };
  for (const Case& c : {Case{.070, .040195984394252086, 6}, Case{1.694, .16367090390129632, 21},
                        Case{2.387, .93162639775844713, 141}, Case{.638, .90782966683535049, 138},
                        Case{.366, .98679362005862004, 150}}) {
    std::vector<double> logits(151, 0.0);
    logits[0] = c.best;
    EXPECT_EQ(kept_by(row_of<double>(logits), {.top_p = c.p}).size(), c.kept) << c.best;
  }
  std::mt19937_64 generator(5);
  std::uniform_real_distribution<double> uniform(0, 3);
  int decided = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const double best = uniform(generator);
    const Index ties = 2 + static_cast<Index>(generator() % 7);
    std::vector<double> logits(static_cast<std::size_t>(ties + 1), 0.0);
    logits[0] = best;
    const auto count = static_cast<double>(1 + generator() % static_cast<unsigned>(ties));
    const double weight = std::exp(-best), total = 1 + static_cast<double>(ties) * weight;
    // A hair on either side of `count` ties: one part in 10^12 is far above rounding, far below a
    // weight.
    for (double hair : {-1e-12, 1e-12}) {
      const double p = (1 + count * weight) / total + hair;
      if (p >= 1) continue;
      const auto kept_tokens = kept_by(row_of<double>(logits), {.top_p = p});
      EXPECT_EQ(kept_tokens, first(1 + static_cast<Index>(count) + (hair > 0 ? 1 : 0)))
          << best << " " << ties << " " << p;
      ++decided;
    }
  }
  EXPECT_GT(decided, 20000);
}

// A weight that equals the threshold stays: of min-p, of the distance from the entropy, of the sum
// that top-p asks for.
TEST(SamplingFilters, ExactlyAtTheThreshold) {
  const auto steps = row_of({0, -1, -2});
  EXPECT_EQ(kept_by(steps, {.min_p = std::exp(-1.0)}), (Set{0, 1}));
  EXPECT_EQ(kept_by(steps, {.min_p = std::nextafter(std::exp(-1.0), 1.0)}), (Set{0}));
  EXPECT_EQ(kept_by(steps, {.min_p = std::exp(-2.0)}), (Set{0, 1, 2}));
  EXPECT_EQ(kept_by(steps, {.temperature = 2, .min_p = std::exp(-.5)}), (Set{0, 1}));
  EXPECT_EQ(kept_by(log_of({1, .5}), {.min_p = .5}), (Set{0, 1}));
  ef::Tensor<double, 2> large(1, 1000);
  large.setConstant(std::log(.25));
  large(0, 777) = 0;
  large(0, 778) = std::log(.125);
  EXPECT_EQ(kept_by(large, {.min_p = .25}).size(), 999u);
  EXPECT_EQ(kept_by(large, {.min_p = .25000001}), (Set{777}));
  const auto halves = row_of<double>({0, -std::log(2), -std::log(2)});
  EXPECT_EQ(kept_by(halves, {.typical_p = .1}), (Set{0, 1, 2}));  // all as far from the entropy
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0, -kInfinity}), {.top_p = .25}), (Set{0}));
  EXPECT_EQ(kept_by(row_of({0, 0, 0, 0, -kInfinity}), {.top_p = std::nextafter(.25, 1.)}),
            (Set{0, 1}));
}

// The largest token of a block may be out of play when top-k comes after typical-p.
TEST(SamplingFilters, TypicalBeforeTopK) {
  using enum ef::SamplingStage;
  const ef::SamplingOrder order{penalties, logit_bias, token_mask, temperature,
                                typical_p, top_k,      top_p,      min_p};
  for (unsigned blocks = 0; blocks < 64; ++blocks) {
    auto logits = random_tensor<float, 2>({1, 768}, blocks, .3);
    for (unsigned block = 0; block < 6; ++block)
      if ((blocks >> block & 1u) != 0) logits(0, 128 * static_cast<Index>(block) + 17) = 3.f;
    for (double p : {.3, .5, .8})
      for (Index k = 1; k <= 5; ++k) {
        const ef::SamplingParams params{.top_k = k, .typical_p = p, .order = order};
        EXPECT_EQ(kept_by(logits, params).size(), static_cast<std::size_t>(k));
        check_distribution(logits, params, "typical first");
      }
  }
}

TEST(SamplingTies, UniformVocabulariesCutExactly) {
  for (Index vocab : {8, 1024, 128000}) {
    ef::Tensor<float, 2> uniform(1, vocab);
    uniform.setConstant(-7.25f);
    for (double p : {.125, .25, .5, .875}) {
      const auto tokens = kept_by(uniform, {.top_p = p});
      EXPECT_EQ(static_cast<double>(tokens.size()), p * static_cast<double>(vocab));
      EXPECT_EQ(*tokens.rbegin() + 1, static_cast<Index>(tokens.size()));  // the first ones
    }
    EXPECT_EQ(kept_by(uniform, {.top_k = vocab / 2 + 1}).size(),
              static_cast<std::size_t>(vocab / 2 + 1));
    // equally typical
    EXPECT_EQ(kept_by(uniform, {.typical_p = .5}).size(), static_cast<std::size_t>(vocab));
  }
  // of the least finite logit, where the set ends as in a row that no filter has seen
  ef::Tensor<float, 2> least(1, 128000);
  least.setConstant(std::numeric_limits<float>::lowest());
  EXPECT_EQ(kept_by(least, {.top_k = 100000, .top_p = .5}).size(), 50000U);
  EXPECT_EQ(kept_by(least, {.top_k = 100000, .top_p = .5, .order = ef::kVllmOrder}).size(), 50000U);
}

TEST(SamplingFilters, PublishedVectorsOfLlamaCpp) {
  const auto p = log_of({.1, .2, .3, .4});
  EXPECT_EQ(kept_by(p, {.top_p = 0}), (Set{3}));
  EXPECT_EQ(kept_by(p, {.top_p = .7f}), (Set{2, 3}));
  EXPECT_EQ(kept_by(p, {.top_p = .8f}), (Set{1, 2, 3}));
  EXPECT_EQ(kept_by(p, {.top_p = 1}), (Set{0, 1, 2, 3}));
  const std::vector<std::pair<double, std::size_t>> min_p{{0, 4},   {.24, 4}, {.26, 3}, {.49, 3},
                                                          {.51, 2}, {.74, 2}, {.76, 1}, {1, 1}};
  for (const auto& [threshold, count] : min_p)
    EXPECT_EQ(kept_by(p, {.min_p = threshold}).size(), count) << threshold;
  EXPECT_EQ(kept_by(log_of({.97, .01, .01, .01}), {.typical_p = .5}), (Set{0}));
  EXPECT_EQ(kept_by(log_of({.4, .2, .2, .2}), {.typical_p = .5}), (Set{1, 2, 3}));
}

TEST(SamplingFilters, OrdersGiveTheSetsOfTheirProjects) {
  const auto logits = row_of({3, 2, 1});
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8}), (Set{0}));
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8, .order = ef::kVllmOrder}), (Set{0}));
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8, .order = ef::kLlamaCppOrder}),
            (Set{0, 1}));
  // min-p leaves {0, 1}, .714 and .286 of what is left: .71 of that is one token, .71 of the whole
  // is three.
  const auto four = log_of({.5, .2, .16, .14});
  EXPECT_EQ(kept_by(four, {.top_p = .71, .min_p = .35}), (Set{0, 1}));
  EXPECT_EQ(kept_by(four, {.top_p = .71, .min_p = .35, .order = ef::kVllmOrder}), (Set{0}));
}

TEST(SamplingFilters, ExtremeTemperaturesAndLogits) {
  const auto logits = row_of({1, 3, 2, 3});
  for (double t : {1e-45, 1e-310, 1e-6}) {
    const auto p = ef::sampling_probabilities(logits, {.temperature = t});
    EXPECT_EQ(p(0, 1), .5f);
    EXPECT_EQ(p(0, 3), .5f);
    EXPECT_EQ(p(0, 0), 0.f);
    EXPECT_EQ(kept_by(logits, {.temperature = t, .top_p = .5}), (Set{1}));
  }
  const auto hot = ef::sampling_probabilities(logits, {.temperature = 1e300});
  for (Index v = 0; v < 4; ++v) EXPECT_FLOAT_EQ(hot(0, v), .25f);
  const auto far =
      ef::sampling_probabilities(row_of({3e38, -3e38, 3e38, -kInfinity}), {.top_p = .99});
  EXPECT_EQ(far(0, 0), .5f);
  EXPECT_EQ(far(0, 2), .5f);
  EXPECT_EQ(far(0, 3), 0.f);
}

TEST(SamplingFilters, TopKOfZeroAndOfMoreThanThereAreKeepsAll) {
  const auto logits = random_tensor<float, 2>({2, 300}, 4);
  const auto all = ef::sampling_probabilities(logits, {});
  std::vector<Index> counts{0, 300, 301, std::numeric_limits<Index>::max()};
  if constexpr (sizeof(Index) > 4)  // whose low 32 bits are 0 and 2
    for (int low : {0, 2}) counts.push_back((Index{1} << (sizeof(Index) > 4 ? 32 : 0)) + low);
  for (const auto order : {ef::kHuggingFaceOrder, ef::kVllmOrder, ef::kLlamaCppOrder})
    for (Index k : counts)
      EXPECT_TRUE(same_bits(ef::sampling_probabilities(logits, {.top_k = k, .order = order}), all))
          << k;
  ef::Philox rng{1}, same{1};
  EXPECT_TRUE(same_bits(ef::sample(logits, {.top_k = 0}, rng), ef::sample(logits, {}, same)));
  EXPECT_TRUE(
      same_bits(ef::top_k_sample(logits, counts[3], 1., rng), ef::sample(logits, {}, same)));
}

}  // namespace
