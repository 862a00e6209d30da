// Rotary embedding of queries. Limit: copy bandwidth. Peer: what an Eigen user writes by hand, with
// cosines and sines at hand.
#include <eigenformer/rope.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

void rope_cases(bench::Suite& suite) {
  constexpr Eigen::Index heads = 32, head_dim = 128, half = head_dim / 2;
  for (Eigen::Index tokens : {1, 64, 2048}) {
    auto x = std::make_shared<ef::Tensor<float, 3>>(tokens, heads, head_dim),
         y = std::make_shared<ef::Tensor<float, 3>>(tokens, heads, head_dim);
    x->setRandom();
    y->setZero();
    auto positions = std::make_shared<std::vector<Eigen::Index>>();
    for (Eigen::Index t = 0; t < tokens; ++t) positions->push_back(1000 + t);
    const double bytes = static_cast<double>(x->size()) * sizeof(float);
    const auto limit = bench::Limit::copy_bytes(bytes, bytes);
    const std::string shape = std::to_string(tokens) + " tokens of 32 heads of 128 float";

    const auto table = std::make_shared<ef::RopeTable>(4096, head_dim);
    auto cosine = std::make_shared<ef::Tensor<float, 3>>(tokens, 1, half),
         sine = std::make_shared<ef::Tensor<float, 3>>(tokens, 1, half);
    for (Eigen::Index t = 0; t < tokens; ++t)
      for (Eigen::Index i = 0; i < half; ++i) {
        const double angle = static_cast<double>(1000 + t) *
                             std::pow(10000.0, -2.0 * static_cast<double>(i) / head_dim);
        (*cosine)(t, 0, i) = static_cast<float>(std::cos(angle));
        (*sine)(t, 0, i) = static_cast<float>(std::sin(angle));
      }
    suite.row("rope, table " + shape, limit)
        .ours([=](const auto& device) { ef::rope_into(device, *y, *x, *positions, *table); })
        .peer("Eigen by hand", [=](const auto& device) {
          const Eigen::array<Eigen::Index, 3> low{0, 0, 0}, high{0, 0, half},
              extent{tokens, heads, half}, across{1, heads, 1};
          const auto a = x->slice(low, extent), b = x->slice(high, extent);
          const auto c = cosine->broadcast(across), s = sine->broadcast(across);
          y->slice(low, extent).device(device) = a * c - b * s;
          y->slice(high, extent).device(device) = b * c + a * s;
        });
    const auto interleaved = std::make_shared<ef::RopeTable>(
        4096, head_dim, ef::RopeOptions{.layout = ef::RopeLayout::interleaved});
    suite.row("rope, interleaved table " + shape, limit).ours([=](const auto& device) {
      ef::rope_into(device, *y, *x, *positions, *interleaved);
    });
    suite.row("rope, options " + shape, limit).ours([=](const auto& device) {
      ef::rope_into(device, *y, *x, *positions, {.base = 10000.0f});
    });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(rope_cases)
