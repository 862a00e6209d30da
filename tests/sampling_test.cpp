// Laws: the distribution is that of a sort in double for every filter, order and size; ties go by index; draws follow the distribution and
// depend on (seed, position, row) only; bad rows are named and harm no other; speculative tokens follow the target.
#include <eigenformer/reference/sampling.h>
#include <eigenformer/sampling.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <set>

#include "compare.h"

namespace {
std::atomic<long> allocations{0};
void* counted_allocation(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  void* p = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace
void* operator new(std::size_t bytes) { return counted_allocation(bytes, 16); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return counted_allocation(bytes, static_cast<std::size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

using namespace eigenformer_test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
using Ids = ef::Tensor<std::int32_t, 1>;

template <typename T = float>
ef::Tensor<T, 2> row_of(const std::vector<double>& values) {
  ef::Tensor<T, 2> row(1, static_cast<Index>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) row.data()[i] = static_cast<T>(values[i]);
  return row;
}

/// Logits whose softmax is `probabilities`.
ef::Tensor<double, 2> log_of(std::vector<double> probabilities) {
  for (double& p : probabilities) p = std::log(p);
  return row_of<double>(probabilities);
}

template <typename Probabilities>
std::set<Index> kept(const Probabilities& p, Index row = 0) {
  std::set<Index> tokens;
  for (Index v = 0; v < p.dimension(1); ++v)
    if (p(row, v) > 0) tokens.insert(v);
  return tokens;
}
template <typename Logits>
std::set<Index> kept_by(const Logits& logits, const ef::SamplingParams& params) {
  return kept(ef::sampling_probabilities(logits, params));
}
using Set = std::set<Index>;

template <typename Logits>
void check_distribution(const Logits& logits, const ef::SamplingParams& params, const std::string& what) {
  const auto actual = ef::sampling_probabilities(logits, params);
  const auto expected = ef::reference::sampling_probabilities(logits, params);
  for (Index r = 0; r < logits.dimension(0); ++r)
    for (Index v = 0; v < logits.dimension(1); ++v)
      if (expected(r, v) > 1e-35) {  // below, a float may be 0
        ASSERT_GT(actual(r, v), 0.0f) << what << " row " << r << " token " << v << " is missing";
      } else {
        ASSERT_LT(actual(r, v), 1e-30f) << what << " row " << r << " token " << v << " should be out";
      }
  EXPECT_LT(relative_error(actual, expected), 1e-6) << what;
}

std::vector<std::pair<std::string, ef::SamplingParams>> parameter_sets() {
  return {{"plain", {}},
          {"hot", {.temperature = 1.7}},
          {"cold", {.temperature = 0.03}},
          {"greedy", {.temperature = 0}},
          {"top-k 1", {.top_k = 1}},
          {"top-k 5", {.top_k = 5}},
          {"top-k 50", {.temperature = .7, .top_k = 50}},
          {"top-k 5 all ties", {.top_k = 5, .top_k_ties = ef::TopKTies::keep_all}},
          {"top-k 3000", {.top_k = 3000}},
          {"top-p 0.9", {.top_p = .9f}},
          {"top-p 0.3", {.temperature = 2, .top_p = .3f}},
          {"top-p 0.9999", {.top_p = .9999f}},
          {"top-p 0", {.top_p = 0}},
          {"min-p 0.05", {.min_p = .05f}},
          {"min-p 1", {.min_p = 1}},
          {"typical 0.9", {.typical_p = .9f}},
          {"typical 0.2", {.temperature = 1.5, .typical_p = .2f}},
          {"combined", {.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f}},
          {"combined vLLM", {.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f, .order = ef::kVllmOrder}},
          {"combined llama.cpp", {.temperature = .8f, .top_k = 40, .top_p = .95f, .min_p = .05f, .typical_p = .9f, .order = ef::kLlamaCppOrder}},
          {"llama.cpp greedy", {.temperature = 0, .top_k = 40, .order = ef::kLlamaCppOrder}}};
}

template <typename T>
class Sampling : public ::testing::Test {};
using Scalars = ::testing::Types<float, double, ef::bfloat16, ef::half>;
TYPED_TEST_SUITE(Sampling, Scalars);

TYPED_TEST(Sampling, DistributionOfEverySmallVocabulary) {
  for (Index vocab = 1; vocab <= 70; ++vocab)
    for (const auto& [name, params] : parameter_sets())
      check_distribution(random_tensor<TypeParam, 2>({2, vocab}, static_cast<unsigned>(vocab), 2.0), params, name + " vocab " + std::to_string(vocab));
}

TYPED_TEST(Sampling, DistributionOfLargeVocabularies) {
  for (Index vocab : {127, 128, 129, 1000, 32000}) {
    if (vocab == 32000 && std::is_same_v<TypeParam, double>) continue;  // the float row says as much
    for (double scale : {0.5, 4.0})
      for (const auto& [name, params] : parameter_sets())
        check_distribution(random_tensor<TypeParam, 2>({1, vocab}, 7, scale), params, name + " vocab " + std::to_string(vocab));
  }
}

TEST(SamplingDistribution, Vocabulary128256FlatPeakedAndTied) {
  auto tied = random_tensor<float, 2>({1, 128256}, 3, 2.0);
  for (Index i = 0; i < tied.size(); ++i) tied.data()[i] = std::nearbyint(tied.data()[i]);
  for (const auto& [name, params] : parameter_sets()) {
    if (name != "top-k 50" && name != "top-p 0.9" && name != "top-p 0.3" && name != "combined" && name != "typical 0.9" && name != "top-k 3000") continue;
    check_distribution(random_tensor<float, 2>({1, 128256}, 1, 0.01), params, name + " flat");
    check_distribution(random_tensor<float, 2>({1, 128256}, 2, 3.0), params, name + " peaked");
    check_distribution(tied, params, name + " tied");
  }
}

TEST(SamplingDistribution, EveryIsaKeepsTheSameTokens) {
  const auto logits = random_tensor<float, 2>({2, 3000}, 5, 3.0);
  const auto expected = ef::reference::sampling_probabilities(logits, {.temperature = .9, .top_p = .9f, .min_p = .001});
  const ef::SamplingParams params{.temperature = .9, .top_p = .9f, .min_p = .001};
  ef::Workspace workspace;
  for_each_isa([&](auto tag) {
    auto actual = poisoned_tensor<float, 2>({2, 3000});
    const ef::SamplingProblem<float> problem{logits.data(), 2, 3000, &params, 0, nullptr, 0, nullptr, nullptr};
    ef::cpu::sampling_probabilities(tag, Eigen::DefaultDevice{}, problem, actual.data(), workspace);
    for (Index r = 0; r < 2; ++r) EXPECT_EQ(kept(actual, r), kept(expected, r)) << tag.name;
    EXPECT_LT(relative_error(actual, expected), 1e-6) << tag.name;
  });
}

TEST(SamplingTies, LowestIndexFirst) {
  const auto uniform = row_of({0, 0, 0, 0});
  EXPECT_EQ(kept_by(uniform, {.top_k = 2}), (Set{0, 1}));
  EXPECT_EQ(kept_by(uniform, {.top_k = 2, .top_k_ties = ef::TopKTies::keep_all}), (Set{0, 1, 2, 3}));
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

TEST(SamplingTies, UniformVocabulariesCutExactly) {
  for (Index vocab : {8, 1024, 128000}) {
    ef::Tensor<float, 2> uniform(1, vocab);
    uniform.setConstant(-7.25f);
    for (double p : {.125, .25, .5, .875}) {
      const auto tokens = kept_by(uniform, {.top_p = p});
      EXPECT_EQ(static_cast<double>(tokens.size()), p * static_cast<double>(vocab));
      EXPECT_EQ(*tokens.rbegin() + 1, static_cast<Index>(tokens.size()));  // the first ones
    }
    EXPECT_EQ(kept_by(uniform, {.top_k = vocab / 2 + 1}).size(), static_cast<std::size_t>(vocab / 2 + 1));
    EXPECT_EQ(kept_by(uniform, {.typical_p = .5}).size(), static_cast<std::size_t>(vocab));  // equally typical
  }
}

TEST(SamplingFilters, PublishedVectorsOfLlamaCpp) {
  const auto p = log_of({.1, .2, .3, .4});
  EXPECT_EQ(kept_by(p, {.top_p = 0}), (Set{3}));
  EXPECT_EQ(kept_by(p, {.top_p = .7f}), (Set{2, 3}));
  EXPECT_EQ(kept_by(p, {.top_p = .8f}), (Set{1, 2, 3}));
  EXPECT_EQ(kept_by(p, {.top_p = 1}), (Set{0, 1, 2, 3}));
  const std::vector<std::pair<double, std::size_t>> min_p{{0, 4}, {.24, 4}, {.26, 3}, {.49, 3}, {.51, 2}, {.74, 2}, {.76, 1}, {1, 1}};
  for (const auto& [threshold, count] : min_p) EXPECT_EQ(kept_by(p, {.min_p = threshold}).size(), count) << threshold;
  EXPECT_EQ(kept_by(log_of({.97, .01, .01, .01}), {.typical_p = .5}), (Set{0}));
  EXPECT_EQ(kept_by(log_of({.4, .2, .2, .2}), {.typical_p = .5}), (Set{1, 2, 3}));
}

TEST(SamplingFilters, OrdersGiveTheSetsOfTheirProjects) {
  const auto logits = row_of({3, 2, 1});
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8}), (Set{0}));
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8, .order = ef::kVllmOrder}), (Set{0}));
  EXPECT_EQ(kept_by(logits, {.temperature = .5, .top_p = .8, .order = ef::kLlamaCppOrder}), (Set{0, 1}));
  // min-p leaves {0, 1}, .714 and .286 of what is left: .71 of that is one token, .71 of the whole is three.
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
  const auto far = ef::sampling_probabilities(row_of({3e38, -3e38, 3e38, -kInfinity}), {.top_p = .99});
  EXPECT_EQ(far(0, 0), .5f);
  EXPECT_EQ(far(0, 2), .5f);
  EXPECT_EQ(far(0, 3), 0.f);
}

TEST(SamplingLogits, PenaltiesBiasAndMask) {
  const std::vector<std::int32_t> prompt{0, 1, 1}, output{2, 3, 3, 1, 60};
  const std::vector<ef::LogitBias> bias{{5, 3.f}, {6, -kInfinity}, {5, .5f}};
  std::vector<std::uint32_t> mask(3, 0xFFFFFFFFu);
  mask[0] = ~(1u << 4 | 1u << 9);
  mask[2] = 0x0000000Fu;
  for (const auto order : {ef::kHuggingFaceOrder, ef::kVllmOrder, ef::kLlamaCppOrder}) {
    const ef::SamplingParams params{.temperature = .9, .top_p = .95f, .repetition_penalty = 1.3, .frequency_penalty = .4, .presence_penalty = .2,
                                    .order = order, .prompt_tokens = prompt, .output_tokens = output, .logit_bias = bias, .token_mask = mask};
    check_distribution(random_tensor<float, 2>({2, 70}, 9, 2.0), params, "adjusted float");
    check_distribution(random_tensor<double, 2>({2, 70}, 9, 2.0), params, "adjusted double");
    check_distribution(random_tensor<ef::half, 2>({2, 70}, 9, 2.0), params, "adjusted half");
  }
  // By hand: 2 and -2 both become less likely, -infinity stays; frequency counts, presence does not.
  const std::vector<std::int32_t> all{0, 1, 2, 0};
  const auto p = ef::sampling_probabilities(row_of({2, -2, -kInfinity, 0}), {.repetition_penalty = 2, .frequency_penalty = .25, .presence_penalty = 1, .output_tokens = all});
  EXPECT_NEAR(std::log(p(0, 0) / p(0, 3)), 1 - .5 - 1, 1e-6);
  EXPECT_NEAR(std::log(p(0, 1) / p(0, 3)), -4 - .25 - 1, 1e-5);
  EXPECT_EQ(p(0, 2), 0.f);
}

TEST(SamplingRows, GreedyTakesTheLowestIndexOfEquals) {
  for (Index vocab : {1, 2, 7, 8, 9, 31, 33, 127, 128, 129, 255, 257, 1000, 32000}) {
    auto logits = random_tensor<float, 2>({3, vocab}, static_cast<unsigned>(vocab));
    for (Index i = 0; i < logits.size(); ++i) logits.data()[i] = std::nearbyint(logits.data()[i]);
    EXPECT_TRUE(same_bits(ef::greedy_sample(logits), ef::reference::greedy_sample(logits))) << vocab;
    ef::Philox rng{1};
    EXPECT_TRUE(same_bits(ef::sample(logits, {.temperature = 0}, rng), ef::reference::greedy_sample(logits))) << vocab;
    const ef::SamplingParams greedy{.temperature = 0};
    ef::Workspace workspace;
    for_each_isa([&](auto tag) {
      Ids ids(3);
      const ef::SamplingProblem<float> problem{logits.data(), 3, vocab, &greedy, 0, nullptr, 0, ids.data(), nullptr};
      ef::cpu::greedy_sample(tag, Eigen::DefaultDevice{}, problem, workspace);
      EXPECT_TRUE(same_bits(ids, ef::reference::greedy_sample(logits))) << vocab << " " << tag.name;
    });
  }
}

TEST(SamplingRows, OnlyTheRowIsReadAtAnyAlignment) {
  for (Index vocab : {1, 5, 16, 127, 129, 300})
    for (Index offset : {0, 1, 3}) {
      std::vector<float> memory(static_cast<std::size_t>(2 * vocab + offset + 40), kNaN);
      const auto logits = random_tensor<float, 2>({2, vocab}, 4);
      std::copy(logits.data(), logits.data() + 2 * vocab, memory.begin() + offset);
      const ef::TensorView<const float, 2> view(memory.data() + offset, 2, vocab);
      EXPECT_TRUE(same_bits(ef::greedy_sample(view), ef::greedy_sample(logits)));
      const ef::SamplingParams params{.temperature = .8, .top_k = 9, .top_p = .9};
      EXPECT_TRUE(same_bits(ef::sampling_probabilities(view, params), ef::sampling_probabilities(logits, params)));
    }
}

TEST(SamplingRows, BadRowsAreNamedAndHarmNoOther) {
  for (Index at : {0, 63, 129}) {
    const auto good = random_tensor<float, 2>({5, 130}, 8);
    auto logits = good;
    logits(1, at) = kNaN;
    logits(2, at) = kInfinity;
    for (Index v = 0; v < 130; ++v) logits(3, v) = -kInfinity;
    ef::Philox rng{3}, same{3};
    const std::vector<ef::SampleStatus> expected{ef::SampleStatus::ok, ef::SampleStatus::nan, ef::SampleStatus::positive_infinity, ef::SampleStatus::no_token, ef::SampleStatus::ok};
    std::vector<ef::SampleStatus> statuses(5);
    Ids ids(5), alone = ef::sample(good, {.top_k = 20}, same);
    ef::sample_into(Eigen::DefaultDevice{}, ids, logits, {.top_k = 20}, rng, statuses);
    EXPECT_EQ(statuses, expected);
    for (Index r = 0; r < 5; ++r) EXPECT_EQ(ids(r), r == 0 || r == 4 ? alone(r) : -1);
    EXPECT_EQ(rng.position(), 1u);
    statuses.assign(5, ef::SampleStatus::ok);
    ef::greedy_sample_into(Eigen::DefaultDevice{}, ids, logits, statuses);
    EXPECT_EQ(statuses, expected);
    EXPECT_EQ(ids(4), ef::greedy_sample(good)(4));
    expect_throws<std::invalid_argument>([&] { ef::greedy_sample(logits); }, {"greedy_sample", "row 1", "NaN"});
    logits(1, at) = 0;
    expect_throws<std::invalid_argument>([&] { ef::sample(logits, {}, rng); }, {"sample", "row 2", "+infinity"});
    logits(2, at) = 0;
    expect_throws<std::invalid_argument>([&] { ef::top_k_sample(logits, 3, 1.f, rng); }, {"top_k_sample", "row 3", "-infinity"});
    expect_throws<std::invalid_argument>([&] { ef::sampling_probabilities(logits, {.temperature = 0}); }, {"row 3"});
    EXPECT_EQ(rng.position(), 1u);
  }
  const std::vector<std::uint32_t> nothing(1, 0u);
  expect_throws<std::invalid_argument>([&] { ef::sampling_probabilities(row_of({1, 2}), {.token_mask = nothing}); }, {"row 0", "no token is left"});
}

TEST(SamplingRows, RefusesWithTheArgumentNamed) {
  ef::Philox rng{1};
  const auto logits = row_of({1, 2, 3});
  const auto refused = [&](const ef::SamplingParams& params, const std::vector<std::string>& fragments) {
    expect_throws<std::invalid_argument>([&] { ef::sample(logits, params, rng); }, fragments);
    expect_throws<std::invalid_argument>([&] { ef::sampling_probabilities(logits, params); }, fragments);
  };
  const double nan = std::nan("");
  refused({.temperature = -1}, {"sampl", "temperature", "-1"});
  refused({.temperature = nan}, {"temperature"});
  refused({.temperature = HUGE_VAL}, {"temperature"});
  refused({.top_k = 0}, {"top_k is 0"});
  refused({.top_k = -1}, {"top_k is -1"});
  refused({.top_p = nan}, {"top_p is NaN"});
  refused({.min_p = nan}, {"min_p"});
  refused({.min_p = -.1}, {"min_p"});
  refused({.min_p = 1.1}, {"min_p"});
  refused({.typical_p = nan}, {"typical_p"});
  refused({.repetition_penalty = 0}, {"repetition_penalty"});
  refused({.repetition_penalty = nan}, {"repetition_penalty"});
  refused({.frequency_penalty = nan}, {"frequency_penalty"});
  refused({.presence_penalty = HUGE_VAL}, {"presence_penalty"});
  const std::vector<std::int32_t> bad{1, 3}, negative{-1};
  refused({.prompt_tokens = bad}, {"prompt_tokens[1] is 3", "3)"});
  refused({.output_tokens = negative}, {"output_tokens[0] is -1"});
  const std::vector<ef::LogitBias> bias{{4, 1.f}}, infinite{{0, kInfinity}}, unknown{{0, kNaN}};
  refused({.logit_bias = bias}, {"logit_bias[0]", "token 4"});
  refused({.logit_bias = infinite}, {"logit_bias[0]", "inf"});
  refused({.logit_bias = unknown}, {"logit_bias[0]", "nan"});
  const std::vector<std::uint32_t> words(2, 7u);
  refused({.token_mask = words}, {"token_mask has 2 words", "1"});
  auto order = ef::kHuggingFaceOrder;
  std::swap(order[0], order[5]);
  refused({.order = order}, {"order", "place 0"});
  order = ef::kHuggingFaceOrder;
  order[4] = order[5];
  refused({.order = order}, {"order", "once"});
  expect_throws<std::invalid_argument>([&] { ef::top_k_sample(logits, 0, 1.f, rng); }, {"top_k_sample", "top_k is 0"});
  expect_throws<std::invalid_argument>([&] { ef::top_p_sample(logits, .5f, -1.f, rng); }, {"top_p_sample", "temperature"});
  const ef::Tensor<float, 2> no_vocabulary(2, 0);
  expect_throws<std::invalid_argument>([&] { ef::greedy_sample(no_vocabulary); }, {"vocabulary of 0"});
  expect_throws<std::invalid_argument>([&] { ef::sample(no_vocabulary, {.temperature = 1}, rng); }, {"vocabulary of 0"});
  std::vector<ef::SamplingParams> two(2);
  expect_throws<std::invalid_argument>([&] { ef::sample(logits, two, rng); }, {"params has 2 sets", "1 rows"});
  const ef::Tensor<float, 2> rows = random_tensor<float, 2>({2, 4}, 1);
  two[1].top_k = 0;
  expect_throws<std::invalid_argument>([&] { ef::sample(rows, two, rng); }, {"params of row 1", "top_k is 0"});
  std::vector<ef::Philox> one(1);
  expect_throws<std::invalid_argument>([&] { ef::sample(rows, {.top_k = 1}, one); }, {"rng has 1 generators", "2 rows"});
  Ids short_ids(1);
  expect_throws<std::invalid_argument>([&] { ef::greedy_sample_into(Eigen::DefaultDevice{}, short_ids, rows); }, {"ids has 1", "2 rows"});
  EXPECT_EQ(rng.position(), 0u);
}

TEST(SamplingDraws, EveryContractCall) {
  const ef::Tensor<float, 2> logits = random_tensor<float, 2>({3, 40}, 2);
  const std::uint64_t seed = 42;
  const int k = 5;
  const float p = .9f, temperature = .8f;
  ef::Philox rng{seed};
  ef::Tensor<std::int32_t, 1> ids = ef::greedy_sample(logits);
  ids = ef::top_k_sample(logits, k, temperature, rng);
  ids = ef::top_p_sample(logits, p, temperature, rng);
  ids = ef::sample(logits, ef::SamplingParams{.temperature = .8f, .top_k = 50, .top_p = .95f, .min_p = .05f}, rng);
  const std::vector<ef::SamplingParams> rows(3);
  const std::span<const ef::SamplingParams> per_row_params = rows;
  ids = ef::sample(logits, per_row_params, rng);
  ids = ef::sample(logits, rows, rng);
  EXPECT_EQ(rng.position(), 5u);
  const ef::SamplingParams params;
  ef::Tensor<float, 2> distribution = ef::sampling_probabilities(logits, params);
  distribution = ef::sampling_probabilities(logits, per_row_params);
  const Eigen::DefaultDevice device;
  ids = ef::greedy_sample(device, logits);
  ids = ef::top_k_sample(device, logits, k, temperature, rng);
  ids = ef::top_p_sample(device, logits, p, temperature, rng);
  ids = ef::sample(device, logits, params, rng);
  distribution = ef::sampling_probabilities(device, logits, params);
  std::vector<ef::Philox> generators(3, ef::Philox{1});
  ids = ef::sample(logits, params, std::span<ef::Philox>(generators));
  ids = ef::top_k_sample(logits, k, temperature, generators);
  for (const auto& generator : generators) EXPECT_EQ(generator.position(), 2u);
  const ef::Tensor<float, 2> none(0, 40);
  EXPECT_EQ(ef::sample(none, params, rng).size(), 0);
  EXPECT_EQ(ef::greedy_sample(none).size(), 0);
  EXPECT_EQ(ef::sampling_probabilities(none, params).dimension(1), 40);
}

TEST(SamplingDraws, DependOnSeedPositionAndRowOnly) {
  const auto logits = random_tensor<float, 2>({9, 5000}, 6, 2.0);
  const ef::SamplingParams params{.temperature = 1.2, .top_p = .97};
  ef::Philox rng{11, 5};
  const Ids expected = ef::sample(logits, params, rng);
  const auto distribution = ef::sampling_probabilities(logits, params);
  for (int threads : {1, 2, 3}) {
    Threads pool(threads);
    ef::Philox again{11, 5};
    EXPECT_TRUE(same_bits(ef::sample(pool.device, logits, params, again), expected));
    EXPECT_TRUE(same_bits(ef::greedy_sample(pool.device, logits), ef::greedy_sample(logits)));
    EXPECT_TRUE(same_bits(ef::sampling_probabilities(pool.device, logits, params), distribution));
  }
  ef::Philox again{11, 5};
  const Ids first = ef::sample(ef::TensorView<const float, 2>(logits.data(), 4, 5000), params, again);  // fewer rows around
  for (Index r = 0; r < 4; ++r) EXPECT_EQ(first(r), expected(r));
  // A generator of its own follows the request from row to row: it draws at row 0.
  std::vector<ef::Philox> generators;
  for (std::uint64_t r = 0; r < 9; ++r) generators.emplace_back(100 + r);
  const Ids own = ef::sample(logits, params, generators);
  for (Index r = 0; r < 9; ++r) {
    ef::Philox one{100 + static_cast<std::uint64_t>(r)};
    EXPECT_EQ(ef::sample(ef::TensorView<const float, 2>(logits.data() + r * 5000, 1, 5000), params, one)(0), own(r));
  }
  // Parameters a row: each row as if all had its own.
  std::vector<ef::SamplingParams> rows(9, params);
  rows[3] = {.temperature = 0};
  rows[5] = {.top_k = 2};
  const std::vector<std::int32_t> history{1, 2, 3};
  rows[6] = {.presence_penalty = 2, .output_tokens = history};
  const auto mixed = ef::sampling_probabilities(logits, rows);
  for (Index r = 0; r < 9; ++r) {
    const auto alone = ef::sampling_probabilities(logits, rows[static_cast<std::size_t>(r)]);
    for (Index v = 0; v < 5000; ++v) ASSERT_EQ(mixed(r, v), alone(r, v)) << r;
  }
}

/// Pearson's statistic against its mean and spread: sqrt(2 * statistic) is normal around sqrt(2 * cells - 3) with deviation 1.
void expect_distributed(const std::vector<double>& counts, const std::vector<double>& probabilities, const std::string& what) {
  double total = 0, statistic = 0, cells = 0, rest_count = 0, rest_expected = 0;
  for (double c : counts) total += c;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * total;
    if (probabilities[i] == 0) {
      ASSERT_EQ(counts[i], 0) << what << ": token " << i << " has no probability";
    } else if (expected < 8) {
      rest_count += counts[i], rest_expected += expected;
    } else {
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected, ++cells;
    }
  }
  if (rest_expected > 1) statistic += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected, ++cells;
  if (cells < 2) return;
  EXPECT_LT(std::sqrt(2 * statistic) - std::sqrt(2 * (cells - 1) - 1), 4.0) << what << ": chi-square " << statistic << " over " << cells << " cells";
}

TEST(SamplingDraws, FollowTheDistribution) {
  constexpr Index batch = 500, steps = 60;
  for (Index vocab : {6, 300})
    for (const auto& [name, params] : parameter_sets()) {
      const auto row = random_tensor<float, 2>({1, vocab}, 12, 1.5);
      const ef::Tensor<float, 2> logits = row.broadcast(Eigen::array<Index, 2>{batch, 1});
      const auto reference = ef::reference::sampling_probabilities(row, params);
      std::vector<double> counts(static_cast<std::size_t>(vocab)), expected(reference.data(), reference.data() + vocab);
      ef::Philox rng{2024};
      for (Index s = 0; s < steps; ++s) {
        const Ids ids = ef::sample(logits, params, rng);
        for (Index r = 0; r < batch; ++r) ++counts[static_cast<std::size_t>(ids(r))];
      }
      expect_distributed(counts, expected, name + " vocab " + std::to_string(vocab));
    }
}

TEST(SamplingDraws, DestinationFormsAllocateNothing) {
  const auto logits = random_tensor<float, 2>({4, 3000}, 6, 2.0);
  const std::vector<std::int32_t> history{1, 2, 3};
  const ef::SamplingParams params{.temperature = .9, .top_k = 500, .top_p = .9, .typical_p = .95, .presence_penalty = 1, .output_tokens = history};
  Ids ids(4);
  ef::Tensor<float, 2> distribution(4, 3000);
  std::vector<ef::SampleStatus> statuses(4);
  ef::Philox rng{1};
  ef::Workspace workspace;
  const Eigen::DefaultDevice device;
  const auto calls = [&] {
    ef::greedy_sample_into(device, ids, logits, statuses, workspace);
    ef::sample_into(device, ids, logits, params, rng, statuses, workspace);
    ef::top_k_sample_into(device, ids, logits, 50, 1.0, rng, statuses, workspace);
    ef::sampling_probabilities_into(device, distribution, logits, params, statuses, workspace);
  };
  calls();
  const long before = allocations;
  calls();
  EXPECT_EQ(allocations, before);
}

TEST(SamplingLogProbabilities, RawProcessedRankAndBest) {
  const auto logits = random_tensor<float, 2>({6, 700}, 31, 2.0);
  const std::vector<std::int32_t> history{3};
  const ef::SamplingParams params{.temperature = .7, .top_k = 20, .presence_penalty = .5, .output_tokens = history};
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
    std::stable_sort(sorted.begin(), sorted.end(), [&](auto a, auto b) { return logits(r, a) > logits(r, b); });
    EXPECT_EQ(sorted[static_cast<std::size_t>(result.ranks(r)) - 1], result.ids(r));
    for (Index i = 0; i < 30; ++i) {
      const std::int32_t id = sorted[static_cast<std::size_t>(i)];
      EXPECT_EQ(result.best_ids(r, i), id);
      EXPECT_NEAR(result.best_log_probabilities(r, i), std::log(raw(r, id)), 1e-5);
      if (processed(r, id) > 0) {
        EXPECT_NEAR(result.best_processed_log_probabilities(r, i), std::log(processed(r, id)), 1e-5);
      } else {
        EXPECT_EQ(result.best_processed_log_probabilities(r, i), -kInfinity);
      }
    }
  }
  const auto few = ef::sample_with_log_probabilities(row_of({1, -kInfinity, 1}), {.temperature = 0}, rng, {.best = 9});
  EXPECT_EQ(few.best_ids.dimension(1), 3);
  EXPECT_EQ(few.best_ids(0, 1), 2);
  EXPECT_EQ(few.best_ids(0, 2), 1);
  EXPECT_EQ(few.best_log_probabilities(0, 2), -kInfinity);
  EXPECT_EQ(few.processed_log_probabilities(0), 0.f);
  expect_throws<std::invalid_argument>([&] { ef::sample_with_log_probabilities(row_of({1}), {.top_k = 1}, rng, {.best = -1}); }, {"best is -1"});
}

/// Verifies `batch` chains per step whose drafts are drawn from `draft`; counts the token at each place of the chain.
void check_speculative(const ef::Tensor<double, 2>& draft, const ef::Tensor<double, 2>& target, const std::string& what) {
  const Index drafts = draft.dimension(0), vocab = draft.dimension(1), batch = 2000, steps = 15;
  ef::Tensor<double, 3> q(batch, drafts, vocab), p(batch, drafts + 1, vocab);
  for (Index r = 0; r < batch; ++r) {
    std::copy(draft.data(), draft.data() + draft.size(), q.data() + r * draft.size());
    std::copy(target.data(), target.data() + target.size(), p.data() + r * target.size());
  }
  std::vector<std::vector<double>> counts(static_cast<std::size_t>(drafts) + 1, std::vector<double>(static_cast<std::size_t>(vocab)));
  ef::Philox rng{77};
  for (Index s = 0; s < steps; ++s) {
    ef::Tensor<std::int32_t, 2> tokens(batch, drafts);
    for (Index i = 0; i < drafts; ++i) {
      ef::Tensor<double, 2> logits(batch, vocab);
      for (Index r = 0; r < batch; ++r)
        for (Index v = 0; v < vocab; ++v) logits(r, v) = std::log(draft(i, v));
      const Ids ids = ef::sample(logits, {.temperature = 1}, rng);
      for (Index r = 0; r < batch; ++r) tokens(r, i) = ids(r);
    }
    const auto result = ef::verify_speculative(tokens, q, p, rng);
    for (Index r = 0; r < batch; ++r) {
      const Index accepted = result.accepted_counts(r);
      for (Index i = 0; i <= drafts; ++i) {
        if (i <= accepted)
          ++counts[static_cast<std::size_t>(i)][static_cast<std::size_t>(result.tokens(r, i))];
        else
          ASSERT_EQ(result.tokens(r, i), -1);
        if (i < accepted) {
          ASSERT_EQ(result.tokens(r, i), tokens(r, i));
        }
      }
    }
  }
  for (Index i = 0; i <= drafts; ++i) {
    const std::vector<double> expected(target.data() + i * vocab, target.data() + (i + 1) * vocab);
    expect_distributed(counts[static_cast<std::size_t>(i)], expected, what + " place " + std::to_string(i));
  }
}

TEST(SpeculativeVerification, TokensFollowTheTarget) {
  const auto draft = ef::reference::sampling_probabilities(random_tensor<float, 2>({3, 12}, 1), {.temperature = 1.5});
  const auto target = ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2), {.top_k = 7});
  check_speculative(draft, target, "different");
  ef::Tensor<double, 2> same(4, 12);
  std::copy(draft.data(), draft.data() + 36, same.data());
  std::copy(draft.data(), draft.data() + 12, same.data() + 36);
  check_speculative(draft, same, "the same");
  check_speculative(draft, ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2), {.temperature = 0}), "greedy target");
}

TEST(SpeculativeVerification, EdgesAndErrors) {
  ef::Philox rng{1};
  ef::Tensor<float, 3> q(2, 1, 3), p(2, 2, 3);
  q.setConstant(1.f / 3);
  p.setConstant(kNaN);  // rows that must not be read
  const std::vector<Index> lengths{0, 1};
  ef::Tensor<std::int32_t, 2> tokens(2, 1);
  tokens(0, 0) = 99;  // past its length
  tokens(1, 0) = 2;
  for (Index v = 0; v < 3; ++v) p(0, 0, v) = p(1, 0, v) = v == 1;
  const auto result = ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = lengths});
  EXPECT_EQ(result.accepted_counts(0), 0);
  EXPECT_EQ(result.tokens(0, 0), 1);
  EXPECT_EQ(result.accepted_counts(1), 0);  // p(2) = 0: refused, drawn from the residual
  EXPECT_EQ(result.tokens(1, 0), 1);
  EXPECT_EQ(result.tokens(1, 1), -1);
  EXPECT_EQ(rng.position(), 1u);
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng); }, {"draft_tokens(0, 0) is 99"});
  tokens(1, 0) = 1;  // accepted, and the bonus distribution is NaN
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = lengths}); }, {"row 1", "NaN"});
  const std::vector<Index> wrong{0, 2};
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = wrong}); }, {"draft_lengths[1] is 2"});
  const ef::Tensor<float, 3> short_target(2, 1, 3), narrow(2, 1, 2);
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, short_target, rng); }, {"target_probabilities", "(2, 1, 3)"});
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, narrow, p, rng); }, {"draft_probabilities", "(2, 1, 2)"});
  EXPECT_EQ(rng.position(), 1u);
  // p equals q up to rounding: where a draft is refused and no residual is left, the target itself is drawn from.
  ef::Tensor<float, 3> halves(1, 1, 2), quarter(1, 2, 2);
  halves.setConstant(.5f);
  quarter.setConstant(.25f);  // everywhere below q
  ef::Tensor<std::int32_t, 2> zero(1, 1);
  zero.setZero();
  int refused = 0;
  for (int i = 0; i < 20; ++i) {
    const auto r = ef::verify_speculative(zero, halves, quarter, rng);
    refused += r.accepted_counts(0) == 0;
    EXPECT_GE(r.tokens(0, 0), 0);
  }
  EXPECT_GT(refused, 0);
}

}  // namespace
