/// \file
/// The small decoder that the tests of this room share.
#pragma once

#include <list>
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

/// The matrices of a layer as four-bit values, those that ef::WeightFormat::int4 finds for them.
struct Int4Layer {
  Int4Layer(const ef::DecoderLayerViews<float>& from, Index group) {
    const auto set = [&](auto& to, const auto& matrix) {
      if (!matrix.has_value()) return;
      const auto& w = values.emplace_back(
          ef::quantize_weights_int4_with_minimums(*matrix, group, ef::Int4Fit::least_squares));
      to.emplace(ef::Int4View{ef::input_view<2>(w.values), ef::input_view<2>(w.scales),
                              ef::input_view<2>(w.minimums), group});
    };
    set(views.query, from.query);
    set(views.key, from.key);
    set(views.value, from.value);
    set(views.output, from.output);
    set(views.gate, from.gate);
    set(views.up, from.up);
    set(views.down, from.down);
  }
  std::list<ef::QuantizedInt4WithMinimums> values;
  ef::DecoderLayerViews<ef::int4, float> views;
};

}  // namespace eigenformer_test
