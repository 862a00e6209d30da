/// \file
/// A model's tensors, from its files into packed weights: one linear layer after the other, read
/// once (twice for INT8 and INT4) where they lie, so that nothing but the largest of them is ever
/// held beside the packed ones.
#pragma once

#include <memory>
#include <stdexcept>
#include <utility>

#include "../core/memory.h"
#include "load/embedding.h"
#include "load/experts.h"
#include "load/layer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// `owner` keeps the tensors' memory alive: the embedding stays there where its scalar allows it.
template <typename T, Device D>
std::shared_ptr<const PackedDecoderWeights<T>> load_tensors(ModelPacking<T, D>& to,
                                                            std::shared_ptr<const void> owner) {
  const ModelConfig& model = to.model;
  try {
    for (Index l = 0; l < model.shape.layers; ++l) {
      LayerLoader<T, D>(to, l).load();
      if (model.form.has_experts(l)) ExpertLoader<T, D>(to, l).load();
      to.from.release();
    }
    // 17 MB of 1,390 after the layers of a model of 1.2 billion weights in blocks, float copies of
    // which lay between packed ones; the head comes on top of what is held.
    give_back_free_pages();
    EndsLoader<T, D>(to).load(std::move(owner));
    to.from.require_all_used(model);
    to.weights->require_complete();
  } catch (const std::invalid_argument& error) {  // what packing refuses: NaN, infinity
    to.from.fail(to.from.last(), error.what());
  }
  return to.weights;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
