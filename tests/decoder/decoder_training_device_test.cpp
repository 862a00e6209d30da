// Training the decoder on a GPU: gradients and steps of the CPU's, micro-batches as the one batch,
// inference that packs the trained weights; master weights of the host are refused. (CPUs:
// decoder_test.cpp.)
#include <eigenformer/decoder.h>
#include <eigenformer/training.h>

#include "decoder_support.h"
#include "device.h"

using namespace eigenformer_test;

namespace {

struct Batch {
  ef::Tensor<std::int32_t, 2> inputs;
  ef::Tensor<std::int32_t, 1> targets;
};

Batch make_batch(Index rows, Index length, unsigned seed) {
  std::mt19937 generator(seed);
  const auto id = [&] { return static_cast<std::int32_t>(generator() % kConfig.vocabulary); };
  Batch batch{ef::Tensor<std::int32_t, 2>(rows, length),
              ef::Tensor<std::int32_t, 1>(rows * length)};
  for (Index i = 0; i < rows * length; ++i) {
    batch.inputs.data()[i] = id();
    batch.targets(i) = i % 4 == 3 ? -100 : id();
  }
  return batch;
}

template <typename B>
std::shared_ptr<ef::DecoderWeights> weights_on(const B& bench, const ef::DecoderWeights& host) {
  return std::make_shared<ef::DecoderWeights>(host, ef::memory_of(bench.device));
}

/// All numbers of one of the two views of parameters, from the memory they lie in.
ef::Tensor<float, 1> numbers(const ef::Memory& memory, const std::vector<ef::Parameter>& parameters,
                             ef::TensorView<float, 1> ef::Parameter::*part) {
  Index count = 0;
  for (const auto& parameter : parameters) count += (parameter.*part).size();
  ef::Tensor<float, 1> all(count);
  Index at = 0;
  for (const auto& parameter : parameters) {
    const auto& view = parameter.*part;
    memory.copy_out(all.data() + at, view.data(),
                    static_cast<std::size_t>(view.size()) * sizeof(float));
    at += view.size();
  }
  return all;
}

template <typename Compute, typename Model, typename D>
double one_step(const D& device, Model& model, const std::vector<Batch>& batches) {
  ef::Sgd optimizer(model.parameters(), {.learning_rate = 0}, ef::memory_of(device));
  return ef::train_step_with_grad_accumulation<Compute>(device, model, optimizer, batches,
                                                        static_cast<Index>(batches.size()));
}

// Micro-batches of 2 x 3 tokens and of 1 x 17, one more than a tile of tensor cores.
template <typename Compute>
void check_gradients(Index layers, double allowed) {
  ef::DecoderConfig config = kConfig;
  config.layers = layers;
  const auto weights = make_weights(config);
  const std::vector<Batch> batches{make_batch(2, 3, 1), make_batch(1, 17, 2)};
  ef::Decoder<float> by_cpu(weights, kOneThread);
  const double expected_loss = one_step<float>(kOneThread, by_cpu, batches);
  const auto expected = numbers(ef::host_memory, by_cpu.parameters(), &ef::Parameter::gradient);
  for_each_gpu([&](const auto& bench) {
    const ef::Memory& memory = ef::memory_of(bench.device);
    ef::Decoder<float, std::remove_cvref_t<decltype(bench.device)>> model(
        weights_on(bench, *weights), bench.device);
    const double loss = one_step<Compute>(bench.device, model, batches);
    EXPECT_NEAR(loss, expected_loss, allowed * expected_loss);
    const auto gradient = numbers(memory, model.parameters(), &ef::Parameter::gradient);
    EXPECT_LT(relative_error(gradient, to_double(expected)), allowed);
  });
}

TEST(DecoderTrainingOnDevice, GradientsAreThoseOfTheCpu) {
  check_gradients<float>(2, 2e-5);
#if !defined(__CUDACC__)  // nvcc takes minutes for another scalar
  check_gradients<ef::bfloat16>(1, 0.05);
#endif
}

TEST(DecoderTrainingOnDevice, LearnsAndServesWhatItLearned) {
  ef::DecoderConfig config = kConfig;
  config.layers = 1;
  const ef::DecoderWeights start(config, 1);
  const Batch batch = make_batch(2, 4, 3);
  const auto train = [&](const auto& device, auto& model) {
    ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-2}, ef::memory_of(device));
    ef::GradScaler scaler({.init_scale = 256});
    double loss = 0;
    for (int step = 0; step < 2; ++step)
      loss = ef::train_step_mixed_precision<float>(device, model, optimizer, batch.inputs,
                                                   batch.targets, scaler, {.max_gradient_norm = 1});
    return loss;
  };
  ef::Decoder<float> by_cpu(std::make_shared<ef::DecoderWeights>(start), kOneThread);
  ef::KvCache<float> cpu_cache;
  by_cpu.prefill(batch.inputs, cpu_cache);  // packs, and packs again after training
  const double expected_loss = train(kOneThread, by_cpu);
  cpu_cache.clear();
  const auto expected = by_cpu.prefill(batch.inputs, cpu_cache);
  for_each_gpu([&](const auto& bench) {
    const ef::Memory& memory = ef::memory_of(bench.device);
    ef::Decoder<float, std::remove_cvref_t<decltype(bench.device)>> model(weights_on(bench, start),
                                                                          bench.device);
    ef::KvCache<float> cache(memory);
    model.prefill(batch.inputs, cache);
    EXPECT_NEAR(train(bench.device, model), expected_loss, 1e-3);
    cache.clear();
    EXPECT_LT(relative_error(model.prefill(batch.inputs, cache), to_double(expected)), 1e-2);
    const ef::DecoderWeights back(model.weights(), ef::host_memory);
    const auto view = back.vector(back.norm());
    EXPECT_NE(view(0), 1.0f);
  });
}

TEST(DecoderTrainingOnDevice, RefusesWeightsOfTheHostAndForeignIds) {
  const auto weights = make_weights();
  auto batch = make_batch(1, 3, 4);
  for_each_gpu([&](const auto& bench) {
    using D = std::remove_cvref_t<decltype(bench.device)>;
    ef::Decoder<float, D> of_host(weights, bench.device);
    expect_throws<std::invalid_argument>([&] { of_host.template forward<float>(batch.inputs); },
                                         {"the table of master weights lies in memory of cpu"});
    ef::Decoder<float, D> model(weights_on(bench, *weights), bench.device);
    auto foreign = batch.inputs;
    foreign(0, 2) = -1;
    expect_throws<std::invalid_argument>([&] { model.template forward<float>(foreign); },
                                         {"Decoder::forward", "id -1", "position 2"});
  });
}

}  // namespace
