// A step of beam search: 8 sequences, 4 beams, a vocabulary of 32000. Limit: one read of the
// scores. Peer: std::partial_sort over all candidates of a sequence.
#include <eigenformer/beam_search.h>

#include <algorithm>
#include <random>
#include <vector>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

void beam_search_cases(bench::Suite& suite) {
  constexpr Index batch = 8, beams = 4, vocab = 32000;
  const auto scores = std::make_shared<ef::Tensor<float, 2>>(batch * beams, vocab);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(-12.0f, 2.0f);
  for (Index i = 0; i < scores->size(); ++i) scores->data()[i] = normal(generator);
  const auto search = std::make_shared<ef::BeamSearch>(
      batch, ef::BeamSearchOptions{.beams = beams, .max_new_tokens = Index{1} << 40});
  auto& row =
      suite.row("beam_search step (8 * 4, 32000) float",
                bench::Limit::read_bytes(static_cast<double>(scores->size()) * sizeof(float)));
  row.ours([=](const auto& device) { search->step(device, *scores); });
  const auto all = std::make_shared<std::vector<std::pair<float, Index>>>(beams * vocab);
  const auto tokens = std::make_shared<std::vector<Index>>(batch * beams);
  row.peer_one_thread("std::partial_sort", [=] {
    for (Index b = 0; b < batch; ++b) {
      for (Index i = 0; i < beams * vocab; ++i)
        (*all)[static_cast<std::size_t>(i)] = {-scores->data()[b * beams * vocab + i], i};
      std::partial_sort(all->begin(), all->begin() + 2 * beams, all->end());
      for (Index i = 0; i < beams; ++i)
        (*tokens)[static_cast<std::size_t>(b * beams + i)] =
            (*all)[static_cast<std::size_t>(i)].second;
    }
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(beam_search_cases)
