// Top-k of a vocabulary of 128256. Limit: one read. Peer: std::partial_sort_copy.
#include <eigenformer/top_k.h>

#include <algorithm>
#include <random>
#include <vector>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

void top_k_cases(bench::Suite& suite) {
  constexpr Index batch = 8, vocab = 128256;
  const auto x = std::make_shared<ef::Tensor<float, 2>>(batch, vocab);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (Index i = 0; i < x->size(); ++i) x->data()[i] = normal(generator);
  const auto limit = bench::Limit::read_bytes(static_cast<double>(x->size()) * sizeof(float));
  for (const Index k : {8, 64, 1024})
    for (const bool largest : {true, false}) {
      if (k != 64 && !largest) continue;
      const auto values = std::make_shared<ef::Tensor<float, 2>>(batch, k);
      const auto ids = std::make_shared<ef::Tensor<std::int32_t, 2>>(batch, k);
      auto& row = suite.row(
          (largest ? "top_k " : "top_k smallest ") + std::to_string(k) + " (8, 128256) float",
          limit);
      row.ours([=](const auto& device) {
        ef::top_k_into(device, *values, *ids, *x, {.largest = largest});
      });
      const auto pairs = std::make_shared<std::vector<std::pair<float, std::int32_t>>>(vocab);
      row.peer_one_thread("std::partial_sort", [=] {
        for (Index r = 0; r < batch; ++r) {
          for (Index i = 0; i < vocab; ++i)
            (*pairs)[static_cast<std::size_t>(i)] = {largest ? -(*x)(r, i) : (*x)(r, i),
                                                     static_cast<std::int32_t>(i)};
          std::partial_sort(pairs->begin(), pairs->begin() + k, pairs->end());
          for (Index j = 0; j < k; ++j) {
            (*ids)(r, j) = (*pairs)[static_cast<std::size_t>(j)].second;
            (*values)(r, j) = (*x)(r, (*ids)(r, j));
          }
        }
      });
    }
}

}  // namespace

EIGENFORMER_BENCHMARK(top_k_cases)
