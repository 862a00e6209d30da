/// \file
/// Norms and elementwise operators of bfloat16: memory is the limit of all.
#pragma once

#include <eigenformer/activation.h>
#include <eigenformer/normalization.h>
#include <eigenformer/rope.h>

#include "rows.h"

namespace gpu_day {
namespace elementwise {

using T = ef::bfloat16;
constexpr Index kTokens = 4096, kFeatures = 4096, kHidden = 14336;
constexpr double kLine = 2.0 * kTokens * kFeatures, kWide = 2.0 * kTokens * kHidden;  // bytes

}  // namespace elementwise

inline void add_normalization_rows(Rows& rows) {
  using namespace elementwise;
  rows.push_back({"normalization", "rms_norm 4096 x 4096 bfloat16", 2 * kLine, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, kFeatures);
                    auto x = memory.tensor<T>(kTokens, kFeatures);
                    auto weight = memory.tensor<float>(kFeatures);
                    return [=, &memory] { ef::rms_norm_into(memory.device(), y, x, weight); };
                  }});
  rows.push_back({"normalization", "add_rms_norm 4096 x 4096 bfloat16", 4 * kLine, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, kFeatures);
                    auto residual = memory.tensor<T>(kTokens, kFeatures);
                    auto x = memory.tensor<T>(kTokens, kFeatures);
                    auto weight = memory.tensor<float>(kFeatures);
                    return [=, &memory] {
                      ef::add_rms_norm_into(memory.device(), y, residual, x, weight);
                    };
                  }});
  rows.push_back({"normalization", "layer_norm 4096 x 4096 bfloat16", 2 * kLine, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, kFeatures);
                    auto x = memory.tensor<T>(kTokens, kFeatures);
                    auto weight = memory.tensor<float>(kFeatures), bias = weight;
                    return
                        [=, &memory] { ef::layer_norm_into(memory.device(), y, x, weight, bias); };
                  }});
  rows.push_back({"normalization", "rms_norm_backward 4096 x 4096 bfloat16", 3 * kLine, 0,
                  Peak::none, [](Memory& memory) -> Call {
                    auto grad_x = memory.tensor<T>(kTokens, kFeatures);
                    auto grad_y = memory.tensor<T>(kTokens, kFeatures);
                    auto x = memory.tensor<T>(kTokens, kFeatures);
                    auto weight = memory.tensor<float>(kFeatures);
                    auto grad_weight = memory.tensor<float>(kFeatures);
                    return [=, &memory] {
                      ef::rms_norm_backward_into(memory.device(), grad_x, grad_weight, grad_y, x,
                                                 weight);
                    };
                  }});
}

inline void add_elementwise_rows(Rows& rows) {
  using namespace elementwise;
  rows.push_back({"rope", "rope 4096 tokens x 32 heads x 128 bfloat16", 2 * kLine, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, Index{32}, Index{128});
                    auto x = memory.tensor<T>(kTokens, Index{32}, Index{128});
                    std::vector<Index> positions(kTokens);
                    for (Index t = 0; t < kTokens; ++t) positions[static_cast<std::size_t>(t)] = t;
                    return [=, &memory] { ef::rope_into(memory.device(), y, x, positions); };
                  }});
  rows.push_back({"activation", "swiglu 4096 x 14336 bfloat16", 3 * kWide, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, kHidden);
                    auto gate = memory.tensor<T>(kTokens, kHidden);
                    auto up = memory.tensor<T>(kTokens, kHidden);
                    return [=, &memory] { ef::swiglu_into(memory.device(), y, gate, up); };
                  }});
  rows.push_back({"activation", "swiglu_backward 4096 x 14336 bfloat16", 5 * kWide, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto grad_gate = memory.tensor<T>(kTokens, kHidden);
                    auto grad_up = memory.tensor<T>(kTokens, kHidden);
                    auto grad_y = memory.tensor<T>(kTokens, kHidden);
                    auto gate = memory.tensor<T>(kTokens, kHidden);
                    auto up = memory.tensor<T>(kTokens, kHidden);
                    return [=, &memory] {
                      ef::swiglu_backward_into(memory.device(), grad_gate, grad_up, grad_y, gate,
                                               up);
                    };
                  }});
  rows.push_back({"activation", "residual_add 4096 x 4096 bfloat16", 3 * kLine, 0, Peak::none,
                  [](Memory& memory) -> Call {
                    auto y = memory.tensor<T>(kTokens, kFeatures);
                    auto x = memory.tensor<T>(kTokens, kFeatures);
                    auto residual = memory.tensor<T>(kTokens, kFeatures);
                    return [=, &memory] { ef::residual_add_into(memory.device(), y, x, residual); };
                  }});
}

}  // namespace gpu_day
