// Distributions that transformers made, and those of llama.cpp's formulas
// (golden/make_sampling.py).
#include <fstream>
#include <map>
#include <sstream>

#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Params = ef::SamplingParams;
using Tokens = std::vector<std::int32_t>;
using enum ef::SamplingStage;

constexpr Index kVocab = 48;

/// Row 0 is what all cases filter, row 1 that of guidance.
ef::Tensor<double, 2> golden_logits() {
  ef::Tensor<double, 2> logits(2, kVocab);
  for (int i = 0; i < kVocab; ++i) {
    logits(0, i) = ((i * 37 + 11) % 64 - 32) / 8.0;
    logits(1, i) = ((i * 29 + 5) % 64 - 32) / 16.0;
  }
  return logits;
}

const Tokens& prompt() {
  static const Tokens tokens{5, 9, 2, 40, 5, 9, 2, 7};
  return tokens;
}
const Tokens& output() {
  static const Tokens tokens{5, 9, 11, 2, 5, 9};
  return tokens;
}
const Tokens& history() {
  static const Tokens tokens = [] {
    Tokens all = prompt();
    all.insert(all.end(), output().begin(), output().end());
    return all;
  }();
  return tokens;
}
/// A prompt that comes again, but for its last token.
const Tokens& prompt_twice() {
  static const Tokens tokens = [] {
    Tokens all = prompt();
    all.insert(all.end(), prompt().begin(), prompt().end() - 1);
    return all;
  }();
  return tokens;
}

std::map<std::string, Params> transformers_cases() {
  std::map<std::string, Params> cases{
      {"repetition", {.repetition_penalty = 1.3}},
      {"no_repeat_ngram", {.no_repeat_ngram = 3}},
      {"no_repeat_unigram", {.no_repeat_ngram = 1}},
      {"bad_words", {.bad_words = {{11}, {9, 2}, {5, 9, 40}, {9, 5, 1}}}},
      {"sequence_bias",
       {.sequence_bias = {{{5}, -2.5f}, {{9, 30}, 3}, {{5, 9, 2}, 1.5f}, {{2, 9, 17}, 9}}}},
      {"min_tokens", {.min_tokens = 7, .stop_tokens = {19, 45}}},
      {"min_tokens_over", {.min_tokens = 6, .stop_tokens = {19, 45}}},
      {"forced", {.forced_tokens = {{6, 19}, {7, 1}}}},
      {"guidance", {.guidance_scale = 1.75, .guidance_row = 1}},
      {"guidance_repetition",
       {.repetition_penalty = 1.3, .guidance_scale = 1.75, .guidance_row = 1}},
      {"log_repetition", {.repetition_penalty = 1.3, .penalize_log_probabilities = true}},
      {"top_p", {.top_p = .35}},
      {"top_p_keep", {.top_p = .35, .min_tokens_to_keep = 9}},
      {"min_p", {.min_p = .4}},
      {"min_p_keep", {.min_p = .4, .min_tokens_to_keep = 12}},
      {"top_k_keep", {.top_k = 3, .min_tokens_to_keep = 6}},
      {"typical", {.typical_p = .6}},
      {"typical_keep", {.typical_p = .1, .min_tokens_to_keep = 14}},
      {"epsilon", {.epsilon_cutoff = .03}},
      {"epsilon_keep", {.min_tokens_to_keep = 5, .epsilon_cutoff = .9}},
      {"eta", {.eta_cutoff = .2}},
      {"top_h", {.top_h = .4}},
      {"top_h_small", {.top_h = .01}}};
  Params chain{.temperature = .8,
               .top_k = 30,
               .top_p = .95,
               .min_p = .02,
               .typical_p = .9,
               .repetition_penalty = 1.3,
               .epsilon_cutoff = .01,
               .eta_cutoff = .02,
               .top_h = .9,
               .no_repeat_ngram = 3,
               .bad_words = cases["bad_words"].bad_words,
               .sequence_bias = cases["sequence_bias"].sequence_bias,
               .guidance_scale = 1.25,
               .guidance_row = 1};
  cases["chain"] = chain;
  for (auto& [name, params] : cases) {
    params.prompt_tokens = prompt();
    params.output_tokens = output();
  }
  return cases;
}

std::map<std::string, Params> llama_cases() {
  std::map<std::string, Params> cases{
      {"penalties",
       {.repetition_penalty = 1.2,
        .frequency_penalty = .3,
        .presence_penalty = .1,
        .penalty_window = 5}},
      {"dry", {.dry_multiplier = .8}},
      {"dry_long", {.dry_multiplier = .5, .dry_base = 1.2}},
      {"dry_one", {.dry_multiplier = .25, .dry_base = 3, .dry_allowed_length = 0}},
      {"dry_breakers", {.dry_multiplier = .8, .dry_breakers = {{40, 5}, {7}}}},
      {"dry_breaker_token",
       {.dry_multiplier = .8, .dry_allowed_length = 1, .dry_breakers = {{2}, {3, 9}}}},
      {"dry_window", {.dry_multiplier = .8, .dry_allowed_length = 1, .dry_window = 8}},
      {"xtc", {.xtc_probability = 1, .xtc_threshold = .04}},
      {"xtc_high", {.xtc_probability = 1, .xtc_threshold = .3}},
      {"top_n_sigma", {.top_n_sigma = .75}},
      {"mirostat_1", {.mirostat = 1, .mirostat_mu = 6}},
      {"mirostat_2", {.mirostat = 2, .mirostat_mu = 3.5}},
      {"mirostat_2_best", {.mirostat = 2, .mirostat_mu = 1}},
      {"dynatemp", {.temperature = .9, .dynatemp_range = .6, .dynatemp_exponent = 1.3}},
      {"chain",
       {.temperature = .7,
        .top_k = 20,
        .repetition_penalty = 1.1,
        .frequency_penalty = .2,
        .top_n_sigma = 2,
        .xtc_probability = 1,
        .xtc_threshold = .08,
        .dynatemp_range = .3,
        .dry_multiplier = .8}}};
  for (auto& [name, params] : cases) {
    params.order = ef::kLlamaCppOrder;
    params.output_tokens =
        name == "dry_long" || name == "dry_breakers" ? prompt_twice() : history();
  }
  return cases;
}

TEST(SamplingGolden, DistributionsOfTransformersAndLlamaCpp) {
  const auto logits = golden_logits();
  std::map<std::string, Params> cases;
  for (const auto& [name, params] : transformers_cases()) cases["hf_" + name] = params;
  for (const auto& [name, params] : llama_cases()) cases["llama_" + name] = params;
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/sampling.txt");
  std::size_t lines = 0;
  for (std::string line; std::getline(file, line); ++lines) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    ASSERT_EQ(cases.count(name), 1u) << name;
    const Params& params = cases[name];
    const auto actual = ef::sampling_probabilities(logits, params);
    const auto reference = ef::reference::sampling_probabilities(logits, params);
    for (Index v = 0; v < kVocab; ++v) {
      double expected = 0;
      words >> expected;
      EXPECT_NEAR(actual(0, v), expected, 1e-6) << name << " token " << v;
      EXPECT_NEAR(reference(0, v), expected, 1e-6) << name << " token " << v;
      EXPECT_EQ(actual(0, v) > 0, expected > 0) << name << " token " << v;
    }
  }
  EXPECT_EQ(lines, cases.size());
}

// By hand, as llama.cpp does it: mu -= eta * (surprise of the drawn token - tau).
TEST(SamplingGolden, MirostatHoldsTheSurprise) {
  ef::MirostatState state{.target = 3, .rate = .2};
  EXPECT_EQ(state.mu, 6);
  state.update(std::log(.25));
  EXPECT_DOUBLE_EQ(state.mu, 6 - .2 * (2 - 3));
  state.update(-HUGE_VAL);
  EXPECT_DOUBLE_EQ(state.mu, 6.2);
  const auto logits = random_tensor<float, 2>({1, 2000}, 3, 2.0);
  ef::Philox rng{4};
  for (const int version : {1, 2}) {
    state = {.target = 4, .rate = .1};
    double surprise = 0;
    for (int i = 0; i < 400; ++i) {
      const auto drawn = ef::sample_with_log_probabilities(
          logits, Params{.mirostat = version, .mirostat_mu = state.mu}, rng);
      const double log_probability = drawn.processed_log_probabilities(0);
      state.update(log_probability);
      if (i >= 100) surprise -= log_probability / std::log(2.0) / 300;
    }
    EXPECT_NEAR(surprise, 4, .15) << "version " << version;
  }
}

}  // namespace
