/// \file
/// Step (b) of the main job: gradient accumulation in bfloat16 mixed precision on a thread pool,
/// with a progress bar.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <string>
#include <vector>

#include <eigenformer/decoder.h>
#include <eigenformer/loss.h>
#include <eigenformer/training.h>

#include "progress.h"
#include "text.h"

namespace demo {

struct TrainingPlan {
  Index batch = 1, length = 288;  // of a micro-batch
  Index accumulation = 2;         // micro-batches per step
  Index tokens = 1'440'000;       // in all: what is recalled depends on them, not on the machine
  double learning_rate = 1.5e-3;

  Index tokens_per_step() const { return batch * length * accumulation; }
  Index steps() const { return (tokens + tokens_per_step() - 1) / tokens_per_step(); }
};

/// What was done, and how fast.
struct TrainingResult {
  Index tokens = 0;
  double seconds = 0, loss = 0;
  double rate() const { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }
};

/// Linear warm-up, then a cosine to a twentieth; `done` is the part of the training that is over.
inline double learning_rate_at(const TrainingPlan& plan, double done) {
  constexpr double warm = 0.05;
  if (done < warm) return plan.learning_rate * std::max(done, 1e-3) / warm;
  return plan.learning_rate *
         (0.05 + 0.95 * 0.5 * (1 + std::cos(std::numbers::pi * (done - warm) / (1 - warm))));
}

template <typename Model>
TrainingResult train(Model& model, const Eigen::ThreadPoolDevice& device, const std::string& text,
                     const TrainingPlan& plan) {
  ef::AdamW optimizer(model.parameters(),
                      {.learning_rate = plan.learning_rate, .weight_decay = 0.01, .beta2 = 0.99});
  Windows windows(text, plan.batch, plan.length, /*seed=*/2026);
  Progress progress("training", 5.0);
  const auto start = Clock::now();
  const Index steps = plan.steps();
  TrainingResult result;
  std::vector<TrainingBatch> group(static_cast<std::size_t>(plan.accumulation));
  for (Index step = 0; step < steps; ++step) {
    for (TrainingBatch& batch : group) batch = windows.next();
    optimizer.set_learning_rate(
        learning_rate_at(plan, static_cast<double>(step) / static_cast<double>(steps)));
    const double loss = ef::train_step_with_grad_accumulation<Eigen::bfloat16>(
        device, model, optimizer, group, plan.accumulation,
        ef::TrainOptions{.max_gradient_norm = 1.0f});
    result.loss = step == 0 ? loss : 0.95 * result.loss + 0.05 * loss;
    result.tokens += plan.tokens_per_step();
    result.seconds = seconds_since(start);
    char status[96];
    std::snprintf(status, sizeof status, "%.2f of %.2f million tokens  loss %.4f  %.0f tokens/s",
                  static_cast<double>(result.tokens) / 1e6,
                  static_cast<double>(steps * plan.tokens_per_step()) / 1e6, result.loss,
                  result.rate());
    progress.update(static_cast<double>(step + 1) / static_cast<double>(steps), status);
  }
  return result;
}

/// Mean cross-entropy in nats per byte over the text, through the cache and whatever weights
/// inference holds (float or INT8).
template <typename Model>
double evaluate(Model& model, const std::string& text, Index length, Index windows) {
  double sum = 0;
  Index count = 0;
  for (Index w = 0; w < windows; ++w) {
    const Index start =
        (static_cast<Index>(text.size()) - length - 1) * w / std::max<Index>(1, windows - 1);
    ef::KvCache<float> cache;
    ef::Tensor<std::int32_t, 2> ids(1, length / 2);
    ef::Tensor<std::int32_t, 1> target(1), next(1);
    const auto byte = [&](Index i) {
      return static_cast<std::int32_t>(
          static_cast<unsigned char>(text[static_cast<std::size_t>(start + i)]));
    };
    for (Index i = 0; i < length / 2; ++i) ids(0, i) = byte(i);
    ef::Tensor<float, 2> logits = model.prefill(ids, cache);
    for (Index i = length / 2; i < length; ++i) {
      target(0) = byte(i);
      const ef::LossResult loss = ef::cross_entropy(logits, target);
      sum += loss.sum;
      count += loss.count;
      next(0) = byte(i);
      logits = model.decode(next, cache);
    }
  }
  return sum / static_cast<double>(count);
}

}  // namespace demo
