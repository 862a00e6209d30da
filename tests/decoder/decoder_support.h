/// \file
/// The small decoder that the tests of this room share.
#pragma once

#include <memory>

#include <eigenformer/decoder.h>

#include "compare.h"

namespace eigenformer_test {

inline constexpr ef::DecoderConfig kConfig{.vocabulary = 37,
                                           .features = 24,
                                           .layers = 2,
                                           .heads = 4,
                                           .kv_heads = 2,
                                           .head_dim = 6,
                                           .hidden = 40};

inline const Eigen::DefaultDevice kOneThread;

/// Weights large enough for the branches to matter.
inline std::shared_ptr<ef::DecoderWeights> make_weights(const ef::DecoderConfig& config = kConfig,
                                                        unsigned seed = 5) {
  auto weights = std::make_shared<ef::DecoderWeights>(config, seed);
  for (ef::Parameter& parameter : weights->parameters())
    for (Index i = 0; i < parameter.value.size(); ++i)
      if (parameter.value(i) != 1.0f) parameter.value(i) *= 10.0f;
  return weights;
}

}  // namespace eigenformer_test
