// Sampling, most of it from a vocabulary of 128256. Limit: one read of the logits. Peer: Eigen by
// hand, that is argmax, or softmax and a sort.
#include <eigenformer/parallel_region.h>
#include <eigenformer/sampling.h>

#include <cmath>
#include <numeric>
#include <random>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

constexpr Index kBatch = 8, kVocab = 128256;

using Logits = std::shared_ptr<ef::Tensor<float, 2>>;

Logits random_logits(float scale, Index batch = kBatch, Index vocab = kVocab) {
  auto logits = std::make_shared<ef::Tensor<float, 2>>(batch, vocab);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, scale);
  // drawn once: each row begins elsewhere
  std::vector<float> numbers(static_cast<std::size_t>(2 * vocab));
  for (float& number : numbers) number = normal(generator);
  for (Index r = 0; r < batch; ++r)
    std::copy_n(numbers.begin() + static_cast<Index>(generator() % static_cast<unsigned>(vocab)),
                vocab, logits->data() + r * vocab);
  return logits;
}

/// One token in each row that has nearly all of the probability.
Logits peaked_logits(Index batch, Index vocab) {
  auto logits = random_logits(1.0f, batch, vocab);
  for (Index r = 0; r < batch; ++r) (*logits)(r, (r + 1) * vocab / (batch + 2)) = 18.0f;
  return logits;
}

template <typename T, typename F>
ef::Values<T> values(std::size_t count, F f) {
  return ef::Values<T>::owned(count, f);
}

/// Softmax with Eigen, a sort of token indices, and a walk: the draw of one row.
std::int32_t sample_by_hand(const float* logits, Index k, float p, float u) {
  const Eigen::Map<const Eigen::ArrayXf> x(logits, kVocab);
  const Eigen::ArrayXf probabilities = (x - x.maxCoeff()).exp();
  std::vector<std::int32_t> order(kVocab);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](auto a, auto b) { return probabilities[a] > probabilities[b]; });
  const float total = probabilities.sum();
  float kept = 0;
  Index n = 0;
  while (n < k && kept < p * total) kept += probabilities[order[static_cast<std::size_t>(n++)]];
  float target = u * kept;
  for (Index i = 0; i < n; ++i)
    if ((target -= probabilities[order[static_cast<std::size_t>(i)]]) <= 0)
      return order[static_cast<std::size_t>(i)];
  return order[static_cast<std::size_t>(n - 1)];
}

void sampling_cases(bench::Suite& suite) {
  const auto flat = random_logits(1.0f), peaked = random_logits(4.0f);
  const auto limit = bench::Limit::read_bytes(static_cast<double>(kBatch * kVocab) * sizeof(float));
  const auto ids = std::make_shared<ef::Tensor<std::int32_t, 1>>(kBatch);
  const std::string shape = " (8, 128256) float";

  auto& greedy = suite.row("greedy_sample" + shape, limit);
  greedy.ours([=](const auto& device) { ef::greedy_sample_into(device, *ids, *flat); });
  greedy.peer("Eigen by hand", [=](const auto& device) {
    ef::Tensor<Index, 1> best(kBatch);
    best.device(device) = flat->argmax(1);
    *ids = best.cast<std::int32_t>();
  });

  const auto add = [&](const std::string& name, const std::shared_ptr<ef::Tensor<float, 2>>& logits,
                       const ef::SamplingParams& params) {
    const auto rng = std::make_shared<ef::Philox>(7u);
    auto& row = suite.row(name + shape, limit);
    row.ours([=](const auto& device) { ef::sample_into(device, *ids, *logits, params, *rng); });
    row.peer_one_thread("Eigen by hand", [=] {
      const Index k = std::min(params.top_k, kVocab);
      for (Index r = 0; r < kBatch; ++r)
        (*ids)(r) = sample_by_hand(logits->data() + r * kVocab, k, static_cast<float>(params.top_p),
                                   static_cast<float>(rng->uniform(static_cast<std::uint32_t>(r))));
      rng->advance();
    });
  };
  add("sample top-k 50", flat, {.top_k = 50});
  add("sample top-p 0.9 peaked", peaked, {.top_p = .9});
  add("sample top-p 0.9 flat", flat, {.top_p = .9});
  add("sample top-k 50, top-p 0.95, min-p 0.05", peaked, {.top_k = 50, .top_p = .95, .min_p = .05});
  add("sample all tokens", flat, {});

  // Stages that nobody writes by hand.
  const auto stage = [&](const std::string& name, const ef::SamplingParams& params) {
    const auto rng = std::make_shared<ef::Philox>(7u);
    suite.row("sample " + name + shape, limit).ours([=](const auto& device) {
      ef::sample_into(device, *ids, *peaked, params, *rng);
    });
  };
  std::vector<std::int32_t> history;
  for (std::int32_t i = 0; i < 1000; ++i) history.push_back(i * 37 % 4999);
  stage("typical-p 0.9", {.typical_p = .9});
  stage("top-n-sigma 1", {.top_n_sigma = 1});
  stage("XTC", {.xtc_probability = 1, .xtc_threshold = .1});
  stage("epsilon cutoff", {.epsilon_cutoff = 3e-4});
  stage("eta cutoff", {.eta_cutoff = 3e-4});
  stage("top-h 0.4", {.top_h = .4});
  stage("mirostat 1", {.mirostat = 1, .mirostat_mu = 5});
  stage("mirostat 2", {.mirostat = 2, .mirostat_mu = 5});
  stage("dynamic temperature", {.dynatemp_range = .5});
  ef::SamplingParams dry{.top_k = 50, .dry_multiplier = .8};
  dry.output_tokens =
      values<std::int32_t>(history.size(), [&](std::size_t i) { return history[i]; });
  stage("top-k 50, DRY on 1000 tokens", dry);
}

/// What changes few logits or bans the others, beside the same draw without.
void changed_logits_cases(bench::Suite& suite) {
  const auto limit = bench::Limit::read_bytes(static_cast<double>(kBatch * kVocab) * sizeof(float));
  const auto logits = random_logits(3.0f);
  const auto ids = std::make_shared<ef::Tensor<std::int32_t, 1>>(kBatch);
  const auto add = [&](const std::string& name, const ef::SamplingParams& params) {
    const auto rng = std::make_shared<ef::Philox>(7u);
    suite.row("sample " + name + " (8, 128256) float", limit).ours([=](const auto& device) {
      ef::sample_into(device, *ids, *logits, params, *rng);
    });
  };
  const auto add_changes = [&](const std::string& name, const ef::SamplingParams& plain) {
    std::mt19937 generator(3);
    const auto any_token = [&] { return static_cast<std::int32_t>(generator() % kVocab); };
    add(name + ", no change", plain);
    // as text has them: the likelihood of a token falls with its number
    const auto of_text = [&](std::size_t) {
      const double u = (generator() + 1.0) / 4294967296.0;
      return static_cast<std::int32_t>(std::pow(static_cast<double>(kVocab), u)) - 1;
    };
    for (const bool spread : {true, false}) {
      ef::SamplingParams params = plain;
      params.repetition_penalty = 1.1;
      params.output_tokens =
          spread ? values<std::int32_t>(1000, [&](std::size_t) { return any_token(); })
                 : values<std::int32_t>(1000, of_text);
      add(name + ", penalties on 1000 tokens" + (spread ? "" : " of text"), params);
    }
    ef::SamplingParams biases = plain;
    biases.logit_bias = {{1000, 2.0f}, {2000, -2.0f}};
    add(name + ", 2 biases", biases);
    const auto add_mask = [&](const std::string& mask_name, const auto& word) {
      ef::SamplingParams params = plain;
      params.token_mask = values<std::uint32_t>((kVocab + 31) / 32, word);
      add(name + ", mask of " + mask_name, params);
    };
    std::vector<std::uint32_t> few((kVocab + 31) / 32);
    for (int i = 0; i < 50; ++i) {
      const auto token = static_cast<std::size_t>(any_token());
      few[token / 32] |= std::uint32_t{1} << (token % 32);
    }
    add_mask("50 tokens", [&](std::size_t i) { return few[i]; });
    add_mask("the lower half", [](std::size_t i) { return i < kVocab / 64 ? ~0u : 0u; });
    add_mask("all tokens", [](std::size_t) { return ~0u; });
  };
  add_changes("top-k 50", {.top_k = 50});
  add_changes("top-p 0.9", {.top_p = .9});
}

/// Other vocabularies, 64 rows: where a call is spread over threads by rows.
void vocabulary_cases(bench::Suite& suite) {
  constexpr Index batch = 64;
  for (const Index vocab : {Index{32000}, Index{128256}, Index{262144}}) {
    const auto limit = bench::Limit::read_bytes(static_cast<double>(batch * vocab) * sizeof(float));
    const auto ids = std::make_shared<ef::Tensor<std::int32_t, 1>>(batch);
    const auto add = [&](const std::string& name, const Logits& logits,
                         const ef::SamplingParams& params) {
      const auto rng = std::make_shared<ef::Philox>(7u);
      suite.row("sample " + name + " (64, " + std::to_string(vocab) + ") float", limit)
          .ours([=](const auto& device) { ef::sample_into(device, *ids, *logits, params, *rng); });
    };
    const auto normal = random_logits(3.0f, batch, vocab);
    add("top-k 50", normal, {.top_k = 50});
    add("min-p 0.05", normal, {.min_p = .05});
    add("top-p 0.9", normal, {.top_p = .9});
    add("top-p 0.9 peaked", peaked_logits(batch, vocab), {.top_p = .9});
    add("top-p 0.9 flat", random_logits(.01f, batch, vocab), {.top_p = .9});
  }
}

/// One row at a time, as a single sequence is served: in a region its threads share each row.
void single_row_cases(bench::Suite& suite) {
  constexpr int draws = 16;
  const auto id = std::make_shared<ef::Tensor<std::int32_t, 1>>(1);
  for (const Index vocab : {Index{32000}, Index{128256}, Index{262144}}) {
    const auto limit = bench::Limit::read_bytes(static_cast<double>(draws * vocab) * sizeof(float));
    const auto add = [&](const std::string& name, const Logits& logits,
                         const ef::SamplingParams& params) {
      const auto rng = std::make_shared<ef::Philox>(7u);
      suite.row("16 draws, " + name + " (1, " + std::to_string(vocab) + ") float", limit)
          .ours([=](const auto& device) {
            const ef::ParallelRegion region(device);
            for (int i = 0; i < draws; ++i) ef::sample_into(device, *id, *logits, params, *rng);
          });
    };
    const auto normal = random_logits(3.0f, 1, vocab), flat = random_logits(.01f, 1, vocab);
    add("all tokens", normal, {});
    add("top-k 50", normal, {.top_k = 50});
    add("top-p 0.9", normal, {.top_p = .9});
    add("top-p 0.9 peaked", peaked_logits(1, vocab), {.top_p = .9});
    add("top-p 0.9 flat", flat, {.top_p = .9});
    if (vocab != kVocab) continue;
    add("typical-p 0.9", normal, {.typical_p = .9});
    add("typical-p 0.9 flat", flat, {.typical_p = .9});
  }
}

/// Verification of 4 drafts, as a chain, as siblings, and as siblings that are certain. Limit: one
/// read of the distributions at the root, where most walks end.
void speculative_cases(bench::Suite& suite) {
  constexpr Index drafts = 4, vocab = 25600;
  const auto probabilities = [&](float scale) {
    const auto logits = random_logits(scale);
    const ef::TensorView<const float, 2> rows(logits->data(), kBatch * (drafts + 1), vocab);
    return std::make_shared<ef::Tensor<float, 2>>(
        ef::sampling_probabilities(rows, ef::SamplingParams{}));
  };
  static_assert((drafts + 1) * vocab <= kVocab);
  const auto q = probabilities(4.0f), p = probabilities(3.0f);
  const auto tokens = std::make_shared<ef::Tensor<std::int32_t, 2>>(kBatch, drafts);
  const auto parents = std::make_shared<ef::Tensor<std::int32_t, 1>>(drafts);
  parents->setConstant(-1);
  for (Index r = 0; r < kBatch; ++r)
    for (Index i = 0; i < drafts; ++i) (*tokens)(r, i) = static_cast<std::int32_t>(100 * r + i);
  const auto result = std::make_shared<ef::SpeculativeResult>();
  const auto tree = std::make_shared<ef::SpeculativeTreeResult>();
  const auto of = [&](const auto& x, Index places) {
    return ef::TensorView<const float, 3>(x->data(), kBatch, places, vocab);
  };
  const auto limit = [&](double rows) {
    return bench::Limit::read_bytes(rows * static_cast<double>(kBatch * vocab) * sizeof(float));
  };
  const auto chain_q = of(q, drafts), tree_q = of(q, drafts + 1), target = of(p, drafts + 1);
  suite.row("verify_speculative 4 drafts (8, 25600) float", limit(2)).ours([=](const auto& device) {
    (void)p, (void)q;  // kept
    ef::verify_speculative_into(device, *result, *tokens, chain_q, target, ef::Philox{1});
  });
  suite.row("verify_speculative_tree 4 siblings (8, 25600) float", limit(2))
      .ours([=](const auto& device) {
        (void)p, (void)q;
        ef::verify_speculative_tree_into(device, *tree, *tokens, *parents, tree_q, target,
                                         ef::Philox{1});
      });
  suite.row("verify_speculative_tree 4 certain siblings (8, 25600) float", limit(1))
      .ours([=](const auto& device) {
        (void)p;
        ef::verify_speculative_tree_into(device, *tree, *tokens, *parents, target, ef::Philox{1});
      });
}

}  // namespace

EIGENFORMER_BENCHMARK(sampling_cases)
EIGENFORMER_BENCHMARK(changed_logits_cases)
EIGENFORMER_BENCHMARK(vocabulary_cases)
EIGENFORMER_BENCHMARK(single_row_cases)
EIGENFORMER_BENCHMARK(speculative_cases)
