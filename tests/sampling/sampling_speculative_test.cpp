// Laws: the tokens of speculative verification follow the target whatever the seeds; they are those
// of the reference, draw for draw; a row that is no distribution is told by its status and harms no
// other.
#include "allocations.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;

/// Verifies `batch` chains per step whose drafts are drawn from `draft`; counts the token at each
/// place of the chain.
void check_speculative(const ef::Tensor<double, 2>& draft, const ef::Tensor<double, 2>& target,
                       const std::string& what, bool one_seed = false) {
  const Index drafts = draft.dimension(0), vocab = draft.dimension(1), batch = 2000, steps = 15;
  ef::Tensor<double, 3> q(batch, drafts, vocab), p(batch, drafts + 1, vocab);
  for (Index r = 0; r < batch; ++r) {
    std::copy(draft.data(), draft.data() + draft.size(), q.data() + r * draft.size());
    std::copy(target.data(), target.data() + target.size(), p.data() + r * target.size());
  }
  std::vector<std::vector<double>> counts(static_cast<std::size_t>(drafts) + 1,
                                          std::vector<double>(static_cast<std::size_t>(vocab)));
  ef::Philox rng{77}, same_seed{77};
  for (Index s = 0; s < steps; ++s) {
    ef::Tensor<std::int32_t, 2> tokens(batch, drafts);
    for (Index i = 0; i < drafts; ++i) {
      ef::Tensor<double, 2> logits(batch, vocab);
      for (Index r = 0; r < batch; ++r)
        for (Index v = 0; v < vocab; ++v) logits(r, v) = std::log(draft(i, v));
      const Ids ids = ef::sample(logits, {.temperature = 1}, rng);
      for (Index r = 0; r < batch; ++r) tokens(r, i) = ids(r);
    }
    const auto result = ef::verify_speculative(tokens, q, p, one_seed ? same_seed : rng);
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
    expect_distributed(counts[static_cast<std::size_t>(i)], expected,
                       what + " place " + std::to_string(i));
  }
}

TEST(SpeculativeVerification, TokensFollowTheTarget) {
  const auto draft = ef::reference::sampling_probabilities(random_tensor<float, 2>({3, 12}, 1),
                                                           {.temperature = 1.5});
  const auto target =
      ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2), {.top_k = 7});
  check_speculative(draft, target, "different");
  ef::Tensor<double, 2> same(4, 12);
  std::copy(draft.data(), draft.data() + 36, same.data());
  std::copy(draft.data(), draft.data() + 12, same.data() + 36);
  check_speculative(draft, same, "the same");
  check_speculative(draft,
                    ef::reference::sampling_probabilities(random_tensor<float, 2>({4, 12}, 2),
                                                          {.temperature = 0}),
                    "greedy target");
}

// The drafter samples at the verifier's very positions: purposes keep their numbers apart.
TEST(SpeculativeVerification, OneSeedForDrafterAndVerifier) {
  for (Index drafts : {1, 3}) {
    const auto logits = random_tensor<float, 2>({drafts, 12}, 1);
    check_speculative(ef::reference::sampling_probabilities(logits, {.temperature = 1.5}),
                      ef::reference::sampling_probabilities(
                          random_tensor<float, 2>({drafts + 1, 12}, 2), {.top_k = 7}),
                      "one seed", true);
  }
  // One generator per request, and a copy of it for its verifier.
  constexpr Index batch = 2000, steps = 15;
  std::vector<ef::Philox> drafter, verifier;
  for (std::uint64_t r = 0; r < batch; ++r) drafter.emplace_back(r);
  verifier = drafter;
  const std::vector<double> p{.2, .3, .5}, q{.6, .3, .1};
  ef::Tensor<double, 3> draft(batch, 1, 3), target(batch, 2, 3);
  ef::Tensor<double, 2> logits(batch, 3);
  for (Index r = 0; r < batch; ++r)
    for (Index v = 0; v < 3; ++v) {
      const auto at = static_cast<std::size_t>(v);
      draft(r, 0, v) = q[at];
      logits(r, v) = std::log(q[at]);
      target(r, 0, v) = target(r, 1, v) = p[at];
    }
  std::vector<double> counts(3);
  for (Index s = 0; s < steps; ++s) {
    const Ids ids = ef::sample(logits, {.temperature = 1}, drafter);
    const ef::TensorView<const std::int32_t, 2> tokens(ids.data(), batch, 1);
    const auto result = ef::verify_speculative(tokens, draft, target, verifier);
    for (Index r = 0; r < batch; ++r) ++counts[static_cast<std::size_t>(result.tokens(r, 0))];
  }
  expect_distributed(counts, p, "one seed a request");
}

/// `batch` rows of distributions over few tokens, some of them 0, and drafts of any tokens.
struct Chains {
  ef::Tensor<std::int32_t, 2> tokens;
  ef::Tensor<double, 3> q, p;
  Chains(Index batch, Index drafts, Index vocab, unsigned seed)
      : tokens(batch, drafts), q(batch, drafts, vocab), p(batch, drafts + 1, vocab) {
    std::mt19937 generator(seed);
    const auto fill = [&](ef::Tensor<double, 3>& x) {
      for (Index row = 0; row < x.dimension(0) * x.dimension(1); ++row) {
        double* const out = x.data() + row * vocab;
        double sum = 0;
        for (Index v = 0; v < vocab; ++v) sum += out[v] = static_cast<double>(generator() % 4);
        if (sum == 0) sum = out[0] = 1;
        for (Index v = 0; v < vocab; ++v) out[v] /= sum;
      }
    };
    fill(q);
    fill(p);
    for (Index i = 0; i < tokens.size(); ++i)
      tokens.data()[i] = static_cast<std::int32_t>(generator() % static_cast<unsigned>(vocab));
  }

  std::vector<std::int32_t> reference(Index r, Index length, const ef::Philox& rng,
                                      std::uint32_t row) const {
    const Index vocab = p.dimension(2);
    ef::Tensor<double, 2> own_q(length, vocab), own_p(length + 1, vocab);
    std::copy_n(q.data() + r * q.dimension(1) * vocab, own_q.size(), own_q.data());
    std::copy_n(p.data() + r * p.dimension(1) * vocab, own_p.size(), own_p.data());
    const std::int32_t* first = tokens.data() + r * tokens.dimension(1);
    return ef::reference::verified_tokens({first, first + length}, own_q, own_p, rng, row);
  }
};

void expect_tokens(const ef::SpeculativeResult& result, Index r,
                   const std::vector<std::int32_t>& expected) {
  EXPECT_EQ(result.statuses[static_cast<std::size_t>(r)], Status::ok) << r;
  EXPECT_EQ(result.accepted_counts(r) + 1, static_cast<Index>(expected.size())) << r;
  for (Index i = 0; i < result.tokens.dimension(1); ++i)
    EXPECT_EQ(result.tokens(r, i),
              i < static_cast<Index>(expected.size()) ? expected[static_cast<std::size_t>(i)] : -1)
        << r << " place " << i;
}

TEST(SpeculativeVerification, IsTheReferenceDrawForDraw) {
  constexpr Index batch = 400;
  for (Index drafts : {0, 1, 2, 5})
    for (Index vocab : {1, 2, 5}) {
      const Chains chains(batch, drafts, vocab, static_cast<unsigned>(10 * drafts + vocab));
      ef::Philox rng{7, std::uint64_t{1} << 40};
      const ef::Philox used = rng;
      Threads pool(3);
      const auto result =
          ef::verify_speculative(pool.device, chains.tokens, chains.q, chains.p, rng);
      EXPECT_EQ(rng.position(), used.position() + 1);
      for (Index r = 0; r < batch; ++r)
        expect_tokens(result, r, chains.reference(r, drafts, used, static_cast<std::uint32_t>(r)));
      // A generator of its own draws at row 0, wherever its request stands in the batch; some
      // chains are shorter, said by a length or by a draft that is -1.
      std::vector<ef::Philox> generators;
      std::vector<std::size_t> lengths;
      ef::Tensor<std::int32_t, 2> cut = chains.tokens;
      for (Index r = 0; r < batch; ++r) {
        generators.emplace_back(static_cast<std::uint64_t>(r % 3), 5);
        lengths.push_back(static_cast<std::size_t>(r % (drafts + 1)));
        if (r % (drafts + 1) < drafts) cut(r, r % (drafts + 1)) = -1;
      }
      const auto of_lengths = ef::verify_speculative(chains.tokens, chains.q, chains.p, generators,
                                                     {.draft_lengths = lengths});
      for (const auto& generator : generators) EXPECT_EQ(generator.position(), 6u);
      for (auto& generator : generators) generator = ef::Philox(generator.seed(), 5);
      const auto of_tokens = ef::verify_speculative(cut, chains.q, chains.p, generators);
      for (Index r = 0; r < batch; ++r) {
        const auto expected = chains.reference(r, r % (drafts + 1),
                                               ef::Philox(static_cast<std::uint64_t>(r % 3), 5), 0);
        expect_tokens(of_lengths, r, expected);
        expect_tokens(of_tokens, r, expected);
      }
    }
}

TEST(SpeculativeVerification, EqualGeneratorsDrawEqualTokens) {
  ef::Tensor<std::int32_t, 2> tokens(4, 1);
  tokens.setConstant(3);
  ef::Tensor<float, 3> q(4, 1, 8), p(4, 2, 8);
  q.setConstant(1.f / 8);
  p.setConstant(1.f / 8);
  std::vector<ef::Philox> generators(4, ef::Philox(5));
  const auto result = ef::verify_speculative(tokens, q, p, generators);
  for (Index r = 1; r < 4; ++r) EXPECT_EQ(result.tokens(r, 1), result.tokens(0, 1));
}

// A draft that its own distribution excludes is accepted where the target allows it and refused
// where it does not.
TEST(SpeculativeVerification, DraftsOfProbabilityZero) {
  ef::Tensor<std::int32_t, 2> tokens(1, 1);
  tokens(0, 0) = 2;
  ef::Tensor<double, 3> q(1, 1, 3), p(1, 2, 3);
  q.setValues({{{.5, .5, 0}}});
  p.setValues({{{.5, .5, 0}, {1, 0, 0}}});
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto result = ef::verify_speculative(tokens, q, p, ef::Philox{seed});
    EXPECT_EQ(result.accepted_counts(0), 0);
    EXPECT_NE(result.tokens(0, 0), 2);
  }
  p(0, 0, 2) = 1e-300;
  EXPECT_EQ(ef::verify_speculative(tokens, q, p, ef::Philox{1}).accepted_counts(0), 1);
}

struct Spoiled {
  const char* what;
  int place;  // of the distribution
  bool in_target;
  Index token;
  double value;
  Status expected;
};

// Row 1 of 3 is spoiled. Its drafts are tokens 0 and 1: the first is accepted for certain, the
// second refused for certain.
TEST(SpeculativeVerification, BadRowsHarmNoOther) {
  const double nan = std::nan(""), infinity = HUGE_VAL;
  const std::vector<Spoiled> cases{
      {"accepted, target NaN", 0, true, 0, nan, Status::nan},
      {"accepted, target infinite", 0, true, 0, infinity, Status::positive_infinity},
      {"accepted, target negative", 0, true, 0, -.5, Status::negative},
      {"accepted, draft NaN", 0, false, 0, nan, Status::nan},
      {"accepted, draft infinite", 0, false, 0, infinity, Status::positive_infinity},
      {"accepted, draft negative", 0, false, 0, -.5, Status::negative},
      {"refused, target NaN", 1, true, 1, nan, Status::nan},
      {"refused, draft negative", 1, false, 1, -.25, Status::negative},
      {"residual, target NaN", 1, true, 2, nan, Status::nan},
      {"residual, target infinite", 1, true, 3, infinity, Status::positive_infinity},
      {"residual, target -infinity", 1, true, 3, -infinity, Status::negative},
      {"residual, target negative", 1, true, 3, -.5, Status::negative},
      {"residual, draft NaN", 1, false, 2, nan, Status::nan},
      {"residual, draft infinite", 1, false, 3, infinity, Status::positive_infinity},
      {"residual, draft negative", 1, false, 3, -.5, Status::negative},
      {"accepted, another target is not read", 0, true, 3, nan, Status::ok},
      {"accepted, another draft is not read", 0, false, 3, nan, Status::ok},
      {"past the refusal nothing is read", 2, true, 0, nan, Status::ok}};
  for (const auto& spoiled : cases) {
    ef::Tensor<double, 3> q(3, 2, 4), p(3, 3, 4);
    ef::Tensor<std::int32_t, 2> tokens(3, 2);
    for (Index r = 0; r < 3; ++r) {
      tokens(r, 0) = 0;
      tokens(r, 1) = 1;
      for (Index i = 0; i < 2; ++i)
        for (Index v = 0; v < 4; ++v) {
          q(r, i, v) = .25;
          p(r, i, v) = i == 0 ? .25 : v == 1 ? 0 : 1. / 3;
        }
      for (Index v = 0; v < 4; ++v) p(r, 2, v) = .25;
    }
    ef::Philox rng{3}, same{3};
    const auto good = ef::verify_speculative(tokens, q, p, same);
    (spoiled.in_target ? p(1, spoiled.place, spoiled.token) : q(1, spoiled.place, spoiled.token)) =
        spoiled.value;
    const auto result = ef::verify_speculative(tokens, q, p, rng);
    EXPECT_EQ(rng.position(), 1u);
    EXPECT_EQ(result.statuses, (std::vector<Status>{Status::ok, spoiled.expected, Status::ok}))
        << spoiled.what;
    const bool served = spoiled.expected == Status::ok;
    for (Index r = 0; r < 3; ++r) {
      EXPECT_EQ(good.accepted_counts(r), 1);
      EXPECT_EQ(result.accepted_counts(r), r != 1 || served ? 1 : 0) << spoiled.what;
      for (Index i = 0; i < 3; ++i)
        EXPECT_EQ(result.tokens(r, i), r != 1 || served ? good.tokens(r, i) : -1) << spoiled.what;
    }
  }
}

TEST(SpeculativeVerification, BadBonusDistributions) {
  ef::Tensor<std::int32_t, 2> tokens(1, 1);
  tokens(0, 0) = 0;
  ef::Tensor<double, 3> q(1, 1, 3), p(1, 2, 3);
  const auto status = [&](std::vector<double> bonus) {
    for (Index v = 0; v < 3; ++v) {
      q(0, 0, v) = p(0, 0, v) = v < 2 ? .5 : 0;
      p(0, 1, v) = bonus[static_cast<std::size_t>(v)];
    }
    const auto result = ef::verify_speculative(tokens, q, p, ef::Philox{1});
    if (result.statuses[0] != Status::ok) {
      EXPECT_EQ(result.accepted_counts(0), 0);
      EXPECT_EQ(result.tokens(0, 0), -1);
      EXPECT_EQ(result.tokens(0, 1), -1);
    }
    return result.statuses[0];
  };
  EXPECT_EQ(status({.5, .25, .25}), Status::ok);
  EXPECT_EQ(status({1.5, -.5, 0}), Status::negative);
  EXPECT_EQ(status({0, 0, 0}), Status::no_token);
  EXPECT_EQ(status({.5, std::nan(""), .5}), Status::nan);
  EXPECT_EQ(status({.5, HUGE_VAL, .5}), Status::positive_infinity);
  EXPECT_EQ(status({1e308, 1e308, 0}), Status::positive_infinity);  // its sum
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
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, q, p, rng); },
                                       {"draft_tokens(0, 0) is 99"});
  tokens(1, 0) = 1;
  const std::vector<Index> wrong{0, 2};
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(tokens, q, p, rng, {.draft_lengths = wrong}); },
      {"draft_lengths[1] is 2"});
  const ef::Tensor<float, 3> short_target(2, 1, 3), narrow(2, 1, 2);
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(tokens, q, short_target, rng); },
      {"target_probabilities", "(2, 1, 3)"});
  expect_throws<std::invalid_argument>([&] { ef::verify_speculative(tokens, narrow, p, rng); },
                                       {"draft_probabilities", "(2, 1, 2)"});
  EXPECT_EQ(rng.position(), 1u);
  // p equals q up to rounding: where a draft is refused and no residual is left, the target itself
  // is drawn from.
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

TEST(SpeculativeVerification, LengthsOfAnyTypeAndRefusals) {
  const Chains chains(2, 3, 4, 9);
  ef::Philox rng{1};
  const auto expected = ef::verify_speculative(chains.tokens, chains.q, chains.p, ef::Philox{1},
                                               {.draft_lengths = {1, 2}});
  const std::vector<int> ints{1, 2};
  EXPECT_TRUE(same_bits(ef::verify_speculative(chains.tokens, chains.q, chains.p, ef::Philox{1},
                                               {.draft_lengths = ints})
                            .tokens,
                        expected.tokens));
  auto result = expected;
  const auto refuse = [&](const ef::SpeculativeOptions& options,
                          const std::vector<std::string>& fragments) {
    expect_throws<std::invalid_argument>(
        [&] {
          ef::verify_speculative_into(Eigen::DefaultDevice{}, result, chains.tokens, chains.q,
                                      chains.p, rng, options);
        },
        fragments);
  };
  refuse({.draft_lengths = {1, 4}}, {"verify_speculative", "draft_lengths[1] is 4", "0 to 3"});
  refuse({.draft_lengths = {-1, 0}}, {"draft_lengths[0] is -1"});
  refuse({.draft_lengths = {1}}, {"draft_lengths has 1", "2"});
  const std::vector<long long> huge{1LL << 62, 0};
  refuse({.draft_lengths = huge}, {"draft_lengths[0] is"});
  auto tokens = chains.tokens;
  for (std::int32_t token : {4, std::numeric_limits<std::int32_t>::max(), -2}) {
    tokens(1, 2) = token;
    expect_throws<std::invalid_argument>(
        [&] { ef::verify_speculative(tokens, chains.q, chains.p, rng); },
        {"draft_tokens(1, 2) is " + std::to_string(token)});
  }
  std::vector<ef::Philox> three(3);
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative(chains.tokens, chains.q, chains.p, three); },
      {"rng has 3 generators, draft_tokens has 2 rows"});
  EXPECT_EQ(rng.position(), 0u);
  EXPECT_EQ(three[0].position(), 0u);
  EXPECT_TRUE(same_bits(result.tokens, expected.tokens));
}

TEST(SpeculativeVerification, DestinationFormAllocatesNothing) {
  const Chains chains(5, 3, 40, 9);
  ef::SpeculativeResult result;
  ef::Philox rng{1};
  const auto call = [&] {
    ef::verify_speculative_into(Eigen::DefaultDevice{}, result, chains.tokens, chains.q, chains.p,
                                rng);
  };
  call();
  EXPECT_EQ(count_allocations(call), 0);
  const auto again =
      ef::verify_speculative(chains.tokens, chains.q, chains.p, ef::Philox{1, rng.position() - 1});
  EXPECT_TRUE(same_bits(result.tokens, again.tokens));
  EXPECT_TRUE(same_bits(result.accepted_counts, again.accepted_counts));
}

}  // namespace
