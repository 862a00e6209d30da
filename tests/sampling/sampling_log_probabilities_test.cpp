// Laws: log-probabilities are those of a double reference to a float's rounding, for drawn and for
// given tokens, raw and processed; a bad row is told by its status and harms no other.
#include "allocations.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;

TEST(SamplingLogProbabilities, RawProcessedRankAndBest) {
  const auto logits = random_tensor<float, 2>({6, 700}, 31, 2.0);
  const std::vector<std::int32_t> history{3};
  const ef::SamplingParams params{
      .temperature = .7, .top_k = 20, .presence_penalty = .5, .output_tokens = history};
  ef::Philox rng{5}, same{5};
  const auto result = ef::sample_with_log_probabilities(logits, params, rng, {.best = 30});
  EXPECT_TRUE(same_bits(result.ids, ef::sample(logits, params, same)));
  EXPECT_EQ(rng.position(), 1u);
  const auto raw = ef::reference::sampling_probabilities(logits, {});
  const auto processed = ef::reference::sampling_probabilities(logits, params);
  for (Index r = 0; r < 6; ++r) {
    EXPECT_NEAR(result.log_probabilities(r), std::log(raw(r, result.ids(r))), 1e-5);
    EXPECT_NEAR(result.processed_log_probabilities(r), std::log(processed(r, result.ids(r))), 1e-5);
    std::vector<std::int32_t> sorted(700);
    for (std::size_t v = 0; v < 700; ++v) sorted[v] = static_cast<std::int32_t>(v);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](auto a, auto b) { return logits(r, a) > logits(r, b); });
    EXPECT_EQ(sorted[static_cast<std::size_t>(result.ranks(r)) - 1], result.ids(r));
    for (Index i = 0; i < 30; ++i) {
      const std::int32_t id = sorted[static_cast<std::size_t>(i)];
      EXPECT_EQ(result.best_ids(r, i), id);
      EXPECT_NEAR(result.best_log_probabilities(r, i), std::log(raw(r, id)), 1e-5);
      if (processed(r, id) > 0) {
        EXPECT_NEAR(result.best_processed_log_probabilities(r, i), std::log(processed(r, id)),
                    1e-5);
      } else {
        EXPECT_EQ(result.best_processed_log_probabilities(r, i), -kInfinity);
      }
    }
  }
  for (const ef::SampleStatus status : result.statuses) EXPECT_EQ(status, ef::SampleStatus::ok);
  const auto few = ef::sample_with_log_probabilities(row_of({1, -kInfinity, 1}), {.temperature = 0},
                                                     rng, {.best = 9});
  EXPECT_EQ(few.best_ids.dimension(1), 3);
  EXPECT_EQ(few.best_ids(0, 1), 2);
  EXPECT_EQ(few.best_ids(0, 2), 1);
  EXPECT_EQ(few.best_log_probabilities(0, 2), -kInfinity);
  EXPECT_EQ(few.processed_log_probabilities(0), 0.f);
  expect_throws<std::invalid_argument>(
      [&] { ef::sample_with_log_probabilities(row_of({1}), {.top_k = 1}, rng, {.best = -1}); },
      {"best is -1"});
}

// What a function makes of the logits is what is drawn from; raw stays raw.
TEST(SamplingLogProbabilities, OfAFunctionOfTheCallers) {
  const auto logits = random_tensor<float, 2>({3, 300}, 41, 2.0);
  const auto halved = [](Index row, Index token, float logit) {
    return token == row ? -kInfinity : logit / 2;
  };
  auto by_hand = logits;
  for (Index r = 0; r < 3; ++r)
    for (Index v = 0; v < 300; ++v) by_hand(r, v) = halved(r, v, logits(r, v));
  const ef::SamplingParams params{.top_p = .9};
  ef::Philox rng{5}, same{5};
  const auto drawn = ef::sample_with_log_probabilities(logits, params, rng, {.best = 4}, halved);
  EXPECT_TRUE(same_bits(drawn.ids, ef::sample(by_hand, params, same)));
  EXPECT_TRUE(same_bits(drawn.processed_log_probabilities,
                        ef::log_probabilities_of(by_hand, drawn.ids, params)));
  EXPECT_TRUE(same_bits(drawn.log_probabilities, ef::log_probabilities_of(logits, drawn.ids)));
  EXPECT_TRUE(same_bits(ef::log_probabilities_of(logits, drawn.ids, params, halved),
                        drawn.processed_log_probabilities));
  ef::Workspace workspace;
  ef::SamplesWithLogProbabilities result;
  const Eigen::DefaultDevice device;
  ef::sample_with_log_probabilities_into(device, result, logits, params, ef::Philox{5}, {},
                                         workspace, halved);
  EXPECT_TRUE(same_bits(result.ids, drawn.ids));
  ef::Tensor<float, 1> scores(3);
  ef::log_probabilities_of_into(device, scores, logits, drawn.ids, params, {}, workspace, halved);
  EXPECT_TRUE(same_bits(scores, drawn.processed_log_probabilities));
}

/// Rows 1, 2 and 3 hold NaN, +infinity, and nothing but -infinity.
ef::Tensor<float, 2> with_bad_rows(const ef::Tensor<float, 2>& good) {
  ef::Tensor<float, 2> logits = good;
  logits(1, logits.dimension(1) / 2) = kNaN;
  logits(2, logits.dimension(1) - 1) = kInfinity;
  for (Index v = 0; v < logits.dimension(1); ++v) logits(3, v) = -kInfinity;
  return logits;
}
const std::vector<Status> kFiveStatuses{Status::ok, Status::nan, Status::positive_infinity,
                                        Status::no_token, Status::ok};

TEST(SamplingLogProbabilities, BadRowsHarmNoOther) {
  const auto good = random_tensor<float, 2>({5, 300}, 8);
  const auto logits = with_bad_rows(good);
  const ef::SamplingParams params{.temperature = .8, .top_k = 9};
  ef::Philox rng{3}, same{3};
  const auto expected = ef::sample_with_log_probabilities(good, params, same, {.best = 3});
  ef::SamplesWithLogProbabilities reused =
      ef::sample_with_log_probabilities(random_tensor<float, 2>({2, 7}, 1), params, same);
  const auto check = [&](const ef::SamplesWithLogProbabilities& result) {
    EXPECT_EQ(result.statuses, kFiveStatuses);
    for (Index r = 0; r < 5; ++r) {
      const bool served = r == 0 || r == 4;
      EXPECT_EQ(result.ids(r), served ? expected.ids(r) : -1);
      EXPECT_EQ(result.ranks(r), served ? expected.ranks(r) : -1);
      const auto same_number = [&](float a, float e) {
        EXPECT_TRUE(served ? a == e : std::isnan(a)) << r << ": " << a << " and " << e;
      };
      same_number(result.log_probabilities(r), expected.log_probabilities(r));
      same_number(result.processed_log_probabilities(r), expected.processed_log_probabilities(r));
      for (Index i = 0; i < 3; ++i) {
        EXPECT_EQ(result.best_ids(r, i), served ? expected.best_ids(r, i) : -1);
        same_number(result.best_log_probabilities(r, i), expected.best_log_probabilities(r, i));
        same_number(result.best_processed_log_probabilities(r, i),
                    expected.best_processed_log_probabilities(r, i));
      }
    }
  };
  check(ef::sample_with_log_probabilities(logits, params, rng, {.best = 3}));
  EXPECT_EQ(rng.position(), 1u);
  rng = ef::Philox{3};
  ef::sample_with_log_probabilities_into(Eigen::DefaultDevice{}, reused, logits, params, rng,
                                         {.best = 3});
  check(reused);
  EXPECT_EQ(rng.position(), 1u);
  // Per-row parameters and generators; one row's mask leaves no token.
  std::vector<ef::SamplingParams> rows(5, params);
  rows[4].token_mask = std::vector<std::uint32_t>(10, 0u);
  std::vector<ef::Philox> generators(5, ef::Philox{3});
  const auto mixed = ef::sample_with_log_probabilities(logits, rows, generators);
  EXPECT_EQ(mixed.statuses[0], Status::ok);
  EXPECT_EQ(mixed.ids(0), expected.ids(0));  // row 0 draws at row 0 either way
  EXPECT_EQ(mixed.statuses[4], Status::no_token);
  for (const auto& generator : generators) EXPECT_EQ(generator.position(), 1u);
}

TEST(SamplingLogProbabilities, RefusalsChangeNothing) {
  ef::Philox rng{1};
  auto result = ef::sample_with_log_probabilities(row_of({1, 2}), {.top_k = 1}, rng);
  const auto logits = random_tensor<float, 2>({2, 4}, 1);
  std::vector<ef::Philox> three(3);
  const Eigen::DefaultDevice device;
  const auto refuse = [&](const ef::SamplingParams& params, ef::Generators generators, Index best,
                          const std::vector<std::string>& fragments) {
    expect_throws<std::invalid_argument>(
        [&] {
          ef::sample_with_log_probabilities_into(device, result, logits, params, generators,
                                                 {.best = best});
        },
        fragments);
  };
  refuse({.top_k = -1}, rng, 0, {"sample_with_log_probabilities", "top_k is -1"});
  refuse({}, three, 0, {"rng has 3 generators", "2 rows"});
  refuse({}, rng, -1, {"best is -1"});
  EXPECT_EQ(rng.position(), 1u);
  for (const auto& generator : three) EXPECT_EQ(generator.position(), 0u);
  EXPECT_EQ(result.ids.size(), 1);
  EXPECT_EQ(result.ids(0), 1);
  // All there are, where more are asked for.
  result = ef::sample_with_log_probabilities(logits, {.top_k = 0}, rng,
                                             {.best = std::numeric_limits<Index>::max()});
  EXPECT_EQ(result.best_ids.dimension(1), 4);
}

/// |a - e| within 2 units in the last place of a float, and equal where infinite.
::testing::AssertionResult right_to_float(float actual, double expected) {
  const float e = static_cast<float>(expected);
  const float ulp = std::nextafter(std::abs(e), kInfinity) - std::abs(e);
  if (actual == e || std::abs(actual - e) <= 2 * ulp) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << actual << ", expected " << expected;
}

template <typename T>
class LogProbabilitiesOf : public ::testing::Test {};
TYPED_TEST_SUITE(LogProbabilitiesOf, EveryScalar);

TYPED_TEST(LogProbabilitiesOf, EveryTokenUnderEveryParameters) {
  for (Index vocab : {1, 2, 7, 127, 128, 129, 300})
    for (const auto& [name, params] : parameter_sets()) {
      const auto logits =
          random_tensor<TypeParam, 2>({1, vocab}, static_cast<unsigned>(vocab), 3.0);
      const auto expected = ef::reference::sampling_log_probabilities(logits, params);
      // a row for each token
      const ef::Tensor<TypeParam, 2> rows = logits.broadcast(Eigen::array<Index, 2>{vocab, 1});
      std::vector<std::int32_t> tokens;
      for (Index v = 0; v < vocab; ++v) tokens.push_back(static_cast<std::int32_t>(v));
      const auto actual = ef::log_probabilities_of(rows, tokens, params);
      ASSERT_EQ(actual.size(), vocab);
      for (Index v = 0; v < vocab; ++v)
        ASSERT_TRUE(right_to_float(actual(v), expected(0, v))) << name << " token " << v;
    }
}

TEST(LogProbabilitiesOf, AreRightHoweverUnlikelyOrCertain) {
  const std::vector<std::int32_t> tokens{0, 1};
  for (double gap : {1e-3, 1., 10., 20., 30., 40., 60., 100., 200., 700., 1e4, 1e30}) {
    ef::Tensor<float, 2> logits(2, 2);
    logits.setZero();
    logits(0, 0) = logits(1, 0) = static_cast<float>(gap);
    const double exact = static_cast<double>(static_cast<float>(gap));
    const double certain = -std::log1p(std::exp(-exact));
    const auto actual = ef::log_probabilities_of(logits, tokens);
    EXPECT_TRUE(right_to_float(actual(0), certain)) << gap;
    EXPECT_TRUE(right_to_float(actual(1), certain - exact)) << gap;
    ef::Philox rng{1};
    const auto drawn = ef::sample_with_log_probabilities(logits, {.top_k = 1}, rng, {.best = 2});
    EXPECT_TRUE(right_to_float(drawn.log_probabilities(0), certain)) << gap;
    EXPECT_TRUE(right_to_float(drawn.best_log_probabilities(0, 1), certain - exact)) << gap;
  }
  const auto row = row_of({200, 0, 0, 0, 0});
  const std::vector<std::int32_t> second{1}, third{2};
  EXPECT_FLOAT_EQ(ef::log_probabilities_of(row, second)(0), -200.f);
  EXPECT_EQ(ef::log_probabilities_of(row_of({0, 1, -kInfinity}), third)(0), -kInfinity);
  EXPECT_EQ(ef::log_probabilities_of(row_of({2, 1, 0}), third, {.top_k = 2})(0), -kInfinity);
  EXPECT_EQ(ef::log_probabilities_of(row_of({2, 1, 0}), second, {.temperature = 0})(0), -kInfinity);
  const std::vector<std::int32_t> first{0};
  EXPECT_EQ(ef::log_probabilities_of(row_of({2, 1, 0}), first, {.temperature = 0})(0), 0.f);
}

TEST(LogProbabilitiesOf, AreThoseOfTheDraw) {
  const auto logits = random_tensor<float, 2>({9, 5000}, 6, 2.0);
  std::vector<ef::SamplingParams> rows(9, {.temperature = .7, .top_p = .95});
  rows[2] = {.temperature = 0};
  rows[5] = {.presence_penalty = 2, .output_tokens = {1, 2, 3}, .logit_bias = {{7, -3.f}}};
  ef::Philox rng{5};
  const auto drawn = ef::sample_with_log_probabilities(logits, rows, rng);
  for (int threads : {1, 3}) {
    Threads pool(threads);
    EXPECT_TRUE(same_bits(ef::log_probabilities_of(pool.device, logits, drawn.ids),
                          drawn.log_probabilities));
    EXPECT_TRUE(same_bits(ef::log_probabilities_of(pool.device, logits, drawn.ids, rows),
                          drawn.processed_log_probabilities));
  }
  const ef::TensorView<const std::int32_t, 1> two(drawn.ids.data(), 2);  // fewer rows around
  const auto alone = ef::log_probabilities_of(rows_of(logits, 0, 2), two, rows[0]);
  EXPECT_EQ(alone(1), drawn.processed_log_probabilities(1));
  const ef::Tensor<float, 2> none(0, 40);
  EXPECT_EQ(ef::log_probabilities_of(none, std::vector<std::int32_t>{}).size(), 0);
}

TEST(LogProbabilitiesOf, BadRowsAreNamedAndHarmNoOther) {
  const auto good = random_tensor<float, 2>({5, 300}, 8);
  const auto logits = with_bad_rows(good);
  Ids tokens(5);
  tokens.setValues({7, 0, 299, 4, 130});
  const auto expected = ef::log_probabilities_of(good, tokens);
  auto result = poisoned_tensor<float, 1>({5});
  std::vector<Status> statuses(5, Status::negative);
  const Eigen::DefaultDevice device;
  ef::log_probabilities_of_into(device, result, logits, tokens, {}, statuses);
  EXPECT_EQ(statuses, kFiveStatuses);
  for (Index r = 0; r < 5; ++r)
    EXPECT_TRUE(r == 0 || r == 4 ? result(r) == expected(r) : std::isnan(result(r))) << r;
  ef::log_probabilities_of_into(device, result, logits, tokens);  // without statuses
  EXPECT_EQ(result(4), expected(4));
  expect_throws<std::invalid_argument>([&] { ef::log_probabilities_of(logits, tokens); },
                                       {"log_probabilities_of", "row 1", "NaN"});
  tokens(1) = tokens(2) = tokens(3) = -1;  // no token, as sample_into says of such rows
  const auto skipped = ef::log_probabilities_of(logits, tokens);
  for (Index r = 0; r < 5; ++r) EXPECT_EQ(skipped(r), r == 0 || r == 4 ? expected(r) : 0.f);
  // What the parameters make of a row, for given tokens too.
  const std::vector<std::int32_t> one{1};
  expect_throws<std::invalid_argument>(
      [&] {
        ef::log_probabilities_of(row_of({1, 2}), one, {.token_mask = {0u}});
      },
      {"row 0", "no token is left"});
}

TEST(LogProbabilitiesOf, RefusesWithTheArgumentNamed) {
  const auto logits = random_tensor<float, 2>({2, 4}, 1);
  const Eigen::DefaultDevice device;
  const auto refuse = [&](const std::vector<std::int32_t>& tokens, const ef::SamplingParams& params,
                          const std::vector<std::string>& fragments) {
    auto result = poisoned_tensor<float, 1>({2});
    expect_throws<std::invalid_argument>(
        [&] { ef::log_probabilities_of_into(device, result, logits, tokens, params); }, fragments);
    EXPECT_TRUE(std::isnan(result(0)) && std::isnan(result(1)));
  };
  constexpr auto largest = std::numeric_limits<std::int32_t>::max();
  refuse({0}, {}, {"log_probabilities_of", "tokens has 1", "2 rows"});
  refuse({0, 4}, {}, {"tokens[1] is 4", "[0, 4)"});
  refuse({0, largest}, {}, {"tokens[1] is 2147483647"});
  refuse({-2, 0}, {}, {"tokens[0] is -2"});
  refuse({0, 0}, {.min_p = -2}, {"min_p is -2"});
  ef::Tensor<float, 1> small_result(1);
  const std::vector<std::int32_t> tokens{0, 1};
  expect_throws<std::invalid_argument>(
      [&] { ef::log_probabilities_of_into(device, small_result, logits, tokens); },
      {"log_probabilities has 1", "2 rows"});
  std::vector<Status> statuses(3);
  ef::Tensor<float, 1> result(2);
  expect_throws<std::invalid_argument>(
      [&] { ef::log_probabilities_of_into(device, result, logits, tokens, {}, statuses); },
      {"statuses has 3"});
}

TEST(LogProbabilitiesOf, DestinationFormsAllocateNothing) {
  const auto logits = random_tensor<float, 2>({4, 3000}, 6, 2.0);
  const std::vector<std::int32_t> history{1, 2, 3};
  const ef::SamplingParams params{
      .temperature = .9, .top_p = .9, .presence_penalty = 1, .output_tokens = history};
  ef::SamplesWithLogProbabilities result;
  ef::Tensor<float, 1> scores(4);
  std::vector<Status> statuses(4);
  ef::Philox rng{1};
  ef::Workspace workspace;
  const Eigen::DefaultDevice device;
  const auto calls = [&] {
    ef::sample_with_log_probabilities_into(device, result, logits, params, rng, {.best = 5},
                                           workspace);
    ef::log_probabilities_of_into(device, scores, logits, result.ids, params, statuses, workspace);
  };
  calls();
  EXPECT_EQ(count_allocations(calls), 0);
}

}  // namespace
