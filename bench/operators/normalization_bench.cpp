// RMSNorm: one read and one write. Limit: copy bandwidth. Peer: what an Eigen user writes by hand.
#include <eigenformer/normalization.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

template <int Rank>
std::shared_ptr<ef::Tensor<float, Rank>> random_tensor(
    const Eigen::array<Eigen::Index, Rank>& sizes) {
  auto tensor = std::make_shared<ef::Tensor<float, Rank>>(sizes);
  tensor->setRandom();
  return tensor;
}

void normalization_cases(bench::Suite& suite) {
  for (Eigen::Index rows : {1, 512, 4096}) {
    const Eigen::Index features = 4096;
    const auto x = random_tensor<2>({rows, features}), y = random_tensor<2>({rows, features}),
               residual = random_tensor<2>({rows, features});
    const auto weight = random_tensor<1>({features});
    const double bytes = static_cast<double>(rows * features) * sizeof(float);
    const std::string shape = std::to_string(rows) + " rows of 4096 float";

    auto& norm = suite.row("rms_norm " + shape, bench::Limit::copy_bytes(bytes, bytes));
    norm.ours([=](const auto& device) {
      ef::rms_norm_into(device, *y, *x, *weight, {.epsilon = 1e-5f});
    });
    const Eigen::array<Eigen::Index, 1> over_features{1};
    const Eigen::array<Eigen::Index, 2> column{rows, 1}, one_row{1, features}, across{1, features},
        down{rows, 1};
    norm.peer("Eigen by hand", [=](const auto& device) {
      y->device(device) = *x *
                          (x->square().mean(over_features).eval() + 1e-5f)
                              .rsqrt()
                              .eval()
                              .reshape(column)
                              .broadcast(across) *
                          weight->reshape(one_row).broadcast(down);
    });

    auto& add = suite.row("add_rms_norm " + shape, bench::Limit::copy_bytes(2 * bytes, 2 * bytes));
    add.ours([=](const auto& device) {
      ef::add_rms_norm_into(device, *y, *residual, *x, *weight, {.epsilon = 1e-5f});
    });
    add.peer("Eigen by hand", [=](const auto& device) {
      residual->device(device) = *residual + *x;
      y->device(device) = *residual *
                          (residual->square().mean(over_features).eval() + 1e-5f)
                              .rsqrt()
                              .eval()
                              .reshape(column)
                              .broadcast(across) *
                          weight->reshape(one_row).broadcast(down);
    });

    const auto bias = random_tensor<1>({features});
    auto& layer = suite.row("layer_norm " + shape, bench::Limit::copy_bytes(bytes, bytes));
    layer.ours([=](const auto& device) { ef::layer_norm_into(device, *y, *x, *weight, *bias); });

    const auto grad_y = random_tensor<2>({rows, features});
    const auto grad_weight = random_tensor<1>({features});
    auto& backward =
        suite.row("rms_norm_backward " + shape, bench::Limit::copy_bytes(2 * bytes, bytes));
    backward.ours([=](const auto& device) {
      ef::rms_norm_backward_into(device, *y, *grad_weight, *grad_y, *x, *weight);
    });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(normalization_cases)
