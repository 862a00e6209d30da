// A training step of a small two-layer model written with Eigen's matrices: the same model under
// train_step_with_grad_accumulation and under the loop an Eigen user writes. The difference is the
// library's share: loss, gradients' bookkeeping, AdamW.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // g++ 12 in its own AVX-512 intrinsics, where Eigen reduces (GCC bug 105593)
#endif
#include <eigenformer/training.h>

#include <Eigen/Core>
#include <random>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
constexpr Eigen::Index kFeatures = 256, kHidden = 1024, kClasses = 1000, kRows = 64;

Matrix random_matrix(Eigen::Index rows, Eigen::Index columns, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  return Matrix::NullaryExpr(rows, columns, [&] { return normal(generator); });
}

ef::Parameter parameter(Matrix& value, Matrix& gradient) {
  return ef::Parameter{ef::TensorView<float, 1>(value.data(), value.size()),
                       ef::TensorView<float, 1>(gradient.data(), gradient.size())};
}

/// logits = relu(x first^T) second^T
struct Mlp {
  Matrix first = random_matrix(kHidden, kFeatures, 1), second = random_matrix(kClasses, kHidden, 2);
  Matrix first_gradient = Matrix::Zero(kHidden, kFeatures),
         second_gradient = Matrix::Zero(kClasses, kHidden);
  Matrix inputs, hidden;

  template <typename Compute, typename Inputs>
  ef::Tensor<Compute, 2> forward(const Inputs& x) {
    inputs = Eigen::Map<const Matrix>(x.data(), x.dimension(0), x.dimension(1));
    hidden.noalias() = inputs * first.transpose();
    hidden = hidden.cwiseMax(0.0f);
    ef::Tensor<Compute, 2> logits(x.dimension(0), kClasses);
    Eigen::Map<Matrix>(logits.data(), x.dimension(0), kClasses).noalias() =
        hidden * second.transpose();
    return logits;
  }
  template <typename Compute>
  void backward(const ef::Tensor<Compute, 2>& logits_gradient) {
    const Eigen::Map<const Matrix> d(logits_gradient.data(), logits_gradient.dimension(0),
                                     kClasses);
    second_gradient.noalias() += d.transpose() * hidden;
    Matrix back = d * second;
    back.array() *= (hidden.array() > 0.0f).cast<float>();
    first_gradient.noalias() += back.transpose() * inputs;
  }
  std::vector<ef::Parameter> parameters() {
    return {parameter(first, first_gradient), parameter(second, second_gradient)};
  }
};

struct Batch {
  ef::Tensor<float, 2> inputs{kRows, kFeatures};
  ef::Tensor<std::int32_t, 1> targets{kRows};
};

std::vector<Batch> batches() {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<Batch> result(4);
  for (Batch& batch : result) {
    for (Eigen::Index i = 0; i < batch.inputs.size(); ++i)
      batch.inputs.data()[i] = normal(generator);
    for (Eigen::Index r = 0; r < kRows; ++r)
      batch.targets(r) = static_cast<std::int32_t>(generator() % kClasses);
  }
  return result;
}

/// AdamW and softmax as matrix expressions.
struct ByHand {
  Mlp model;
  Matrix m1 = Matrix::Zero(kHidden, kFeatures), v1 = m1, m2 = Matrix::Zero(kClasses, kHidden),
         v2 = m2;
  int t = 0;

  void adamw(Matrix& w, const Matrix& g, Matrix& m, Matrix& v) const {
    const float correction1 = 1.0f - std::pow(0.9f, static_cast<float>(t)),
                correction2 = 1.0f - std::pow(0.999f, static_cast<float>(t));
    m = 0.9f * m + 0.1f * g;
    v = 0.999f * v + 0.001f * g.cwiseAbs2();
    w.array() = w.array() * (1.0f - 1e-3f * 0.01f) -
                1e-3f / correction1 * m.array() / ((v.array() / correction2).sqrt() + 1e-8f);
  }
  double step(const std::vector<Batch>& data) {
    double loss = 0;
    model.first_gradient.setZero();
    model.second_gradient.setZero();
    const float rows = static_cast<float>(kRows) * static_cast<float>(data.size());
    for (const Batch& batch : data) {
      auto logits = model.forward<float>(batch.inputs);
      Eigen::Map<Matrix> x(logits.data(), kRows, kClasses);
      for (Eigen::Index r = 0; r < kRows; ++r) {
        auto row = x.row(r).array();
        const float maximum = row.maxCoeff(), target = row(batch.targets(r));
        row = (row - maximum).exp();
        const float sum = row.sum();
        loss += static_cast<double>(std::log(sum) + maximum - target);
        row *= 1.0f / (sum * rows);
        row(batch.targets(r)) -= 1.0f / rows;
      }
      model.backward<float>(logits);
    }
    ++t;
    adamw(model.first, model.first_gradient, m1, v1);
    adamw(model.second, model.second_gradient, m2, v2);
    return loss / static_cast<double>(rows);
  }
};

struct Trained {
  Mlp model;
  ef::AdamW optimizer{model.parameters(), {.learning_rate = 1e-3, .weight_decay = 0.01}};
};

void training_case(bench::Suite& suite) {
  auto data = std::make_shared<std::vector<Batch>>(batches());
  auto ours = std::make_shared<Trained>();
  auto by_hand = std::make_shared<ByHand>();
  constexpr double weights = static_cast<double>(kHidden * (kFeatures + kClasses));
  const double flops = 6.0 * weights * static_cast<double>(kRows * 4);
  auto& row = suite.row("train_step_with_grad_accumulation 4 x (64, 256), 1.3M weights",
                        bench::Limit::product(flops, 28 * weights));
  row.ours([=](const auto& device) {
    ef::train_step_with_grad_accumulation(device, ours->model, ours->optimizer, *data, 4);
  });
  row.peer_one_thread("Eigen by hand", [=] { by_hand->step(*data); });
}

}  // namespace

EIGENFORMER_BENCHMARK(training_case)
