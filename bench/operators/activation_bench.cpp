// Gated activation and residual sum of a feed-forward block. Limit: copy bandwidth. Peer: what an
// Eigen user writes by hand.
#include <eigenformer/activation.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

std::shared_ptr<ef::Tensor<float, 2>> random_tensor(Eigen::Index rows, Eigen::Index columns) {
  auto tensor = std::make_shared<ef::Tensor<float, 2>>(rows, columns);
  tensor->setRandom();
  *tensor = *tensor * 4.0f - 2.0f;
  return tensor;
}

void activation_cases(bench::Suite& suite) {
  constexpr Eigen::Index features = 11008;  // feed-forward width of a 7 B Llama
  for (Eigen::Index rows : {1, 16, 512}) {
    const auto gate = random_tensor(rows, features), up = random_tensor(rows, features),
               y = random_tensor(rows, features);
    const auto grad_y = random_tensor(rows, features), grad_up = random_tensor(rows, features),
               fused = random_tensor(rows, 2 * features);
    const double bytes = static_cast<double>(rows * features) * sizeof(float);
    const std::string shape = std::to_string(rows) + " rows of 11008 float";
    const auto read_two = bench::Limit::copy_bytes(2 * bytes, bytes);

    suite.row("silu " + shape, bench::Limit::copy_bytes(bytes, bytes))
        .ours([=](const auto& device) { ef::silu_into(device, *y, *gate); })
        .peer("Eigen by hand",
              [=](const auto& device) { y->device(device) = *gate / ((-*gate).exp() + 1.0f); });
    suite.row("gelu " + shape, bench::Limit::copy_bytes(bytes, bytes))
        .ours([=](const auto& device) { ef::gelu_into(device, *y, *gate); })
        .peer("Eigen by hand", [=](const auto& device) {
          y->device(device) = *gate * 0.5f * ((*gate * 0.70710678f).erf() + 1.0f);
        });
    suite.row("softcap " + shape, bench::Limit::copy_bytes(bytes, bytes))
        .ours([=](const auto& device) { ef::softcap_into(device, *y, *gate, {.cap = 30.0f}); })
        .peer("Eigen by hand",
              [=](const auto& device) { y->device(device) = (*gate / 30.0f).tanh() * 30.0f; });
    suite.row("swiglu " + shape, read_two)
        .ours([=](const auto& device) { ef::swiglu_into(device, *y, *gate, *up); })
        .peer("Eigen by hand", [=](const auto& device) {
          y->device(device) = *gate / ((-*gate).exp() + 1.0f) * *up;
        });
    suite.row("swiglu, fused " + shape, read_two).ours([=](const auto& device) {
      ef::swiglu_into(device, *y, *fused);
    });
    suite.row("swiglu_backward " + shape, bench::Limit::copy_bytes(3 * bytes, 2 * bytes))
        .ours([=](const auto& device) {
          ef::swiglu_backward_into(device, *y, *grad_up, *grad_y, *gate, *up);
        });
    suite.row("residual_add " + shape, read_two)
        .ours([=](const auto& device) { ef::residual_add_into(device, *y, *gate, *up); })
        .peer("Eigen by hand", [=](const auto& device) { y->device(device) = *gate + *up; });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(activation_cases)
