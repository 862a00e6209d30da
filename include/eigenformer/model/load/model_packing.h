/// \file
/// What the parts of a model's loader share: tensors by the names of a layer, the format that each
/// product is packed in, and the packed weights that come out.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../decoder/packed_weights.h"
#include "../config.h"
#include "../model_tensors.h"
#include "../stored_matrix.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline std::string weight_name(std::string_view name) { return std::string(name) + ".weight"; }
inline std::string bias_name(std::string_view name) { return std::string(name) + ".bias"; }

/// Weights are packed matrix by matrix.
template <typename T, Device D>
struct ModelPacking {
  using Weights = PackedDecoderWeights<T>;
  using Vector = std::vector<float>;
  using Views = DecoderLayerViews<float>;

  ModelPacking(const D& on_device, const ModelConfig& config, const StoredTensors& tensors,
               const WeightStorage& storage, const LoadProgress& progress,
               const ModelTensors::Release& release)
      : device(on_device),
        model(config),
        from(tensors, progress, release),
        weights(std::make_shared<Weights>(config.shape, storage, config.form)) {}

  std::string of_layer(Index l, std::string_view name) const {
    return model.names.layer + std::to_string(l) + "." + std::string(name);
  }

  StoredMatrix matrix(const std::string& name, Index rows, Index columns) {
    return from.matrix(device, name, rows, columns, model.transposed, keeps_int4());
  }
  /// A matrix out of a stack of experts.
  StoredMatrix expert_matrix(const StoredTensor& rows) const {
    return {device, rows, false, keeps_int4()};
  }
  bool keeps_int4() const {
    return stores<T, int4> && weights->storage().format == WeightFormat::as_stored;
  }

  StoredMatrix matrix_of(Index l, const std::string& name, Index rows, Index columns) {
    return matrix(of_layer(l, weight_name(name)), rows, columns);
  }

  /// What the matrices of one product are packed in.
  template <typename... Matrices>
  WeightStorage storage_of(const Matrices&... matrices) const {
    if ((matrices.is_int4() && ...)) return weights->storage();  // as stored
    return storage_for({matrices.stored()...});
  }
  WeightStorage storage_for(std::initializer_list<StoredFormat> stored) const {
    const WeightStorage storage = weights->storage();
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
    weights->pack_layer(device, l, views, storage, alone);
    from.report();
  }

  /// One matrix of a layer; place(views) points to where it belongs.
  template <typename Place>
  void pack_one(Index l, const std::string& name, Index rows, Index columns, Place&& place) {
    pack_one(l, matrix_of(l, name, rows, columns), place);
  }
  template <typename Place>
  void pack_one(Index l, StoredMatrix one, Place&& place) {
    visit_matrices(
        device,
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
    StoredMatrix one = matrix_of(l, name, rows, model.shape.features);
    if (one.is_int4()) one.convert(device);
    pack_one(l, std::move(one), place);
  }

  const D& device;
  const ModelConfig& model;
  ModelTensors from;
  std::shared_ptr<Weights> weights;
  SelfCommunicator alone;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
