// Every stage of sampling on every device: tokens, statuses and probabilities of the CPU, one by
// one, in each system's order and in random chains.
#include "device.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;
using Stage = ef::SamplingStage;

/// Draws and distributions on every device against those of the calling thread, which the other
/// tests compare with the reference. Row `batch - 1` of the logits serves guidance. `function`:
/// none, or a stage of the caller's.
template <typename T, typename... Function>
ef::Tensor<float, 2> check(const ef::Tensor<T, 2>& logits,
                           const std::vector<ef::SamplingParams>& params, const std::string& what,
                           const Function&... function) {
  const Index batch = logits.dimension(0), vocab = logits.dimension(1);
  std::vector<ef::Philox> random;
  for (Index r = 0; r < batch; ++r) random.emplace_back(static_cast<std::uint64_t>(r), 5);
  const Eigen::DefaultDevice here;
  ef::Tensor<std::int32_t, 1> expected_ids(batch);
  std::vector<Status> expected_statuses(static_cast<std::size_t>(batch));
  auto generators = random;
  ef::Workspace workspace;
  ef::sample_into(here, expected_ids, logits, params, generators, expected_statuses, workspace,
                  function...);
  ef::Tensor<float, 2> expected(batch, vocab);
  ef::sampling_probabilities_into(here, expected, logits, params, {}, workspace, function...);
  for_each_device([&](const auto& bench) {
    const auto x = on_device(bench, logits);
    auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({batch}));
    auto statuses = on_device(bench, poisoned_tensor<std::int8_t, 1>({batch}));
    auto p = on_device(bench, poisoned_tensor<float, 2>({batch, vocab}));
    generators = random;
    ef::sample_into(bench.device, ids.view(), x.cview(), params, generators,
                    std::span(reinterpret_cast<Status*>(statuses.view().data()),
                              static_cast<std::size_t>(batch)),
                    workspace, function...);
    ef::sampling_probabilities_into(bench.device, p.view(), x.cview(), params, {}, workspace,
                                    function...);
    const auto got_ids = ids.host();
    const auto got_statuses = statuses.host();
    const auto got = p.host();
    for (Index r = 0; r < batch; ++r) {
      ASSERT_EQ(got_statuses(r),
                static_cast<std::int8_t>(expected_statuses[static_cast<std::size_t>(r)]))
          << what << " row " << r;
      ASSERT_EQ(got_ids(r), expected_ids(r)) << what << " row " << r;
      for (Index v = 0; v < vocab; ++v) {
        ASSERT_NEAR(got(r, v), expected(r, v), 1e-6f) << what << " row " << r << " token " << v;
        ASSERT_EQ(got(r, v) > 0, expected(r, v) > 0) << what << " row " << r << " token " << v;
      }
    }
  });
  return expected;
}

std::vector<ef::SamplingParams> each_stage() {
  std::vector<ef::SamplingParams> all{
      {.top_n_sigma = 1},
      {.top_n_sigma = 0.01},
      {.xtc_probability = 1, .xtc_threshold = .05},
      {.temperature = 0, .xtc_probability = 1, .xtc_threshold = .02},
      {.top_k = 3, .xtc_probability = 1, .xtc_threshold = .01},
      {.min_tokens_to_keep = 5, .xtc_probability = 1, .xtc_threshold = .05},
      {.top_k = 4, .order = {Stage::xtc, Stage::top_k}, .xtc_probability = 1, .xtc_threshold = .05},
      {.typical_p = .5,
       .order = {Stage::xtc, Stage::typical_p},
       .xtc_probability = 1,
       .xtc_threshold = .05},
      {.epsilon_cutoff = .01},
      {.epsilon_cutoff = .9},
      {.eta_cutoff = .02},
      {.top_h = .4},
      {.top_h = .01},
      {.top_h = .9},
      {.mirostat = 1, .mirostat_mu = 4},
      {.mirostat = 2, .mirostat_mu = 3},
      {.mirostat = 2, .mirostat_mu = .01},
      {.temperature = 1.2, .dynatemp_range = .7},
      {.temperature = .5, .dynatemp_range = .5, .dynatemp_exponent = 2},
      {.top_p = .3, .min_tokens_to_keep = 7},
      {.min_p = .5, .min_tokens_to_keep = 7},
      {.typical_p = .1, .min_tokens_to_keep = 7},
      {.min_tokens_to_keep = 7, .epsilon_cutoff = .5},
      {.min_tokens_to_keep = 7, .eta_cutoff = .5},
      {.top_k = 20, .guidance_scale = 1.5, .guidance_row = 0},
      {.top_k = 5, .forced_tokens = {{.position = 0, .token = 9}}},
      {.repetition_penalty = 1.3,
       .frequency_penalty = .2,
       .prompt_tokens = {1, 2, 3},
       .output_tokens = {3, 3, 8},
       .penalize_log_probabilities = true},
      {.prompt_tokens = {1, 2, 3, 1, 2},
       .output_tokens = {3, 1, 2},
       .dry_multiplier = 1,
       .no_repeat_ngram = 2,
       .bad_words = {{4}, {2, 5}},
       .sequence_bias = {{.tokens = {1, 2, 6}, .bias = 2}}},
      {.output_tokens = {5}, .min_tokens = 3, .stop_tokens = {0, 7}}};
  for (const auto& order : {ef::kVllmOrder, ef::kLlamaCppOrder})
    all.push_back({.temperature = .8,
                   .top_k = 30,
                   .top_p = .95,
                   .min_p = .02,
                   .typical_p = .95,
                   .order = order,
                   .xtc_probability = 1,
                   .xtc_threshold = .2});
  return all;
}

template <typename T>
ef::Tensor<T, 2> rows_with_ties(Index rows, Index vocab, unsigned seed) {
  auto logits = random_tensor<T, 2>({rows, vocab}, seed, 3.0);
  for (Index r = 0; r < rows; r += 2)
    for (Index t = 0; t < vocab; ++t)
      logits(r, t) = static_cast<T>(std::nearbyint(static_cast<double>(logits(r, t))));
  return logits;
}

template <typename T>
void check_each_stage(Index vocab) {
  auto params = each_stage();
  // lists name tokens up to 9
  const Index rows = static_cast<Index>(params.size());
  for (unsigned seed : {1u, 2u})
    check(rows_with_ties<T>(rows, vocab, seed), params, "vocab " + std::to_string(vocab));
}

TEST(SamplingStagesOnDevice, EachIsThatOfTheCpu) {
  for (Index vocab : {10, 33, 300}) check_each_stage<float>(vocab);
  check_each_stage<ef::bfloat16>(264);
  check_each_stage<double>(130);
}

TEST(SamplingStagesOnDevice, RandomChainsAreThoseOfTheCpu) {
  std::mt19937 generator(7);
  const auto number = [&](double least, double most) {
    return std::uniform_real_distribution<double>(least, most)(generator);
  };
  std::vector<Stage> filters{Stage::temperature, Stage::top_k,          Stage::top_p,
                             Stage::min_p,       Stage::typical_p,      Stage::top_n_sigma,
                             Stage::xtc,         Stage::epsilon_cutoff, Stage::eta_cutoff,
                             Stage::top_h,       Stage::mirostat};
  std::vector<ef::SamplingParams> params;
  for (int trial = 0; trial < 40; ++trial) {
    std::shuffle(filters.begin(), filters.end(), generator);
    ef::SamplingParams p{.temperature = number(.5, 2),
                         .top_k = static_cast<Index>(number(2, 60)),
                         .top_p = number(.5, 1),
                         .min_p = number(0, .1),
                         .typical_p = number(.5, 1)};
    p.min_tokens_to_keep = trial % 3 == 0 ? 4 : 1;
    p.top_n_sigma = number(.5, 3);
    p.xtc_probability = trial % 2;
    p.xtc_threshold = number(.02, .3);
    p.epsilon_cutoff = number(1e-4, .02);
    p.eta_cutoff = number(1e-4, .02);
    p.top_h = number(.5, 1);
    p.mirostat = trial % 2 + 1;
    p.mirostat_mu = number(2, 9);
    p.order = {};
    std::copy(filters.begin(), filters.end(), p.order.begin());
    params.push_back(p);
  }
  check(rows_with_ties<float>(40, 200, 9), params, "chains");
}

TEST(SamplingStagesOnDevice, CoinsOfXtcAreThoseOfTheCpu) {
  const Index rows = 64;
  const auto logits = random_tensor<float, 2>({rows, 50}, 11, 2.0);
  const ef::SamplingParams params{.xtc_probability = .5, .xtc_threshold = .05};
  ef::Philox random(3);
  const auto expected = ef::sample(logits, params, random);
  for_each_device([&](const auto& bench) {
    const auto x = on_device(bench, logits);
    auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({rows}));
    ef::Philox same(3);
    ef::sample_into(bench.device, ids.view(), x.cview(), params, same);
    EXPECT_TRUE(same_bits(ids.host(), expected));
  });
}

/// Tells rows, tokens and what earlier stages did apart.
struct FoldedLogit {
  template <typename C>
  EIGENFORMER_HOST_DEVICE C operator()(Index row, Index token, C logit) const {
    if (token % 11 == row % 5) return -std::numeric_limits<C>::infinity();
    return logit > least ? least - logit : logit;
  }
  float least;
};

// One row for each place among the other stages that change logits.
template <typename T>
void check_function() {
  constexpr Index vocab = 140;
  const std::array others{Stage::guidance,     Stage::penalties,  Stage::logit_bias,
                          Stage::bad_words,    Stage::min_tokens, Stage::token_mask,
                          Stage::sequence_bias};
  const auto rows = static_cast<Index>(others.size()) + 1;
  std::vector<ef::SamplingParams> params;
  for (Index place = 0; place < rows; ++place) {
    ef::SamplingParams p{.temperature = .9,
                         .top_k = 60,
                         .top_p = .95,
                         .repetition_penalty = 1.5,
                         .order = {},
                         .prompt_tokens = {1, 2, 30, 31, 40},
                         .output_tokens = {31, 2},
                         .logit_bias = {{3, 4.f}, {41, 3.f}, {3, -1.f}},
                         .token_mask = std::vector<std::uint32_t>(5, 0xfffffffdu)};
    p.guidance_row = 3;
    p.guidance_scale = 1.5;
    p.bad_words = {{12}, {2, 15}};
    p.sequence_bias = {{.tokens = {2, 16}, .bias = 5}};
    p.min_tokens = 9;
    p.stop_tokens = {4, 17};
    auto* next = std::copy_n(others.begin(), place, p.order.begin());
    *next++ = Stage::function;
    next = std::copy(others.begin() + place, others.end(), next);
    for (Stage filter : {Stage::temperature, Stage::top_k, Stage::top_p}) *next++ = filter;
    params.push_back(p);
  }
  auto logits = random_tensor<T, 2>({rows, vocab}, 12, 3.0);
  for (Index t = 0; t < vocab; ++t) logits(5, t) = logits(0, t);  // both lose the same tokens
  const auto p = check(logits, params, "function", FoldedLogit{.5f});
  double apart = 0;
  for (Index t = 0; t < vocab; ++t)
    apart += std::abs(static_cast<double>(p(0, t)) - static_cast<double>(p(5, t)));
  EXPECT_GT(apart, .1);  // by where it stands
}

TEST(SamplingStagesOnDevice, FunctionsOfTheCallersAreThoseOfTheCpu) {
  check_function<float>();
  check_function<ef::bfloat16>();
}

}  // namespace
