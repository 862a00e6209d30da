/// \file
/// Loss and optimizer. The loss waits for the host in each call, as its manual says.
#pragma once

#include <eigenformer/loss.h>
#include <eigenformer/optimizer.h>

#include <memory>

#include "rows.h"

namespace gpu_day {

inline void add_training_rows(Rows& rows) {
  using T = ef::bfloat16;
  constexpr Index tokens = 1024, vocabulary = 128256, count = Index{1} << 26;
  rows.push_back({"loss", "cross_entropy_with_gradient 1024 x 128256 bfloat16",
                  4.0 * tokens * vocabulary, 0, Peak::none, [](Memory& memory) -> Call {
                    auto logits = memory.tensor<T>(tokens, vocabulary);
                    auto gradient = memory.tensor<T>(tokens, vocabulary);
                    std::vector<Index> targets(tokens);
                    for (Index t = 0; t < tokens; ++t)
                      targets[static_cast<std::size_t>(t)] = t * 97 % vocabulary;
                    return [=, &memory] {
                      ef::cross_entropy_with_gradient_into(memory.device(), gradient, logits,
                                                           targets, 1.0 / tokens);
                    };
                  }});
  rows.push_back({"optimizer", "AdamW 64 Mi parameters float", 28.0 * count, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    const std::vector<ef::Parameter> parameters{
                        {memory.tensor<float>(count), memory.tensor<float>(count)}};
                    const auto optimizer = std::make_shared<ef::AdamW>(
                        parameters, ef::AdamWOptions{}, ef::memory_of(memory.device()));
                    return [=, &memory] { optimizer->step(memory.device()); };
                  }});
  rows.push_back({"optimizer", "gradient_norm 64 Mi parameters float", 4.0 * count, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    const std::vector<ef::Parameter> parameters{
                        {memory.tensor<float>(count), memory.tensor<float>(count)}};
                    return [=, &memory] { ef::gradient_norm(memory.device(), parameters); };
                  }});
}

}  // namespace gpu_day
