/// \file
/// Sampling of 64 rows of 128,256 logits: one read of them is the floor.
#pragma once

#include <eigenformer/sampling.h>

#include "rows.h"

namespace gpu_day {
namespace sampling {

constexpr Index kBatch = 64, kVocabulary = 128256;
constexpr double kBytes = 4.0 * kBatch * kVocabulary;

template <typename D>
void add_chain_rows(Rows& rows) {
  if constexpr (ef::RunsOn<ef::cuda::Backend<D>, ef::problem::Sampling<float>>) {
    const auto add = [&](const std::string& name, const ef::SamplingParams& params) {
      rows.push_back({"sampling", "sample " + name + " 64 x 128256 float", kBytes, 0, Peak::none,
                      [=](Memory& memory) -> Call {
                        auto logits = memory.tensor<float>(kBatch, kVocabulary);
                        auto ids = memory.ids(kBatch, 1);
                        return [=, &memory] {
                          ef::Philox random(1);
                          const D& device = memory.device();
                          ef::sample_into(device, ids, logits, params, random);
                        };
                      }});
    };
    add("top-p 0.9", {.top_p = 0.9f});
    add("top-k 50, top-p 0.9", {.top_k = 50, .top_p = 0.9f});
  }
}

}  // namespace sampling

inline void add_sampling_rows(Rows& rows) {
  using namespace sampling;
  rows.push_back({"sampling", "greedy_sample 64 x 128256 float", kBytes, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto logits = memory.tensor<float>(kBatch, kVocabulary);
                    auto ids = memory.ids(kBatch, 1);
                    return [=, &memory] { ef::greedy_sample_into(memory.device(), ids, logits); };
                  }});
  rows.push_back({"sampling", "top_k_sample 50, 64 x 128256 float", kBytes, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto logits = memory.tensor<float>(kBatch, kVocabulary);
                    auto ids = memory.ids(kBatch, 1);
                    return [=, &memory] {
                      ef::Philox random(1);
                      ef::top_k_sample_into(memory.device(), ids, logits, 50, 1.0, random);
                    };
                  }});
  add_chain_rows<Eigen::GpuDevice>(rows);
}

}  // namespace gpu_day
