// Training steps on every device, with a model whose weights, gradients and logits are memory of
// the device: micro-batches give the step of the one batch, the steps are those of the CPU, a step
// that overflows changes no weight, clipping reports the norm, bad targets change nothing.
#include <eigenformer/embedding.h>
#include <eigenformer/normalization.h>
#include <eigenformer/training.h>

#include "device.h"

using namespace eigenformer_test;

namespace {

constexpr Index kVocabulary = 11, kClasses = 37;

struct Batch {
  ef::Tensor<std::int32_t, 1> inputs, targets;
};

Batch make_batch(Index rows, unsigned seed, Index ignored_every = 0) {
  std::mt19937 generator(seed);
  Batch batch{ef::Tensor<std::int32_t, 1>(rows), ef::Tensor<std::int32_t, 1>(rows)};
  for (Index r = 0; r < rows; ++r) {
    batch.inputs(r) = static_cast<std::int32_t>(generator() % kVocabulary);
    batch.targets(r) = static_cast<std::int32_t>(generator() % kClasses);
    if (ignored_every > 0 && r % ignored_every == 0) batch.targets(r) = -100;
  }
  return batch;
}

Batch joined(const std::vector<Batch>& parts) {
  Batch all = parts[0];
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const ef::Tensor<std::int32_t, 1> inputs = all.inputs.concatenate(parts[i].inputs, 0),
                                      targets = all.targets.concatenate(parts[i].targets, 0);
    all = {inputs, targets};
  }
  return all;
}

/// logits = rms_norm(table[ids]) * weight. Gradients begin as NaN: a step must not look at them.
template <typename B>
class Bigrams {
  using D = std::remove_cvref_t<decltype(B::device)>;
  template <typename T, int Rank>
  using Kept = std::unique_ptr<DeviceTensor<B, T, Rank>>;

 public:
  explicit Bigrams(const B& bench)
      : bench_(bench),
        table_(bench, random_tensor<float, 1>({kVocabulary * kClasses}, 1)),
        weight_(bench, random_tensor<float, 1>({kClasses}, 2)),
        table_gradient_(bench, poisoned_tensor<float, 1>({kVocabulary * kClasses})),
        weight_gradient_(bench, poisoned_tensor<float, 1>({kClasses})) {}

  template <typename Compute, typename Inputs>
  ef::detail::ModelTensor<D, Compute, 2> forward(const Inputs& ids) {
    rows_ = ids.size();
    ids_ = std::make_unique<DeviceTensor<B, std::int32_t, 1>>(bench_, ids);
    auto& t = std::get<Tape<Compute>>(tapes_);
    const auto memory = [&] {
      return std::make_unique<DeviceTensor<B, Compute, 2>>(
          bench_, poisoned_tensor<Compute, 2>({rows_, kClasses}));
    };
    t.x = memory();
    t.x_gradient = memory();
    ef::embedding_into(bench_.device, t.x->view(), ids_->cview(), table());
    if constexpr (ef::CpuDevice<D>) {
      ef::Tensor<Compute, 2> logits(rows_, kClasses);
      ef::rms_norm_into(bench_.device, logits, t.x->view(), weight_.cview());
      return logits;
    } else {
      t.logits = memory();
      ef::rms_norm_into(bench_.device, t.logits->view(), t.x->view(), weight_.cview());
      return t.logits->view();
    }
  }
  template <typename Compute>
  void backward(const ef::detail::ModelTensor<D, Compute, 2>& logits_gradient) {
    auto& t = std::get<Tape<Compute>>(tapes_);
    ef::rms_norm_backward_into(bench_.device, t.x_gradient->view(), weight_gradient_.view(),
                               logits_gradient, t.x->view(), weight_.cview());
    const auto flat = table_gradient_.view();
    ef::embedding_backward_into(bench_.device,
                                ef::TensorView<float, 2>(flat.data(), kVocabulary, kClasses),
                                t.x_gradient->view(), ids_->cview());
  }
  std::vector<ef::Parameter> parameters() {
    return {{table_.view(), table_gradient_.view()}, {weight_.view(), weight_gradient_.view()}};
  }

  std::vector<ef::Tensor<float, 1>> weights() const { return {table_.host(), weight_.host()}; }
  std::vector<ef::Tensor<float, 1>> gradients() const {
    return {table_gradient_.host(), weight_gradient_.host()};
  }

 private:
  template <typename Compute>
  struct Tape {
    Kept<Compute, 2> x, x_gradient, logits;
  };
  ef::TensorView<const float, 2> table() const {
    return {table_.cview().data(), kVocabulary, kClasses};
  }

  const B& bench_;
  Index rows_ = 0;
  Kept<std::int32_t, 1> ids_;
  std::tuple<Tape<float>, Tape<ef::bfloat16>, Tape<ef::half>> tapes_;
  DeviceTensor<B, float, 1> table_, weight_, table_gradient_, weight_gradient_;
};

template <typename A, typename C>
void expect_close(const A& actual, const C& expected, double allowed) {
  for (std::size_t i = 0; i < expected.size(); ++i)
    EXPECT_TRUE(within(actual[i], expected[i], allowed)) << i;
}

const std::vector<Batch> kParts{make_batch(3, 1), make_batch(1, 2), make_batch(5, 3, 2),
                                make_batch(0, 4)};

// Two epochs of one group each.
TEST(TrainingOnDevice, MicroBatchesGiveTheStepOfTheOneBatch) {
  const Eigen::DefaultDevice one;
  const HostBench<Eigen::DefaultDevice> host{one};
  Bigrams<HostBench<Eigen::DefaultDevice>> by_cpu(host);
  ef::AdamW cpu_optimizer(by_cpu.parameters(), {.learning_rate = 0.05});
  const std::vector<Batch> whole{joined(kParts)};
  double expected_loss = 0;
  for (int epoch = 0; epoch < 2; ++epoch)
    expected_loss = ef::train_step_with_grad_accumulation(by_cpu, cpu_optimizer, whole, 1);
  for_each_device([&](const auto& bench) {
    for (const auto& [loader, group] : {std::pair{whole, Index{1}}, std::pair{kParts, Index{4}}}) {
      Bigrams model(bench);
      ef::AdamW optimizer(model.parameters(), {.learning_rate = 0.05}, ef::memory_of(bench.device));
      double loss = 0;
      for (int epoch = 0; epoch < 2; ++epoch)
        loss = ef::train_step_with_grad_accumulation(bench.device, model, optimizer, loader, group);
      EXPECT_NEAR(loss, expected_loss, 1e-5);
      expect_close(model.weights(), by_cpu.weights(), 1e-5);
      expect_close(model.gradients(), by_cpu.gradients(), 1e-4);
    }
  });
}

TEST(TrainingOnDevice, MixedPrecisionSkipsWhatOverflows) {
  const Batch batch = make_batch(6, 5);
  for_each_device([&](const auto& bench) {
    Bigrams model(bench);
    ef::Sgd optimizer(model.parameters(), {.learning_rate = 0.1}, ef::memory_of(bench.device));
    ef::GradScaler scaler({.init_scale = 0x1p22, .growth_interval = 1});  // half ends at 65504
    const auto before = model.weights();
    ef::StepReport report;
    const ef::TrainOptions options{.on_step = [&](const ef::StepReport& r) { report = r; }};
    const double first = ef::train_step_mixed_precision<ef::half>(
        bench.device, model, optimizer, batch.inputs, batch.targets, scaler, options);
    EXPECT_TRUE(report.found_inf);
    EXPECT_FALSE(report.stepped);
    EXPECT_EQ(scaler.scale(), 0x1p21);
    const auto skipped = model.weights();
    for (std::size_t i = 0; i < before.size(); ++i)
      EXPECT_TRUE(same_bits(skipped[i], before[i])) << i;
    scaler.load_state({.scale = 1024});
    double loss = first;
    for (int step = 0; step < 3; ++step)
      loss = ef::train_step_mixed_precision<ef::half>(bench.device, model, optimizer, batch.inputs,
                                                      batch.targets, scaler, options);
    EXPECT_TRUE(report.stepped);
    EXPECT_EQ(scaler.scale(), 8192.0);
    EXPECT_LT(loss, first);
    ef::GradScaler disabled({.enabled = false});
    EXPECT_LT(ef::train_step_mixed_precision<ef::bfloat16>(bench.device, model, optimizer,
                                                           batch.inputs, batch.targets, disabled),
              first);
  });
}

TEST(TrainingOnDevice, ClipsAndReports) {
  const std::vector<Batch> loader{make_batch(6, 7)};
  for_each_device([&](const auto& bench) {
    Bigrams model(bench);
    ef::Sgd optimizer(model.parameters(), {.learning_rate = 1}, ef::memory_of(bench.device));
    const auto before = model.weights();
    double norm = 0;
    ef::train_step_with_grad_accumulation(
        bench.device, model, optimizer, loader, 1,
        {.max_gradient_norm = 0.25,
         .on_step = [&](const ef::StepReport& r) { norm = r.gradient_norm; }});
    EXPECT_GT(norm, 0.25);
    const auto after = model.weights();
    double moved = 0;
    for (std::size_t i = 0; i < before.size(); ++i)
      for (Index j = 0; j < before[i].size(); ++j)
        moved += std::pow(static_cast<double>(after[i](j)) - static_cast<double>(before[i](j)), 2);
    EXPECT_NEAR(std::sqrt(moved), 0.25, 1e-4);
    EXPECT_NEAR(ef::gradient_norm(bench.device, model.parameters()), 0.25, 1e-6);
  });
}

TEST(TrainingOnDevice, ABadTargetChangesNoWeight) {
  std::vector<Batch> loader{make_batch(3, 8), make_batch(3, 9)};
  loader[1].targets(2) = kClasses;
  for_each_device([&](const auto& bench) {
    Bigrams model(bench);
    ef::Sgd optimizer(model.parameters(), {}, ef::memory_of(bench.device));
    const auto before = model.weights();
    EXPECT_THROW(ef::train_step_with_grad_accumulation(bench.device, model, optimizer, loader, 2),
                 std::invalid_argument);
    const auto after = model.weights();
    for (std::size_t i = 0; i < before.size(); ++i)
      EXPECT_TRUE(same_bits(after[i], before[i])) << i;
  });
}

// An optimizer whose state lies elsewhere is refused, with the weights as they were.
TEST(TrainingOnDevice, RefusesAnOptimizerOfAnotherMemory) {
  const std::vector<Batch> loader{make_batch(3, 10)};
  for_each_gpu([&](const auto& bench) {
    Bigrams model(bench);
    ef::AdamW optimizer(model.parameters());
    EXPECT_THROW(ef::train_step_with_grad_accumulation(bench.device, model, optimizer, loader, 1),
                 std::invalid_argument);
  });
}

}  // namespace
