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

#include "../stored_embedding.h"
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
    // Newer files call every head lm_head.
    const std::string own = from_.contains("lm_head.weight") ? "lm_head" : n.head;
    pack_head(view(norm), from_.at(weight_name(m_.tied_head ? n.embedding : own), {vocabulary, d}));
    if (m_.norm_bias)
      to_.weights->set_norm_bias(to_.device, view(from_.vector(bias_name(n.norm), d)));
    if (m_.head_bias)
      to_.weights->set_head_bias(to_.device, view(from_.vector(bias_name(n.head), vocabulary)));
    if (m_.form.positions > 0)
      StoredMatrix(to_.device, from_.at(weight_name(n.positions), {m_.form.positions, d}))
          .visit([&](const auto& table) { to_.weights->set_positions(to_.device, table); });
    from_.report();
    from_.release();
    if (m_.tied_head) return to_.weights->tie_embedding();
    set_embedding(from_.at(weight_name(n.embedding), {vocabulary, d}), std::move(owner));
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
          // All before it: the system maps pages around those that are looked at, again ones of
          // slices that are packed.
          if (first > 0) from_.release(stored_rows(tensor, 0, first).bytes);
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

  /// Stays where it lies, as numbers or as blocks.
  void set_embedding(const StoredTensor& tensor, std::shared_ptr<const void> owner) {
    if (StoredMatrix::is_read_in_place(tensor))
      StoredMatrix(to_.device, tensor).visit([&](const auto& rows) {
        to_.weights->set_embedding(rows, std::move(owner));
      });
    else
      to_.weights->set_embedding(
          encoded_embedding(tensor.format, tensor.bytes.data(), tensor.rows(), tensor.columns()),
          std::move(owner));
  }

  ModelPacking<T, D>& to_;
  const ModelConfig& m_;
  ModelTensors& from_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
