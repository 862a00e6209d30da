// Causal mask: a pure write. Limit: streaming write bandwidth. Peer: what an Eigen user writes by
// hand.
#include <eigenformer/causal_mask.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

void mask_cases(bench::Suite& suite) {
  for (Eigen::Index length : {512, 2048}) {
    auto mask = std::make_shared<ef::Tensor<float, 3>>(4, length, length);
    const double bytes = static_cast<double>(mask->size()) * sizeof(float);
    auto& row = suite.row(
        "causal_mask (4, " + std::to_string(length) + ", " + std::to_string(length) + ") float",
        bench::Limit::write_bytes(bytes));
    row.ours([=](const auto& device) { ef::causal_mask_into(device, *mask); });
    row.peer("Eigen by hand", [=](const auto& device) {
      mask->device(device) = mask->generate([](const Eigen::array<Eigen::Index, 3>& at) {
        return at[2] <= at[1] ? 0.0f : -INFINITY;
      });
    });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(mask_cases)
