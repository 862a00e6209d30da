// Log-softmax over a vocabulary of 128256. Limit: a read and a write. Peer: Eigen by hand.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // g++ 12 in its own AVX-512 intrinsics, where Eigen reduces (GCC bug 105593)
#endif
#include <eigenformer/log_softmax.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

void log_softmax_cases(bench::Suite& suite) {
  constexpr Index batch = 8, vocab = 128256;
  const auto x = std::make_shared<ef::Tensor<float, 2>>(batch, vocab);
  const auto y = std::make_shared<ef::Tensor<float, 2>>(batch, vocab);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (Index i = 0; i < x->size(); ++i) x->data()[i] = normal(generator);
  const double bytes = static_cast<double>(x->size()) * sizeof(float);
  auto& row = suite.row("log_softmax (8, 128256) float", bench::Limit::copy_bytes(bytes, bytes));
  row.ours([=](const auto& device) { ef::log_softmax_into(device, *y, *x); });
  row.peer("Eigen by hand", [=](const auto& device) {
    const Eigen::array<Index, 1> row_axis{1};
    const Eigen::array<Index, 2> column{batch, 1}, across{1, vocab};
    ef::Tensor<float, 1> best(batch), sum(batch);
    best.device(device) = x->maximum(row_axis);
    y->device(device) = *x - best.reshape(column).broadcast(across);
    sum.device(device) = y->exp().sum(row_axis).log();
    y->device(device) = *y - sum.reshape(column).broadcast(across);
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(log_softmax_cases)
