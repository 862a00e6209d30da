// Laws of training on several ranks: with data parallelism all ranks take, bit for bit, the same
// steps, which are those of the one batch that all their batches form; where one rank's gradients
// are not finite no rank steps; ranks that hold parts of a model agree and clip by the whole norm.
#include <eigenformer/communicator.h>
#include <eigenformer/reference/training.h>
#include <eigenformer/training.h>

#include "compare.h"
#include "tiny_mlp.h"

using namespace eigenformer_test;

namespace {

/// What the ranks of a run leave behind.
struct Outcome {
  std::vector<ef::Tensor<float, 1>> weights;
  std::vector<double> losses, scales;
  std::vector<Index> skipped, steps;
  explicit Outcome(int ranks)
      : weights(static_cast<std::size_t>(ranks)),
        losses(static_cast<std::size_t>(ranks)),
        scales(static_cast<std::size_t>(ranks)),
        skipped(static_cast<std::size_t>(ranks)),
        steps(static_cast<std::size_t>(ranks)) {}
};

/// Each rank has micro-batches of its own: other sizes, other numbers of targets that count.
std::vector<TinyBatch> batches_of(int rank) {
  auto batches = ragged_batches(static_cast<unsigned>(10 + 20 * rank));
  std::rotate(batches.begin(), batches.begin() + rank, batches.end());
  return batches;
}

template <typename Compute>
Outcome train_on(int ranks, ef::TrainOptions options, const ef::AdamWOptions& adamw,
                 int overflowing_rank = -1) {
  Outcome outcome(ranks);
  ef::ThreadCommunicator::run(ranks, [&](auto& communicator) {
    auto model = new_model();
    ef::AdamW optimizer(model.parameters(), adamw);
    ef::GradScaler scaler({.init_scale = 1024, .growth_interval = 2});
    auto batches = batches_of(communicator.rank());
    if (communicator.rank() == overflowing_rank)  // in the second of four groups
      for (TinyBatch& batch : std::span(batches).subspan(2, 2)) batch.inputs.setConstant(NAN);
    const auto r = static_cast<std::size_t>(communicator.rank());
    outcome.losses[r] = ef::train_step_with_grad_accumulation<Compute>(
        model, optimizer, batches, 2, ef::data_parallel(communicator, options), scaler);
    outcome.weights[r] = model.weights();
    outcome.scales[r] = scaler.scale();
    outcome.skipped[r] = scaler.skipped_steps();
    outcome.steps[r] = optimizer.step_count();
  });
  for (std::size_t r = 1; r < outcome.weights.size(); ++r) {
    EXPECT_TRUE(same_bits(outcome.weights[0], outcome.weights[r]));
    EXPECT_EQ(outcome.scales[0], outcome.scales[r]);
    EXPECT_EQ(outcome.skipped[0], outcome.skipped[r]);
    EXPECT_EQ(outcome.steps[0], outcome.steps[r]);
  }
  return outcome;
}

TEST(DataParallel, EqualsTheOneBatchOfAllRanks) {
  const ef::AdamWOptions options{.learning_rate = 0.01, .epsilon = 1e-3};
  for (int ranks : {1, 2, 3}) {
    const Outcome outcome = train_on<float>(ranks, {}, options);
    auto expected = new_model().reference();
    ef::LossResult total;
    for (std::size_t begin = 0; begin < 7; begin += 2) {
      std::vector<TinyBatch> group;
      for (int rank = 0; rank < ranks; ++rank) {
        const auto batches = batches_of(rank);
        for (std::size_t i = begin; i < std::min<std::size_t>(begin + 2, 7); ++i)
          group.push_back(batches[i]);
      }
      const auto big = joined(group, 0, group.size());
      const auto loss =
          ef::reference::mlp_adamw_step(expected, to_double(big.inputs), big.targets, options);
      total.sum += loss.sum;
      total.count += loss.count;
    }
    EXPECT_LE(relative_error(outcome.weights[0], tensor(expected.weights.value)), 1e-5) << ranks;
    for (double loss : outcome.losses) EXPECT_NEAR(loss, total.mean(), 1e-5);
    EXPECT_EQ(outcome.steps[0], 4);
    EXPECT_EQ(outcome.scales[0], 4096.0);  // four good steps, growing every second
  }
}

TEST(DataParallel, AnOverflowOnOneRankIsSkippedByAll) {
  for (int bad : {0, 1, 2}) {
    const Outcome half = train_on<ef::half>(3, {.max_gradient_norm = 1}, {}, bad);
    EXPECT_EQ(half.skipped[0], 1);
    EXPECT_EQ(half.steps[0], 3);
    EXPECT_EQ(half.scales[0], 1024.0);  // good, bad (512), good, good (1024)
    const Outcome bfloat = train_on<ef::bfloat16>(3, {}, {}, bad);
    EXPECT_EQ(bfloat.skipped[0], 1);
    for (Index i = 0; i < bfloat.weights[0].size(); ++i)
      ASSERT_TRUE(std::isfinite(bfloat.weights[0](i)));
  }
}

TEST(DataParallel, ARankWithoutTargetsTakesPart) {
  std::vector<ef::Tensor<float, 1>> weights(2);
  ef::ThreadCommunicator::run(2, [&](auto& communicator) {
    auto model = new_model();
    ef::Sgd optimizer(model.parameters(), {.learning_rate = 0.1});
    const bool first = communicator.rank() == 0;
    const TinyBatch batch = tiny_batch(first ? 6 : 2, kFeatures, kClasses, 1, first ? 0 : 1);
    ef::GradScaler scaler;
    const double loss = ef::train_step_mixed_precision<float>(
        model, optimizer, batch.inputs, batch.targets, scaler, ef::data_parallel(communicator));
    EXPECT_GT(loss, 0.5);
    EXPECT_EQ(optimizer.step_count(), 1);
    weights[static_cast<std::size_t>(communicator.rank())] = model.weights();
  });
  auto alone = new_model();
  ef::Sgd optimizer(alone.parameters(), {.learning_rate = 0.1});
  const TinyBatch batch = tiny_batch(6, kFeatures, kClasses, 1);
  ef::GradScaler scaler;
  ef::train_step_mixed_precision<float>(alone, optimizer, batch.inputs, batch.targets, scaler);
  for (const auto& w : weights) EXPECT_TRUE(same_bits(alone.weights(), w));
}

/// This rank's layer of a TinyMlp.
struct LayerDescent {
  ef::Sgd inner;
  LayerDescent(TinyMlp& model, int rank)
      : inner({model.parameters()[static_cast<std::size_t>(rank)]}, {.learning_rate = 0.5}) {}
  const std::vector<ef::Parameter>& parameters() const { return inner.parameters(); }
  void zero_grad() { inner.zero_grad(); }
  void step() { inner.step(); }
};

TEST(ModelParallel, RanksAgreeAndClipByTheWholeNorm) {
  const TinyBatch batch = tiny_batch(16, kFeatures, kClasses, 1);
  auto whole = new_model();
  whole.gradient().setZero();
  ef::Sgd sgd(whole.parameters(), {.learning_rate = 0.5});
  ef::StepReport expected;
  ef::GradScaler scaler;
  ef::train_step_mixed_precision<float>(
      whole, sgd, batch.inputs, batch.targets, scaler,
      {.max_gradient_norm = 0.1, .on_step = [&](const auto& report) { expected = report; }});
  ASSERT_GT(expected.gradient_norm, 0.1);
  for (int bad : {-1, 0, 1})
    ef::ThreadCommunicator::run(2, [&](auto& communicator) {
      const int rank = communicator.rank();
      auto model = new_model();
      model.gradient().setZero();
      const ef::Tensor<float, 1> before = model.weights();
      LayerDescent optimizer(model, rank);
      ef::GradScaler own;
      ef::StepReport report;
      const auto loss = [&](ef::Tensor<float, 2>& logits, const auto& targets, double scale) {
        const ef::LossResult result = ef::cross_entropy_with_gradient_into(
            Eigen::DefaultDevice{}, logits, logits, targets, scale);
        if (rank == bad) logits(3, 0) = std::numeric_limits<float>::infinity();
        return result;
      };
      ef::train_step_mixed_precision<float>(
          model, optimizer, batch.inputs, batch.targets, own,
          ef::model_parallel(communicator, {.max_gradient_norm = 0.1,
                                            .on_step = [&](const auto& r) { report = r; }}),
          loss);
      EXPECT_EQ(report.stepped, bad < 0);
      EXPECT_EQ(own.scale(), bad < 0 ? 65536.0 : 32768.0);
      if (bad < 0)
        EXPECT_NEAR(report.gradient_norm, expected.gradient_norm, 1e-9);
      else
        EXPECT_TRUE(same_bits(before, model.weights()));
      const ef::Parameter mine = optimizer.parameters()[0];
      const Index begin = mine.value.data() - model.weights().data();
      for (Index i = 0; bad < 0 && i < mine.value.size(); ++i)
        ASSERT_NEAR(mine.value(i), whole.weights()(begin + i), 1e-6);
    });
}

TEST(DataParallel, LossAndGradientsAreReducedTogether) {
  auto model = new_model();
  ef::Sgd optimizer(model.parameters());
  const auto batches = ragged_batches();
  const std::vector<ef::TrainOptions> halves{
      {.reduce_loss = [](ef::LossResult&) {}},
      {.reduce_gradients = [](std::span<const ef::Parameter>) {}}};
  for (const ef::TrainOptions& options : halves)
    expect_throws<std::invalid_argument>(
        [&] { ef::train_step_with_grad_accumulation(model, optimizer, batches, 2, options); },
        {"reduce_loss", "reduce_gradients"});
}

}  // namespace
