// Laws of mixed precision: a step's gradients are those of the reference, unscaled; a step with one
// that is not finite changes no weight; the scale moves on schedule; threads change no bit; what
// throws can be tried again.
#include <eigenformer/linear.h>
#include <eigenformer/reference/training.h>
#include <eigenformer/training.h>

#include "compare.h"
#include "tiny_mlp.h"

using namespace eigenformer_test;

namespace {

TEST(MixedPrecision, TheContractsCall) {
  TinyMlp model = new_model();
  const auto [inputs, labels] = tiny_batch(8, kFeatures, kClasses, 1);
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-3f, .weight_decay = 0.01f});
  ef::GradScaler scaler;  // scale 65536, growth 2 every 2000 good steps, backoff 0.5
  const auto expected =
      ef::reference::mlp_gradient(model.reference(), to_double(inputs), labels).loss.mean();
  double loss =
      ef::train_step_mixed_precision<Eigen::half>(model, optimizer, inputs, labels, scaler);
  EXPECT_NEAR(loss, expected, 2e-3 * expected);
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
  // -0.8 * 2^19 overflows half, and so does 2^18; 2^16 * -0.8 does not
  ef::GradScaler scaler({.init_scale = 524288});
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

/// Two linear layers of the library on a device, large enough for every product to have many parts.
template <typename D>
struct PoolModel {
  static constexpr Index kWidth = 96;
  const D& device;
  ef::Tensor<float, 2> first = random_tensor<float, 2>({256, kWidth}, 1, 0.1),
                       second = random_tensor<float, 2>({kClasses, 256}, 2, 0.1);
  ef::Tensor<float, 2> first_gradient{256, kWidth}, second_gradient{kClasses, 256};
  ef::Tensor<float, 2> inputs = {}, hidden = {}, back = {};

  template <typename Compute, typename Inputs>
  ef::Tensor<Compute, 2> forward(const Inputs& x) {
    inputs = x;
    hidden.resize(x.dimension(0), 256);
    ef::linear_into(device, hidden, inputs, first);
    ef::Tensor<float, 2> logits(x.dimension(0), kClasses);
    ef::linear_into(device, logits, hidden, second);
    return logits.template cast<Compute>();
  }
  template <typename Compute>
  void backward(const ef::Tensor<Compute, 2>& logits_gradient) {
    const ef::Tensor<float, 2> d = logits_gradient.template cast<float>();
    ef::linear_backward_weight_into(device, second_gradient, d, hidden);
    back.resize(hidden.dimensions());
    ef::linear_backward_input_into(device, back, d, second);
    ef::linear_backward_weight_into(device, first_gradient, back, inputs);
  }
  std::vector<ef::Parameter> parameters() {
    const auto flat = [](ef::Tensor<float, 2>& x) {
      return ef::TensorView<float, 1>(x.data(), x.size());
    };
    return {{flat(first), flat(first_gradient)}, {flat(second), flat(second_gradient)}};
  }
};

/// Losses of a few epochs, then the weights.
template <typename D>
std::vector<double> losses_and_weights(const D& device, bool scaled) {
  PoolModel<D> model{device};
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.02});
  ef::GradScaler scaler({.init_scale = 1024, .growth_interval = 5, .enabled = scaled});
  std::vector<TinyBatch> batches;
  for (Index rows : {70, 33, 64})
    batches.push_back(tiny_batch(rows, model.kWidth, kClasses, static_cast<unsigned>(rows), 5));
  Index groups = 0;
  const ef::TrainOptions options{.max_gradient_norm = 1,
                                 .on_step = [&](const ef::StepReport& report) {
                                   EXPECT_TRUE(report.stepped);
                                   EXPECT_EQ(report.group, groups++ % 2);
                                 }};
  std::vector<double> result;
  for (int epoch = 0; epoch < 6; ++epoch)
    result.push_back(ef::train_step_with_grad_accumulation<ef::bfloat16>(
        device, model, optimizer, batches, 2, options, scaler));
  EXPECT_EQ(groups, 12);
  EXPECT_LT(result.back(), 0.7 * result.front());
  EXPECT_EQ(scaler.scale(), scaled ? 4096.0 : 1.0);
  for (const ef::Parameter& parameter : optimizer.parameters())
    for (Index i = 0; i < parameter.value.size(); ++i)
      result.push_back(static_cast<double>(parameter.value(i)));
  return result;
}

TEST(MixedPrecision, LearnsOnAPoolWithTheBitsOfOneThread) {
  for (bool scaled : {true, false}) {
    const auto expected = losses_and_weights(Eigen::DefaultDevice{}, scaled);
    for (int count : {1, 2, 3}) {
      Threads threads(count);
      EXPECT_TRUE(losses_and_weights(threads.device, scaled) == expected) << count;
    }
  }
}

/// Descent that fails as often as told.
struct FailingDescent {
  ef::Sgd inner;
  int failures;
  const std::vector<ef::Parameter>& parameters() const { return inner.parameters(); }
  void zero_grad() { inner.zero_grad(); }
  void step() {
    if (failures-- > 0) throw std::runtime_error("no");
    inner.step();
  }
};

TEST(MixedPrecision, AStepThatThrowsIsTriedAgain) {
  auto model = new_model(), expected = new_model();
  const TinyBatch batch = tiny_batch(8, kFeatures, kClasses, 1);
  ef::Sgd sgd(expected.parameters());
  FailingDescent optimizer{ef::Sgd(model.parameters()), 2};
  ef::GradScaler scaler({.growth_interval = 1}), other({.growth_interval = 1});
  const ef::Tensor<float, 1> weights = model.weights();
  for (int attempt = 0; attempt < 2; ++attempt) {
    expect_throws<std::runtime_error>(
        [&] {
          ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets,
                                                   scaler);
        },
        {"no"});
    EXPECT_TRUE(same_bits(weights, model.weights()));
    EXPECT_EQ(scaler.scale(), 65536.0);
    EXPECT_FALSE(scaler.pending());
  }
  ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets, scaler);
  ef::train_step_mixed_precision<ef::half>(expected, sgd, batch.inputs, batch.targets, other);
  EXPECT_TRUE(same_bits(expected.weights(), model.weights()));
  EXPECT_EQ(scaler.scale(), 131072.0);
}

TEST(MixedPrecision, RefusesAScalerInTheMiddleOfAStep) {
  auto model = new_model(), generator = new_model(4);
  generator.gradient().setConstant(65536.0f);
  ef::Sgd optimizer(model.parameters()), other(generator.parameters());
  ef::GradScaler scaler;
  scaler.unscale(other);
  const TinyBatch batch = tiny_batch(8, kFeatures, kClasses, 1);
  const ef::Tensor<float, 1> weights = model.weights();
  const auto step = [&] {
    ef::train_step_mixed_precision<ef::half>(model, optimizer, batch.inputs, batch.targets, scaler);
  };
  expect_throws<std::logic_error>(step, {"train_step", "update()"});
  EXPECT_TRUE(same_bits(weights, model.weights()));
  EXPECT_TRUE(scaler.step(other));  // it was not forgotten that these are divided
  EXPECT_EQ(generator.gradient()(0), 1.0f);
  scaler.update();
  step();
  EXPECT_EQ(optimizer.step_count(), 1);
}

}  // namespace
