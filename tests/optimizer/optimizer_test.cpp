// Laws: steps equal the double reference and PyTorch for every size and ISA; the same bits for any
// number of threads and after a resume from saved state; gradient norms and clipping equal their
// definition; nonsense is refused.
#include <eigenformer/optimizer.h>
#include <eigenformer/reference/optimizer.h>

#include <cmath>
#include <fstream>
#include <optional>
#include <random>
#include <sstream>

#include "allocations.h"
#include "compare.h"
#include "optimizer_support.h"

using namespace eigenformer_test;

namespace {

ef::Tensor<double, 1> tensor(const std::vector<double>& x) {
  ef::Tensor<double, 1> result(static_cast<Index>(x.size()));
  std::copy(x.begin(), x.end(), result.data());
  return result;
}

std::vector<Index> edge_sizes() {
  std::vector<Index> sizes;
  for (Index n = 0; n <= 33; ++n) sizes.push_back(n);
  for (Index n : {ef::problem::kPieceElements - 1, ef::problem::kPieceElements,
                  ef::problem::kPieceElements + 1, 3 * ef::problem::kPieceElements + 17})
    sizes.push_back(n);
  return sizes;
}

template <typename Optimizer, typename Options, typename Reference>
void compare_with_reference(const Options& options, Reference reference_step) {
  Model model(edge_sizes());
  Optimizer optimizer(model.parameters(), options);
  std::vector<ef::reference::OptimizedVector> expected;
  for (const auto& value : model.values) expected.push_back({doubles(value)});
  for (unsigned step = 1; step <= 4; ++step) {
    optimizer.step();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      reference_step(expected[i], doubles(model.gradients[i]), options);
      ASSERT_LE(relative_error(model.values[i], tensor(expected[i].value)), tolerance<float>())
          << "step " << step << " size " << model.values[i].size();
    }
    model.new_gradients(100 * step);
  }
  EXPECT_EQ(optimizer.step_count(), 4);
}

TEST(Optimizer, AdamWEqualsTheReference) {
  for (const auto& options :
       {ef::AdamWOptions{},
        ef::AdamWOptions{
            .learning_rate = 0.1, .weight_decay = 0.5, .beta1 = 0.5, .beta2 = 0.9, .epsilon = 1e-2},
        ef::AdamWOptions{.weight_decay = 0, .beta1 = 0, .beta2 = 0}})
    compare_with_reference<ef::AdamW>(options, ef::reference::adamw_step);
}

TEST(Optimizer, SgdEqualsTheReference) {
  for (const auto& options :
       {ef::SgdOptions{}, ef::SgdOptions{.learning_rate = 0.1, .weight_decay = 0.3},
        ef::SgdOptions{.learning_rate = 0.1, .weight_decay = 0.1, .momentum = 0.9},
        ef::SgdOptions{.learning_rate = 0.1, .momentum = 0.8, .nesterov = true}})
    compare_with_reference<ef::Sgd>(options, ef::reference::sgd_step);
}

template <typename Optimizer>
void replay_golden_step(Optimizer& optimizer, ef::Tensor<float, 1>& gradient, int step) {
  for (int i = 0; i < 7; ++i) gradient(i) = static_cast<float>((i * 5 + step * 3) % 17 - 8) / 8;
  optimizer.step();
}

// tests/golden/optimizer.py made the file with PyTorch.
TEST(Optimizer, EqualsPyTorch) {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/optimizer.txt");
  ASSERT_TRUE(file.good());
  Model model({7});
  std::optional<ef::AdamW> adamw;
  std::optional<ef::Sgd> sgd;
  int lines = 0;
  for (std::string line; std::getline(file, line); ++lines) {
    std::istringstream words(line);
    std::string name;
    double o[5];
    int step = -1;
    words >> name;
    for (double& option : o) words >> option;
    words >> step;
    if (step == 0) {
      for (int i = 0; i < 7; ++i) model.values[0](i) = static_cast<float>(i - 3) / 4;
      adamw.reset();
      sgd.reset();
      if (name == "adamw")
        adamw.emplace(model.parameters(), ef::AdamWOptions{.learning_rate = o[0],
                                                           .weight_decay = o[1],
                                                           .beta1 = o[2],
                                                           .beta2 = o[3],
                                                           .epsilon = o[4]});
      else
        sgd.emplace(model.parameters(), ef::SgdOptions{.learning_rate = o[0],
                                                       .weight_decay = o[1],
                                                       .momentum = o[2],
                                                       .nesterov = o[3] != 0});
    }
    if (adamw) replay_golden_step(*adamw, model.gradients[0], step);
    if (sgd) replay_golden_step(*sgd, model.gradients[0], step);
    for (int i = 0; i < 7; ++i) {
      double expected = 0;
      ASSERT_TRUE(static_cast<bool>(words >> expected));
      ASSERT_NEAR(model.values[0](i), expected, 1e-6) << line;
    }
  }
  EXPECT_EQ(lines, 25);
}

TEST(Optimizer, TheContractsConstruction) {
  Model model({5});
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
  optimizer.step();
  optimizer.zero_grad();
  EXPECT_EQ(optimizer.parameters().size(), 1u);
  for (Index i = 0; i < 5; ++i) EXPECT_EQ(model.gradients[0](i), 0.0f);
  ef::Sgd sgd(model.parameters());
  sgd.set_learning_rate(0.5f);
  EXPECT_EQ(sgd.learning_rate(), 0.5);
}

TEST(Optimizer, SameBitsForAnyNumberOfThreads) {
  const std::vector<Index> sizes{3, 5 * ef::problem::kPieceElements + 3, 1,
                                 4 * ef::problem::kPieceElements};
  Model model(sizes);
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.01});
  for (int step = 0; step < 3; ++step) optimizer.step();
  const double norm = ef::gradient_norm(model.parameters());
  Model scaled(sizes);
  ef::clip_gradient_norm(scaled.parameters(), 0.7);
  for (int count : {1, 2, 3}) {
    Threads threads(count);
    Model other(sizes);
    ef::AdamW same(other.parameters(), {.learning_rate = 0.01});
    for (int step = 0; step < 3; ++step) same.step(threads.device);
    EXPECT_EQ(ef::gradient_norm(threads.device, other.parameters()), norm);
    EXPECT_EQ(ef::clip_gradient_norm(threads.device, other.parameters(), 0.7), norm);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      ASSERT_TRUE(same_bits(model.values[i], other.values[i]));
      ASSERT_TRUE(same_bits(scaled.gradients[i], other.gradients[i]));
    }
    same.zero_grad(threads.device);
    EXPECT_EQ(ef::gradient_norm(other.parameters()), 0.0);
  }
}

TEST(Optimizer, AnElementDoesNotDependOnWhereItStands) {
  Model together({40});
  std::vector<ef::Parameter> parts;
  Model apart({40});
  for (Index begin : {0, 1, 4, 21}) {
    const Index end = begin == 0 ? 1 : begin == 1 ? 4 : begin == 4 ? 21 : 40;
    parts.push_back(
        ef::Parameter{ef::TensorView<float, 1>(apart.values[0].data() + begin, end - begin),
                      ef::TensorView<float, 1>(apart.gradients[0].data() + begin, end - begin)});
  }
  ef::AdamW a(together.parameters()), b(parts);
  for (int step = 0; step < 3; ++step) {
    a.step();
    b.step();
  }
  EXPECT_TRUE(same_bits(together.values[0], apart.values[0]));
}

TEST(Optimizer, EveryIsaEqualsTheReference) {
  for_each_isa([&](auto isa) {
    for (Index size : {1, 7, 8, 9, 31, 100}) {
      Model model({size});
      auto expected = ef::reference::OptimizedVector{doubles(model.values[0])};
      ef::reference::adamw_step(expected, doubles(model.gradients[0]), {.learning_rate = 0.1});
      ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.1});
      optimizer.step(on(isa));
      EXPECT_LE(relative_error(model.values[0], tensor(expected.value)), 1e-5) << isa.name << size;
      double squares = 0;
      for (double g : doubles(model.gradients[0])) squares += g * g;
      const double norm = std::sqrt(squares);  // a root halves the relative error of its argument
      EXPECT_NEAR(ef::gradient_norm(on(isa), model.parameters()), norm, 0.5e-12 * norm) << isa.name;
      for (float bad :
           {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
        for (Index at = 0; at < size; ++at) {
          const float kept = std::exchange(model.gradients[0](at), 1e30f);
          ASSERT_TRUE(ef::all_finite(on(isa), model.parameters())) << isa.name;
          model.gradients[0](at) = bad;
          ASSERT_FALSE(ef::all_finite(on(isa), model.parameters())) << isa.name << " " << at;
          model.gradients[0](at) = kept;
        }
    }
  });
}

/// w - step, rounded once: off by half a last digit of the weight, and by the rounding of the step.
testing::AssertionResult rounded_once(float before, double step, float after) {
  const float next = std::nextafter(after, std::numeric_limits<float>::infinity());
  const double digit = static_cast<double>(next) - static_cast<double>(after);
  const double error = static_cast<double>(before) - step - static_cast<double>(after);
  if (std::abs(error) <= 0.51 * digit + 1e-6 * std::abs(step)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << error / digit << " last digits from the update";
}

TEST(Optimizer, TheWeightIsRoundedOnceAStep) {
  constexpr Index size = 203;
  const auto rounded = [](double factor) {
    return static_cast<double>(static_cast<float>(factor));
  };
  for_each_isa([&](auto isa) {
    Model model({size}), moments({size, size});
    const auto g = doubles(model.gradients[0]);
    ef::Tensor<float, 1>&m = moments.values[0], &v = moments.values[1];
    for (Index i = 0; i < size; ++i) v(i) = std::abs(v(i)) + 0.1f;
    const auto m0 = doubles(m), v0 = doubles(v);
    std::vector<float> state(m.data(), m.data() + size);
    state.insert(state.end(), v.data(), v.data() + size);
    // The second step, whose bias corrections are 1 - beta^2; betas and 1 - beta are exact floats.
    const double first_bias = 1 - 0.875 * 0.875, rate = 1e-3 * first_bias;
    const ef::AdamWOptions options{
        .learning_rate = rate, .weight_decay = 1e-5 / rate, .beta1 = 0.875, .beta2 = 0.5};
    const double step_size = rounded(rate / first_bias),
                 decay = rounded(rate * options.weight_decay),
                 inverse_root_bias = rounded(1 / std::sqrt(1 - 0.5 * 0.5));
    ef::AdamW adamw(model.parameters(), options);
    adamw.load_state(state, 1);
    ef::Tensor<float, 1> before = model.values[0];
    adamw.step(on(isa));
    for (Index i = 0; i < size; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const double first = 0.875 * m0[k] + 0.125 * g[k], second = 0.5 * v0[k] + 0.5 * g[k] * g[k];
      const double step = step_size * first / (std::sqrt(second) * inverse_root_bias + 1e-8) +
                          decay * static_cast<double>(before(i));
      ASSERT_TRUE(rounded_once(before(i), step, model.values[0](i))) << isa.name << ' ' << i;
    }
    state.resize(size);  // m, which is then Sgd's u
    for (bool nesterov : {false, true}) {
      before = model.values[0];
      const std::vector<double> u0(state.begin(), state.end());
      ef::Sgd sgd(model.parameters(),
                  {.weight_decay = 0.125, .momentum = 0.875, .nesterov = nesterov});
      sgd.load_state(state, 0);
      sgd.step(on(isa));
      state.assign(sgd.state().begin(), sgd.state().end());
      for (Index i = 0; i < size; ++i) {
        const auto k = static_cast<std::size_t>(i);
        const double d = g[k] + 0.125 * static_cast<double>(before(i)), u = 0.875 * u0[k] + d;
        const double step = rounded(1e-3) * (nesterov ? d + 0.875 * u : u);
        ASSERT_TRUE(rounded_once(before(i), step, model.values[0](i))) << isa.name << ' ' << i;
      }
    }
  });
}

/// The decay that arrives after many steps of noise, over that of the formula in double.
template <typename Optimizer, typename Options, typename Reference>
double decay_that_arrives(Options options, Reference reference_step) {
  constexpr Index size = 256;
  Model model({size});
  for (Index i = 0; i < size; ++i) model.values[0](i) = 1.0f + static_cast<float>(i) / size;
  Optimizer optimizer(model.parameters(), options);
  Options without = options;
  without.weight_decay = 0;
  ef::reference::OptimizedVector decayed{doubles(model.values[0])}, plain{doubles(model.values[0])};
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  for (int step = 0; step < 3000; ++step) {
    for (Index i = 0; i < size; ++i) model.gradients[0](i) = normal(generator);
    const auto gradient = doubles(model.gradients[0]);
    optimizer.step();
    reference_step(decayed, gradient, options);
    reference_step(plain, gradient, without);
  }
  double expected = 0, actual = 0;
  for (Index i = 0; i < size; ++i) {
    const auto k = static_cast<std::size_t>(i);
    expected += plain.value[k] - decayed.value[k];
    actual += plain.value[k] - static_cast<double>(model.values[0](i));
  }
  return actual / expected;
}

TEST(Optimizer, ADecayBelowTheLastDigitArrives) {
  for (const auto& options : {ef::AdamWOptions{.learning_rate = 2e-6, .weight_decay = 0.01},
                              ef::AdamWOptions{.learning_rate = 1e-4, .weight_decay = 1e-4}})
    EXPECT_NEAR(decay_that_arrives<ef::AdamW>(options, ef::reference::adamw_step), 1, 0.05);
  for (const auto& options :
       {ef::SgdOptions{.learning_rate = 2e-6, .weight_decay = 0.01},
        ef::SgdOptions{.learning_rate = 2e-6, .weight_decay = 0.01, .momentum = 0.5},
        ef::SgdOptions{
            .learning_rate = 2e-6, .weight_decay = 0.01, .momentum = 0.5, .nesterov = true}})
    EXPECT_NEAR(decay_that_arrives<ef::Sgd>(options, ef::reference::sgd_step), 1, 0.05);
}

template <typename Optimizer, typename Options>
void resume(const Options& options) {
  Model model({50, 3});
  Optimizer whole(model.parameters(), options);
  whole.step();
  whole.step();
  Model restored = model;
  const std::vector<float> saved(whole.state().begin(), whole.state().end());
  Optimizer resumed(restored.parameters(), options);
  resumed.load_state(saved, whole.step_count());
  whole.step();
  resumed.step();
  EXPECT_EQ(resumed.step_count(), 3);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_TRUE(same_bits(model.values[i], restored.values[i]));
  expect_throws<std::invalid_argument>(
      [&] { resumed.load_state(std::span<const float>(saved).first(1), 1); },
      {"load_state", "1 elements"});
  expect_throws<std::invalid_argument>([&] { resumed.load_state(saved, -1); },
                                       {"step_count", "-1"});
}

TEST(Optimizer, ResumesExactly) {
  resume<ef::AdamW>(ef::AdamWOptions{});
  resume<ef::Sgd>(ef::SgdOptions{.momentum = 0.9});
  Model model({4, 6});
  ef::AdamW optimizer(model.parameters(), {.beta1 = 0.5, .beta2 = 0.75});
  optimizer.step();
  ASSERT_EQ(optimizer.second_moment(1).size(), 6);
  for (Index i = 0; i < 6; ++i) {
    const float g = model.gradients[1](i);
    EXPECT_EQ(optimizer.first_moment(1)(i), 0.5f * g);
    EXPECT_FLOAT_EQ(optimizer.second_moment(1)(i), 0.25f * g * g);
  }
  ef::AdamW moved = std::move(optimizer);
  EXPECT_EQ(moved.first_moment(1)(0), 0.5f * model.gradients[1](0));
  moved.step();
  EXPECT_EQ(moved.step_count(), 2);
  expect_throws<std::invalid_argument>([&] { moved.first_moment(2); },
                                       {"first_moment", "parameter 2 of 2"});
  expect_throws<std::invalid_argument>([&] { ef::Sgd(model.parameters()).momentum(0); },
                                       {"momentum"});
}

TEST(Gradients, ClippingEqualsItsDefinition) {
  Model model({1, 30, 2000});
  double squares = 0;
  for (const auto& gradient : model.gradients)
    for (double g : doubles(gradient)) squares += g * g;
  const double norm = std::sqrt(squares);
  Model untouched = model;
  EXPECT_NEAR(ef::clip_gradient_norm(model.parameters(), 2 * norm), norm, 1e-9);
  for (std::size_t i = 0; i < 3; ++i)
    EXPECT_TRUE(same_bits(model.gradients[i], untouched.gradients[i]));
  EXPECT_NEAR(ef::clip_gradient_norm(model.parameters(), 0.5), norm, 1e-9);
  EXPECT_NEAR(ef::gradient_norm(model.parameters()), 0.5, 1e-6);
  EXPECT_NEAR(model.gradients[2](7), untouched.gradients[2](7) * 0.5 / norm, 1e-7);
}

TEST(Gradients, NormsPastTheRangeOfFloatAndNonFiniteOnes) {
  Model model({40});
  model.gradients[0].setConstant(1e30f);  // squares overflow float
  EXPECT_NEAR(ef::gradient_norm(model.parameters()), std::sqrt(40.0) * 1e30, 1e24);
  EXPECT_TRUE(ef::all_finite(model.parameters()));
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    model.gradients[0](39) = bad;
    EXPECT_FALSE(ef::all_finite(model.parameters()));
    EXPECT_FALSE(std::isfinite(ef::clip_gradient_norm(model.parameters(), 1.0)));
    EXPECT_EQ(model.gradients[0](0), 1e30f);  // left as it was
  }
  model.gradients[0].setConstant(1e30f);
  EXPECT_FALSE(ef::scale_gradients(model.parameters(), 1e20));  // overflow by the factor counts
}

TEST(Gradients, NormsAndClippingOverTheWholeRangeOfFloat) {
  constexpr float largest = std::numeric_limits<float>::max();
  constexpr float smallest = std::numeric_limits<float>::denorm_min();
  for (Index size : {1, 40, 20000})
    for (float g : {largest, 1e30f, 1e-30f, 1e-40f, smallest})
      for (double max_norm : {1e-3, 1.0, 1e10, 1e38}) {
        Model model({size});
        model.gradients[0].setConstant(-g);
        const double norm = static_cast<double>(g) * std::sqrt(static_cast<double>(size));
        EXPECT_NEAR(ef::gradient_norm(model.parameters()), norm, 1e-12 * norm);
        EXPECT_NEAR(ef::clip_gradient_norm(model.parameters(), max_norm), norm, 1e-12 * norm);
        const double expected = -static_cast<double>(g) * std::min(1.0, max_norm / norm);
        for (Index i = 0; i < size; ++i)
          ASSERT_NEAR(static_cast<double>(model.gradients[0](i)), expected,
                      2e-7 * std::abs(expected))
              << g << " to " << max_norm;
      }
  Model model({100});  // factors below the smallest normal float keep their bits
  model.gradients[0].setConstant(3e38f);
  for (double factor : {0x1.234567p-130, -0x1.abcdefp-149, 0x1p-200}) {
    Model scaled = model;
    EXPECT_TRUE(ef::scale_gradients(scaled.parameters(), factor));
    const double expected = static_cast<double>(3e38f) * factor;
    ASSERT_NEAR(static_cast<double>(scaled.gradients[0](99)), expected,
                2e-7 * std::abs(expected) + 0x1p-149);
  }
  for (double bad : {1e39, -1e300, static_cast<double>(std::numeric_limits<float>::infinity())})
    expect_throws<std::invalid_argument>([&] { ef::scale_gradients(model.parameters(), bad); },
                                         {"scale_gradients", "factor"});
}

TEST(OptimizerContract, Refuses) {
  Model model({4, 5});
  auto mixed = std::vector<ef::Parameter>{
      ef::Parameter{model.parameters()[0].value, model.parameters()[1].gradient}};
  expect_throws<std::invalid_argument>([&] { ef::AdamW{mixed}; },
                                       {"AdamW", "parameter 0", "4 values", "5 gradients"});
  expect_throws<std::invalid_argument>([&] { ef::Sgd{mixed}; }, {"Sgd", "parameter 0"});
  expect_throws<std::invalid_argument>([&] { ef::gradient_norm(mixed); },
                                       {"gradient_norm", "parameter 0"});
  auto twice = model.parameters();
  twice.push_back(model.parameters()[0]);
  expect_throws<std::invalid_argument>([&] { ef::AdamW{twice}; },
                                       {"AdamW", "share memory", "0", "2"});
  ef::Tensor<float, 1> memory(60);  // any overlap, of values, of gradients or of one with the other
  for (Index value = 0; value <= 50; ++value)
    for (Index gradient = 0; gradient <= 50; ++gradient) {
      const auto view = [&](Index begin) {
        return ef::TensorView<float, 1>(memory.data() + begin, 10);
      };
      const auto apart = [](Index a, Index b) { return a >= b + 10 || b >= a + 10; };
      const std::vector<ef::Parameter> pair{{view(20), view(40)}, {view(value), view(gradient)}};
      const bool legal = apart(value, gradient) && apart(value, 20) && apart(value, 40) &&
                         apart(gradient, 20) && apart(gradient, 40);
      if (legal)
        ef::AdamW{pair};
      else
        expect_throws<std::invalid_argument>([&] { ef::AdamW{pair}; }, {"share memory"});
    }
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const auto p = model.parameters();
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.learning_rate = -1}); },
                                       {"AdamW", "learning_rate", "-1"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.learning_rate = nan}); },
                                       {"learning_rate", "nan"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.weight_decay = nan}); },
                                       {"weight_decay"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.beta1 = 1}); }, {"beta1", "1"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.beta2 = nan}); }, {"beta2"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p, {.epsilon = -1e-8}); }, {"epsilon"});
  expect_throws<std::invalid_argument>([&] { ef::AdamW(p).set_learning_rate(nan); },
                                       {"learning_rate"});
  expect_throws<std::invalid_argument>([&] { ef::Sgd(p, {.momentum = 1.5}); },
                                       {"Sgd", "momentum", "1.5"});
  expect_throws<std::invalid_argument>([&] { ef::Sgd(p, {.nesterov = true}); },
                                       {"nesterov", "momentum"});
  expect_throws<std::invalid_argument>([&] { ef::clip_gradient_norm(p, 0); }, {"max_norm", "0"});
  expect_throws<std::invalid_argument>([&] { ef::clip_gradient_norm(p, nan); }, {"max_norm"});
  expect_throws<std::invalid_argument>([&] { ef::scale_gradients(p, nan); }, {"factor"});
}

TEST(OptimizerContract, NoParametersAndEmptyOnes) {
  ef::AdamW none({});
  none.step();
  none.zero_grad();
  EXPECT_EQ(ef::gradient_norm(none.parameters()), 0.0);
  EXPECT_TRUE(ef::all_finite(none.parameters()));
  Model model({0, 0});
  ef::Sgd(model.parameters()).step();
}

TEST(OptimizerContract, AllocatesNothingInAStep) {
  Model model({100, 2 * ef::problem::kPieceElements});
  ef::AdamW optimizer(model.parameters());
  ef::clip_gradient_norm(optimizer.parameters(), 1.0);
  EXPECT_EQ(count_allocations([&] {
              optimizer.step();
              ef::clip_gradient_norm(optimizer.parameters(), 0.5);
              optimizer.zero_grad();
            }),
            0);
}

}  // namespace
