// Embedding: rows of a table. Limit: copy bandwidth. Peer: what an Eigen user writes by hand.
#include <random>

#include <eigenformer/embedding.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

void embedding_cases(bench::Suite& suite) {
  constexpr Eigen::Index vocab = 32000, features = 2048;
  const auto table = std::make_shared<ef::Tensor<float, 2>>(vocab, features);
  table->setRandom();
  for (Eigen::Index tokens : {1, 64, 2048}) {
    const auto ids = std::make_shared<ef::Tensor<std::int32_t, 1>>(tokens);
    std::mt19937 generator(1);
    for (Eigen::Index t = 0; t < tokens; ++t)
      (*ids)(t) = static_cast<std::int32_t>(generator() % vocab);
    const auto y = std::make_shared<ef::Tensor<float, 2>>(tokens, features);
    const auto narrow = std::make_shared<ef::Tensor<ef::bfloat16, 2>>(tokens, features);
    y->setRandom();
    narrow->setConstant(ef::bfloat16(1.0f));  // no page fault inside the timing
    const double bytes = static_cast<double>(y->size()) * sizeof(float);
    const std::string shape = std::to_string(tokens) + " tokens of 2048 features";
    suite.row("embedding " + shape + ", float", bench::Limit::copy_bytes(bytes, bytes))
        .ours([=](const auto& device) { ef::embedding_into(device, *y, *ids, *table); })
        .peer("Eigen by hand", [=](const auto& device) {
          for (Eigen::Index t = 0; t < tokens; ++t)
            y->chip<0>(t).device(device) = table->chip<0>((*ids)(t));
        });
    suite
        .row("embedding " + shape + ", float to bfloat16",
             bench::Limit::copy_bytes(bytes, bytes / 2))
        .ours([=](const auto& device) { ef::embedding_into(device, *narrow, *ids, *table); });
    const auto grad_table = std::make_shared<ef::Tensor<float, 2>>(vocab, features);
    grad_table->setZero();
    suite.row("embedding_backward " + shape + ", float", bench::Limit::copy_bytes(2 * bytes, bytes))
        .ours(
            [=](const auto& device) { ef::embedding_backward_into(device, *grad_table, *y, *ids); })
        .peer("Eigen by hand", [=](const auto& device) {
          for (Eigen::Index t = 0; t < tokens; ++t)
            grad_table->chip<0>((*ids)(t)).device(device) += y->chip<0>(t);
        });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(embedding_cases)
