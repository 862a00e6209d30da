// Laws: a group of parameters takes the steps, to the bit, of an optimizer of its own with the
// group's options; all groups are saved and loaded together; nonsense is refused by its group. A
// step that scales gradients has the bits of scaling them before.
#include <eigenformer/optimizer.h>

#include <cstring>

#include "compare.h"
#include "optimizer_support.h"

using namespace eigenformer_test;

namespace {

/// A group's parameters take the steps that an optimizer of their own would, to the bit.
template <typename Optimizer, typename Options>
void compare_groups(const std::vector<Options>& options) {
  Threads threads(2);
  const std::vector<std::vector<Index>> sizes{
      {5, 3 * ef::problem::kPieceElements + 2}, {}, {1, 0, 40}};
  std::vector<Model> grouped, alone;
  std::vector<typename Optimizer::Group> groups;
  std::vector<Optimizer> optimizers;
  for (std::size_t g = 0; g < 3; ++g) {
    const unsigned seed = static_cast<unsigned>(10 * g + 1);
    grouped.emplace_back(sizes[g], seed);
    alone.emplace_back(sizes[g], seed);
    groups.push_back({grouped[g].parameters(), options[g]});
    optimizers.emplace_back(alone[g].parameters(), options[g]);
  }
  Optimizer optimizer(groups);
  ASSERT_EQ(optimizer.group_count(), 3);
  ASSERT_EQ(optimizer.parameters().size(), 5u);
  for (unsigned step = 0; step < 4; ++step) {
    step % 2 == 0 ? optimizer.step() : optimizer.step(threads.device);
    for (std::size_t g = 0; g < 3; ++g) {
      optimizers[g].step();
      EXPECT_EQ(optimizer.learning_rate(static_cast<Index>(g)), optimizers[g].learning_rate());
      for (std::size_t i = 0; i < sizes[g].size(); ++i)
        ASSERT_TRUE(same_bits(grouped[g].values[i], alone[g].values[i])) << step << ' ' << g;
      grouped[g].new_gradients(50 * step);
      alone[g].new_gradients(50 * step);
    }
    if (step == 0) {  // of one
      optimizer.set_learning_rate(2, 0.25);
      optimizers[2].set_learning_rate(0.25);
    }
    if (step == 1) {  // of all
      optimizer.set_learning_rate(0.125);
      for (Optimizer& other : optimizers) other.set_learning_rate(0.125);
    }
    if (step == 2) {
      Options changed = options[0];
      changed.weight_decay = 0.75;
      optimizer.set_options(0, changed);
      optimizers[0].set_options(0, changed);
      EXPECT_EQ(optimizer.options(0).weight_decay, 0.75);
      EXPECT_EQ(optimizer.options(2).weight_decay, options[2].weight_decay);
    }
  }
  Model again = grouped[2];  // a resume, bit for bit
  auto resumed_groups = groups;
  resumed_groups[2].parameters.clear();
  for (const auto& parameter : again.parameters())
    resumed_groups[2].parameters.push_back(parameter);
  Model first = grouped[0];
  resumed_groups[0].parameters.clear();
  for (const auto& parameter : first.parameters())
    resumed_groups[0].parameters.push_back(parameter);
  Optimizer resumed(resumed_groups);
  resumed.load_state(optimizer.state(), optimizer.step_count());
  for (Index g = 0; g < 3; ++g) resumed.set_options(g, optimizer.options(g));
  optimizer.step();
  resumed.step();
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(grouped[2].values[i], again.values[i]));
  for (std::size_t i = 0; i < 2; ++i) EXPECT_TRUE(same_bits(grouped[0].values[i], first.values[i]));
}

TEST(Optimizer, EachGroupHasItsOwnOptions) {
  compare_groups<ef::AdamW>(std::vector<ef::AdamWOptions>{
      {.learning_rate = 0.01, .weight_decay = 0.1},
      {},
      {.learning_rate = 0.5, .weight_decay = 0, .beta1 = 0.5, .beta2 = 0.75, .epsilon = 1e-3}});
  compare_groups<ef::Sgd>(std::vector<ef::SgdOptions>{
      {.learning_rate = 0.01, .weight_decay = 0.1, .momentum = 0.9, .nesterov = true},
      {.momentum = 0.5},
      {.learning_rate = 0.5}});
  compare_groups<ef::Sgd>(std::vector<ef::SgdOptions>{
      {.learning_rate = 0.01}, {}, {.learning_rate = 0.5, .momentum = 0.5}});
}

TEST(Optimizer, GroupsAreWrittenInBraces) {
  Model matrices({6, 4}, 1), norms({3}, 9);
  const auto group = [](Model& model) { return model.parameters(); };
  ef::AdamW adamw({{group(matrices), {.weight_decay = 0.1}}, {group(norms), {.weight_decay = 0}}});
  EXPECT_EQ(adamw.parameters().size(), 3u);
  EXPECT_EQ(adamw.options(1).weight_decay, 0.0);
  EXPECT_EQ(adamw.state().size(), 26u);
  ef::Sgd sgd({{group(matrices), {.momentum = 0.5}}, {group(norms), {}}});
  EXPECT_EQ(sgd.state().size(), 10u);  // only where there is momentum
  sgd.step();
  for (Index i = 0; i < 4; ++i) EXPECT_EQ(sgd.momentum(1)(i), matrices.gradients[1](i));
  expect_throws<std::invalid_argument>([&] { sgd.momentum(2); },
                                       {"Sgd::momentum", "parameter 2", "without momentum"});
  expect_throws<std::invalid_argument>([&] { sgd.set_options(1, {.momentum = 0.5}); },
                                       {"Sgd", "group 1", "momentum"});
  expect_throws<std::invalid_argument>([&] { sgd.set_options(0, {.learning_rate = -1}); },
                                       {"learning_rate of group 0", "-1"});
  EXPECT_EQ(sgd.learning_rate(0), 1e-3);
  EXPECT_EQ(sgd.options(0).momentum, 0.5);
  for (Index bad : {-1, 2}) {
    expect_throws<std::invalid_argument>([&] { adamw.set_learning_rate(bad, 0.1); },
                                         {"AdamW", "group " + std::to_string(bad) + " of 2"});
    expect_throws<std::invalid_argument>([&] { adamw.options(bad); }, {"group"});
  }
  expect_throws<std::invalid_argument>(
      [&] {
        ef::AdamW({{group(matrices), {}}, {group(norms), {.beta1 = 1}}});
      },
      {"beta1 of group 1"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::AdamW({{group(matrices), {}}, {group(matrices), {}}});
      },
      {"share memory"});
}

/// A step of an optimizer that unscales and clips by itself, and one after both by hand.
template <typename Optimizer>
void check_factors(const typename Optimizer::Options& options) {
  for_each_isa([&](auto isa) {
    for (Index size : {1, 9, 100})
      for (const ef::problem::GradientFactors by : {ef::problem::GradientFactors{0.3f, 0.7f},
                                                    {0x1p-16f, 1.0f},
                                                    {1.0f, 0.1f},
                                                    {-0x1p100f, 1e38f},
                                                    {1.0f, 1.0f}}) {
        Model fused({size, size + 7}), by_hand({size, size + 7});
        Optimizer a(fused.parameters(), options), b(by_hand.parameters(), options);
        for (int step = 0; step < 2; ++step) {
          a.step(on(isa), by);
          ef::scale_gradients(on(isa), by_hand.parameters(), by.scale);
          ef::scale_gradients(on(isa), by_hand.parameters(), by.clip);
          b.step(on(isa));
        }
        for (std::size_t i = 0; i < 2; ++i) {
          ASSERT_TRUE(same_bits(fused.values[i], by_hand.values[i])) << isa.name << size;
          ASSERT_TRUE(same_bits(fused.gradients[i], by_hand.gradients[i])) << isa.name << size;
        }
        ASSERT_EQ(std::memcmp(a.state().data(), b.state().data(), a.state().size_bytes()), 0);
      }
  });
}

TEST(Gradients, AStepThatScalesThemHasTheBitsOfScalingByHand) {
  check_factors<ef::AdamW>({.learning_rate = 0.1});
  check_factors<ef::Sgd>({.learning_rate = 0.1, .weight_decay = 0.01});
  check_factors<ef::Sgd>({.learning_rate = 0.1, .momentum = 0.9, .nesterov = true});
}

}  // namespace
