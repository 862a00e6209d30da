/// \file
/// A layer out of a model's files, all but its experts.
#pragma once

#include <array>

#include "vectors.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename T, Device D>
class LayerLoader {
 public:
  LayerLoader(ModelPacking<T, D>& to, Index layer) : to_(to), m_(to.model), layer_(layer) {}

  /// All but experts.
  void load() {
    LayerVectors<T, D>(to_, layer_).load();
    load_attention();
    if (!m_.form.has_experts(layer_)) load_feed_forward();
  }

 private:
  void load_attention() {
    const QkvRows rows = qkv_rows(m_);
    if (m_.qkv_layout == QkvLayout::apart)
      load_qkv_apart(rows);
    else
      load_fused_qkv(rows);
    to_.pack_one(layer_, m_.names.output, m_.shape.features, rows.count(0),
                 [](auto& views) { return &views.output; });
  }

  template <typename View>
  void pack_qkv(const View& q, const View& k, const View& v, const WeightStorage& storage) {
    DecoderLayerViews<scalar_of_matrix<View>, float> views;
    views.query.emplace(q);
    views.key.emplace(k);
    views.value.emplace(v);
    to_.pack(layer_, views, storage);
  }
  void load_qkv_apart(const QkvRows& rows) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features;
    StoredMatrix query = to_.matrix_of(layer_, n.query, rows.count(0), d),
                 key = to_.matrix_of(layer_, n.key, rows.count(1), d),
                 value = to_.matrix_of(layer_, n.value, rows.count(2), d);
    const WeightStorage storage = to_.storage_of(query, key, value);
    visit_matrices(
        to_.device,
        [&](const auto& q, const auto& k, const auto& v) { pack_qkv(q, k, v, storage); }, query,
        key, value);
  }
  void load_fused_qkv(const QkvRows& rows) {
    const Index d = m_.shape.features;
    StoredMatrix fused = to_.matrix_of(layer_, m_.names.qkv, rows.total(), d);
    const bool stacked = m_.qkv_layout == QkvLayout::stacked;
    if (fused.is_int4() && !stacked) fused.convert(to_.device);
    const WeightStorage storage = to_.storage_of(fused);
    if (stacked)
      visit_matrices(
          to_.device,
          [&](const auto& all) {
            const Index q = rows.count(0), kv = rows.count(1);
            pack_qkv(rows_of(all, 0, q), rows_of(all, q, kv), rows_of(all, q + kv, kv), storage);
          },
          fused);
    else
      fused.visit([&]<typename W>(const TensorView<const W, 2>& all) {
        const std::array parts{rows.gather(0, all.data(), d), rows.gather(1, all.data(), d),
                               rows.gather(2, all.data(), d)};
        pack_qkv(TensorView<const W, 2>(parts[0].data(), rows.count(0), d),
                 TensorView<const W, 2>(parts[1].data(), rows.count(1), d),
                 TensorView<const W, 2>(parts[2].data(), rows.count(2), d), storage);
      });
  }

  template <typename View>
  void pack_gated(const View& gate, const View& up, const WeightStorage& storage) {
    DecoderLayerViews<scalar_of_matrix<View>, float> views;
    views.gate.emplace(gate);
    views.up.emplace(up);
    to_.pack(layer_, views, storage);
  }
  void load_feed_forward() {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, hidden = m_.shape.hidden;
    if (!m_.form.gated) {
      to_.pack_one(layer_, n.up, hidden, d, [](auto& views) { return &views.up; });
    } else if (m_.fused_gate_up) {
      StoredMatrix fused = to_.matrix_of(layer_, n.gate_up, 2 * hidden, d);
      const WeightStorage storage = to_.storage_of(fused);
      visit_matrices(
          to_.device,
          [&](const auto& both) {
            pack_gated(rows_of(both, 0, hidden), rows_of(both, hidden, hidden), storage);
          },
          fused);
    } else {
      StoredMatrix gate = to_.matrix_of(layer_, n.gate, hidden, d),
                   up = to_.matrix_of(layer_, n.up, hidden, d);
      const WeightStorage storage = to_.storage_of(gate, up);
      visit_matrices(
          to_.device,
          [&](const auto& first, const auto& second) { pack_gated(first, second, storage); }, gate,
          up);
    }
    to_.pack_one(layer_, n.down, d, hidden, [](auto& views) { return &views.down; });
  }

  ModelPacking<T, D>& to_;
  const ModelConfig& m_;
  Index layer_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
