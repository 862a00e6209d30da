// Sampling on every device: the tokens, probabilities and statuses of the CPU, whatever the
// filters, their order and the row's place in the batch.
#include "device.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;

/// What a call leaves for each row.
struct Draws {
  ef::Tensor<std::int32_t, 1> ids;
  ef::Tensor<std::int8_t, 1> statuses;
  ef::Tensor<float, 2> probabilities;
};

std::span<Status> statuses_of(const ef::TensorView<std::int8_t, 1>& bytes) {
  return {reinterpret_cast<Status*>(bytes.data()), static_cast<std::size_t>(bytes.size())};
}

template <typename B, typename T, typename Params>
Draws draw(const B& bench, const ef::Tensor<T, 2>& logits, const Params& params,
           std::vector<ef::Philox> generators) {
  const Index batch = logits.dimension(0), vocab = logits.dimension(1);
  const auto x = on_device(bench, logits);
  const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({batch}));
  const auto statuses = on_device(bench, poisoned_tensor<std::int8_t, 1>({batch}));
  const auto p = on_device(bench, poisoned_tensor<float, 2>({batch, vocab}));
  const auto of_ids = statuses_of(statuses.view());
  ef::sampling_probabilities_into(bench.device, p.view(), x.cview(), params);
  if (generators.size() == 1)
    ef::sample_into(bench.device, ids.view(), x.cview(), params, generators[0], of_ids);
  else
    ef::sample_into(bench.device, ids.view(), x.cview(), params, generators, of_ids);
  return {ids.host(), statuses.host(), p.host()};
}

std::vector<ef::Philox> generators(Index rows, std::uint64_t seed) {
  std::vector<ef::Philox> all;
  for (Index r = 0; r < rows; ++r) all.emplace_back(seed + static_cast<std::uint64_t>(r), 3);
  return all;
}

void expect_equal(const Draws& got, const Draws& expected, const std::string& what) {
  const Index vocab = expected.probabilities.dimension(1);
  for (Index r = 0; r < expected.ids.size(); ++r) {
    ASSERT_EQ(got.statuses(r), expected.statuses(r)) << what << " row " << r;
    ASSERT_EQ(got.ids(r), expected.ids(r)) << what << " row " << r;
    for (Index v = 0; v < vocab; ++v)
      ASSERT_NEAR(got.probabilities(r, v), expected.probabilities(r, v), 1e-6f)
          << what << " row " << r << " token " << v;
    for (Index v = 0; v < vocab; ++v)
      ASSERT_EQ(got.probabilities(r, v) > 0, expected.probabilities(r, v) > 0)
          << what << " row " << r << " token " << v;
  }
}

/// Draws on every device and on the calling thread, which the other tests of sampling compare with
/// the reference.
template <typename T, typename Params>
void check(const ef::Tensor<T, 2>& logits, const Params& params,
           const std::vector<ef::Philox>& generators, const std::string& what) {
  const Eigen::DefaultDevice one;
  const Draws expected = draw(HostBench<Eigen::DefaultDevice>{one}, logits, params, generators);
  for_each_device([&](const auto& bench) {
    expect_equal(draw(bench, logits, params, generators), expected, what);
  });
}

/// Many equals in some rows.
template <typename T>
ef::Tensor<T, 2> rows_with_ties(Index rows, Index vocab, unsigned seed) {
  auto logits = random_tensor<T, 2>({rows, vocab}, seed, 3.0);
  for (Index r = 0; r < rows; r += 3)
    for (Index t = 0; t < vocab; ++t)
      logits(r, t) = static_cast<T>(std::nearbyint(static_cast<double>(logits(r, t))));
  return logits;
}

std::vector<ef::SamplingParams> all_parameters() {
  std::vector<ef::SamplingParams> all;
  for (const auto& [name, params] : parameter_sets()) all.push_back(params);
  return all;
}

template <typename T>
void check_all_parameters(Index vocab) {
  const auto params = all_parameters();
  const Index rows = static_cast<Index>(params.size());
  check(rows_with_ties<T>(rows, vocab, static_cast<unsigned>(vocab)), params, generators(rows, 20),
        "vocab " + std::to_string(vocab));
}

TEST(SamplingOnDevice, EveryFilterInEveryOrder) {
  for (Index vocab : {1, 33, 256, 1001}) check_all_parameters<float>(vocab);
  check_all_parameters<ef::bfloat16>(264);
  check_all_parameters<ef::half>(255);
  check_all_parameters<double>(130);
}

TEST(SamplingOnDevice, ManySeedsDrawTheTokensOfTheCpu) {
  constexpr Index rows = 200, vocab = 300;
  ef::Tensor<ef::bfloat16, 2> logits(rows, vocab);
  const auto one = random_tensor<ef::bfloat16, 2>({1, vocab}, 5, 2.0);
  for (Index r = 0; r < rows; ++r) std::copy_n(one.data(), vocab, logits.data() + r * vocab);
  check(logits, ef::SamplingParams{}, generators(rows, 1000), "a generator for each row");
  const ef::Tensor<ef::bfloat16, 2> few =
      logits.slice(Eigen::DSizes<Index, 2>(0, 0), Eigen::DSizes<Index, 2>(32, vocab));
  check(few, ef::SamplingParams{.temperature = 1.2, .top_k = 250, .top_p = .97, .min_p = .001},
        generators(1, 7), "one generator");
}

TEST(SamplingOnDevice, BadRowsHarmNoOther) {
  constexpr Index vocab = 70;
  auto logits = random_tensor<float, 2>({6, vocab}, 4, 3.0);
  logits(1, 69) = kNaN;
  logits(1, 3) = kInfinity;
  logits(2, 0) = kInfinity;
  for (Index t = 0; t < vocab; ++t) logits(3, t) = -kInfinity;
  logits(4, 7) = -kInfinity;
  std::vector<ef::SamplingParams> params(6, {.temperature = .8, .top_k = 20});
  params[5].token_mask = {0u, 0u, 0u};  // no token is left
  check(logits, params, generators(6, 3), "bad rows");
}

TEST(SamplingOnDevice, PenaltiesBiasAndMask) {
  constexpr Index vocab = 300;
  std::vector<std::int32_t> prompt, output;
  std::vector<ef::LogitBias> biases;
  std::vector<std::uint32_t> mask((vocab + 31) / 32, 0x7fffffffu);
  for (int i = 0; i < 700; ++i) prompt.push_back((i * i) % 211);
  for (int i = 0; i < 520; ++i) output.push_back((i * 7) % 97);  // each of them five times and more
  for (int i = 0; i < 300; ++i)
    biases.push_back({(i * 5) % 290, i % 11 == 0 ? -kInfinity : .01f * static_cast<float>(i)});
  std::vector<ef::SamplingParams> params(
      5, {.repetition_penalty = 1.3, .frequency_penalty = .1, .presence_penalty = .4});
  params[0].prompt_tokens = prompt;
  params[1].output_tokens = output;
  params[2].prompt_tokens = prompt;
  params[2].output_tokens = output;
  params[2].logit_bias = biases;
  params[2].token_mask = mask;
  params[3] = params[2];
  params[3].order = ef::kVllmOrder;
  params[3].top_p = .9;
  const auto logits = rows_with_ties<float>(5, vocab, 2);  // params[4] leaves its row as it is
  check(logits, params, generators(5, 9), "lists for each row");
  check(rows_with_ties<ef::bfloat16>(2, vocab, 3), params[2], generators(1, 9), "one list");
}

// One scratch row serves several rows of the batch.
TEST(SamplingOnDevice, MoreRowsThanScratch) {
  const ef::SamplingParams params{.logit_bias = {{1, .5f}}};
  check(random_tensor<float, 2>({140, 3}, 8), params, generators(140, 1), "140 rows");
}

// The sums of a row this long do not fit shared memory at once: 4096 runs of 128 do.
TEST(SamplingOnDevice, VocabularyOfMoreThanATile) {
  check(random_tensor<ef::bfloat16, 2>({1, 4096 * 128 + 77}, 8), ef::SamplingParams{},
        generators(1, 5), "long row");
}

// Several blocks share a row of 9001 tokens.
TEST(SamplingOnDevice, GreedyAndTopK) {
  for (Index vocab : {1, 2, 33, 257, 1000, 9001}) {
    auto logits = rows_with_ties<float>(3, vocab, 6);
    const auto expected = ef::greedy_sample(logits);
    ef::Philox same(2);
    const auto drawn = ef::top_k_sample(logits, 3, .7, same);
    logits(2, vocab - 1) = kNaN;
    for_each_device([&](const auto& bench) {
      const auto x = on_device(bench, logits);
      const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({3}));
      const auto bytes = on_device(bench, poisoned_tensor<std::int8_t, 1>({3}));
      ef::greedy_sample_into(bench.device, ids.view(), x.cview(), statuses_of(bytes.view()));
      const auto best = ids.host();
      const auto statuses = bytes.host();
      EXPECT_EQ(best(0), expected(0));
      EXPECT_EQ(best(1), expected(1));
      EXPECT_EQ(best(2), -1);
      EXPECT_EQ(static_cast<Status>(statuses(0)), Status::ok);
      EXPECT_EQ(static_cast<Status>(statuses(2)), Status::nan);
      ef::top_k_sample_into(bench.device, ids.view(), x.cview(), 3, .7, ef::Philox(2));
      const auto got = ids.host();
      EXPECT_EQ(got(0), drawn(0));
      EXPECT_EQ(got(1), drawn(1));
      EXPECT_EQ(got(2), -1);
    });
  }
}

/// Rows whose best tokens are few, have equals, or are all of one logit; and one of few tokens.
template <typename T>
ef::Tensor<T, 2> rows_for_lists(Index vocab) {
  auto logits = random_tensor<T, 2>({5, vocab}, 10, 3.0);
  for (Index t = 0; t < vocab; ++t) {
    logits(1, t) = static_cast<T>(std::nearbyint(2 * static_cast<double>(logits(1, t))));
    logits(2, t) = static_cast<T>(1.5f);
    logits(3, t) = static_cast<T>(t % 3 == 0 ? 0.25f : -0.0f);
    if (t % 100 != 7) logits(4, t) = static_cast<T>(-kInfinity);
  }
  return logits;
}

// Long enough for the list of the best tokens, and for what no list holds.
TEST(SamplingOnDevice, ListsOfTheBestTokens) {
  const std::vector<ef::SamplingParams> all{
      {.top_k = 50},
      {.temperature = .7, .top_k = 40, .top_p = .8, .min_p = .02},
      {.top_k = 20, .top_k_ties = ef::TopKTies::keep_all},
      {.top_k = 1200, .top_p = .95},
      {.temperature = 0}};
  const auto few = std::span(all).first(2);
  const auto run = [](const auto& logits, std::span<const ef::SamplingParams> sets) {
    for (const ef::SamplingParams& params : sets)
      check(logits, params, generators(logits.dimension(0), 70),
            "vocab " + std::to_string(logits.dimension(1)));
  };
  run(rows_for_lists<float>(2403), all);
  run(rows_for_lists<ef::bfloat16>(2304), few);
  run(rows_for_lists<double>(1501), few);
}

// At an odd vocabulary the rows of a batch begin at other alignments than a row alone.
TEST(SamplingOnDevice, ARowAloneIsTheRowInABatch) {
  constexpr Index rows = 3, vocab = 301;
  const auto logits = random_tensor<float, 2>({rows, vocab}, 8, 2.0);
  const ef::SamplingParams params{.temperature = .9, .top_p = .9, .typical_p = .95};
  for_each_device([&](const auto& bench) {
    const Draws all = draw(bench, logits, params, generators(rows, 40));
    for (Index r = 0; r < rows; ++r) {
      ef::Tensor<float, 2> alone(1, vocab);
      std::copy_n(logits.data() + r * vocab, vocab, alone.data());
      const Draws one = draw(bench, alone, std::span(&params, 1),
                             {1, generators(rows, 40)[static_cast<std::size_t>(r)]});
      EXPECT_EQ(one.ids(0), all.ids(r));
      EXPECT_EQ(std::memcmp(one.probabilities.data(), all.probabilities.data() + r * vocab,
                            static_cast<std::size_t>(vocab) * sizeof(float)),
                0);
    }
  });
}

#if defined(EIGENFORMER_TEST_BLOCKS)
// Parameters, lists and generators are those of the capture, logits those of the replay.
TEST(SamplingOnDevice, ACallIsCaptured) {
  constexpr Index vocab = 90;
  const auto logits = random_tensor<float, 2>({2, vocab}, 8, 2.0);
  ef::SamplingParams params{.temperature = .9,
                            .top_k = 30,
                            .frequency_penalty = .5,
                            .output_tokens = {3, 4, 4},
                            .logit_bias = {{5, 1.f}}};
  ef::Tensor<std::int32_t, 1> expected(2);
  ef::sample_into(Eigen::DefaultDevice{}, expected, logits, params, ef::Philox(6));
  const EmulatedBench bench{{emulated::Stream({.seed = 5, .deferred = true})}, {}};
  const auto x = on_device(bench, poisoned_tensor<float, 2>({2, vocab}));
  const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({2}));
  emulated::Stream& stream = bench.device.stream();
  stream.begin_capture();
  ef::sample_into(bench.device, ids.view(), x.cview(), params, ef::Philox(6));
  const auto graph = stream.end_capture();
  params = {};
  bench.to_device(x.view().data(), logits.data(), logits.size());
  for (int replay = 0; replay < 2; ++replay) {
    stream.replay(graph);
    const auto got = ids.host();
    EXPECT_EQ(got(0), expected(0));
    EXPECT_EQ(got(1), expected(1));
  }
}

TEST(SamplingOnDevice, NothingIsAllocatedOnceTheSizesHaveBeenSeen) {
  const EmulatedBench bench{{emulated::Stream()}, {}};
  const auto x = on_device(bench, random_tensor<float, 2>({3, 50}, 8));
  const auto ids = on_device(bench, poisoned_tensor<std::int32_t, 1>({3}));
  std::vector<ef::SamplingParams> params(3, {.top_k = 9, .logit_bias = {{5, 1.f}}});
  ef::Philox random;
  const auto call = [&] { ef::sample_into(bench.device, ids.view(), x.cview(), params, random); };
  for (int i = 0; i < 8; ++i) call();  // every piece of the stream's staging has had its turn
  const auto before = emulated::DeviceMemory::instance().allocations();
  call();
  EXPECT_EQ(emulated::DeviceMemory::instance().allocations(), before);
}
#endif

}  // namespace
