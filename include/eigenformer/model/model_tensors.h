/// \file
/// The tensors of a model's files as a loader asks for them: by the names that files have for them,
/// in the shapes that the configuration says, with what was never asked for an error.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config.h"
#include "dequantize.h"
#include "stored_matrix.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Called as a model is packed, with bytes of tensors done and in all.
using LoadProgress = std::function<void(std::uint64_t done, std::uint64_t total)>;

namespace detail {

class ModelTensors {
 public:
  using Vector = std::vector<float>;
  /// Called with bytes of a file that are not needed again: their memory may go.
  using Release = std::function<void(std::span<const std::byte>)>;

  ModelTensors(const StoredTensors& tensors, const LoadProgress& progress, const Release& release)
      : tensors_(tensors), progress_(progress), release_(release) {
    for (const auto& [name, tensor] : tensors_.map()) total_ += tensor.bytes.size();
  }

  /// A tensor by its name, with or without what comes before the decoder's own names in files of
  /// larger or of bare models.
  const StoredTensor* find(const std::string& name) {
    part_ = name;
    const std::size_t dot = name.find('.');
    for (const std::string& tried :
         {name, "language_model." + name, "model.language_model." + name.substr(dot + 1),
          name.substr(dot + 1), transformers_name(name)}) {
      const StoredTensor* const tensor = tensors_.find(tried);
      if (tensor == nullptr) continue;
      if (used_.insert(tried).second) done_ += tensor->bytes.size();
      found_.push_back(tensor);
      return tensor;
    }
    return nullptr;
  }
  const StoredTensor& at(const std::string& name, const std::vector<std::int64_t>& shape) {
    const StoredTensor* const tensor = find(name);
    if (tensor == nullptr) fail(name, "this tensor is missing");
    if (tensor->shape != shape)
      fail(name, "has shape " + stored_shape_text(tensor->shape) + ", the configuration says " +
                     stored_shape_text(shape));
    return *tensor;
  }
  Vector vector(const std::string& name, Index size, float plus = 0) {
    const StoredTensor& tensor = at(name, {size});  // before memory is taken for what may be a lie
    Vector values(static_cast<std::size_t>(size));
    dequantize_rows(tensor, 0, values);
    for (float& value : values) value += plus;
    return values;
  }
  /// The numbers of a tensor of two dimensions.
  Vector all_of(const std::string& name, const std::vector<std::int64_t>& shape) {
    const StoredTensor& tensor = at(name, shape);
    Vector values(static_cast<std::size_t>(shape[0] * shape[1]));
    dequantize_rows(tensor, 0, values);
    return values;
  }
  /// (rows, columns), or the other way round in the file.
  template <typename D>
  StoredMatrix matrix(const D& device, const std::string& name, Index rows, Index columns,
                      bool transposed, bool keeps_int4 = false) {
    std::vector<std::int64_t> shape{rows, columns};
    if (transposed) std::swap(shape[0], shape[1]);
    const StoredTensor* const tensor = rows == 1 ? find(name) : nullptr;
    if (tensor != nullptr && tensor->shape.size() == 1) shape.erase(shape.begin());  // one row
    return StoredMatrix(device, at(name, shape), transposed, keeps_int4);
  }

  /// Whether the files have a tensor of just this name; it does not count as asked for.
  bool contains(std::string_view name) const { return tensors_.find(name) != nullptr; }
  /// The name that was asked for last.
  const std::string& last() const { return part_; }
  [[noreturn]] void fail(const std::string& name, const std::string& reason) const {
    fail_model(tensors_.file(), name, reason);
  }

  void report() const {
    if (progress_) progress_(done_, total_);
  }
  /// These bytes of a tensor are packed.
  void release(std::span<const std::byte> bytes) const { release_(bytes); }
  /// All that was found so far is packed.
  void release() {
    for (const StoredTensor* const tensor : found_) release_(tensor->bytes);
    found_.clear();
  }

  /// Tensors of the file that are no part of the decoder as configured: an error, but for what
  /// files carry without need.
  void require_all_used(const ModelConfig& config) const {
    for (const auto& [name, tensor] : tensors_.map()) {
      if (used_.contains(name)) continue;
      const auto ends = [&, n = std::string_view(name)](std::string_view end) {
        return n.ends_with(end);
      };
      const bool buffer = ends(".rotary_emb.inv_freq") || ends(".attn.bias") ||
                          ends(".attn.masked_bias") || ends(".attention.bias") ||
                          ends(".attention.masked_bias") || name == "rope_freqs.weight" ||
                          name == "rope_factors_long.weight" || name == "rope_factors_short.weight";
      const bool copy = config.tied_head && ends(config.names.head + ".weight");
      const bool vision = name.find("vision_tower.") != std::string::npos ||
                          name.find("multi_modal_projector.") != std::string::npos;
      bool further = false;
      for (Index l = 0; l < config.further_layers && !further; ++l)
        further = name.find(config.names.layer + std::to_string(config.shape.layers + l) + ".") !=
                  std::string::npos;
      if (!buffer && !copy && !vision && !further)
        fail(name, "no part of a " + config.family + " model has this name");
    }
  }

 private:
  /// Mixtral's blocks in transformers, which calls them as other families'.
  static std::string transformers_name(std::string name) {
    constexpr std::string_view block = ".block_sparse_moe.";
    if (const std::size_t at = name.find(block); at != std::string::npos)
      name.replace(at, block.size(), ".mlp.");
    return name;
  }

  const StoredTensors& tensors_;
  const LoadProgress& progress_;
  const Release& release_;
  std::set<std::string, std::less<>> used_;
  std::vector<const StoredTensor*> found_;
  std::string part_;
  std::uint64_t done_ = 0, total_ = 0;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
