// Cross-entropy with its gradient in place: one exponential per element over a read and a write.
// Limit: memory. Peer: what an Eigen user writes by hand.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // g++ 12 in its own AVX-512 intrinsics, where Eigen reduces (GCC bug 105593)
#endif
#include <eigenformer/loss.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

template <typename T>
std::shared_ptr<ef::Tensor<T, 2>> random_logits(Eigen::Index rows, Eigen::Index classes) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  auto logits = std::make_shared<ef::Tensor<T, 2>>(rows, classes);
  for (Eigen::Index i = 0; i < logits->size(); ++i)
    logits->data()[i] = static_cast<T>(normal(generator));
  return logits;
}

std::shared_ptr<ef::Tensor<std::int32_t, 1>> random_targets(Eigen::Index rows,
                                                            Eigen::Index classes) {
  std::mt19937 generator(2);
  auto targets = std::make_shared<ef::Tensor<std::int32_t, 1>>(rows);
  for (Eigen::Index r = 0; r < rows; ++r)
    (*targets)(r) = static_cast<std::int32_t>(generator() % static_cast<std::uint32_t>(classes));
  return targets;
}

void eigen_cross_entropy(const auto& device, ef::Tensor<float, 2>& gradient,
                         const ef::Tensor<float, 2>& logits,
                         const ef::Tensor<std::int32_t, 1>& targets) {
  const Eigen::Index rows = logits.dimension(0), classes = logits.dimension(1);
  const Eigen::array<Eigen::Index, 1> row_axis{1};
  const Eigen::array<Eigen::Index, 2> column{rows, 1}, across{1, classes};
  ef::Tensor<float, 1> maximum(rows), sum(rows);
  maximum.device(device) = logits.maximum(row_axis);
  gradient.device(device) = (logits - maximum.reshape(column).broadcast(across)).exp();
  sum.device(device) = gradient.sum(row_axis);
  gradient.device(device) =
      gradient * (1.0f / static_cast<float>(rows) / sum).reshape(column).broadcast(across);
  for (Eigen::Index r = 0; r < rows; ++r)
    gradient(r, targets(r)) -= 1.0f / static_cast<float>(rows);
}

template <typename T>
void add_case(bench::Suite& suite, const char* scalar, Eigen::Index rows, Eigen::Index classes) {
  auto logits = random_logits<T>(rows, classes);
  auto gradient = std::make_shared<ef::Tensor<T, 2>>(rows, classes);
  auto targets = random_targets(rows, classes);
  const double bytes = static_cast<double>(logits->size()) * sizeof(T);
  auto& row = suite.row("cross_entropy_with_gradient (" + std::to_string(rows) + ", " +
                            std::to_string(classes) + ") " + scalar,
                        bench::Limit::copy_bytes(bytes, bytes));
  row.ours([=](const auto& device) {
    ef::cross_entropy_with_gradient_into(device, *gradient, *logits, *targets,
                                         1.0 / static_cast<double>(rows));
  });
  if constexpr (std::is_same_v<T, float>)
    row.peer("Eigen by hand", [=](const auto& device) {
      eigen_cross_entropy(device, *gradient, *logits, *targets);
    });
}

void loss_cases(bench::Suite& suite) {
  add_case<float>(suite, "float", 512, 32000);
  add_case<ef::bfloat16>(suite, "bfloat16", 512, 32000);
}

}  // namespace

EIGENFORMER_BENCHMARK(loss_cases)
