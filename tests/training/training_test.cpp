// Laws of gradient accumulation: gradients, weights and loss are those of the one big batch, for
// ragged micro-batches, ignored targets, targets of any type, the shorter last group, dirty
// gradients and any kind of range; errors change no weight.
#include <eigenformer/reference/training.h>
#include <eigenformer/training.h>

#include <list>
#include <ranges>
#include <span>
#include <sstream>

#include "compare.h"
#include "tiny_mlp.h"

using namespace eigenformer_test;

namespace {

static_assert(ef::TrainableModel<TinyMlp>);
static_assert(ef::TrainableModel<TinyMlp, ef::bfloat16, ef::Tensor<float, 2>>);
static_assert(!ef::TrainableModel<int>);

TEST(Reference, GradientIsTheDerivativeOfItsLoss) {
  auto m = new_model().reference();
  const TinyBatch batch = tiny_batch(6, kFeatures, kClasses, 1, 4);
  const auto inputs = to_double(batch.inputs);
  const auto gradient = ef::reference::mlp_gradient(m, inputs, batch.targets).gradient;
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const double w = m.weights.value[i];
    m.weights.value[i] = w + 1e-5;
    const double above = ef::reference::mlp_gradient(m, inputs, batch.targets).loss.mean();
    m.weights.value[i] = w - 1e-5;
    const double below = ef::reference::mlp_gradient(m, inputs, batch.targets).loss.mean();
    m.weights.value[i] = w;
    ASSERT_NEAR(gradient[i], (above - below) / 2e-5, 1e-8) << i;
  }
}

TEST(Accumulation, GradientsAreThoseOfTheOneBigBatch) {
  const auto batches = ragged_batches();
  for (std::size_t count = 1; count <= batches.size(); ++count) {
    auto model = new_model();
    ef::Sgd optimizer(model.parameters(), {.learning_rate = 0});
    const auto big = joined(batches, 0, count);
    const auto expected =
        ef::reference::mlp_gradient(model.reference(), to_double(big.inputs), big.targets);
    const double loss = ef::train_step_with_grad_accumulation(model, optimizer,
                                                              std::span(batches).first(count), 100);
    EXPECT_LE(relative_error(model.gradient(), tensor(expected.gradient)), 1e-5) << count;
    EXPECT_NEAR(loss, expected.loss.mean(), 1e-5);
  }
}

TEST(Accumulation, EpochsEqualTrainingOnBigBatches) {
  const auto batches = ragged_batches();
  for (std::size_t steps = 1; steps <= batches.size() + 1; ++steps) {
    auto model = new_model();
    auto expected = model.reference();
    const ef::AdamWOptions options{.learning_rate = 0.01, .epsilon = 1e-3};
    ef::AdamW optimizer(model.parameters(), options);
    // gradients of the epoch before are in the way of the next
    for (int epoch = 0; epoch < 3; ++epoch) {
      const double loss = ef::train_step_with_grad_accumulation(model, optimizer, batches,
                                                                static_cast<Index>(steps));
      ef::LossResult total;
      for (std::size_t begin = 0; begin < batches.size(); begin += steps) {
        const auto big = joined(batches, begin, std::min(begin + steps, batches.size()));
        const auto result =
            ef::reference::mlp_adamw_step(expected, to_double(big.inputs), big.targets, options);
        total.sum += result.sum;
        total.count += result.count;
      }
      ASSERT_NEAR(loss, total.mean(), 1e-5) << steps;
      ASSERT_LE(relative_error(model.weights(), tensor(expected.weights.value)), 1e-5) << steps;
    }
    EXPECT_EQ(optimizer.step_count(), expected.weights.steps);
  }
}

TEST(Accumulation, TheContractsCall) {
  TinyMlp model = new_model();
  const std::vector<TinyBatch> data_loader = ragged_batches();
  const int accumulation_steps = 2;
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
  auto expected = model.reference();
  double average_loss =
      ef::train_step_with_grad_accumulation(model, optimizer, data_loader, accumulation_steps);
  ef::LossResult total;
  for (std::size_t begin = 0; begin < data_loader.size(); begin += 2) {
    const auto big = joined(data_loader, begin, std::min(begin + 2, data_loader.size()));
    const auto result =
        ef::reference::mlp_adamw_step(expected, to_double(big.inputs), big.targets,
                                      {.learning_rate = 1e-3, .weight_decay = 0.01});
    total.sum += result.sum;
    total.count += result.count;
  }
  EXPECT_NEAR(average_loss, total.mean(), 1e-5);
  EXPECT_LE(relative_error(model.weights(), tensor(expected.weights.value)), 1e-5);
}

/// Trains a fresh model on a range; the weights afterwards.
template <typename Loader>
ef::Tensor<float, 1> trained_on(Loader&& loader) {
  auto model = new_model();
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.01});
  ef::train_step_with_grad_accumulation(model, optimizer, std::forward<Loader>(loader), 3);
  return model.weights();
}

TEST(Accumulation, TakesAnyInputRange) {
  std::vector<TinyBatch> batches = ragged_batches();
  const auto expected = trained_on(std::as_const(batches));
  EXPECT_TRUE(same_bits(expected, trained_on(batches)));
  EXPECT_TRUE(
      same_bits(expected, trained_on(std::list<TinyBatch>(batches.begin(), batches.end()))));
  EXPECT_TRUE(same_bits(expected, trained_on(std::span<const TinyBatch>(batches))));
  EXPECT_TRUE(same_bits(
      expected, trained_on(std::views::iota(std::size_t{0}, batches.size()) |
                           std::views::transform([&](std::size_t i) { return batches[i]; }))));
  std::istringstream numbers("0 1 2 3 4 5 6");  // single-pass, and a batch lives for one iteration
  auto single_pass = std::views::istream<std::size_t>(numbers) |
                     std::views::transform([&](std::size_t i) { return batches[i]; });
  static_assert(!std::ranges::forward_range<decltype(single_pass)>);
  EXPECT_TRUE(same_bits(expected, trained_on(single_pass)));
}

TEST(Accumulation, ThePoolGivesTheSameBits) {
  const auto batches = ragged_batches();
  const auto expected = trained_on(batches);
  for (int count : {1, 2, 3}) {
    Threads threads(count);
    auto model = new_model();
    ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.01});
    ef::train_step_with_grad_accumulation(threads.device, model, optimizer, batches, 3);
    EXPECT_TRUE(same_bits(expected, model.weights()));
  }
}

TEST(Accumulation, AnEmptyLoaderLeavesEverythingAsItWas) {
  auto model = new_model();
  model.gradient().setConstant(7.0f);
  const ef::Tensor<float, 1> weights = model.weights(), gradient = model.gradient();
  ef::AdamW optimizer(model.parameters());
  EXPECT_EQ(ef::train_step_with_grad_accumulation(model, optimizer, std::vector<TinyBatch>{}, 4),
            0.0);
  EXPECT_TRUE(same_bits(weights, model.weights()));
  EXPECT_TRUE(same_bits(gradient, model.gradient()));
  EXPECT_EQ(optimizer.step_count(), 0);
}

TEST(Accumulation, AGroupWithoutTargetsMakesNoStep) {
  auto model = new_model();
  const ef::Tensor<float, 1> weights = model.weights();
  ef::AdamW optimizer(model.parameters(), {.weight_decay = 0.5});
  const std::vector<TinyBatch> batches{tiny_batch(3, kFeatures, kClasses, 1, 1),
                                       tiny_batch(0, kFeatures, kClasses, 2)};
  EXPECT_EQ(ef::train_step_with_grad_accumulation(model, optimizer, batches, 1), 0.0);
  EXPECT_TRUE(same_bits(weights, model.weights()));
  EXPECT_EQ(optimizer.step_count(), 0);
  ef::GradScaler scaler({.growth_interval = 1});
  EXPECT_EQ(ef::train_step_mixed_precision<float>(model, optimizer, batches[0].inputs,
                                                  batches[0].targets, scaler),
            0.0);
  EXPECT_EQ(scaler.scale(), 65536.0);
  EXPECT_TRUE(same_bits(weights, model.weights()));
}

TEST(Accumulation, RefusesBeforeAnyWeightOfTheGroupChanges) {
  auto model = new_model();
  model.gradient().setConstant(7.0f);
  const ef::Tensor<float, 1> weights = model.weights(), gradient = model.gradient();
  ef::AdamW optimizer(model.parameters());
  const std::vector<TinyBatch> batches = ragged_batches();
  for (Index steps : {0, -3})
    expect_throws<std::invalid_argument>(
        [&] { ef::train_step_with_grad_accumulation(model, optimizer, batches, steps); },
        {"train_step_with_grad_accumulation", "accumulation_steps", std::to_string(steps)});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::train_step_with_grad_accumulation(model, optimizer, batches, 2,
                                              {.max_gradient_norm = -1});
      },
      {"max_gradient_norm", "-1"});
  EXPECT_TRUE(same_bits(weights, model.weights()));
  EXPECT_TRUE(same_bits(gradient, model.gradient()));

  auto twin = new_model();
  ef::AdamW twin_optimizer(twin.parameters());
  ef::train_step_with_grad_accumulation(twin, twin_optimizer, std::span(batches).first(2), 2);
  for (std::int32_t bad : {static_cast<std::int32_t>(kClasses), -1}) {
    auto fresh = new_model();
    ef::AdamW fresh_optimizer(fresh.parameters());
    std::vector<TinyBatch> spoiled{batches[0], batches[1], batches[2], batches[5]};
    spoiled[3].targets(8) = bad;  // the last target of the second group
    expect_throws<std::invalid_argument>(
        [&] { ef::train_step_with_grad_accumulation(fresh, fresh_optimizer, spoiled, 2); },
        {"target 8 is " + std::to_string(bad), "[0, 4)"});
    EXPECT_TRUE(same_bits(twin.weights(), fresh.weights()));
    EXPECT_EQ(fresh_optimizer.step_count(), 1);
  }
}

/// Twice the cross-entropy, in the form a user writes.
struct DoubledLoss {
  template <typename Compute>
  ef::LossResult operator()(ef::Tensor<Compute, 2>& logits,
                            const ef::Tensor<std::int32_t, 1>& targets,
                            double gradient_scale) const {
    ef::LossResult result = ef::cross_entropy_with_gradient_into(
        Eigen::DefaultDevice{}, logits, logits, targets, 2 * gradient_scale);
    result.sum *= 2;
    return result;
  }
};

TEST(Accumulation, TakesAnotherLoss) {
  const auto batches = ragged_batches();
  auto model = new_model(), doubled = new_model();
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0}),
      other(doubled.parameters(), {.learning_rate = 0});
  const double loss = ef::train_step_with_grad_accumulation(model, optimizer, batches, 100);
  EXPECT_EQ(ef::train_step_with_grad_accumulation(doubled, other, batches, 100, DoubledLoss{}),
            2 * loss);
  for (Index i = 0; i < model.gradient().size(); ++i)
    EXPECT_EQ(doubled.gradient()(i), 2 * model.gradient()(i));
  const auto lambda = [](ef::Tensor<float, 2>& logits, const ef::Tensor<std::int32_t, 1>& targets,
                         double gradient_scale) {
    return DoubledLoss{}(logits, targets, gradient_scale);
  };
  EXPECT_EQ(ef::train_step_with_grad_accumulation(doubled, other, batches, 100, lambda), 2 * loss);
  EXPECT_EQ(ef::train_step_with_grad_accumulation(doubled, other, batches, 100, ef::TrainOptions{},
                                                  lambda),
            2 * loss);
  const double smoothed = ef::train_step_with_grad_accumulation(
      model, optimizer, batches, 100, ef::CrossEntropyLoss{{.label_smoothing = 0.5}});
  EXPECT_NE(smoothed, loss);
}

/// A distribution over the classes for each row, as distillation has, or values to come near to.
struct SoftBatch {
  ef::Tensor<float, 2> inputs, targets;
};

/// sum over rows of -sum_k targets[k] log(softmax(logits)[k]) in the form a user writes.
struct SoftLoss {
  template <typename Compute>
  ef::LossResult operator()(ef::Tensor<Compute, 2>& logits, const ef::Tensor<float, 2>& targets,
                            double gradient_scale) const {
    ef::LossResult result;
    result.count = logits.dimension(0);
    for (Index r = 0; r < logits.dimension(0); ++r) {
      double sum = 0;
      for (Index k = 0; k < kClasses; ++k) sum += std::exp(static_cast<double>(logits(r, k)));
      for (Index k = 0; k < kClasses; ++k) {
        const double p = std::exp(static_cast<double>(logits(r, k))) / sum,
                     t = static_cast<double>(targets(r, k));
        result.sum -= t * std::log(p);
        logits(r, k) = static_cast<Compute>(static_cast<float>((p - t) * gradient_scale));
      }
    }
    return result;
  }
};

TEST(Accumulation, SoftTargetsThatAreClassesGiveTheGradientsOfClasses) {
  std::vector<TinyBatch> batches;
  for (Index rows : {4, 0, 7, 1}) batches.push_back(tiny_batch(rows, kFeatures, kClasses, 5));
  std::vector<SoftBatch> soft;
  for (const TinyBatch& batch : batches) {
    soft.push_back({batch.inputs, ef::Tensor<float, 2>(batch.targets.size(), kClasses)});
    for (Index r = 0; r < batch.targets.size(); ++r)
      for (Index k = 0; k < kClasses; ++k)
        soft.back().targets(r, k) = batch.targets(r) == static_cast<std::int32_t>(k) ? 1.0f : 0.0f;
  }
  for (Index steps : {1, 2, 4}) {
    auto model = new_model(), other = new_model();
    ef::AdamW a(model.parameters(), {.learning_rate = 0.01, .epsilon = 1e-3}),
        b(other.parameters(), {.learning_rate = 0.01, .epsilon = 1e-3});
    const double loss = ef::train_step_with_grad_accumulation(model, a, batches, steps);
    EXPECT_NEAR(ef::train_step_with_grad_accumulation(other, b, soft, steps, SoftLoss{}), loss,
                1e-5);
    EXPECT_LE(relative_error(other.weights(), model.weights()), 1e-5);
    ef::GradScaler scaler;
    ef::train_step_mixed_precision<ef::bfloat16>(other, b, soft[2].inputs, soft[2].targets, scaler,
                                                 {}, SoftLoss{});
    EXPECT_EQ(b.step_count(), a.step_count() + 1);
  }
}

/// Sum of all logits times what `weight_of` reads from the targets: the gradient is that weight.
template <typename Targets, typename WeightOf>
void targets_reach_the_loss(const Targets& targets, WeightOf weight_of) {
  struct Batch {
    ef::Tensor<float, 2> inputs;
    Targets targets;
  };
  const auto loss = [&](ef::Tensor<float, 2>& logits, const Targets& given, double scale) {
    ef::LossResult result;
    result.count = logits.dimension(0);
    for (Index i = 0; i < logits.size(); ++i) {
      result.sum += weight_of(given) * static_cast<double>(logits.data()[i]);
      logits.data()[i] = static_cast<float>(weight_of(given) * scale);
    }
    return result;
  };
  auto model = new_model();
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0});
  const std::vector<Batch> batches(2, Batch{random_tensor<float, 2>({3, kFeatures}, 4), targets});
  ef::train_step_with_grad_accumulation(model, optimizer, batches, 2, loss);
  for (Index c = 0; c < kClasses; ++c)
    EXPECT_FLOAT_EQ(model.gradient().data()[model.layout().second_bias(c)],
                    static_cast<float>(weight_of(targets)));
  ef::GradScaler scaler;
  ef::train_step_mixed_precision<float>(model, optimizer, batches[0].inputs, targets, scaler, {},
                                        loss);
  EXPECT_FLOAT_EQ(model.gradient().data()[model.layout().second_bias(0)],
                  static_cast<float>(weight_of(targets)));
}

TEST(Accumulation, TargetsOfAnyTypeAndRank) {
  targets_reach_the_loss(random_tensor<double, 1>({3}, 1), [](const auto& t) { return t(1); });
  targets_reach_the_loss(random_tensor<double, 3>({3, 2, 5}, 1),
                         [](const auto& t) { return t(2, 1, 4); });
  ef::Tensor<double, 0> scalar;
  scalar() = 0.75;
  targets_reach_the_loss(scalar, [](const auto& t) { return t(); });
  targets_reach_the_loss(ef::Tensor<ef::half, 2>(random_tensor<ef::half, 2>({3, 4}, 1)),
                         [](const auto& t) { return static_cast<double>(t(0, 3)); });
  targets_reach_the_loss(0.5, [](double t) { return t; });
  struct Pair {
    std::vector<std::int64_t> first;
    double second;
  };
  targets_reach_the_loss(Pair{{1, 2}, 3.0}, [](const Pair& t) { return t.second; });
}

/// An optimizer of the user's own: no device, parameters by value.
struct PlainDescent {
  TinyMlp& model;
  int steps = 0;
  std::vector<ef::Parameter> parameters() { return model.parameters(); }
  void zero_grad() { model.gradient().setZero(); }
  void step() {
    ++steps;
    model.weights() -= model.gradient() * 0.1f;
  }
};

TEST(Accumulation, TakesAUsersOptimizer) {
  const auto batches = ragged_batches();
  auto model = new_model(), expected = new_model();
  PlainDescent optimizer{model};
  ef::Sgd sgd(expected.parameters(), {.learning_rate = 0.1f});
  ef::train_step_with_grad_accumulation(model, optimizer, batches, 2);
  ef::train_step_with_grad_accumulation(expected, sgd, batches, 2);
  EXPECT_EQ(optimizer.steps, 4);
  EXPECT_LE(relative_error(model.weights(), expected.weights()), 1e-6);
  ef::GradScaler scaler;
  ef::train_step_mixed_precision<float>(model, optimizer, batches[0].inputs, batches[0].targets,
                                        scaler);
  EXPECT_EQ(optimizer.steps, 5);
}

TEST(Accumulation, ClipsAndReports) {
  const auto batches = ragged_batches();
  auto model = new_model();
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0});
  std::vector<ef::StepReport> reports;
  const double loss = ef::train_step_with_grad_accumulation(
      model, optimizer, batches, 2,
      {.max_gradient_norm = 1e-2,
       .on_step = [&](const ef::StepReport& report) { reports.push_back(report); }});
  ASSERT_EQ(reports.size(), 4u);  // 7 micro-batches in twos
  ef::LossResult total;
  for (std::size_t g = 0; g < 4; ++g) {
    const auto big = joined(batches, 2 * g, std::min<std::size_t>(2 * g + 2, 7));
    const auto expected =
        ef::reference::mlp_gradient(model.reference(), to_double(big.inputs), big.targets);
    double squares = 0;
    for (double x : expected.gradient) squares += x * x;
    EXPECT_EQ(reports[g].group, static_cast<Index>(g));
    EXPECT_TRUE(reports[g].stepped);
    EXPECT_FALSE(reports[g].found_inf);
    EXPECT_EQ(reports[g].scale, 1.0);
    EXPECT_EQ(reports[g].targets, expected.loss.count);
    EXPECT_NEAR(reports[g].loss, expected.loss.mean(), 1e-5);
    EXPECT_NEAR(reports[g].gradient_norm, std::sqrt(squares), 1e-5);
    total.sum += expected.loss.sum;
    total.count += expected.loss.count;
  }
  EXPECT_NEAR(loss, total.mean(), 1e-5);
  EXPECT_NEAR(ef::gradient_norm(model.parameters()), 1e-2, 1e-7);  // those the last step used
}

/// An optimizer of another type, for which gradients are unscaled and clipped in memory.
struct OtherAdamW {
  ef::AdamW inner;
  const std::vector<ef::Parameter>& parameters() const { return inner.parameters(); }
  void zero_grad() { inner.zero_grad(); }
  void step() { inner.step(); }
};

TEST(Accumulation, TheOptimizersPassHasTheBitsOfUnscalingAndClippingInMemory) {
  struct Case {
    Index count;  // of targets
    double scale, limit, loss_gradient;
  };
  const Case cases[] = {{3, 1024, 0, 1},
                        {7, 3, 0, 1},
                        {7, 3, 0.01, 1},
                        {7, 3, 1e6, 1},               // not clipped
                        {1000000, 0x1p120, 1e-8, 1},  // the first factor is below float's range
                        {7, 8, 1e-10, 1e30}};         // the second is
  const std::vector<TinyBatch> batches(2, tiny_batch(3, kFeatures, kClasses, 1));
  for (const Case& c : cases)
    for (bool scaled : {false, true}) {
      const auto loss = [&](ef::Tensor<float, 2>& logits, const auto&, double scale) {
        for (Index i = 0; i < logits.size(); ++i)
          logits.data()[i] = static_cast<float>(c.loss_gradient * scale * (i % 7 - 2.5));
        return ef::LossResult{1, c.count};
      };
      const auto train = [&](auto& model, auto& optimizer) {
        ef::GradScaler scaler({.init_scale = c.scale, .max_scale = 0x1p120});
        double norm = 0;
        const ef::TrainOptions options{.max_gradient_norm = c.limit,
                                       .on_step = [&](const ef::StepReport& report) {
                                         EXPECT_TRUE(report.stepped);
                                         norm = report.gradient_norm;
                                       }};
        if (scaled)
          ef::train_step_with_grad_accumulation(model, optimizer, batches, 1, options, loss,
                                                scaler);
        else
          ef::train_step_with_grad_accumulation(model, optimizer, batches, 1, options, loss);
        return norm;
      };
      auto model = new_model(), expected = new_model();
      ef::AdamW optimizer(model.parameters());
      OtherAdamW other{ef::AdamW(expected.parameters())};
      EXPECT_EQ(train(model, optimizer), train(expected, other));
      EXPECT_TRUE(same_bits(model.weights(), expected.weights())) << c.count << scaled;
      EXPECT_TRUE(same_bits(model.gradient(), expected.gradient())) << c.count << scaled;
      EXPECT_TRUE(std::ranges::equal(optimizer.state(), other.inner.state()));
    }
}

TEST(Accumulation, ClippingSkipsWhatIsNotFinite) {
  std::vector<TinyBatch> batches{tiny_batch(2, kFeatures, kClasses, 1)};
  batches[0].inputs(0, 0) = std::numeric_limits<float>::quiet_NaN();
  auto model = new_model();
  const ef::Tensor<float, 1> weights = model.weights();
  ef::AdamW optimizer(model.parameters());
  ef::StepReport last;
  const double loss = ef::train_step_with_grad_accumulation(
      model, optimizer, batches, 1,
      {.max_gradient_norm = 1, .on_step = [&](const ef::StepReport& report) { last = report; }});
  EXPECT_TRUE(std::isnan(loss));
  EXPECT_TRUE(last.found_inf);
  EXPECT_EQ(last.skipped_total, 1);
  EXPECT_TRUE(same_bits(weights, model.weights()));
  EXPECT_EQ(optimizer.step_count(), 0);
}

}  // namespace
