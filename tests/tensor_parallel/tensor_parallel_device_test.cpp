// Tensor-parallel layers on ranks that have a GPU each: every result equals, bit for bit, that of
// ef::linear on one such GPU with the full weight, for every world size, and tokens are those of
// its logits.
#include <eigenformer/reference/linear.h>
#include <eigenformer/reference/tensor_parallel.h>
#include <eigenformer/tensor_parallel.h>

#include "ranks.h"

using namespace eigenformer_test;

namespace {

/// The part of x (rows, features) that belongs to a rank.
template <typename T>
ef::Tensor<T, 2> features_of(const ef::Tensor<T, 2>& x, int rank, int ranks) {
  const ef::ShardRange own = ef::shard_range(x.dimension(1), rank, ranks);
  return x.slice(Eigen::array<Index, 2>{0, own.begin},
                 Eigen::array<Index, 2>{x.dimension(0), own.size()});
}

template <typename T, typename B>
auto output_on(const B& bench, Index rows, Index columns) {
  return on_device(bench, poisoned_tensor<T, 2>({rows, columns}));
}

template <typename T, typename B, typename C>
void check_layers(const B& bench, C& communicator, Index tokens, Index in, Index out) {
  const int rank = communicator.rank(), ranks = communicator.size();
  const std::string text = std::to_string(tokens) + " tokens, " + std::to_string(in) + " -> " +
                           std::to_string(out) + " on " + std::to_string(ranks) + " ranks";
  const auto host_x = random_tensor<T, 2>({tokens, in}, 1);
  const auto host_weight = random_tensor<T, 2>({out, in}, 2);
  const auto host_bias = random_tensor<T, 1>({out}, 3);
  const auto x = on_device(bench, host_x);
  const auto part = on_device(bench, features_of(host_x, rank, ranks));
  const auto weight = on_device(bench, host_weight);
  const auto bias = on_device(bench, host_bias);
  const auto full = output_on<T>(bench, tokens, out);
  ef::linear_into(bench.device, full.view(), x.cview(), weight.cview(), bias.cview());
  const auto expected = full.host();
  ASSERT_TRUE(within(
      expected,
      ef::reference::linear(to_double(host_x), to_double(host_weight), to_double(host_bias).data()),
      tolerance<T>(), 4 * tolerance<T>()))
      << text;
  const auto shard = ef::pack_column_shard<T>(bench.device, weight.cview(), communicator);
  const auto equals = [&](auto&& call) {
    const auto y = output_on<T>(bench, tokens, out);
    call(y.view());
    ASSERT_TRUE(same_bits(y.host(), expected)) << text;
  };
  equals([&](auto y) {
    ef::column_parallel_linear_into(bench.device, y, x.cview(), weight.cview(), communicator,
                                    bias.cview());
  });
  equals([&](auto y) {
    ef::column_parallel_linear_into(bench.device, y, x.cview(), shard, communicator, bias.cview());
  });
  equals([&](auto y) {
    ef::row_parallel_linear_into(bench.device, y, part.cview(), weight.cview(), communicator,
                                 bias.cview());
  });
  equals([&](auto y) {
    ef::row_parallel_linear_into(bench.device, y, part.cview(), shard, communicator, bias.cview());
  });
  const auto own = features_of(expected, rank, ranks);
  const auto kept = output_on<T>(bench, tokens, own.dimension(1));
  ef::column_parallel_linear_into(bench.device, kept.view(), x.cview(), weight.cview(),
                                  communicator, bias.cview(), {.gather_output = false});
  ASSERT_TRUE(same_bits(kept.host(), own)) << text;
}

// Parts that divide into packs of 16 bytes and that do not, ranks without a feature, rows of one
// token, which need no interleaving, and none.
TEST(TensorParallelOnDevice, LayersEqualLinearForEveryWorldSize) {
  for_each_world(3, {}, [](const auto& bench, auto& communicator, auto&) {
    for (Index out : {2, 31, 96}) check_layers<float>(bench, communicator, 3, 40, out);
    check_layers<float>(bench, communicator, 1, 33, 13);
    check_layers<float>(bench, communicator, 0, 8, 5);
    check_layers<float>(bench, communicator, 2, 1, 1);
    check_layers<ef::bfloat16>(bench, communicator, 5, 48, 48);
    check_layers<ef::half>(bench, communicator, 2, 17, 7);
    communicator.wait();
  });
}

// The two halves of a transformer block's MLP: nothing between them leaves the device or waits.
TEST(TensorParallelOnDevice, APairOfLayersWithAGatedUnit) {
  const auto host_x = random_tensor<float, 2>({3, 24}, 1);
  const auto host_gate = random_tensor<float, 2>({37, 24}, 2),
             host_up = random_tensor<float, 2>({37, 24}, 3),
             host_down = random_tensor<float, 2>({11, 37}, 4);
  for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
    const auto& device = bench.device;
    const auto x = on_device(bench, host_x);
    const auto gate = on_device(bench, host_gate), up = on_device(bench, host_up),
               down = on_device(bench, host_down);
    const auto hidden = output_on<float>(bench, 3, 37), y = output_on<float>(bench, 3, 11);
    const auto pair = ef::pack_gated_weight<float>(device, gate.cview(), up.cview());
    ef::gated_linear_into(device, hidden.view(), x.cview(), pair, ef::Epilogue{}.silu());
    ef::linear_into(device, y.view(), hidden.cview(), down.cview());
    const auto expected_hidden = hidden.host(), expected = y.host();

    const auto shard =
        ef::pack_gated_column_shard<float>(device, gate.cview(), up.cview(), communicator);
    const auto wide = output_on<float>(bench, 3, 37), z = output_on<float>(bench, 3, 11);
    ef::column_parallel_gated_linear_into(device, wide.view(), x.cview(), shard, communicator,
                                          ef::Epilogue{}.silu());
    ASSERT_TRUE(same_bits(wide.host(), expected_hidden));
    const auto part =
        on_device(bench, features_of(expected_hidden, communicator.rank(), communicator.size()));
    ef::row_parallel_linear_into(device, z.view(), part.cview(), down.cview(), communicator);
    ASSERT_TRUE(same_bits(z.host(), expected));

    const auto stack = ef::pack_stacked_weight<float>(device, std::array{gate.cview(), up.cview()});
    const auto both = output_on<float>(bench, 3, 74), stacked = output_on<float>(bench, 3, 74);
    ef::linear_into(device, both.view(), x.cview(), stack);
    ef::column_parallel_linear_into(device, stacked.view(), x.cview(),
                                    ef::pack_stacked_column_shard<float>(
                                        device, std::array{gate.cview(), up.cview()}, communicator),
                                    communicator);
    ASSERT_TRUE(same_bits(stacked.host(), both.host()));
  });
}

// The tokens of gathered logits, from candidates of every rank's shard: ties across ranks, shards
// that are shorter than k, a row that cannot be drawn from.
TEST(TensorParallelOnDevice, TokensAreThoseOfTheWholeVocabulary) {
  using Status = ef::SampleStatus;
  constexpr Index kRows = 4;
  auto host_hidden = random_tensor<float, 2>({kRows, 16}, 10);
  host_hidden(2, 3) = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Status> expected{Status::ok, Status::ok, Status::nan, Status::ok};
  for (Index vocabulary : {1, 5, 97}) {
    auto host_head = random_tensor<float, 2>({vocabulary, 16}, 11);
    if (vocabulary == 97)
      for (Index copy : {20, 50, 96}) host_head.chip(copy, 0) = host_head.chip(3, 0);
    for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
      const auto& device = bench.device;
      const auto hidden = on_device(bench, host_hidden);
      const auto head = on_device(bench, host_head);
      const auto logits_there = output_on<float>(bench, kRows, vocabulary);
      ef::linear_into(device, logits_there.view(), hidden.cview(), head.cview());
      const auto logits = logits_there.host();
      const auto ids = on_device(bench, ef::Tensor<std::int32_t, 1>(kRows));
      const auto check = [&](const std::vector<Status>& statuses, auto&& token_of) {
        ASSERT_EQ(statuses, expected);
        const auto tokens = ids.host();
        for (Index row = 0; row < kRows; ++row)
          ASSERT_EQ(tokens(row), row == 2 ? -1 : token_of(row)) << vocabulary << " " << row;
      };
      std::vector<Status> statuses(kRows, Status::negative);
      ef::vocabulary_parallel_greedy_into(device, ids.view(), hidden.cview(), head.cview(),
                                          communicator, statuses);
      check(statuses, [&](Index row) { return ef::reference::by_likelihood(logits, row)[0]; });
      const auto shard = ef::pack_column_shard<float>(device, head.cview(), communicator);
      for (Index k : {1, 7, 200}) {
        ef::Philox rng{99, 4};
        statuses.assign(kRows, Status::negative);
        ef::vocabulary_parallel_top_k_sample_into(device, ids.view(), hidden.cview(), shard,
                                                  communicator, k, 1.5f, rng, statuses);
        const ef::Philox used{99, 4};
        check(statuses, [&](Index row) {
          return ef::reference::top_k_token(logits, row, k, 1.5,
                                            used.uniform(static_cast<std::uint32_t>(row)));
        });
      }
      const ef::SamplingParams params{.temperature = .8, .top_k = 4, .top_p = .9};
      if (vocabulary <= params.top_k) return;
      statuses.assign(kRows, Status::negative);
      ef::vocabulary_parallel_sample_into(device, ids.view(), hidden.cview(), shard, communicator,
                                          params, ef::Philox{5}, statuses);
      ef::Tensor<std::int32_t, 1> sampled(kRows);
      ef::sample_into(Eigen::DefaultDevice{}, sampled, logits, params, ef::Philox{5});
      check(statuses, [&](Index row) { return sampled(row); });
      for (const ef::SamplingParams& other :
           {ef::SamplingParams{.top_k = 2, .logit_bias = {{1, 1.f}}},
            ef::SamplingParams{.temperature = .6, .top_p = .7}, ef::SamplingParams{}}) {
        statuses.assign(kRows, Status::negative);
        ef::vocabulary_parallel_sample_into(device, ids.view(), hidden.cview(), shard, communicator,
                                            other, ef::Philox{5}, statuses);
        ef::sample_into(Eigen::DefaultDevice{}, sampled, logits, other, ef::Philox{5});
        check(statuses, [&](Index row) { return sampled(row); });
        const auto expected_scores =
            ef::sample_with_log_probabilities(logits, other, ef::Philox{5}, {.best = 3});
        const auto raw = on_device(bench, ef::Tensor<float, 1>(kRows)),
                   processed = on_device(bench, ef::Tensor<float, 1>(kRows));
        const auto ranks = on_device(bench, ef::Tensor<std::int32_t, 1>(kRows));
        const auto best_ids = on_device(bench, ef::Tensor<std::int32_t, 2>(kRows, 3));
        const auto best = output_on<float>(bench, kRows, 3),
                   best_processed = output_on<float>(bench, kRows, 3);
        const auto ends = on_device(bench, ef::Tensor<std::uint8_t, 1>(kRows));
        ef::vocabulary_parallel_sample_with_log_probabilities_into(
            device,
            ef::SampleViews{ids.view(),
                            raw.view(),
                            processed.view(),
                            ranks.view(),
                            best_ids.view(),
                            best.view(),
                            best_processed.view(),
                            {reinterpret_cast<Status*>(ends.view().data()), kRows}},
            hidden.cview(), shard, communicator, other, ef::Philox{5});
        ASSERT_TRUE(same_bits(ids.host(), expected_scores.ids));
        ASSERT_TRUE(same_bits(raw.host(), expected_scores.log_probabilities));
        ASSERT_TRUE(same_bits(processed.host(), expected_scores.processed_log_probabilities));
        ASSERT_TRUE(same_bits(ranks.host(), expected_scores.ranks));
        ASSERT_TRUE(same_bits(best_ids.host(), expected_scores.best_ids));
        ASSERT_TRUE(same_bits(best.host(), expected_scores.best_log_probabilities));
        ASSERT_TRUE(
            same_bits(best_processed.host(), expected_scores.best_processed_log_probabilities));
        ASSERT_EQ(ends.host()(2), static_cast<std::uint8_t>(Status::nan));
        const std::vector<std::int32_t> next{1, 3, -1, 0};
        statuses.assign(kRows, Status::negative);
        ef::vocabulary_parallel_log_probabilities_of_into(device, raw.view(), hidden.cview(), shard,
                                                          communicator, next, other, statuses);
        ef::Tensor<float, 1> expected_next(kRows);
        ef::log_probabilities_of_into(Eigen::DefaultDevice{}, expected_next, logits, next, other);
        ASSERT_TRUE(same_bits(raw.host(), expected_next));
      }
    });
  }
}

/// Rows of logits by a hidden state of one feature each, all chains on each row.
template <typename T>
void check_chains(const ef::Tensor<T, 2>& host_rows,
                  const std::vector<ef::SamplingParams>& chains) {
  using Status = ef::SampleStatus;
  const Index kinds = host_rows.dimension(1), rows = kinds * static_cast<Index>(chains.size());
  ef::Tensor<T, 2> host_hidden(rows, kinds);
  host_hidden.setZero();
  std::vector<ef::SamplingParams> params;
  for (Index r = 0; r < rows; ++r) {
    host_hidden(r, r % kinds) = T(1);
    params.push_back(chains[static_cast<std::size_t>(r / kinds)]);
  }
  for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
    const auto hidden = on_device(bench, host_hidden), head = on_device(bench, host_rows);
    const auto logits = output_on<T>(bench, rows, host_rows.dimension(0));
    ef::linear_into(bench.device, logits.view(), hidden.cview(), head.cview());
    const auto ids = on_device(bench, ef::Tensor<std::int32_t, 1>(rows));
    std::vector<Status> statuses(params.size(), Status::negative), expected(params.size());
    ef::Tensor<std::int32_t, 1> tokens(rows);
    ef::vocabulary_parallel_sample_into(bench.device, ids.view(), hidden.cview(), head.cview(),
                                        communicator, params, ef::Philox{3}, statuses);
    ef::sample_into(Eigen::DefaultDevice{}, tokens, logits.host(), params, ef::Philox{3}, expected);
    ASSERT_TRUE(same_bits(ids.host(), tokens));
    ASSERT_EQ(statuses, expected);
  });
}

// Chains whose stages are answered by sums, in several orders: few numbers, of which many are equal
// across ranks, one token far above the others; and equals alone, whose sums meet their limits.
TEST(TensorParallelOnDevice, ChainsDrawFromShardsThatStay) {
  constexpr Index vocabulary = 210;
  std::vector<ef::SamplingParams> chains{
      {},
      {.temperature = 0},
      {.temperature = .7, .top_k = 40, .top_p = .8, .min_p = .01},
      {.top_p = .9},
      {.top_p = 0},
      {.top_p = .3, .min_p = .2},
      {.temperature = 2, .top_p = .99},
      {.min_p = 2}};
  for (const ef::SamplingOrder& order : {ef::kVllmOrder, ef::kLlamaCppOrder})
    chains.push_back({.temperature = .7, .top_k = 60, .top_p = .8, .min_p = .01, .order = order});
  auto rows = random_tensor<float, 2>({vocabulary, 4}, 14);
  for (Index t = 0; t < vocabulary; ++t) {
    rows(t, 1) = std::round(2 * rows(t, 1)) / 2;
    rows(t, 2) = t == 170 ? -2.0f : -3e38f;
    rows(t, 3) *= 6;
  }
  check_chains(rows, chains);
  check_chains<ef::bfloat16>(rows.cast<ef::bfloat16>(), {chains[2], chains[5]});
  check_chains<double>(rows.cast<double>(), {chains[2], chains[5]});
  rows.setConstant(3);
  check_chains(rows, {chains[0], chains[3]});
}

// Probabilities come to lie in each GPU's memory; of three ranks of two tokens one has no token.
TEST(TensorParallelOnDevice, ProbabilitiesAreThoseOfTheWholeVocabulary) {
  using Status = ef::SampleStatus;
  constexpr Index kRows = 4;
  auto host_hidden = random_tensor<float, 2>({kRows, 16}, 10);
  host_hidden(2, 3) = std::numeric_limits<float>::quiet_NaN();
  for (Index vocabulary : {2, 300}) {
    const auto host_head = random_tensor<float, 2>({vocabulary, 16}, 11);
    for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
      const int rank = communicator.rank(), ranks = communicator.size();
      const auto hidden = on_device(bench, host_hidden), head = on_device(bench, host_head);
      const auto logits = output_on<float>(bench, kRows, vocabulary);
      ef::linear_into(bench.device, logits.view(), hidden.cview(), head.cview());
      for (const ef::SamplingParams& params :
           {ef::SamplingParams{}, ef::SamplingParams{.temperature = .6, .top_p = .7}}) {
        ef::Tensor<float, 2> whole(kRows, vocabulary);
        std::vector<Status> expected(kRows), statuses(kRows, Status::negative);
        ef::sampling_probabilities_into(Eigen::DefaultDevice{}, whole, logits.host(), params,
                                        expected);
        const auto own =
            output_on<float>(bench, kRows, ef::shard_range(vocabulary, rank, ranks).size());
        ef::vocabulary_parallel_sampling_probabilities_into(
            bench.device, own.view(), hidden.cview(), head.cview(), communicator, params, statuses);
        ASSERT_TRUE(same_bits(own.host(), features_of(whole, rank, ranks))) << vocabulary;
        ASSERT_EQ(statuses, expected);
        ASSERT_EQ(statuses[2], Status::nan);
      }
    });
  }
}

// Shards of probabilities and of logits in each GPU's memory give what they give on the host.
TEST(TensorParallelOnDevice, DraftsAndLogSoftmaxAreThoseOfTheHost) {
  constexpr Index kRows = 3, kDrafts = 4, kVocabulary = 300;
  const auto logits = random_tensor<float, 2>({kRows * (2 * kDrafts + 1), kVocabulary}, 12, 2);
  const ef::Tensor<float, 2> p = ef::sampling_probabilities(logits, ef::SamplingParams{});
  const auto shard_of_rows = [&](Index begin, Index places, int rank, int ranks) {
    const ef::ShardRange own = ef::shard_range(kVocabulary, rank, ranks);
    const ef::Tensor<float, 2> part = p.slice(Eigen::array<Index, 2>{begin, own.begin},
                                              Eigen::array<Index, 2>{kRows * places, own.size()});
    const ef::Tensor<float, 3> shaped =
        part.reshape(Eigen::array<Index, 3>{kRows, places, own.size()});
    return shaped;
  };
  ef::Tensor<std::int32_t, 2> tokens(kRows, kDrafts);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = static_cast<std::int32_t>(7 * i);
  ef::Tensor<std::int32_t, 1> parents(kDrafts);
  parents.setValues({-1, -1, 0, 1});
  for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
    const int rank = communicator.rank(), ranks = communicator.size();
    const auto host_q = shard_of_rows(0, kDrafts, rank, ranks),
               host_p = shard_of_rows(kRows * kDrafts, kDrafts + 1, rank, ranks);
    const auto q = on_device(bench, host_q), target = on_device(bench, host_p);
    ef::SpeculativeResult chains;
    ef::vocabulary_parallel_verify_speculative_into(bench.device, chains, tokens, q.cview(),
                                                    target.cview(), kVocabulary, communicator,
                                                    ef::Philox{3});
    const auto expected = ef::vocabulary_parallel_verify_speculative(
        tokens, host_q, host_p, kVocabulary, communicator, ef::Philox{3});
    ASSERT_TRUE(same_bits(chains.tokens, expected.tokens));
    ASSERT_TRUE(same_bits(chains.accepted_counts, expected.accepted_counts));
    ef::SpeculativeTreeResult trees, certain;
    ef::vocabulary_parallel_verify_speculative_tree_into(bench.device, trees, tokens, parents,
                                                         target.cview(), target.cview(),
                                                         kVocabulary, communicator, ef::Philox{5});
    ASSERT_TRUE(same_bits(
        trees.tokens, ef::vocabulary_parallel_verify_speculative_tree(
                          tokens, parents, host_p, host_p, kVocabulary, communicator, ef::Philox{5})
                          .tokens));
    ef::vocabulary_parallel_verify_speculative_tree_into(bench.device, certain, tokens, parents,
                                                         target.cview(), kVocabulary, communicator,
                                                         ef::Philox{5});
    ASSERT_TRUE(same_bits(certain.tokens,
                          ef::vocabulary_parallel_verify_speculative_tree(
                              tokens, parents, host_p, kVocabulary, communicator, ef::Philox{5})
                              .tokens));
    const ef::Tensor<float, 2> host_x = features_of(logits, rank, ranks);
    const auto x = on_device(bench, host_x),
               y = output_on<float>(bench, logits.dimension(0), host_x.dimension(1));
    ef::vocabulary_parallel_log_softmax_into(bench.device, y.view(), x.cview(), kVocabulary,
                                             communicator);
    ASSERT_TRUE(same_bits(y.host(),
                          ef::vocabulary_parallel_log_softmax(host_x, kVocabulary, communicator)));
  });
}

// The best of divided rows, and beams by them, from candidates that each GPU finds in its columns.
TEST(TensorParallelOnDevice, TheBestOfDividedRowsAreThoseOfWholeRows) {
  using Status = ef::SampleStatus;
  constexpr Index kRows = 4, kBeams = 2;
  for (Index vocabulary : {2, 97}) {
    auto host_x = random_tensor<float, 2>({kRows, vocabulary}, 12);
    const auto scores = host_x;
    host_x(2, vocabulary - 1) = std::numeric_limits<float>::quiet_NaN();
    for_each_world(3, {}, [&](const auto& bench, auto& communicator, auto&) {
      const int rank = communicator.rank(), ranks = communicator.size();
      const auto x = on_device(bench, features_of(host_x, rank, ranks));
      for (Index k : {Index{0}, Index{2}, vocabulary})
        for (bool largest : {true, false}) {
          const ef::TopKOptions options{.largest = largest};
          ef::Tensor<float, 2> values(kRows, k);
          ef::Tensor<std::int32_t, 2> ids(kRows, k);
          std::vector<Status> expected(kRows), statuses(kRows, Status::negative);
          ef::top_k_into(Eigen::DefaultDevice{}, values, ids, host_x, options, expected);
          const auto best = output_on<float>(bench, kRows, k);
          const auto places = on_device(bench, ef::Tensor<std::int32_t, 2>(kRows, k));
          ef::vocabulary_parallel_top_k_into(bench.device, best.view(), places.view(), x.cview(),
                                             vocabulary, communicator, options, statuses);
          ASSERT_TRUE(same_bits(best.host(), values)) << vocabulary << " " << k;
          ASSERT_TRUE(same_bits(places.host(), ids)) << vocabulary << " " << k;
          ASSERT_EQ(statuses, expected);
        }
      const ef::BeamSearchOptions options{.beams = kBeams, .max_new_tokens = 3, .end_tokens = {1}};
      ef::BeamSearch search(kRows / kBeams, options), expected(kRows / kBeams, options);
      const auto part = on_device(bench, features_of(scores, rank, ranks));
      while (!expected.done()) {
        expected.step(Eigen::DefaultDevice{}, scores);
        ef::vocabulary_parallel_beam_search_step(bench.device, search, part.cview(), vocabulary,
                                                 communicator);
        ASSERT_TRUE(same_bits(search.tokens(), expected.tokens()));
      }
      ASSERT_TRUE(search.done());
    });
  }
}

#if defined(EIGENFORMER_TEST_BLOCKS)

TEST(TensorParallelOnDevice, LayersAreCaptured) {
  const auto host_x = random_tensor<float, 2>({3, 24}, 1),
             other_x = random_tensor<float, 2>({3, 24}, 9);
  const auto host_up = random_tensor<float, 2>({37, 24}, 2),
             host_down = random_tensor<float, 2>({11, 37}, 4);
  on_ranks(2, {}, {.deferred = true}, [&](const auto& bench, auto& communicator, auto&) {
    const auto& device = bench.device;
    emulated::Stream& stream = device.stream();
    const auto x = on_device(bench, host_x);
    const auto up = on_device(bench, host_up), down = on_device(bench, host_down);
    const Index own = ef::shard_range(37, communicator.rank(), 2).size();
    const auto part = output_on<float>(bench, 3, own), y = output_on<float>(bench, 3, 11),
               hidden = output_on<float>(bench, 3, 37), expected = output_on<float>(bench, 3, 11);
    const auto layers = [&] {
      ef::column_parallel_linear_into(device, part.view(), x.cview(), up.cview(), communicator,
                                      {.gather_output = false});
      ef::row_parallel_linear_into(device, y.view(), part.cview(), down.cview(), communicator);
    };
    stream.begin_capture();
    layers();
    const emulated::Stream::Graph graph = stream.end_capture();
    for (const auto* input : {&other_x, &host_x}) {
      bench.to_device(x.view().data(), input->data(), input->size());
      stream.replay(graph);
      communicator.wait();
      ef::linear_into(device, hidden.view(), x.cview(), up.cview());
      ef::linear_into(device, expected.view(), hidden.cview(), down.cview());
      ASSERT_TRUE(same_bits(y.host(), expected.host()));
    }
  });
}

// Fails when it is compiled, by name: parts on a GPU over a communicator of the host's memory.
static_assert(!ef::detail::reaches<ef::ThreadCommunicator, emulated::Device>);
static_assert(ef::detail::reaches<ef::BasicNcclCommunicator<emulated::Device>, emulated::Device>);
static_assert(
    ef::detail::reaches<ef::BasicNcclCommunicator<emulated::Device>, Eigen::DefaultDevice>);

#endif

}  // namespace
