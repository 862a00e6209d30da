// Laws: the tokens of a verified tree follow the target whatever the drafts, over 10^6 draws; a
// certain draft is accepted with its probability; they are those of the reference, draw for draw,
// and of a chain those of verify_speculative; statuses, absent nodes, errors.
#include <eigenformer/reference/speculative_tree.h>

#include "allocations.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

using Status = ef::SampleStatus;
using Ints = std::vector<std::int32_t>;

/// Three children of the root, two of its first, one of its second, one deeper.
const Ints kParents{-1, -1, 0, 0, 1, -1, 3};
constexpr Index kVocab = 5;

enum class Siblings { chain, certain, without_replacement, with_replacement };

ef::Tensor<std::int32_t, 1> tensor_of(const Ints& values) {
  ef::Tensor<std::int32_t, 1> tensor(static_cast<Index>(values.size()));
  std::copy(values.begin(), values.end(), tensor.data());
  return tensor;
}

/// Rows of probabilities that sum to 1, one of each 0.
template <typename T>
ef::Tensor<T, 2> some_distributions(Index rows, Index vocab, unsigned seed, Index zeros = 3) {
  std::mt19937 generator(seed);
  ef::Tensor<T, 2> p(rows, vocab);
  for (Index r = 0; r < rows; ++r) {
    double sum = 0;
    std::vector<double> weights(static_cast<std::size_t>(vocab));
    for (double& w : weights) sum += w = 1.0 + static_cast<double>(generator() % 1000);
    if (vocab > 1) {
      sum -= weights[static_cast<std::size_t>((r + zeros) % vocab)];
      weights[static_cast<std::size_t>((r + zeros) % vocab)] = 0;
    }
    for (Index v = 0; v < vocab; ++v)
      p(r, v) = static_cast<T>(weights[static_cast<std::size_t>(v)] / sum);
  }
  return p;
}

/// The first rows of x, for each row of a batch.
ef::Tensor<float, 3> repeated(const ef::Tensor<float, 2>& x, Index batch, Index rows) {
  const Index size = rows * x.dimension(1);
  ef::Tensor<float, 3> all(batch, rows, x.dimension(1));
  for (Index r = 0; r < batch; ++r) std::copy_n(x.data(), size, all.data() + r * size);
  return all;
}

/// Draws the children of every place as the drafter would: certain ones are the tokens 0, 1, ...
void draw_tree(const ef::Tensor<float, 2>& q, const Ints& parents, Siblings siblings,
               std::mt19937& generator, std::int32_t* tokens) {
  for (std::int32_t node = -1; node < static_cast<std::int32_t>(parents.size()); ++node) {
    const float* const row = q.data() + (node + 1) * kVocab;
    std::vector<double> left(row, row + kVocab);
    std::int32_t next = 0;
    for (std::size_t i = 0; i < parents.size(); ++i) {
      if (parents[i] != node) continue;
      double sum = 0, target = 0;
      for (double v : left) sum += v;
      target = sum * (generator() * 0x1p-32);
      std::size_t token = 0;
      while (token + 1 < left.size() && (target -= left[token]) >= 0) ++token;
      if (siblings == Siblings::without_replacement) left[token] = 0;
      tokens[i] = siblings == Siblings::certain ? next++ : static_cast<std::int32_t>(token);
    }
  }
}

/// 10^6 rows: at each place the token that follows it, accepted or drawn, follows its target. A
/// chain is verified by verify_speculative.
void check_law(const Ints& parents, Siblings siblings, const std::string& what) {
  constexpr Index batch = 20000, steps = 50;
  const Index nodes = static_cast<Index>(parents.size());
  const auto q = some_distributions<float>(nodes + 1, kVocab, 1, 2);
  const auto p = some_distributions<float>(nodes + 1, kVocab, 2);
  const bool chain = siblings == Siblings::chain;
  const auto draft = repeated(q, batch, chain ? nodes : nodes + 1),
             target = repeated(p, batch, nodes + 1);
  const auto tree = tensor_of(parents);
  std::vector<std::vector<double>> counts(parents.size() + 1, std::vector<double>(kVocab));
  ef::Tensor<std::int32_t, 2> tokens(batch, nodes);
  ef::SpeculativeTreeResult result;
  ef::SpeculativeResult of_chain;
  Threads pool(2);
  ef::Philox rng{5};
  std::mt19937 generator(3);
  double accepted_roots = 0;
  for (Index s = 0; s < steps; ++s) {
    for (Index r = 0; r < batch; ++r)
      draw_tree(q, parents, siblings, generator, tokens.data() + r * nodes);
    if (chain)
      ef::verify_speculative_into(pool.device, of_chain, tokens, draft, target, rng);
    else if (siblings == Siblings::certain)
      ef::verify_speculative_tree_into(pool.device, result, tokens, tree, target, rng);
    else
      ef::verify_speculative_tree_into(
          pool.device, result, tokens, tree, draft, target, rng,
          {.with_replacement = siblings == Siblings::with_replacement});
    const auto& emitted = chain ? of_chain.tokens : result.tokens;
    const auto& lengths = chain ? of_chain.accepted_counts : result.accepted_counts;
    for (Index r = 0; r < batch; ++r) {
      std::int32_t node = -1;
      for (Index i = 0; i <= lengths(r); ++i) {
        ++counts[static_cast<std::size_t>(node + 1)][static_cast<std::size_t>(emitted(r, i))];
        if (i == lengths(r)) break;
        const std::int32_t next = chain ? static_cast<std::int32_t>(i) : result.nodes(r, i);
        ASSERT_EQ(parents[static_cast<std::size_t>(next)], node);
        ASSERT_EQ(emitted(r, i), tokens(r, node = next));
      }
      accepted_roots += lengths(r) > 0 ? 1 : 0;
    }
  }
  for (Index place = 0; place <= nodes; ++place)
    expect_distributed(counts[static_cast<std::size_t>(place)],
                       {p.data() + place * kVocab, p.data() + (place + 1) * kVocab},
                       what + " place " + std::to_string(place));
  if (siblings != Siblings::certain) return;
  const double chance = static_cast<double>(p(0, 0) + p(0, 1) + p(0, 2)), n = batch * steps;
  EXPECT_NEAR(accepted_roots / n, chance, 5 * std::sqrt(chance * (1 - chance) / n));
}

TEST(SpeculativeTrees, CertainDraftsFollowTheTarget) {
  check_law(kParents, Siblings::certain, "certain");
}
TEST(SpeculativeTrees, SiblingsWithoutReplacementFollowTheTarget) {
  check_law(kParents, Siblings::without_replacement, "without replacement");
}
TEST(SpeculativeTrees, SiblingsWithReplacementFollowTheTarget) {
  check_law(kParents, Siblings::with_replacement, "with replacement");
}

TEST(SpeculativeVerification, AMillionChainsFollowTheTarget) {
  check_law({-1, 0, 1}, Siblings::chain, "chain");
}

/// Trees of any shape and tokens, some of them absent.
struct Trees {
  ef::Tensor<std::int32_t, 2> tokens, parents;
  ef::Tensor<double, 3> q, p;
  Trees(Index batch, Index nodes, Index vocab, unsigned seed)
      : tokens(batch, nodes),
        parents(batch, nodes),
        q(batch, nodes + 1, vocab),
        p(batch, nodes + 1, vocab) {
    std::mt19937 generator(seed);
    const auto below = [&](Index n) {
      return static_cast<std::int32_t>(generator() % static_cast<unsigned>(n));
    };
    for (Index r = 0; r < batch; ++r)
      for (Index i = 0; i < nodes; ++i) {
        parents(r, i) = below((std::min)(i, Index{3}) + 1) - 1;
        tokens(r, i) = below(9) == 0 ? -1 : below(vocab);
      }
    const auto rows = batch * (nodes + 1);
    const auto draft = some_distributions<double>(rows, vocab, seed + 1),
               target = some_distributions<double>(rows, vocab, seed + 2);
    std::copy_n(draft.data(), draft.size(), q.data());
    std::copy_n(target.data(), target.size(), p.data());
    for (Index r = 0; r < batch; ++r)  // a drafter draws no token of probability 0
      for (Index i = 0; i < nodes; ++i)
        if (tokens(r, i) >= 0 && q(r, parents(r, i) + 1, tokens(r, i)) == 0)
          tokens(r, i) = static_cast<std::int32_t>((tokens(r, i) + 1) % vocab);
  }

  ef::reference::VerifiedTree reference(Index r, bool certain, bool with_replacement,
                                        const ef::Philox& rng, std::uint32_t row) const {
    const Index nodes = tokens.dimension(1), places = p.dimension(1), vocab = p.dimension(2);
    ef::Tensor<double, 2> own_q(certain ? 0 : places, certain ? 0 : vocab), own_p(places, vocab);
    std::copy_n(q.data() + r * places * vocab, own_q.size(), own_q.data());
    std::copy_n(p.data() + r * places * vocab, own_p.size(), own_p.data());
    const auto of_row = [&](const ef::Tensor<std::int32_t, 2>& x) {
      return Ints(x.data() + r * nodes, x.data() + (r + 1) * nodes);
    };
    return ef::reference::verified_tree(of_row(tokens), of_row(parents), own_q, own_p,
                                        with_replacement, rng, row);
  }
};

void expect_tree(const ef::SpeculativeTreeResult& result, Index r,
                 const ef::reference::VerifiedTree& expected) {
  ASSERT_EQ(result.statuses[static_cast<std::size_t>(r)], Status::ok) << r;
  ASSERT_EQ(result.accepted_counts(r), static_cast<Index>(expected.nodes.size())) << r;
  for (Index i = 0; i < result.tokens.dimension(1); ++i) {
    const auto at = static_cast<std::size_t>(i);
    ASSERT_EQ(result.tokens(r, i), at < expected.tokens.size() ? expected.tokens[at] : -1) << r;
    if (i < result.nodes.dimension(1)) {
      ASSERT_EQ(result.nodes(r, i), at < expected.nodes.size() ? expected.nodes[at] : -1) << r;
    }
  }
}

TEST(SpeculativeTrees, AreTheReferenceDrawForDraw) {
  constexpr Index batch = 200;
  Threads pool(3);
  for (Index nodes : {0, 1, 3, 8, 20})
    for (Index vocab : {1, 3, 6, 200})
      for (auto siblings :
           {Siblings::certain, Siblings::without_replacement, Siblings::with_replacement}) {
        const Trees trees(batch, nodes, vocab, static_cast<unsigned>(31 * nodes + vocab));
        SCOPED_TRACE(testing::Message() << nodes << " nodes, vocab " << vocab << ", siblings "
                                        << static_cast<int>(siblings));
        const bool certain = siblings == Siblings::certain,
                   replaced = siblings == Siblings::with_replacement;
        ef::Philox rng{7, std::uint64_t{1} << 40};
        const ef::Philox used = rng;
        const auto result =
            certain ? ef::verify_speculative_tree(pool.device, trees.tokens, trees.parents, trees.p,
                                                  rng)
                    : ef::verify_speculative_tree(pool.device, trees.tokens, trees.parents, trees.q,
                                                  trees.p, rng, {.with_replacement = replaced});
        EXPECT_EQ(rng.position(), used.position() + 1);
        for (Index r = 0; r < batch; ++r)
          expect_tree(result, r,
                      trees.reference(r, certain, replaced, used, static_cast<std::uint32_t>(r)));
        if (certain) continue;
        std::vector<ef::Philox> generators(batch, ef::Philox{3, 5});
        const auto own = ef::verify_speculative_tree(trees.tokens, trees.parents, trees.q, trees.p,
                                                     generators, {.with_replacement = replaced});
        for (Index r = 0; r < batch; ++r)
          expect_tree(own, r, trees.reference(r, false, replaced, ef::Philox{3, 5}, 0));
      }
}

// Draw for draw, whatever the vocabulary: also of widths that are no multiple of a run.
TEST(SpeculativeTrees, AChainIsVerifySpeculative) {
  constexpr Index batch = 300, drafts = 4, vocab = 150;
  std::mt19937 generator(4);
  ef::Tensor<std::int32_t, 2> tokens(batch, drafts);
  for (Index i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = static_cast<std::int32_t>(generator() % 9);
  const auto p = ef::sampling_probabilities(
      random_tensor<float, 2>({batch * (drafts + 1), vocab}, 5), {.top_k = 9});
  ef::Tensor<float, 2> q = p;
  for (Index r = 0; r < q.dimension(0); ++r)
    std::rotate(q.data() + r * vocab, q.data() + r * vocab + r % 3, q.data() + (r + 1) * vocab);
  const auto best = ef::greedy_sample(q);
  for (Index r = 0; r < batch; ++r)
    for (Index i = 0; i < drafts; ++i) tokens(r, i) = best(r * (drafts + 1) + i);
  const ef::TensorView<const float, 3> target(p.data(), batch, drafts + 1, vocab),
      tree(q.data(), batch, drafts + 1, vocab);
  const ef::Tensor<float, 3> chain =
      tree.slice(Eigen::DSizes<Index, 3>(0, 0, 0), Eigen::DSizes<Index, 3>(batch, drafts, vocab));
  const auto expected = ef::verify_speculative(tokens, chain, target, ef::Philox{8});
  for (bool replaced : {true, false}) {
    const auto result = ef::verify_speculative_tree(tokens, tensor_of({-1, 0, 1, 2}), tree, target,
                                                    ef::Philox{8}, {.with_replacement = replaced});
    EXPECT_TRUE(same_bits(result.accepted_counts, expected.accepted_counts));
    EXPECT_TRUE(same_bits(result.tokens, expected.tokens));
  }
  double accepted = 0;
  for (Index r = 0; r < batch; ++r) accepted += expected.accepted_counts(r);
  EXPECT_GT(accepted, batch / 4);
}

// Row 1 of 3 is spoiled at the root: a number of a child, or one that is read at a refusal.
TEST(SpeculativeTrees, BadRowsHarmNoOther) {
  const double nan = std::nan("");
  struct Spoiled {
    bool in_target;
    Index place, token;
    double value;
    Status certain, drawn;
  };
  const std::vector<Spoiled> cases{
      {true, 0, 0, nan, Status::nan, Status::nan},
      {true, 0, 2, -1, Status::negative, Status::negative},
      {true, 0, 2, HUGE_VAL, Status::positive_infinity, Status::positive_infinity},
      {false, 0, 0, nan, Status::ok, Status::nan},
      {false, 0, 2, -1, Status::ok, Status::negative},
      {true, 1, 0, nan, Status::ok, Status::ok},  // of a node that is refused
      {false, 1, 0, nan, Status::ok, Status::ok}};
  for (const Spoiled& spoiled : cases) {
    ef::Tensor<double, 3> q(3, 3, 3), p(3, 3, 3);
    ef::Tensor<std::int32_t, 2> tokens(3, 2);
    for (Index r = 0; r < 3; ++r)
      for (Index place = 0; place < 3; ++place)
        for (Index v = 0; v < 3; ++v) {
          q(r, place, v) = v < 2 ? .5 : 0;  // both children are refused for certain
          p(r, place, v) = v < 2 ? 0 : 1;
          if (v < 2) tokens(r, v) = static_cast<std::int32_t>(v);
        }
    (spoiled.in_target ? p : q)(1, spoiled.place, spoiled.token) = spoiled.value;
    for (bool certain : {true, false}) {
      const auto parents = tensor_of({-1, -1});
      const auto result = certain
                              ? ef::verify_speculative_tree(tokens, parents, p, ef::Philox{1})
                              : ef::verify_speculative_tree(tokens, parents, q, p, ef::Philox{1});
      const Status expected = certain ? spoiled.certain : spoiled.drawn;
      for (Index r = 0; r < 3; ++r) {
        const bool bad = r == 1 && expected != Status::ok;
        EXPECT_EQ(result.statuses[static_cast<std::size_t>(r)], bad ? expected : Status::ok);
        EXPECT_EQ(result.tokens(r, 0), bad ? -1 : 2);
        EXPECT_EQ(result.accepted_counts(r), 0);
      }
    }
  }
  ef::Tensor<float, 3> zero(1, 2, 4);
  zero.setZero();
  ef::Tensor<std::int32_t, 2> token(1, 1);
  token(0, 0) = 2;
  EXPECT_EQ(ef::verify_speculative_tree(token, tensor_of({-1}), zero, ef::Philox{1}).statuses[0],
            Status::no_token);
}

TEST(SpeculativeTrees, SecondCallsAllocateNothing) {
  const Trees trees(6, 8, 300, 3);
  ef::SpeculativeTreeResult result;
  ef::Workspace workspace;
  const Eigen::DefaultDevice device;
  const auto calls = [&] {
    ef::verify_speculative_tree_into(device, result, trees.tokens, trees.parents, trees.q, trees.p,
                                     ef::Philox{1}, {}, workspace);
    ef::verify_speculative_tree_into(device, result, trees.tokens, trees.parents, trees.p,
                                     ef::Philox{1}, workspace);
  };
  calls();
  EXPECT_EQ(count_allocations(calls), 0);
}

TEST(SpeculativeTrees, ErrorsNameTheArgument) {
  Trees trees(2, 3, 4, 3);
  ef::Philox rng{1};
  const auto refuses = [&](const std::vector<std::string>& fragments) {
    expect_throws<std::invalid_argument>(
        [&] { ef::verify_speculative_tree(trees.tokens, trees.parents, trees.q, trees.p, rng); },
        fragments);
  };
  trees.parents(1, 2) = 2;
  refuses({"verify_speculative_tree", "parents of row 1: that of node 2 is 2", "an earlier node"});
  trees.parents(1, 2) = -2;
  refuses({"that of node 2 is -2"});
  trees.parents(1, 2) = 0;
  trees.tokens(0, 1) = 4;
  refuses({"draft_tokens(0, 1) is 4", "[0, 4)"});
  trees.tokens(0, 1) = 0;
  expect_throws<std::invalid_argument>(
      [&] {
        ef::verify_speculative_tree(trees.tokens, tensor_of({-1, 0}), trees.p, rng);
      },
      {"parents has shape (2), expected (3) or (2, 3)"});
  ef::Tensor<double, 3> few(2, 3, 4);
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative_tree(trees.tokens, trees.parents, few, trees.p, rng); },
      {"draft_probabilities has shape (2, 3, 4), expected (2, 4, 4)"});
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative_tree(trees.tokens, trees.parents, trees.q, few, rng); },
      {"target_probabilities has shape (2, 3, 4), expected (2, 4, 4)"});
  std::vector<ef::Philox> generators(3);
  expect_throws<std::invalid_argument>(
      [&] { ef::verify_speculative_tree(trees.tokens, trees.parents, trees.p, generators); },
      {"rng has 3 generators, draft_tokens has 2 rows"});
  EXPECT_EQ(rng.position(), 0u);
}

}  // namespace
