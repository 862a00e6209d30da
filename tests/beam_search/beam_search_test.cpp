// Laws: the hypotheses of transformers in a toy model, and of the reference, whatever the length
// penalty, the stopping, the number of rows at the first step; parents and tokens spell them; a
// sequence that is done is not read; few candidates; errors change nothing.
#include <eigenformer/beam_search.h>
#include <eigenformer/log_softmax.h>
#include <eigenformer/reference/beam_search.h>

#include <fstream>
#include <numeric>
#include <sstream>

#include "allocations.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

constexpr Index kVocab = 13;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
using Tokens = std::vector<std::int32_t>;

/// That of tests/golden/make_beam_search.py.
float toy_logit(std::int32_t before, std::int32_t last, std::int32_t token) {
  return static_cast<float>(
             (before * 37 + last * 101 + token * 57 + (before + 2) * (last + 3) * (token + 5)) %
             211) /
         32.0f;
}

/// The log-probabilities after each of some sequences.
ef::Tensor<float, 2> toy_scores(const std::vector<Tokens>& sequences) {
  ef::Tensor<float, 2> logits(static_cast<Index>(sequences.size()), kVocab);
  for (Index r = 0; r < logits.dimension(0); ++r) {
    const Tokens& own = sequences[static_cast<std::size_t>(r)];
    for (std::int32_t t = 0; t < kVocab; ++t)
      logits(r, t) = toy_logit(own[own.size() - 2], own.back(), t);
  }
  return ef::log_softmax(logits);
}

/// Runs a search over prompts; the first step from one row per prompt, or from one per beam.
template <typename D = Eigen::DefaultDevice>
ef::BeamSearch searched(const std::vector<Tokens>& prompts, const ef::BeamSearchOptions& options,
                        bool expanded, const D& device = {}) {
  ef::BeamSearch search(static_cast<Index>(prompts.size()), options);
  std::vector<Tokens> beams = prompts;
  if (expanded) {
    beams.clear();
    for (const Tokens& prompt : prompts)
      beams.insert(beams.end(), static_cast<std::size_t>(options.beams), prompt);
  }
  while (!search.done()) {
    search.step(device, toy_scores(beams));
    std::vector<Tokens> next;
    for (std::size_t i = 0; i < search.parents().size(); ++i) {
      next.push_back(beams[static_cast<std::size_t>(search.parents()[i])]);
      next.back().push_back(search.tokens()(static_cast<Index>(i)));
    }
    beams = next;
  }
  return search;
}

void expect_equal(const std::vector<ef::Hypothesis>& got,
                  const std::vector<ef::Hypothesis>& expected, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].tokens, expected[i].tokens) << what << " place " << i;
    EXPECT_NEAR(got[i].score, expected[i].score, tolerance) << what << " place " << i;
  }
}

TEST(BeamSearch, FindsWhatTransformersFinds) {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/beam_search.txt");
  const std::vector<Tokens> prompts{{1, 4}, {7, 9}, {3, 12}};
  int lines = 0;
  for (std::string line; std::getline(file, line); ++lines) {
    std::istringstream words(line);
    ef::BeamSearchOptions options;
    int stopping = 0;
    std::size_t ends = 0, batch = 0;
    words >> options.beams >> options.length_penalty >> stopping >> ends;
    Tokens end_tokens(ends);
    for (auto& token : end_tokens) words >> token;
    words >> options.max_new_tokens >> batch;
    options.end_tokens = end_tokens;
    options.stopping = static_cast<ef::BeamStopping>(stopping);
    ASSERT_EQ(batch, prompts.size());
    const auto search = searched(prompts, options, lines % 2 == 0);
    for (std::size_t b = 0; b < batch; ++b) {
      std::vector<ef::Hypothesis> expected(static_cast<std::size_t>(options.beams));
      for (auto& hypothesis : expected) {
        std::size_t length = 0;
        words >> length;
        hypothesis.tokens.resize(length);
        for (auto& token : hypothesis.tokens) words >> token;
        words >> hypothesis.score;
      }
      ASSERT_TRUE(words);
      expect_equal(search.hypotheses(static_cast<Index>(b)), expected, 1e-4,
                   "line " + std::to_string(lines + 1));
    }
  }
  EXPECT_EQ(lines, 120);
}

TEST(BeamSearch, IsTheReference) {
  Threads threads(2);
  const std::vector<Tokens> prompts{{1, 4}, {0, 0}, {11, 12}};
  for (Index beams : {1, 2, 5, 20})
    for (double penalty : {0.0, 1.0, 2.0, -1.0})
      for (auto stopping :
           {ef::BeamStopping::heuristic, ef::BeamStopping::early, ef::BeamStopping::never}) {
        const ef::BeamSearchOptions options{.beams = beams,
                                            .length_penalty = penalty,
                                            .max_new_tokens = 9,
                                            .end_tokens = {5, 8},
                                            .stopping = stopping};
        const auto search = searched(prompts, options, false);
        const auto threaded = searched(prompts, options, true, threads.device);
        for (std::size_t b = 0; b < prompts.size(); ++b) {
          const auto expected = ef::reference::beam_search(options, [&](const Tokens& tokens) {
            Tokens all = prompts[b];
            all.insert(all.end(), tokens.begin(), tokens.end());
            const auto scores = toy_scores({all});
            return std::vector<double>(scores.data(), scores.data() + kVocab);
          });
          const std::string what = std::to_string(beams) + " beams, " + std::to_string(penalty);
          expect_equal(search.hypotheses(static_cast<Index>(b)), expected, 1e-12, what);
          expect_equal(threaded.hypotheses(static_cast<Index>(b)), expected, 1e-12, what);
        }
      }
}

// One token of all may follow, then two: beams that do not exist are never finished.
TEST(BeamSearch, FewCandidates) {
  ef::BeamSearch search(1, {.beams = 3, .max_new_tokens = 3, .end_tokens = {2}});
  ef::Tensor<float, 2> scores(1, 3);
  scores.setValues({{-kInfinity, -.5f, -kInfinity}});
  const Eigen::DefaultDevice device;
  search.step(device, scores);
  EXPECT_EQ(search.tokens()(0), 1);
  EXPECT_EQ(search.scores()[1], -kInfinity);
  scores.resize(3, 3);
  scores.setConstant(-1);
  scores(0, 2) = -.25f;
  search.step(device, scores);
  EXPECT_FALSE(search.done());
  EXPECT_EQ(search.tokens()(0), 0);  // of equals the lower token
  EXPECT_EQ(search.tokens()(1), 1);
  EXPECT_EQ(search.parents()[1], 0);
  EXPECT_EQ(search.scores()[2], -kInfinity);
  scores.setConstant(-kInfinity);
  search.step(device, scores);
  EXPECT_TRUE(search.done());
  const auto best = search.hypotheses(0);
  ASSERT_EQ(best.size(), 1u);
  EXPECT_EQ(best[0].tokens, (Tokens{1, 2}));
  EXPECT_EQ(best[0].log_probability, -.75);
  EXPECT_EQ(best[0].score, -.375);
}

// Sequence 0 ends at once; its rows may then hold anything.
TEST(BeamSearch, ASequenceThatIsDoneIsNotRead) {
  ef::BeamSearch search(2, {.beams = 1, .max_new_tokens = 5, .end_tokens = {0}});
  ef::Tensor<ef::bfloat16, 2> scores(2, 3);
  scores.setConstant(ef::bfloat16(-2.f));
  scores(0, 0) = scores(1, 1) = ef::bfloat16(-1.f);
  const Eigen::DefaultDevice device;
  search.step(device, scores);
  EXPECT_TRUE(search.done(0));
  EXPECT_FALSE(search.done(1));
  for (Index t = 0; t < 3; ++t) scores(0, t) = std::numeric_limits<ef::bfloat16>::quiet_NaN();
  ef::Workspace workspace;
  search.step(device, scores, workspace);
  EXPECT_EQ(count_allocations([&] { search.step(device, scores, workspace); }), 0);
  while (!search.done()) search.step(device, scores);
  EXPECT_EQ(search.steps(), 5);
  EXPECT_EQ(search.hypotheses(0)[0].tokens, Tokens{0});
  EXPECT_EQ(search.hypotheses(1)[0].tokens, (Tokens{1, 1, 1, 1, 1}));
}

TEST(BeamSearchErrors, ChangeNothing) {
  for (const auto& [options, text] :
       {std::pair{ef::BeamSearchOptions{.beams = 0}, "beams is 0"},
        std::pair{ef::BeamSearchOptions{.length_penalty = kInfinity}, "length_penalty is inf"},
        std::pair{ef::BeamSearchOptions{.max_new_tokens = 0}, "max_new_tokens is 0"},
        std::pair{ef::BeamSearchOptions{.end_tokens = {-1}}, "an end token is -1"}})
    expect_throws<std::invalid_argument>([&, o = options] { ef::BeamSearch(1, o); },
                                         {"beam_search", text});
  expect_throws<std::invalid_argument>([] { ef::BeamSearch(-1); }, {"batch is -1"});
  ef::BeamSearch search(2, {.beams = 2, .max_new_tokens = 2});
  const Eigen::DefaultDevice device;
  auto scores = random_tensor<float, 2>({4, 6}, 1);
  expect_throws<std::invalid_argument>([&] { search.step(device, rows_of(scores, 0, 3)); },
                                       {"has 3 rows, expected 4"});
  scores(3, 5) = std::numeric_limits<float>::quiet_NaN();
  expect_throws<std::invalid_argument>([&] { search.step(device, scores); }, {"row 3 holds NaN"});
  scores(3, 5) = kInfinity;
  expect_throws<std::invalid_argument>([&] { search.step(device, scores); },
                                       {"row 3 holds +infinity"});
  expect_throws<std::invalid_argument>([&] { search.step(device, ef::Tensor<float, 2>(4, 0)); },
                                       {"no columns"});
  EXPECT_EQ(search.steps(), 0);
  scores(3, 5) = 0;
  search.step(device, scores);
  expect_throws<std::invalid_argument>([&] { search.step(device, rows_of(scores, 0, 2)); },
                                       {"has 2 rows, expected 4"});
  search.step(device, scores);
  EXPECT_TRUE(search.done());
  expect_throws<std::invalid_argument>([&] { search.step(device, scores); },
                                       {"the search is done after 2 steps"});
  expect_throws<std::invalid_argument>([&] { search.hypotheses(2); }, {"sequence is 2"});
  EXPECT_TRUE(ef::BeamSearch(0).done());
}

}  // namespace
