// Linear layers: decode is bytes of weights, prefill is arithmetic. Peers: Eigen's own products by hand, oneDNN, OpenBLAS.
#include <eigenformer/linear.h>

#include <random>

#include "harness.h"
#include "peers/matmul.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

template <typename T>
std::shared_ptr<ef::Tensor<T, 2>> random_matrix(Index rows, Index columns, unsigned seed) {
  auto matrix = std::make_shared<ef::Tensor<T, 2>>(rows, columns);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (Index i = 0; i < matrix->size(); ++i) matrix->data()[i] = static_cast<T>(normal(generator));
  return matrix;
}

template <typename T>
using Map = Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

template <typename X, typename W>
void packed_rows(bench::Suite& suite, const std::string& type, bench::Peak peak) {
  const Index in = 4096, out = 4096;
  const auto weight = random_matrix<float>(out, in, 1);
  const auto packed = std::make_shared<ef::PackedWeight<W>>(ef::pack_weight<W>(*weight));
  for (Index tokens : {1, 4, 16, 64, 512}) {
    const auto x = random_matrix<X>(tokens, in, 2);
    const auto y = std::make_shared<ef::Tensor<X, 2>>(tokens, out);
    const double flops = 2.0 * static_cast<double>(tokens * in * out);
    auto& row = suite.row("linear " + std::to_string(tokens) + " x 4096 x 4096 " + type,
                          bench::Limit::product(flops, static_cast<double>(out * in) * sizeof(W), peak));
    row.ours([=](const auto& device) { ef::linear_into(device, *y, *x, *packed); });
    if constexpr (std::is_same_v<X, W> && std::is_same_v<X, float>)
      row.peer("Eigen by hand", [=](const auto&) {
        Eigen::Map<Eigen::Matrix<X, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(y->data(), tokens, out).noalias() =
            Map<X>(x->data(), tokens, in) * Map<X>(weight->data(), out, in).transpose();
      });
    const bool same = std::is_same_v<X, W>, int8 = std::is_same_v<W, std::int8_t>;
    if (same || int8) {  // peers take float and narrow it themselves, before they are timed
      const auto wide = std::make_shared<ef::Tensor<float, 2>>(x->template cast<float>());
      const auto type_of = int8                       ? bench::WeightType::int8
                           : std::is_same_v<W, float> ? bench::WeightType::float32
                                                      : bench::WeightType::bfloat16;
      bench::add_matmul_peers(row, tokens, in, out, wide, weight, type_of);
    }
  }
}

void linear_cases(bench::Suite& suite) {
  packed_rows<float, float>(suite, "float", bench::Peak::float_fma);
  packed_rows<Eigen::bfloat16, Eigen::bfloat16>(suite, "bfloat16", bench::Peak::bfloat16);
  packed_rows<float, Eigen::bfloat16>(suite, "float x bfloat16", bench::Peak::float_fma);
  packed_rows<float, std::int8_t>(suite, "int8", bench::Peak::int8);
}

template <typename T>
void backward_rows(bench::Suite& suite, const std::string& type, bench::Peak peak) {
  const Index tokens = 512, in = 1024, out = 1024;
  const auto grad_y = random_matrix<T>(tokens, out, 1), x = random_matrix<T>(tokens, in, 2);
  const auto weight = random_matrix<float>(out, in, 3), grad_weight = random_matrix<float>(out, in, 4);
  const auto grad_x = std::make_shared<ef::Tensor<T, 2>>(tokens, in);
  const bench::Limit limit =
      bench::Limit::product(2.0 * static_cast<double>(tokens * in * out), static_cast<double>(in * out) * sizeof(float), peak);
  auto& input = suite.row("linear_backward_input 512 x 1024 x 1024 " + type, limit);
  input.ours([=](const auto& device) { ef::linear_backward_input_into(device, *grad_x, *grad_y, *weight); });
  auto& parameters = suite.row("linear_backward_weight 512 x 1024 x 1024 " + type, limit);
  parameters.ours([=](const auto& device) { ef::linear_backward_weight_into(device, *grad_weight, *grad_y, *x); });
  if constexpr (std::is_same_v<T, float>) {
    using Out = Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
    input.peer("Eigen by hand", [=](const auto&) {
      Out(grad_x->data(), tokens, in).noalias() = Map<float>(grad_y->data(), tokens, out) * Map<float>(weight->data(), out, in);
    });
    parameters.peer("Eigen by hand", [=](const auto&) {
      Out(grad_weight->data(), out, in).noalias() +=
          Map<float>(grad_y->data(), tokens, out).transpose() * Map<float>(x->data(), tokens, in);
    });
  }
}

void linear_backward_cases(bench::Suite& suite) {
  backward_rows<float>(suite, "float", bench::Peak::float_fma);
  backward_rows<Eigen::bfloat16>(suite, "bfloat16", bench::Peak::bfloat16);
}

void pack_cases(bench::Suite& suite) {
  const auto weight = random_matrix<float>(4096, 4096, 1);
  const double count = static_cast<double>(weight->size());
  const auto narrow = std::make_shared<ef::PackedWeight<Eigen::bfloat16>>();
  suite.row("pack_weight 4096 x 4096 bfloat16 from float", bench::Limit::copy_bytes(4 * count, 2 * count))
      .ours([=](const auto& device) { ef::pack_weight_into(device, *narrow, *weight); });
}

}  // namespace

EIGENFORMER_BENCHMARK(linear_cases)
EIGENFORMER_BENCHMARK(linear_backward_cases)
EIGENFORMER_BENCHMARK(pack_cases)
