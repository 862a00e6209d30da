// Verification of token trees on every device: the tokens, nodes and statuses of the CPU, whatever
// the siblings; bad rows and nodes that are none.
#include "device.h"
#include "sampling_support.h"

using namespace eigenformer_test;

namespace {

constexpr Index kBatch = 5, kNodes = 9;

template <typename T>
struct Trees {
  ef::Tensor<std::int32_t, 2> tokens{kBatch, kNodes}, parents{kBatch, kNodes};
  ef::Tensor<T, 3> q, p;
  explicit Trees(Index vocab) : q(kBatch, kNodes + 1, vocab), p(kBatch, kNodes + 1, vocab) {
    std::mt19937 generator(static_cast<unsigned>(vocab));
    for (Index r = 0; r < kBatch; ++r)
      for (Index i = 0; i < kNodes; ++i) {
        parents(r, i) =
            static_cast<std::int32_t>(generator() % static_cast<unsigned>(i / 3 + 1)) - 1;
        tokens(r, i) = static_cast<std::int32_t>(generator() % static_cast<unsigned>(vocab));
      }
    tokens(3, 0) = -1;
    const auto fill = [&](ef::Tensor<T, 3>& x, unsigned seed) {
      const auto probabilities = ef::sampling_probabilities(
          random_tensor<float, 2>({kBatch * (kNodes + 1), vocab}, seed), {.top_p = .9});
      for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<T>(probabilities.data()[i]);
    };
    fill(q, 1);
    fill(p, 2);
    p(1, 0, vocab - 1) = std::numeric_limits<T>::quiet_NaN();
  }
};

template <typename T>
void check_trees(Index vocab) {
  const Trees<T> trees(vocab);
  for (int siblings = 0; siblings < 3; ++siblings) {
    const auto verify = [&](const auto& device, auto&& result, const auto& tokens,
                            const auto& parents, const auto& q, const auto& p) {
      std::vector<ef::Philox> generators(kBatch, ef::Philox{9, 4});
      if (siblings == 0)
        ef::verify_speculative_tree_into(device, result, tokens, parents, p, generators);
      else
        ef::verify_speculative_tree_into(device, result, tokens, parents, q, p, generators,
                                         {.with_replacement = siblings == 1});
    };
    ef::SpeculativeTreeResult expected;
    verify(Eigen::DefaultDevice{}, expected, trees.tokens, trees.parents, trees.q, trees.p);
    for_each_gpu([&](const auto& bench) {
      const auto tokens = on_device(bench, trees.tokens), parents = on_device(bench, trees.parents);
      const auto q = on_device(bench, trees.q), p = on_device(bench, trees.p);
      const auto counts = on_device(bench, poisoned_tensor<std::int32_t, 1>({kBatch}));
      const auto out = on_device(bench, poisoned_tensor<std::int32_t, 2>({kBatch, kNodes + 1}));
      const auto nodes = on_device(bench, poisoned_tensor<std::int32_t, 2>({kBatch, kNodes}));
      const auto bytes = on_device(bench, poisoned_tensor<std::int8_t, 1>({kBatch}));
      const ef::SpeculativeTreeViews views{
          counts.view(),
          out.view(),
          nodes.view(),
          {reinterpret_cast<ef::SampleStatus*>(bytes.view().data()), kBatch}};
      verify(bench.device, views, tokens.cview(), parents.cview(), q.cview(), p.cview());
      EXPECT_TRUE(same_bits(counts.host(), expected.accepted_counts)) << vocab << " " << siblings;
      EXPECT_TRUE(same_bits(out.host(), expected.tokens)) << vocab << " " << siblings;
      EXPECT_TRUE(same_bits(nodes.host(), expected.nodes)) << vocab << " " << siblings;
      const auto statuses = bytes.host();
      for (Index r = 0; r < kBatch; ++r)
        EXPECT_EQ(static_cast<ef::SampleStatus>(statuses(r)),
                  expected.statuses[static_cast<std::size_t>(r)]);
    });
  }
}

TEST(SpeculativeTreesOnDevice, KeepTheTokensOfTheCpu) {
  for (Index vocab : {1, 4, 33, 500}) check_trees<float>(vocab);
  check_trees<ef::bfloat16>(130);
}

}  // namespace
