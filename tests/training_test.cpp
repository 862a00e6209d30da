// Laws of gradient accumulation: gradients, weights and loss are those of the one big batch, for ragged micro-batches, ignored
// targets, the shorter last group, dirty gradients and any kind of range; errors change no weight.
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

constexpr Index kFeatures = 5, kHidden = 7, kClasses = 4;

static_assert(ef::TrainableModel<TinyMlp>);
static_assert(ef::TrainableModel<TinyMlp, ef::bfloat16, ef::Tensor<float, 2>>);
static_assert(!ef::TrainableModel<int>);

/// Ragged, with ignored targets, one micro-batch all ignored and one empty.
std::vector<TinyBatch> ragged_batches() {
  std::vector<TinyBatch> batches;
  unsigned seed = 10;
  for (Index rows : {3, 1, 6, 0, 2, 9, 4})
    batches.push_back(tiny_batch(rows, kFeatures, kClasses, ++seed,
                                 rows == 2  ? 1
                                 : rows > 3 ? 3
                                            : 0));
  return batches;
}

TinyMlp new_model(unsigned seed = 3) { return TinyMlp(kFeatures, kHidden, kClasses, seed); }

ef::Tensor<double, 1> tensor(const std::vector<double>& x) {
  ef::Tensor<double, 1> result(static_cast<Index>(x.size()));
  std::copy(x.begin(), x.end(), result.data());
  return result;
}

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
    for (int epoch = 0; epoch < 3;
         ++epoch) {  // gradients of the epoch before are in the way of the next
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
  double average_loss =
      ef::train_step_with_grad_accumulation(model, optimizer, data_loader, accumulation_steps);
  EXPECT_GT(average_loss, 0.0);
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

// ---- mixed precision -----------------------------------------------------------------------------------------------------------

TEST(MixedPrecision, TheContractsCall) {
  TinyMlp model = new_model();
  const auto [inputs, labels] = tiny_batch(8, kFeatures, kClasses, 1);
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
  ef::GradScaler scaler;  // scale 65536, growth 2 every 2000 good steps, backoff 0.5
  double loss =
      ef::train_step_mixed_precision<Eigen::half>(model, optimizer, inputs, labels, scaler);
  EXPECT_GT(loss, 0.0);
  EXPECT_EQ(optimizer.step_count(), 1);
}

template <typename Compute>
void compare_step_with_reference(ef::GradScaler scaler, double allowed) {
  auto model = new_model();
  const TinyBatch batch = tiny_batch(64, kFeatures, kClasses, 2, 5);
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0});
  const auto expected =
      ef::reference::mlp_gradient(model.reference(), to_double(batch.inputs), batch.targets);
  const double loss = ef::train_step_mixed_precision<Compute>(model, optimizer, batch.inputs,
                                                              batch.targets, scaler);
  EXPECT_NEAR(loss, expected.loss.mean(), allowed);
  EXPECT_LE(relative_error(model.gradient(), tensor(expected.gradient)), allowed);
  EXPECT_EQ(optimizer.step_count(), 1);
}

TEST(MixedPrecision, GradientsAreTheReferencesUnscaled) {
  compare_step_with_reference<float>(ef::GradScaler{}, 1e-5);
  compare_step_with_reference<ef::half>(ef::GradScaler{}, 2e-3);
  compare_step_with_reference<ef::bfloat16>(ef::GradScaler{}, 1e-2);
  compare_step_with_reference<ef::bfloat16>(ef::GradScaler({.enabled = false}), 1e-2);
  compare_step_with_reference<ef::half>(ef::GradScaler({.init_scale = 1000}), 2e-3);
}

TEST(MixedPrecision, InFloatAPowerOfTwoChangesNoBit) {
  auto scaled = new_model(), plain = new_model();
  ef::AdamW a(scaled.parameters()), b(plain.parameters());
  ef::GradScaler scaler;
  for (unsigned seed = 0; seed < 3; ++seed) {
    const std::vector<TinyBatch> batch{tiny_batch(9, kFeatures, kClasses, seed, 4)};
    const double loss =
        ef::train_step_mixed_precision<float>(scaled, a, batch[0].inputs, batch[0].targets, scaler);
    EXPECT_EQ(loss, ef::train_step_with_grad_accumulation(plain, b, batch, 1));
    EXPECT_TRUE(same_bits(scaled.weights(), plain.weights()));
  }
}

TEST(MixedPrecision, AnOverflowIsSkippedAndTheScaleBacksOff) {
  auto model = new_model();
  TinyBatch batch = tiny_batch(1, kFeatures, kClasses, 4);
  const auto first = model.forward<float>(batch.inputs);
  for (Index c = 0; c < kClasses; ++c)
    if (first(0, c) < first(0, batch.targets(0)))
      batch.targets(0) = static_cast<std::int32_t>(c);  // an unlikely target: gradient near -1
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3});
  ef::GradScaler scaler(
      {.init_scale =
           524288});  // -0.8 * 2^19 overflows half, and so does 2^18; 2^16 * -0.8 does not
  const ef::Tensor<float, 1> weights = model.weights();
  std::vector<ef::StepReport> reports;
  const ef::TrainOptions options{
      .on_step = [&](const ef::StepReport& report) { reports.push_back(report); }};
  const auto expected =
      ef::reference::mlp_gradient(model.reference(), to_double(batch.inputs), batch.targets);
  double scale = scaler.scale();
  int skipped = 0;
  for (int attempt = 0; attempt < 20 && optimizer.step_count() == 0; ++attempt) {
    const double loss = ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs,
                                                                 batch.targets, scaler, options);
    EXPECT_NEAR(loss, expected.loss.mean(), 2e-3);  // unscaled, skipped or not
    const ef::StepReport& report = reports.back();
    EXPECT_EQ(report.scale, scaler.scale());
    EXPECT_EQ(report.stepped, !report.found_inf);
    if (report.stepped) break;
    ++skipped;
    scale /= 2;
    EXPECT_EQ(scaler.scale(), scale);
    EXPECT_EQ(report.skipped_total, skipped);
    EXPECT_TRUE(same_bits(weights, model.weights()));
    EXPECT_EQ(optimizer.step_count(), 0);
    for (float x : optimizer.state()) EXPECT_EQ(x, 0.0f);
  }
  EXPECT_GE(skipped, 2);
  EXPECT_EQ(optimizer.step_count(), 1);
  EXPECT_LE(relative_error(model.gradient(), tensor(expected.gradient)), 5e-3);
  EXPECT_FALSE(same_bits(weights, model.weights()));
}

TEST(MixedPrecision, TheScaleGrowsOnSchedule) {
  auto model = new_model();
  const TinyBatch batch = tiny_batch(16, kFeatures, kClasses, 4);
  ef::AdamW optimizer(model.parameters());
  ef::GradScaler scaler({.init_scale = 64, .growth_interval = 3});
  for (double expected : {64.0, 64.0, 128.0, 128.0, 128.0, 256.0}) {
    ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets, scaler);
    EXPECT_EQ(scaler.scale(), expected);
  }
  EXPECT_EQ(optimizer.step_count(), 6);
}

TEST(MixedPrecision, ScalingKeepsSmallGradientsAlive) {
  auto model = new_model();
  for (Index c = 0; c < kClasses; ++c)
    for (Index h = 0; h < kHidden; ++h)
      model.weights().data()[model.layout().second(c, h)] = c % 2 == 0 ? 0x1p-18f : -0x1p-18f;
  const TinyBatch batch = tiny_batch(512, kFeatures, kClasses, 4);
  const auto expected =
      ef::reference::mlp_gradient(model.reference(), to_double(batch.inputs), batch.targets);
  const std::size_t at = model.layout().first(2, 3);
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0});
  ef::GradScaler off({.enabled = false}), on;
  ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets, off);
  EXPECT_EQ(model.gradient().data()[at], 0.0f);  // below 2^-25 everything underflows in half
  ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets, on);
  EXPECT_NE(expected.gradient[at], 0.0);
  EXPECT_NEAR(model.gradient().data()[at], expected.gradient[at],
              0.05 * std::abs(expected.gradient[at]));
}

TEST(MixedPrecision, LearnsOverAccumulatedMicroBatchesOnAPool) {
  Threads threads(2);
  for (bool enabled : {true, false}) {
    auto model = new_model();
    ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.02});
    ef::GradScaler scaler({.init_scale = 1024, .enabled = enabled});
    Index groups = 0;
    const ef::TrainOptions options{.max_gradient_norm = 1,
                                   .on_step = [&](const ef::StepReport& report) {
                                     EXPECT_TRUE(report.stepped);
                                     EXPECT_EQ(report.group, groups++ % 4);
                                   }};
    const auto batches = ragged_batches();
    const double before = ef::train_step_with_grad_accumulation<ef::bfloat16>(
        threads.device, model, optimizer, batches, 2, options, scaler);
    double after = before;
    for (int epoch = 0; epoch < 30; ++epoch)
      after = ef::train_step_with_grad_accumulation<ef::bfloat16>(model, optimizer, batches, 2,
                                                                  options, scaler);
    EXPECT_EQ(groups, 31 * 4);
    EXPECT_LT(after, 0.7 * before);
  }
}

}  // namespace
