// INT8 and INT4 quantization: streams of bytes, but for the search of least squares. Peer: the
// Eigen expression an Eigen user writes.
#include <eigenformer/core/packed_array.h>
#include <eigenformer/quantization.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

/// A square matrix in 2 MiB pages, as the memory that limits are measured on.
template <typename T>
std::shared_ptr<ef::TensorView<T, 2>> square_in_huge_pages(Index size) {
  struct Matrix {
    explicit Matrix(Index n) : view((memory.resize(n * n), memory.data()), n, n) {}
    ef::detail::PackedArray<T> memory;
    ef::TensorView<T, 2> view;
  };
  auto matrix = std::make_shared<Matrix>(size);
  std::fill_n(matrix->view.data(), size * size, T{});  // touched
  return {matrix, &matrix->view};
}

std::shared_ptr<ef::TensorView<float, 2>> uniform_square(Index size) {
  const auto weights = square_in_huge_pages<float>(size);
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (Index i = 0; i < weights->size(); ++i) weights->data()[i] = uniform(generator);
  return weights;
}

void quantization_cases(bench::Suite& suite) {
  const Index size = 8192;
  const auto weights = uniform_square(size);
  const auto values = square_in_huge_pages<std::int8_t>(size);
  auto scales = std::make_shared<ef::Tensor<float, 1>>(size);
  // What dequantize reads where no row before it ran.
  ef::quantize_weights_int8_per_channel_into(Eigen::DefaultDevice{}, *values, *scales, *weights);
  const auto back = square_in_huge_pages<float>(size);
  const double count = static_cast<double>(weights->size());

  auto& checked = suite.row("quantize_weights_int8_per_channel (8192, 8192) float, checked first",
                            bench::Limit::copy_bytes(8 * count, count));
  checked.ours([=](const auto& device) {
    ef::quantize_weights_int8_per_channel_into(device, *values, *scales, *weights);
  });
  auto& channels = suite.row("quantize_weights_int8_per_channel (8192, 8192) float",
                             bench::Limit::copy_bytes(4 * count, count));
  channels.ours([=](const auto& device) {
    ef::quantize_weights_int8_per_channel_into(device, *values, *scales, *weights,
                                               {.check_first = false});
  });
  channels.peer("Eigen by hand", [=](const auto& device) {
    scales->device(device) = weights->abs().maximum(Eigen::array<Index, 1>{1}) / 127.0f;
    const auto divisors =
        scales->reshape(Eigen::array<Index, 2>{size, 1}).broadcast(Eigen::array<Index, 2>{1, size});
    values->device(device) = (*weights / divisors)
                                 .round()
                                 .cwiseMin(127.0f)
                                 .cwiseMax(-127.0f)
                                 .template cast<std::int8_t>();
  });

  auto group_scales = std::make_shared<ef::Tensor<float, 2>>(size, size / 64);
  suite
      .row("quantize_weights_int8_grouped (8192, 8192) by 64 float",
           bench::Limit::copy_bytes(4 * count, count * (1 + 4.0 / 64)))
      .ours([=](const auto& device) {
        ef::quantize_weights_int8_grouped_into(device, *values, *group_scales, *weights, 64,
                                               {.check_first = false});
      });

  auto scale = std::make_shared<float>();
  suite.row("quantize_weights_int8 (8192, 8192) float", bench::Limit::copy_bytes(8 * count, count))
      .ours([=](const auto& device) {
        ef::quantize_weights_int8_into(device, *values, *scale, *weights);
      });

  auto& dequantize =
      suite.row("dequantize (8192, 8192) to float", bench::Limit::copy_bytes(count, 4 * count));
  dequantize.ours(
      [=](const auto& device) { ef::dequantize_into(device, *back, *values, *scales); });
  dequantize.peer("Eigen by hand", [=](const auto& device) {
    const auto factors =
        scales->reshape(Eigen::array<Index, 2>{size, 1}).broadcast(Eigen::array<Index, 2>{1, size});
    back->device(device) = values->template cast<float>() * factors;
  });
}

/// Four bits by 32, a value in a byte as files are made from.
void quantization_int4_cases(bench::Suite& suite) {
  const Index size = 4096, group = 32, groups = size / group;
  const auto weights = uniform_square(size);
  const auto values = square_in_huge_pages<std::int8_t>(size);
  const auto scales = std::make_shared<ef::Tensor<float, 2>>(size, groups),
             minimums = std::make_shared<ef::Tensor<float, 2>>(size, groups);
  const double count = static_cast<double>(weights->size()), of_group = 4.0 / double{group};
  const std::pair<ef::Int4Fit, std::string> fits[] = {
      {ef::Int4Fit::extremes, ""}, {ef::Int4Fit::least_squares, ", least squares"}};
  for (const auto& [fit, name] : fits) {
    auto& symmetric = suite.row("quantize_weights_int4 (4096, 4096) by 32 float" + name,
                                bench::Limit::copy_bytes(4 * count, count * (1 + of_group)));
    symmetric.ours([=, fit = fit](const auto& device) {
      ef::quantize_weights_int4_into(device, *values, *scales, *weights, group, fit);
    });
    if (fit == ef::Int4Fit::extremes)
      symmetric.peer("Eigen by hand", [=](const auto& device) {
        const Eigen::array<Index, 2> each{size * groups, group}, one{size * groups, 1},
            wide{1, group};
        const ef::TensorView<float, 2> lines(weights->data(), each);
        ef::TensorView<std::int8_t, 2> to(values->data(), each);
        ef::TensorView<float, 1> factors(scales->data(), size * groups);
        factors.device(device) = lines.abs().maximum(Eigen::array<Index, 1>{1}) / 7.0f;
        to.device(device) = (lines / factors.reshape(one).broadcast(wide))
                                .round()
                                .cwiseMin(7.0f)
                                .cwiseMax(-7.0f)
                                .template cast<std::int8_t>();
      });
    suite
        .row("quantize_weights_int4_with_minimums (4096, 4096) by 32 float" + name,
             bench::Limit::copy_bytes(4 * count, count * (1 + 2 * of_group)))
        .ours([=, fit = fit](const auto& device) {
          ef::quantize_weights_int4_with_minimums_into(device, *values, *scales, *minimums,
                                                       *weights, group, fit);
        });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(quantization_cases)
EIGENFORMER_BENCHMARK(quantization_int4_cases)
