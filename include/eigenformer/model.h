/// \file
/// Models as people have them, loaded, asked and made to write: a folder of Hugging Face's
/// (config.json, *.safetensors, tokenizer.json) or a GGUF file.
///
///   ef::Model<float> model = ef::load_model<float>("Llama-3.2-1B");
///   ef::Model<float> small =
///       ef::load_model<float>("Llama-3.2-1B", {.weights = ef::WeightFormat::int8});  // or int4
///   std::vector<std::int32_t> ids = model.tokenizer().encode("Once upon a time");
///   std::vector<std::int32_t> next = ef::generate(model, ids, {.max_new_tokens = 64});
///   std::string text = model.tokenizer().decode(next);
///   ef::Tensor<float, 2> logits = model.logits(ids);  // (tokens, vocabulary): every position
///
///   ef::generate(model, ids, {.sampling = {.temperature = .8, .top_p = .95}, .seed = 1,
///                             .on_token = [&](std::int32_t id) {
///                               std::cout << stream.push(id) << std::flush;
///                               return true;
///                             }});
///   ef::TextGenerator chat(model);  // text after text: what they share is computed once
///
/// Part of the component eigenformer::model (nlohmann-json, PCRE2). Families: model/families.h and
/// model/gguf_families.h. T is the scalar of activations and caches. Files are not believed:
/// ModelFileError (a std::runtime_error) names file, tensor and reason for anything that is not
/// what it claims to be, and nothing is read out of bounds.
///
/// Weights as stored (ef::WeightFormat::as_stored): F32, BF16 and F16 tensors stay what they are
/// where the activations have products for them (decoder/packed_weights.h), and logits are those of
/// the widened weights; MXFP4 of safetensors becomes bfloat16, which is exact. Blocks of GGUF
/// become INT8 by groups of 32 inputs (double where the activations are). Of Q8_0 these are the
/// file's own values and scales wherever the largest value of a block is 127 in magnitude, as every
/// writer of max / 127 has it; other blocks (a -128 too) and other formats are quantized again, by
/// at most 1 / 254 of the group's largest. Query, key and value share a format, gate and up do, and
/// an expert's gate, up and down: where the file has several it is INT8 if one of them is in
/// blocks, else float. Experts of a layer whose formats then differ are refused.
///
/// Cost: loading reads the weights once (twice for INT8 and INT4) and packs them on the device;
/// beside the packed weights it holds no more than the largest tensor and the pages of one layer,
/// which are given back when it is packed. A head that is the embedding too is one tensor, the
/// packed one, INT8 where the weights are INT8 or INT4. The file stays mapped where another
/// embedding is used as stored. With LoadOptions::cache the second start maps what the first packed
/// (model/packed_file.h), each matrix in its own format.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "decoder.h"
#include "model/families.h"
#include "model/gguf_families.h"
#include "model/load.h"
#include "model/packed_cache.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct LoadOptions {
  WeightStorage weights = WeightFormat::activation;  ///< of linear layers, quantized on load
  Index length = 0;            ///< positions that will be served, where rotations depend on it
  LoadProgress progress = {};  ///< called as tensors are packed
  /// Where packed weights are kept, so that the next start maps them in place of packing: a file,
  /// or a folder for those of several models. One that is out of date (the model's files have
  /// changed, another format or ISA) is made again; one that is no such file, or damaged, is
  /// refused. On CPUs; layers with experts are not kept yet (std::invalid_argument).
  std::filesystem::path cache = {};
};

/// A decoder with the tokenizer and the configuration it came with. Moves, does not copy. The
/// device must outlive it.
template <FloatingScalar T = float, Device D = Eigen::DefaultDevice>
class Model {
 public:
  Model(ModelConfig config, Tokenizer tokenizer,
        std::shared_ptr<const PackedDecoderWeights<T>> weights, const D& device)
      : config_(std::move(config)),
        tokenizer_(std::move(tokenizer)),
        weights_(weights),
        decoder_(std::make_unique<Decoder<T, D>>(std::move(weights), device)),
        device_(&device) {}

  const ModelConfig& config() const { return config_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  /// Steps over caches of your own: decoder.h.
  Decoder<T, D>& decoder() { return *decoder_; }
  const D& device() const { return *device_; }
  /// Bytes of the weights as packed, and of those that every step reads: all but an embedding that
  /// is not the head.
  std::size_t weight_bytes() const { return weights_->bytes(); }
  std::size_t step_bytes() const { return weights_->bytes_of_layers(); }

  /// Pages for `tokens` positions of as many sequences as they are divided among. Throws
  /// std::invalid_argument for a negative number and for pages of no token.
  PagedKvCache<T> make_cache(Index tokens, Index page_size = 16) const {
    const DecoderConfig& c = config_.shape;
    detail::require_that(tokens >= 0, "make_cache", "tokens is ", tokens, ", expected 0 or more");
    detail::require_that(page_size >= 1, "make_cache", "page_size is ", page_size,
                         ", expected 1 or more");
    const PagedKvConfig pages{.layers = c.layers,
                              .kv_heads = c.kv_heads,
                              .head_dim = c.head_dim,
                              .page_size = page_size,
                              .page_count = tokens / page_size + (tokens % page_size != 0 ? 1 : 0)};
    return PagedKvCache<T>(pages, memory_of(*device_));
  }

  /// Logits after every one of the tokens (tokens, vocabulary). Throws std::invalid_argument for an
  /// id outside the vocabulary.
  Tensor<float, 2> logits(std::span<const std::int32_t> ids) {
    const auto count = static_cast<Index>(ids.size());
    if (count == 0) return Tensor<float, 2>(0, config_.shape.vocabulary);
    PagedKvCache<T> cache = make_cache(count);
    const SequenceId sequence = cache.add_sequence();
    const std::vector<Index> offsets{0, count};
    std::vector<Index> all(ids.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Index>(i);
    return decoder_->step({ids, offsets, all}, cache, {&sequence, 1});
  }

 private:
  ModelConfig config_;
  Tokenizer tokenizer_;
  std::shared_ptr<const PackedDecoderWeights<T>> weights_;
  std::unique_ptr<Decoder<T, D>> decoder_;
  const D* device_;
};

namespace detail {

template <typename T, typename D>
auto load_weights(const D& device, const ModelConfig& config, const StoredTensors& tensors,
                  std::shared_ptr<const void> owner, const LoadOptions& options,
                  std::span<const MappedFile> files) {
  const std::function<void(std::span<const std::byte>)> release = [&](auto bytes) {
    for (const MappedFile& file : files) file.advise(bytes, FileAdvice::done);
  };
  return ModelLoader<T, D>(device, config, tensors, options.weights, options.progress, release)
      .load(std::move(owner));
}

}  // namespace detail

/// The model in a folder, or in a file whose name ends with .gguf. Throws ModelFileError.
template <FloatingScalar T = float, Device D>
Model<T, D> load_model(const D& device, const std::filesystem::path& path,
                       const LoadOptions& options = {}) {
  ModelConfig config;
  Tokenizer tokenizer;
  std::shared_ptr<const PackedDecoderWeights<T>> weights;
  const auto kept = [&](auto&& make) {
    weights = detail::kept_weights<T>(device, path, options.cache, config, options.weights, make);
  };
  if (path.extension() == ".gguf") {
    const auto file = std::make_shared<const Gguf>(path);
    config = gguf_model_config(*file, {.length = options.length});
    tokenizer = Tokenizer::from_gguf(*file);
    kept([&] {
      return detail::load_weights<T>(device, config, file->tensors(), file, options,
                                     {&file->file(), 1});
    });
  } else {
    config = read_model_config(path / "config.json", {.length = options.length});
    tokenizer = Tokenizer::from_folder(path);
    kept([&] {
      const auto files = std::make_shared<const Safetensors>(path);
      return detail::load_weights<T>(device, config, files->tensors(), files, options,
                                     files->files());
    });
  }
  return {std::move(config), std::move(tokenizer), std::move(weights), device};
}
template <FloatingScalar T = float>
Model<T> load_model(const std::filesystem::path& path, const LoadOptions& options = {}) {
  static const Eigen::DefaultDevice here;
  return load_model<T>(here, path, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "model/generate.h"
