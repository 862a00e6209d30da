/// \file
/// Norms, biases and sinks of a layer out of a model's files.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model_packing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline QkvRows qkv_rows(const ModelConfig& model) {
  return {model.qkv_layout, model.shape.heads, model.shape.kv_heads, model.shape.head_dim};
}

/// All of them are packed at once, as views that live that long.
template <typename T, Device D>
class LayerVectors {
 public:
  LayerVectors(ModelPacking<T, D>& to, Index layer)
      : to_(to), m_(to.model), from_(to.from), layer_(layer) {}

  void load() {
    norms();
    biases();
    qkv_biases();
    if (m_.form.sinks) set(views_.sinks, from_.vector(of_layer(m_.names.sinks), m_.shape.heads));
    to_.pack(layer_, views_, to_.weights->storage());
  }

 private:
  using Vector = std::vector<float>;
  using Views = DecoderLayerViews<float>;
  using Place = decltype(Views::attention_norm);

  void norms() {
    const ModelNames& n = m_.names;
    const DecoderForm& form = m_.form;
    const Index d = m_.shape.features;
    if (form.norm_before()) {
      norm(views_.attention_norm, &views_.attention_norm_bias, n.attention_norm, d);
      if (!form.shares_norm())
        norm(views_.feed_forward_norm, &views_.feed_forward_norm_bias, n.feed_forward_norm, d);
    }
    if (form.norm_after()) {
      norm(views_.after_attention_norm, nullptr, n.after_attention_norm, d);
      norm(views_.after_feed_forward_norm, nullptr, n.after_feed_forward_norm, d);
    }
    if (form.query_key_norm == QueryKeyNorm::layer_head) {
      head_norms(views_.query_norm, views_.query_norm_bias, n.query_norm, n.query, m_.shape.heads);
      head_norms(views_.key_norm, views_.key_norm_bias, n.key_norm, n.key, m_.shape.kv_heads);
    } else if (form.query_key_norm != QueryKeyNorm::none) {
      norm(views_.query_norm, nullptr, n.query_norm,
           form.query_key_norm_weights(m_.shape, m_.shape.heads));
      norm(views_.key_norm, nullptr, n.key_norm,
           form.query_key_norm_weights(m_.shape, m_.shape.kv_heads));
    }
  }
  /// Weights, and biases where files have them, of every head that `matrix` gives.
  void head_norms(Place& to, Place& to_bias, const std::string& name, const std::string& matrix,
                  Index heads) {
    const Index width = m_.shape.head_dim;
    switch (m_.head_norm_layout) {
      case HeadNormLayout::stacked:
        return set(to, from_.all_of(of_layer(weight_name(name)), {heads, width}));
      case HeadNormLayout::shared: {
        // There are as many heads, before memory is taken for them.
        from_.at(of_layer(weight_name(matrix)), {heads * width, m_.shape.features});
        set(to, repeated(from_.vector(of_layer(weight_name(name)), width), heads));
        return set(to_bias, repeated(from_.vector(of_layer(bias_name(name)), width), heads));
      }
      case HeadNormLayout::apart:
        break;
    }
    Vector all;
    for (Index h = 0; h < heads; ++h) {
      const std::string one = name + ".norms." + std::to_string(h);
      const Vector part = from_.vector(of_layer(weight_name(one)), width);
      all.insert(all.end(), part.begin(), part.end());
    }
    set(to, std::move(all));
  }
  static Vector repeated(const Vector& values, Index times) {
    Vector all;
    for (Index i = 0; i < times; ++i) all.insert(all.end(), values.begin(), values.end());
    return all;
  }
  void norm(Place& to, Place* to_bias, const std::string& name, Index size) {
    set(to, from_.vector(of_layer(weight_name(name)), size, m_.norm_plus_one ? 1.0f : 0.0f));
    if (to_bias != nullptr && m_.norm_bias) bias(*to_bias, name, size);
  }

  void biases() {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, hidden = m_.shape.hidden;
    if (m_.output_bias) bias(views_.output_bias, n.output, d);
    if (m_.form.has_experts(layer_)) {
      const Index experts = m_.form.experts.count;
      if (m_.router_bias) bias(views_.router_bias, n.router, experts);
      if (m_.router_correction)
        set(views_.router_correction, from_.vector(of_layer(n.router_correction), experts));
    } else if (m_.form.feed_forward_bias) {
      if (m_.form.gated) bias(views_.gate_bias, n.gate, hidden);
      bias(views_.up_bias, n.up, hidden);
      bias(views_.down_bias, n.down, d);
    }
  }
  void qkv_biases() {
    const ModelNames& n = m_.names;
    const QkvRows rows = qkv_rows(m_);
    if (!m_.qkv_bias) return;
    if (m_.qkv_layout == QkvLayout::apart) {
      bias(views_.query_bias, n.query, rows.count(0));
      bias(views_.key_bias, n.key, rows.count(1));
      bias(views_.value_bias, n.value, rows.count(2));
    } else {
      const Vector all = from_.vector(of_layer(bias_name(n.qkv)), rows.total());
      set(views_.query_bias, rows.gather(0, all.data(), 1));
      set(views_.key_bias, rows.gather(1, all.data(), 1));
      set(views_.value_bias, rows.gather(2, all.data(), 1));
    }
  }
  void bias(Place& to, const std::string& name, Index size) {
    set(to, from_.vector(of_layer(bias_name(name)), size));
  }

  void set(Place& to, Vector from) {
    values_.push_back(std::move(from));
    to.emplace(values_.back().data(), static_cast<Index>(values_.back().size()));
  }
  std::string of_layer(std::string_view name) const { return to_.of_layer(layer_, name); }

  ModelPacking<T, D>& to_;
  const ModelConfig& m_;
  ModelTensors& from_;
  Index layer_;
  std::vector<Vector> values_;
  Views views_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
