// Linear layers: decode is bytes of weights (out of DRAM: calls with few tokens take turns on
// copies), prefill is arithmetic. Peers: Eigen's own products by hand, oneDNN, OpenBLAS.
#include <eigenformer/activation.h>
#include <eigenformer/linear.h>

#include <random>
#include <vector>

#include "peers/matmul.h"
#include "report/harness.h"

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

/// Bytes that calls with few tokens go through before they come back to the same weights: past
/// every cache.
constexpr Index kRotation = Index{256} << 20;

/// Copies of one thing, taken in turn; made when the first is taken, so that rows that are filtered
/// out cost nothing.
template <typename T>
class Rotation {
 public:
  Rotation(std::shared_ptr<const T> original, Index count)
      : original_(std::move(original)), count_(count) {}
  Index count() const { return count_; }
  const T& next() {
    if (count_ == 1) return *original_;
    if (copies_.empty()) copies_.assign(static_cast<std::size_t>(count_), *original_);
    return copies_[turn_ = (turn_ + 1) % copies_.size()];
  }

 private:
  std::shared_ptr<const T> original_;
  Index count_;
  std::vector<T> copies_;
  std::size_t turn_ = 0;
};

template <typename T>
std::shared_ptr<Rotation<T>> rotation(std::shared_ptr<const T> original, Index bytes,
                                      bool rotates) {
  return std::make_shared<Rotation<T>>(std::move(original), rotates ? kRotation / bytes : 1);
}

constexpr Index kIn = 4096, kOut = 4096;

template <typename X>
bench::Limit product_limit(Index tokens, Index weight_bytes, Index copies, bench::Peak peak) {
  const bench::Limit limit = bench::Limit::product(
      2.0 * static_cast<double>(tokens * kIn * kOut),
      static_cast<double>(weight_bytes + tokens * (kIn + kOut) * Index{sizeof(X)}), peak);
  return copies > 1 ? limit.rotating_through(static_cast<double>(kRotation)) : limit;
}

template <typename X, typename W>
void packed_rows(bench::Suite& suite, const std::string& type, bench::Peak peak,
                 const ef::PackingOptions<W>& packing = {}) {
  const auto weight = random_matrix<float>(kOut, kIn, 1);
  const auto packed =
      std::make_shared<const ef::PackedWeight<W>>(ef::pack_weight<W>(*weight, packing));
  const Index groups = packing.group_size == 0 ? 0 : kIn / packing.group_size,
              factors = packed->minimums() == nullptr ? groups : 2 * groups;
  const Index weight_bytes = packed->bytes() + kOut * factors * Index{sizeof(float)};
  const auto in_dram = rotation(packed, packed->bytes(), true),
             in_cache = rotation(packed, packed->bytes(), false);
  for (Index tokens : {1, 4, 16, 64, 512, 2048}) {
    const bool few = tokens <= 16;
    const auto weights = few ? in_dram : in_cache;
    const Index copies = weights->count();
    const auto x = random_matrix<X>(tokens, kIn, 2);
    const auto y = std::make_shared<ef::Tensor<X, 2>>(tokens, kOut);
    auto& row = suite.row("linear " + std::to_string(tokens) + " x 4096 x 4096 " + type,
                          product_limit<X>(tokens, weight_bytes, copies, peak));
    row.ours([=](const auto& device) { ef::linear_into(device, *y, *x, weights->next()); });
    if constexpr (std::is_same_v<X, W> && std::is_same_v<X, float>) {
      const auto plain =
          rotation<ef::Tensor<float, 2>>(weight, kOut * kIn * Index{sizeof(float)}, few);
      row.peer("Eigen by hand", [=](const auto&) {
        Eigen::Map<Eigen::Matrix<X, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(y->data(),
                                                                                      tokens, kOut)
            .noalias() =
            Map<X>(x->data(), tokens, kIn) * Map<X>(plain->next().data(), kOut, kIn).transpose();
      });
    }
    const bool same = std::is_same_v<X, W>,
               int8 = std::is_same_v<W, std::int8_t> && packing.group_size == 0;
    if (same || int8) {  // peers take float and narrow it themselves, before they are timed
      const auto wide = std::make_shared<ef::Tensor<float, 2>>(x->template cast<float>());
      const auto type_of = int8                       ? bench::WeightType::int8
                           : std::is_same_v<W, float> ? bench::WeightType::float32
                                                      : bench::WeightType::bfloat16;
      bench::add_matmul_peers(row, tokens, kIn, kOut, wide, weight, type_of,
                              static_cast<int>(copies));
    }
  }
}

void linear_float_cases(bench::Suite& suite) {
  packed_rows<float, float>(suite, "float", bench::Peak::float_fma);
}
void linear_bfloat16_cases(bench::Suite& suite) {
  packed_rows<Eigen::bfloat16, Eigen::bfloat16>(suite, "bfloat16", bench::Peak::bfloat16);
  packed_rows<float, Eigen::bfloat16>(suite, "float x bfloat16", bench::Peak::float_fma);
}
void linear_int8_cases(bench::Suite& suite) {
  packed_rows<float, std::int8_t>(suite, "int8", bench::Peak::int8);
  packed_rows<float, std::int8_t>(suite, "int8 in groups of 64", bench::Peak::int8,
                                  {.group_size = 64});
}
void linear_int4_cases(bench::Suite& suite) {
  // By 32 as models of llama.cpp have them, symmetric (Q4_0) and with minimums (Q4_1, Q4_K).
  packed_rows<float, ef::int4>(suite, "int4 in groups of 32", bench::Peak::int8);
  packed_rows<float, ef::int4>(suite, "int4 in groups of 32 with minimums", bench::Peak::int8,
                               {.zero_points = true});
  packed_rows<float, ef::int4>(suite, "int4 in groups of 32 with minimums, x not quantized",
                               bench::Peak::float_fma,
                               {.zero_points = true, .quantize_activations = false});
  const std::string name = "int4 in groups of 64";
  packed_rows<float, ef::int4>(suite, name, bench::Peak::int8, {.group_size = 64});
  packed_rows<float, ef::int4>(suite, name + " with minimums", bench::Peak::int8,
                               {.group_size = 64, .zero_points = true});
  packed_rows<float, ef::int4>(suite, name + ", x not quantized", bench::Peak::float_fma,
                               {.group_size = 64, .quantize_activations = false});
}

template <typename T>
void backward_rows(bench::Suite& suite, const std::string& type, bench::Peak peak) {
  const Index tokens = 512, in = 1024, out = 1024;
  const auto grad_y = random_matrix<T>(tokens, out, 1), x = random_matrix<T>(tokens, in, 2);
  const auto weight = random_matrix<float>(out, in, 3),
             grad_weight = random_matrix<float>(out, in, 4);
  const auto grad_x = std::make_shared<ef::Tensor<T, 2>>(tokens, in);
  const bench::Limit limit =
      bench::Limit::product(2.0 * static_cast<double>(tokens * in * out),
                            static_cast<double>(in * out) * sizeof(float), peak);
  auto& input = suite.row("linear_backward_input 512 x 1024 x 1024 " + type, limit);
  input.ours([=](const auto& device) {
    ef::linear_backward_input_into(device, *grad_x, *grad_y, *weight);
  });
  auto& parameters = suite.row("linear_backward_weight 512 x 1024 x 1024 " + type, limit);
  parameters.ours([=](const auto& device) {
    ef::linear_backward_weight_into(device, *grad_weight, *grad_y, *x);
  });
  if constexpr (std::is_same_v<T, float>) {
    using Out = Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
    input.peer("Eigen by hand", [=](const auto&) {
      Out(grad_x->data(), tokens, in).noalias() =
          Map<float>(grad_y->data(), tokens, out) * Map<float>(weight->data(), out, in);
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

/// SwiGLU in one product, beside the three operators it stands for.
template <typename X, typename W>
void gated_rows(bench::Suite& suite, const std::string& type, bench::Peak peak,
                const ef::PackingOptions<W>& packing = {}) {
  const Index in = 2048, hidden = 5632;
  const auto gate = random_matrix<float>(hidden, in, 1), up = random_matrix<float>(hidden, in, 2);
  const auto pair = std::make_shared<const ef::PackedGatedWeight<W>>(
      ef::pack_gated_weight<W>(*gate, *up, packing));
  const auto alone = [&](const auto& weight) {
    return std::make_shared<const ef::PackedWeight<W>>(ef::pack_weight<W>(weight, packing));
  };
  const auto gate_alone = alone(*gate), up_alone = alone(*up);
  const Index groups = packing.group_size == 0 ? 0 : in / packing.group_size,
              factors = pair->pair().minimums() == nullptr ? groups : 2 * groups;
  for (Index tokens : {1, 512}) {
    const auto x = random_matrix<X>(tokens, in, 3);
    const auto y = std::make_shared<ef::Tensor<X, 2>>(tokens, hidden),
               other = std::make_shared<ef::Tensor<X, 2>>(tokens, hidden);
    const bench::Limit limit = bench::Limit::product(
        4.0 * static_cast<double>(tokens * in * hidden),
        static_cast<double>(pair->pair().bytes() + 2 * hidden * factors * Index{sizeof(float)}),
        peak);
    auto& row = suite.row(
        "gated_linear SwiGLU " + std::to_string(tokens) + " x 2048 x 5632 " + type, limit);
    row.ours([=](const auto& device) {
      ef::gated_linear_into(device, *y, *x, *pair, ef::Epilogue{}.silu());
    });
    row.peer("separate operators", [=](const auto& device) {
      ef::linear_into(device, *y, *x, *gate_alone);
      ef::linear_into(device, *other, *x, *up_alone);
      ef::swiglu_into(device, *y, *y, *other);
    });
  }
}

void gated_cases(bench::Suite& suite) {
  gated_rows<Eigen::bfloat16, Eigen::bfloat16>(suite, "bfloat16", bench::Peak::bfloat16);
  gated_rows<float, std::int8_t>(suite, "int8", bench::Peak::int8);
  gated_rows<float, ef::int4>(suite, "int4 in groups of 32 with minimums", bench::Peak::int8,
                              {.zero_points = true});
}

void pack_cases(bench::Suite& suite) {
  const auto weight = random_matrix<float>(4096, 4096, 1);
  const double count = static_cast<double>(weight->size());
  const auto narrow = std::make_shared<ef::PackedWeight<Eigen::bfloat16>>();
  suite
      .row("pack_weight 4096 x 4096 bfloat16 from float",
           bench::Limit::copy_bytes(4 * count, 2 * count))
      .ours([=](const auto& device) { ef::pack_weight_into(device, *narrow, *weight); });
  // two weights in a byte, a scale and a minimum for 32
  const auto four_bits = std::make_shared<ef::PackedWeight<ef::int4>>();
  const auto limit = bench::Limit::copy_bytes(4 * count, count * (0.5 + 8.0 / 32));
  const std::string name = "pack_weight 4096 x 4096 int4 by 32 with minimums from float";
  suite.row(name, limit).ours([=](const auto& device) {
    ef::pack_weight_into(device, *four_bits, *weight, {.zero_points = true});
  });
  suite.row(name + ", least squares", limit).ours([=](const auto& device) {
    ef::pack_weight_into(device, *four_bits, *weight,
                         {.zero_points = true, .fit = ef::Int4Fit::least_squares});
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(linear_float_cases)
EIGENFORMER_BENCHMARK(linear_bfloat16_cases)
EIGENFORMER_BENCHMARK(linear_int8_cases)
EIGENFORMER_BENCHMARK(linear_int4_cases)
EIGENFORMER_BENCHMARK(linear_backward_cases)
EIGENFORMER_BENCHMARK(gated_cases)
EIGENFORMER_BENCHMARK(pack_cases)
