/// \file
/// A model's tensors, from its files into packed weights: one linear layer after the other, read
/// once (twice for INT8 and INT4) where they lie, so that nothing but the largest of them is ever
/// held beside the packed ones.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../decoder/packed_weights.h"
#include "config.h"
#include "model_tensors.h"
#include "mxfp4.h"
#include "stored_matrix.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename T, Device D>
class ModelLoader {
 public:
  using Weights = PackedDecoderWeights<T>;
  using Vector = std::vector<float>;
  ModelLoader(const D& device, const ModelConfig& config, const StoredTensors& tensors,
              const WeightStorage& storage, const LoadProgress& progress,
              const ModelTensors::Release& release)
      : device_(device),
        m_(config),
        from_(tensors, progress, release),
        weights_(std::make_shared<Weights>(config.shape, storage, config.form)) {}

  /// `owner` keeps the tensors' memory alive: the embedding stays there where its scalar allows it.
  std::shared_ptr<const Weights> load(std::shared_ptr<const void> owner) {
    try {
      for (Index l = 0; l < m_.shape.layers; ++l) load_layer(l);
      load_rest(std::move(owner));
      from_.require_all_used(m_);
      weights_->require_complete();
    } catch (const std::invalid_argument& error) {  // what packing refuses: NaN, infinity
      from_.fail(from_.last(), error.what());
    }
    return weights_;
  }

 private:
  using Views = DecoderLayerViews<float>;

  std::string weight(std::string_view name) const { return std::string(name) + ".weight"; }
  std::string bias(std::string_view name) const { return std::string(name) + ".bias"; }
  std::string of_layer(Index l, std::string_view name) const {
    return m_.names.layer + std::to_string(l) + "." + std::string(name);
  }

  StoredMatrix matrix(const std::string& name, Index rows, Index columns) {
    return from_.matrix(device_, name, rows, columns, m_.transposed, keeps_int4());
  }
  /// A matrix out of a stack of experts.
  StoredMatrix expert_matrix(const StoredTensor& rows) const {
    return {device_, rows, false, keeps_int4()};
  }
  bool keeps_int4() const {
    return stores<T, int4> && weights_->storage().format == WeightFormat::as_stored;
  }

  // ---- a layer ----------------------------------------------------------------------------------

  /// What the matrices of one product are packed in.
  template <typename... Matrices>
  WeightStorage storage_of(const Matrices&... matrices) const {
    if ((matrices.is_int4() && ...)) return weights_->storage();  // as stored
    return storage_for({matrices.stored()...});
  }
  WeightStorage storage_for(std::initializer_list<StoredFormat> stored) const {
    const WeightStorage storage = weights_->storage();
    if (storage.format != WeightFormat::as_stored) return storage;
    if (std::any_of(stored.begin(), stored.end(),
                    [](StoredFormat format) { return layout_of(format).block_elements > 1; }))
      return std::is_same_v<T, double> ? WeightStorage() : WeightStorage(WeightFormat::int8, 32);
    const StoredFormat first = *stored.begin();
    if (std::count(stored.begin(), stored.end(), first) != std::ssize(stored))
      return storage;  // of float copies
    return first == StoredFormat::bf16  ? WeightFormat::bfloat16
           : first == StoredFormat::f16 ? WeightFormat::half
                                        : WeightFormat::as_stored;
  }

  template <typename W>
  void pack(Index l, const DecoderLayerViews<W, float>& views, const WeightStorage& storage) {
    weights_->pack_layer(device_, l, views, storage, alone_);
    from_.report();
  }

  void load_layer(Index l) {
    load_vectors(l);
    load_attention(l);
    if (m_.form.has_experts(l))
      load_experts(l);
    else
      load_feed_forward(l);
    from_.release();
  }

  void load_vectors(Index l) {
    const ModelNames& n = m_.names;
    const DecoderForm& form = m_.form;
    const Index d = m_.shape.features, width = m_.shape.head_dim;
    const float plus = m_.norm_plus_one ? 1.0f : 0.0f;
    std::vector<Vector> values;
    values.reserve(16);  // views of them are kept
    Views v;
    const auto set = [&](auto& to, Vector from) {
      values.push_back(std::move(from));
      to.emplace(values.back().data(), static_cast<Index>(values.back().size()));
    };
    const auto norm = [&](auto& to, auto* to_bias, const std::string& name, Index size) {
      set(to, from_.vector(of_layer(l, weight(name)), size, plus));
      if (to_bias != nullptr && m_.norm_bias)
        set(*to_bias, from_.vector(of_layer(l, bias(name)), size));
    };
    if (form.norm_before()) {
      norm(v.attention_norm, &v.attention_norm_bias, n.attention_norm, d);
      if (!form.shares_norm())
        norm(v.feed_forward_norm, &v.feed_forward_norm_bias, n.feed_forward_norm, d);
    }
    constexpr typename Views::Vector* kNone = nullptr;
    if (form.norm_after()) {
      norm(v.after_attention_norm, kNone, n.after_attention_norm, d);
      norm(v.after_feed_forward_norm, kNone, n.after_feed_forward_norm, d);
    }
    if (form.query_key_norm != QueryKeyNorm::none) {
      const bool row = form.query_key_norm == QueryKeyNorm::row;
      norm(v.query_norm, kNone, n.query_norm, row ? m_.shape.heads * width : width);
      norm(v.key_norm, kNone, n.key_norm, row ? m_.shape.kv_heads * width : width);
    }
    if (form.sinks) set(v.sinks, from_.vector(of_layer(l, n.sinks), m_.shape.heads));
    if (m_.output_bias) set(v.output_bias, from_.vector(of_layer(l, bias(n.output)), d));
    if (form.has_experts(l)) {
      if (m_.router_bias)
        set(v.router_bias, from_.vector(of_layer(l, bias(n.router)), form.experts.count));
    } else if (form.feed_forward_bias) {
      const Index hidden = m_.shape.hidden;
      if (form.gated) set(v.gate_bias, from_.vector(of_layer(l, bias(n.gate)), hidden));
      set(v.up_bias, from_.vector(of_layer(l, bias(n.up)), hidden));
      set(v.down_bias, from_.vector(of_layer(l, bias(n.down)), d));
    }
    const QkvRows rows = qkv_rows();
    if (m_.qkv_bias && m_.qkv_layout == QkvLayout::apart) {
      set(v.query_bias, from_.vector(of_layer(l, bias(n.query)), rows.count(0)));
      set(v.key_bias, from_.vector(of_layer(l, bias(n.key)), rows.count(1)));
      set(v.value_bias, from_.vector(of_layer(l, bias(n.value)), rows.count(2)));
    } else if (m_.qkv_bias) {
      const Vector all = from_.vector(of_layer(l, bias(n.qkv)), rows.total());
      set(v.query_bias, rows.gather(0, all.data(), 1));
      set(v.key_bias, rows.gather(1, all.data(), 1));
      set(v.value_bias, rows.gather(2, all.data(), 1));
    }
    pack(l, v, weights_->storage());
  }

  QkvRows qkv_rows() const {
    return {m_.qkv_layout, m_.shape.heads, m_.shape.kv_heads, m_.shape.head_dim};
  }

  void load_attention(Index l) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features;
    const QkvRows rows = qkv_rows();
    WeightStorage storage;
    const auto pack_qkv = [&]<typename View>(const View& q, const View& k, const View& v) {
      DecoderLayerViews<scalar_of_matrix<View>, float> views;
      views.query.emplace(q);
      views.key.emplace(k);
      views.value.emplace(v);
      pack(l, views, storage);
    };
    if (m_.qkv_layout == QkvLayout::apart) {
      StoredMatrix q = matrix(of_layer(l, weight(n.query)), rows.count(0), d),
                   k = matrix(of_layer(l, weight(n.key)), rows.count(1), d),
                   v = matrix(of_layer(l, weight(n.value)), rows.count(2), d);
      storage = storage_of(q, k, v);
      visit_matrices(device_, pack_qkv, q, k, v);
    } else {
      StoredMatrix fused = matrix(of_layer(l, weight(n.qkv)), rows.total(), d);
      const bool stacked = m_.qkv_layout == QkvLayout::stacked;
      if (fused.is_int4() && !stacked) fused.convert(device_);
      storage = storage_of(fused);
      if (stacked)
        visit_matrices(
            device_,
            [&](const auto& all) {
              const Index q = rows.count(0), kv = rows.count(1);
              pack_qkv(rows_of(all, 0, q), rows_of(all, q, kv), rows_of(all, q + kv, kv));
            },
            fused);
      else
        fused.visit([&]<typename W>(const TensorView<const W, 2>& all) {
          const std::array parts{rows.gather(0, all.data(), d), rows.gather(1, all.data(), d),
                                 rows.gather(2, all.data(), d)};
          pack_qkv(TensorView<const W, 2>(parts[0].data(), rows.count(0), d),
                   TensorView<const W, 2>(parts[1].data(), rows.count(1), d),
                   TensorView<const W, 2>(parts[2].data(), rows.count(2), d));
        });
    }
    pack_one(l, n.output, d, rows.count(0), [](auto& views) { return &views.output; });
  }

  /// One matrix of a layer; place(views) points to where it belongs.
  template <typename Place>
  void pack_one(Index l, const std::string& name, Index rows, Index columns, Place&& place) {
    pack_one(l, matrix_of(l, name, rows, columns), place);
  }
  template <typename Place>
  void pack_one(Index l, StoredMatrix one, Place&& place) {
    visit_matrices(
        device_,
        [&]<typename View>(const View& view) {
          DecoderLayerViews<scalar_of_matrix<View>, float> views;
          place(views)->emplace(view);
          pack(l, views, storage_of(one));
        },
        one);
  }
  /// Of rows that decide which experts: never in four bits.
  template <typename Place>
  void pack_router(Index l, const std::string& name, Index rows, Place&& place) {
    StoredMatrix one = matrix_of(l, name, rows, m_.shape.features);
    if (one.is_int4()) one.convert(device_);
    pack_one(l, std::move(one), place);
  }

  void load_feed_forward(Index l) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, hidden = m_.shape.hidden;
    WeightStorage storage;
    const auto pack_gated = [&]<typename View>(const View& gate, const View& up) {
      DecoderLayerViews<scalar_of_matrix<View>, float> views;
      views.gate.emplace(gate);
      views.up.emplace(up);
      pack(l, views, storage);
    };
    if (!m_.form.gated) {
      pack_one(l, n.up, hidden, d, [](auto& views) { return &views.up; });
    } else if (m_.fused_gate_up) {
      StoredMatrix fused = matrix(of_layer(l, weight(n.gate_up)), 2 * hidden, d);
      storage = storage_of(fused);
      visit_matrices(
          device_,
          [&](const auto& both) {
            pack_gated(rows_of(both, 0, hidden), rows_of(both, hidden, hidden));
          },
          fused);
    } else {
      StoredMatrix gate = matrix(of_layer(l, weight(n.gate)), hidden, d),
                   up = matrix(of_layer(l, weight(n.up)), hidden, d);
      storage = storage_of(gate, up);
      visit_matrices(device_, pack_gated, gate, up);
    }
    pack_one(l, n.down, d, hidden, [](auto& views) { return &views.down; });
  }

  // ---- experts ----------------------------------------------------------------------------------

  void load_experts(Index l) {
    const ModelNames& n = m_.names;
    const DecoderExperts& experts = m_.form.experts;
    const Index d = m_.shape.features;
    pack_router(l, n.router, experts.count, [](auto& views) { return &views.router; });
    if (experts.shared_gate)
      pack_router(l, n.shared_gate, 1, [](auto& views) { return &views.shared_gate; });
    if (experts.shared_hidden > 0)
      pack_unit(l, -1, matrix_of(l, n.shared_gate_proj, experts.shared_hidden, d),
                matrix_of(l, n.shared_up_proj, experts.shared_hidden, d),
                matrix_of(l, n.shared_down_proj, d, experts.shared_hidden));
    const std::string of_experts = of_layer(l, n.experts);
    if (!n.all_gates.empty())
      load_experts_by_part(l);
    else if (m_.turned_experts)
      load_turned_experts(l, of_experts);
    else if (from_.find(of_experts + "gate_up_proj") != nullptr)
      load_stacked_experts(l, of_experts);
    else
      for (Index e = 0; e < experts.count; ++e) {
        const std::string own = n.experts + std::to_string(e) + ".";
        pack_unit(l, e, matrix_of(l, own + n.expert_gate, experts.hidden, d),
                  matrix_of(l, own + n.expert_up, experts.hidden, d),
                  matrix_of(l, own + n.expert_down, d, experts.hidden));
      }
  }
  StoredMatrix matrix_of(Index l, const std::string& name, Index rows, Index columns) {
    return matrix(of_layer(l, weight(name)), rows, columns);
  }

  /// A gated unit: expert e, or for -1 the shared one.
  void pack_unit(Index l, Index e, StoredMatrix gate, StoredMatrix up, StoredMatrix down) {
    const WeightStorage storage = storage_of(gate, up, down);
    visit_matrices(
        device_,
        [&]<typename View>(const View& first, const View& second, const View& third) {
          DecoderLayerViews<scalar_of_matrix<View>, float> views;
          views.expert = e;
          views.gate.emplace(first);
          views.up.emplace(second);
          views.down.emplace(third);
          pack(l, views, storage);
        },
        gate, up, down);
  }

  /// gate_up_proj (experts, 2 * hidden, in), each gate above its up, and down_proj (experts, in,
  /// hidden).
  void load_stacked_experts(Index l, const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const StoredTensor& both = from_.at(name + "gate_up_proj", {count, 2 * hidden, d});
    const StoredTensor& downs = from_.at(name + "down_proj", {count, d, hidden});
    for (Index e = 0; e < count; ++e) {
      const StoredTensor gate = stored_rows(both, 2 * e * hidden, hidden),
                         up = stored_rows(both, (2 * e + 1) * hidden, hidden),
                         down = stored_rows(downs, e * d, d);
      pack_unit(l, e, expert_matrix(gate), expert_matrix(up), expert_matrix(down));
    }
  }

  /// Gates, ups and downs of all experts, (experts, out, in) each, and their biases (experts, out).
  void load_experts_by_part(Index l) {
    const ModelNames& n = m_.names;
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const std::array names{of_layer(l, n.all_gates), of_layer(l, n.all_ups),
                           of_layer(l, n.all_downs)};
    const std::array<Index, 3> rows{hidden, hidden, d};
    std::array<const StoredTensor*, 3> parts{};
    std::array<Vector, 3> biases;
    for (std::size_t p = 0; p < 3; ++p) {
      parts[p] = &from_.at(weight(names[p]), {count, rows[p], p < 2 ? d : hidden});
      if (m_.form.feed_forward_bias) biases[p] = from_.all_of(bias(names[p]), {count, rows[p]});
    }
    for (Index e = 0; e < count; ++e) {
      const std::array own{stored_rows(*parts[0], e * rows[0], rows[0]),
                           stored_rows(*parts[1], e * rows[1], rows[1]),
                           stored_rows(*parts[2], e * rows[2], rows[2])};
      pack_unit(l, e, expert_matrix(own[0]), expert_matrix(own[1]), expert_matrix(own[2]));
      if (!m_.form.feed_forward_bias) continue;
      Views views;
      views.expert = e;
      views.gate_bias.emplace(biases[0].data() + e * rows[0], rows[0]);
      views.up_bias.emplace(biases[1].data() + e * rows[1], rows[1]);
      views.down_bias.emplace(biases[2].data() + e * rows[2], rows[2]);
      pack(l, views, weights_->storage());
    }
  }

  /// gpt-oss: gate_up_proj (experts, in, 2 * hidden), columns of gate and up in turn, down_proj
  /// (experts, hidden, in), with biases; or, row by row, in MXFP4.
  void load_turned_experts(Index l, const std::string& name) {
    const Index count = m_.form.experts.count, hidden = m_.form.experts.hidden,
                d = m_.shape.features;
    const Vector up_biases = from_.all_of(name + "gate_up_proj_bias", {count, 2 * hidden}),
                 down_biases = from_.all_of(name + "down_proj_bias", {count, d});
    const WeightStorage storage = storage_for(
        {format_of_turned(name + "gate_up_proj"), format_of_turned(name + "down_proj")});
    for (Index e = 0; e < count; ++e) {
      const Vector both = expert_rows(name + "gate_up_proj", e, 2 * hidden, d),
                   down = expert_rows(name + "down_proj", e, d, hidden);
      Vector parts[2], biases[2];
      for (Vector& part : parts) part.reserve(static_cast<std::size_t>(hidden * d));
      for (Index h = 0; h < hidden; ++h)
        for (Index part = 0; part < 2; ++part) {
          const float* const row = both.data() + (2 * h + part) * d;
          parts[part].insert(parts[part].end(), row, row + d);
          biases[part].push_back(up_biases[static_cast<std::size_t>((e * hidden + h) * 2 + part)]);
        }
      Views views;
      views.expert = e;
      views.gate.emplace(parts[0].data(), hidden, d);
      views.up.emplace(parts[1].data(), hidden, d);
      views.down.emplace(down.data(), d, hidden);
      views.gate_bias.emplace(biases[0].data(), hidden);
      views.up_bias.emplace(biases[1].data(), hidden);
      views.down_bias.emplace(down_biases.data() + e * d, d);
      pack(l, views, storage);
    }
  }
  /// Numbers of MXFP4 are exact in bfloat16.
  StoredFormat format_of_turned(const std::string& name) {
    const StoredTensor* const whole = from_.find(name);
    return whole != nullptr ? whole->format : StoredFormat::bf16;
  }
  /// An expert's matrix (rows, columns) out of a tensor (experts, columns, rows), or MXFP4 rows.
  Vector expert_rows(const std::string& name, Index e, Index rows, Index columns) {
    const Index count = m_.form.experts.count;
    Vector values;
    if (from_.find(name + "_blocks") != nullptr) {
      if (columns % 32 != 0) from_.fail(name, "rows in MXFP4 are no multiple of 32 elements");
      const StoredTensor& blocks = from_.at(name + "_blocks", {count, rows, columns / 32, 16});
      const StoredTensor& scales = from_.at(name + "_scales", {count, rows, columns / 32});
      for (const StoredTensor* tensor : {&blocks, &scales})
        if (tensor->format != StoredFormat::u8)
          from_.fail(tensor->name, "is not of U8, as MXFP4 is");
      values.resize(static_cast<std::size_t>(rows * columns));
      dequantize_mxfp4(blocks, scales, static_cast<std::size_t>(e * rows * (columns / 32)), values);
      return values;
    }
    const StoredTensor& all = from_.at(name, {count, columns, rows});
    Vector turned(static_cast<std::size_t>(rows * columns));
    values.resize(turned.size());
    dequantize_rows(all, e * columns, turned);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < columns; ++c)
        values[static_cast<std::size_t>(r * columns + c)] =
            turned[static_cast<std::size_t>(c * rows + r)];
    return values;
  }

  // ---- embedding and head -----------------------------------------------------------------------

  void load_rest(std::shared_ptr<const void> owner) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, vocabulary = m_.shape.vocabulary;
    const Vector norm = from_.vector(weight(n.norm), d, m_.norm_plus_one ? 1.0f : 0.0f);
    const auto view = [](const Vector& x) {
      return TensorView<const float, 1>(x.data(), static_cast<Index>(x.size()));
    };
    const auto table = [&](const std::string& name, Index rows) {
      return StoredMatrix(device_, from_.at(name, {rows, d}));
    };
    // Newer files call every head lm_head.
    const std::string own = from_.contains("lm_head.weight") ? "lm_head" : n.head;
    pack_head(view(norm), from_.at(weight(m_.tied_head ? n.embedding : own), {vocabulary, d}));
    if (m_.norm_bias) weights_->set_norm_bias(device_, view(from_.vector(bias(n.norm), d)));
    if (m_.head_bias)
      weights_->set_head_bias(device_, view(from_.vector(bias(n.head), vocabulary)));
    if (m_.form.positions > 0)
      table(weight(n.positions), m_.form.positions).visit([&](const auto& positions) {
        weights_->set_positions(device_, positions);
      });
    from_.report();
    from_.release();
    if (m_.tied_head) return weights_->tie_embedding();
    struct Kept {
      StoredMatrix table;
      std::shared_ptr<const void> owner;
    };
    auto kept =
        std::make_shared<Kept>(Kept{table(weight(n.embedding), vocabulary), std::move(owner)});
    if (kept->table.converted()) from_.release();
    kept->table.visit([&](const auto& embedding) { weights_->set_embedding(embedding, kept); });
    if (kept->table.converted()) kept->owner.reset();  // nothing is read from the file any more
    if (memory_of(device_).backend != host_memory.backend)
      weights_->own_embedding(device_, WeightFormat::activation);
    from_.report();
  }

  /// The largest tensor of many models, and the last: on a CPU a slice of it at a time is converted
  /// or mapped.
  void pack_head(const TensorView<const float, 1>& norm, const StoredTensor& tensor) {
    const WeightStorage storage = storage_for({tensor.format});
    if constexpr (CpuDevice<D>) {
      std::optional<StoredTensor> rows;
      std::optional<StoredMatrix> slice;
      const auto pack = [&]<typename W>(std::type_identity<W>) {
        const auto slice_of = [&](Index first, Index count) {
          if (rows) from_.release(rows->bytes);
          rows = stored_rows(tensor, first, count);
          slice.emplace(device_, *rows);
          return slice->view<W>();
        };
        weights_->pack_head_slices(device_, norm, slice_of, storage);
      };
      StoredMatrix::visit_scalar(tensor, pack);
    } else {
      StoredMatrix(device_, tensor).visit([&](const auto& rows) {
        weights_->pack_head(device_, norm, rows, storage, alone_);
      });
    }
  }

  const D& device_;
  const ModelConfig& m_;
  ModelTensors from_;
  std::shared_ptr<Weights> weights_;
  SelfCommunicator alone_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
