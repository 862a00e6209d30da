/// \file
/// What a decoder has once, out of a model's files: the last norm, the head, learned positions and
/// the embedding.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "model_packing.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename T, Device D>
class EndsLoader {
 public:
  explicit EndsLoader(ModelPacking<T, D>& to) : to_(to), m_(to.model), from_(to.from) {}

  void load(std::shared_ptr<const void> owner) {
    const ModelNames& n = m_.names;
    const Index d = m_.shape.features, vocabulary = m_.shape.vocabulary;
    const Vector norm = from_.vector(weight_name(n.norm), d, m_.norm_plus_one ? 1.0f : 0.0f);
    const auto view = [](const Vector& x) {
      return TensorView<const float, 1>(x.data(), static_cast<Index>(x.size()));
    };
    const auto table = [&](const std::string& name, Index rows) {
      return StoredMatrix(to_.device, from_.at(name, {rows, d}));
    };
    // Newer files call every head lm_head.
    const std::string own = from_.contains("lm_head.weight") ? "lm_head" : n.head;
    pack_head(view(norm), from_.at(weight_name(m_.tied_head ? n.embedding : own), {vocabulary, d}));
    if (m_.norm_bias)
      to_.weights->set_norm_bias(to_.device, view(from_.vector(bias_name(n.norm), d)));
    if (m_.head_bias)
      to_.weights->set_head_bias(to_.device, view(from_.vector(bias_name(n.head), vocabulary)));
    if (m_.form.positions > 0)
      table(weight_name(n.positions), m_.form.positions).visit([&](const auto& positions) {
        to_.weights->set_positions(to_.device, positions);
      });
    from_.report();
    from_.release();
    if (m_.tied_head) return to_.weights->tie_embedding();
    struct Kept {
      StoredMatrix table;
      std::shared_ptr<const void> owner;
    };
    auto kept =
        std::make_shared<Kept>(Kept{table(weight_name(n.embedding), vocabulary), std::move(owner)});
    if (kept->table.converted()) from_.release();
    kept->table.visit([&](const auto& embedding) { to_.weights->set_embedding(embedding, kept); });
    if (kept->table.converted()) kept->owner.reset();  // nothing is read from the file any more
    if (memory_of(to_.device).backend != host_memory.backend)
      to_.weights->own_embedding(to_.device, WeightFormat::activation);
    from_.report();
  }

 private:
  using Vector = std::vector<float>;

  /// The largest tensor of many models, and the last: on a CPU a slice of it at a time is converted
  /// or mapped.
  void pack_head(const TensorView<const float, 1>& norm, const StoredTensor& tensor) {
    const WeightStorage storage = to_.storage_for({tensor.format});
    if constexpr (CpuDevice<D>) {
      std::optional<StoredTensor> rows;
      std::optional<StoredMatrix> slice;
      const auto pack = [&]<typename W>(std::type_identity<W>) {
        const auto slice_of = [&](Index first, Index count) {
          if (rows) from_.release(rows->bytes);
          rows = stored_rows(tensor, first, count);
          slice.emplace(to_.device, *rows);
          return slice->view<W>();
        };
        to_.weights->pack_head_slices(to_.device, norm, slice_of, storage);
      };
      StoredMatrix::visit_scalar(tensor, pack);
    } else {
      StoredMatrix(to_.device, tensor).visit([&](const auto& rows) {
        to_.weights->pack_head(to_.device, norm, rows, storage, to_.alone);
      });
    }
  }

  ModelPacking<T, D>& to_;
  const ModelConfig& m_;
  ModelTensors& from_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
