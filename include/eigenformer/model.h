/// \file
/// Models as people have them, loaded, asked and made to write: a folder of Hugging Face's
/// (config.json, *.safetensors, tokenizer.json), a GGUF file, or one that was packed before.
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
///   ef::pack_model<float>(device, "Llama-3.2-1B", "llama.packed",
///                         {.weights = ef::WeightFormat::int8});
///   ef::Model<float> mapped = ef::load_model<float>("llama.packed");  // the file is all it needs
///
/// Part of the component eigenformer::model (nlohmann-json, PCRE2). Families: model/families.h and
/// model/gguf_families.h. T is the scalar of activations and caches. Files are not believed:
/// ModelFileError (a std::runtime_error) names file, tensor and reason for anything that is not
/// what it claims to be, and nothing is read out of bounds.
///
/// Weights as stored (ef::WeightFormat::as_stored): F32, BF16 and F16 tensors stay what they are
/// where the activations have products for them (decoder/packed_weights.h), and logits are those of
/// the widened weights; MXFP4 of safetensors becomes bfloat16, which is exact. Blocks of GGUF in
/// four bits (Q4_0, Q4_1, Q4_K) are INT4 by groups of 32 inputs, with the file's values, scales and
/// minimums: what a weight stands for has the bits that the file says. Other blocks, and those of
/// the head, become INT8 by such groups (double where the activations are); a router of experts has
/// the scalar of the activations. Of Q8_0 these are the file's own values and scales wherever the
/// largest value of a block is 127 in magnitude, as every writer of max / 127 has it: a matrix of
/// such blocks alone takes the file's bytes (on a GPU 36 for 34). Other blocks (a -128 too) and
/// other formats are quantized again, by at most 1 / 254 of the group's largest, with float scales.
/// Query, key and value share a format, gate and up do, and an expert's gate, up and down: INT4
/// where all are in four bits; where the file has several formats else, INT8 if one of them is in
/// blocks, and float if none is. Experts of a layer whose formats then differ are refused.
///
/// Cost: loading reads the file once and packs on the device; blocks, transposed matrices and MXFP4
/// are converted on its threads; what lies there as numbers is read twice from memory for INT8 and
/// INT4. Beside the packed weights it holds no more than the matrices of one product as float and
/// the pages of one layer, which are given back when it is packed; of the head, which comes last, a
/// few MB. A head that is the embedding too is one tensor, the packed one, INT8 where the weights
/// are INT8 or INT4. Another embedding stays in the file, which stays mapped, in whatever format: a
/// row of blocks becomes numbers when a token asks for it (on a GPU the table is float). With
/// LoadOptions::cache the second start maps what the first packed (model/packed_file.h), each
/// matrix in its own format; a file of pack_model is mapped at once.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "decoder.h"
#include "model/model_source.h"
#include "model/packed_model.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct LoadOptions {
  WeightStorage weights = WeightFormat::activation;  ///< of linear layers, quantized on load
  Index length = 0;            ///< positions that will be served, where rotations depend on it
  LoadProgress progress = {};  ///< called as tensors are packed
  /// Where packed weights are kept, so that the next start maps them in place of packing: a file,
  /// or a folder for those of several models. One that is out of date (the model's files have
  /// changed, another format, ISA or way of packing) is made again; one that is no such file, or
  /// damaged, is refused; one that cannot be written is no error. On CPUs alone
  /// (std::invalid_argument elsewhere).
  std::filesystem::path cache = {};
  /// Called with what is worth to be said and is no error: a cache that could not be written.
  std::function<void(const std::string& text)> warning = {};
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

template <typename T, typename D, typename F>
auto open_packed_model(const D& device, const std::filesystem::path& path,
                       const LoadOptions& options, F&& f) -> Model<T, D> {
  if constexpr (CpuDevice<D>) {
    constexpr auto name = "load_model";
    require_that(options.cache.empty(), name, "cache is given, and the model is packed");
    const auto file = std::make_shared<const MappedFile>(path);
    const PackedModelFile packed(file->bytes(), file->name(), file);
    require_that(options.weights.format == WeightFormat::activation ||
                     packing_key<T>(device, options.weights) ==
                         packing_key<T>(device, packed.storage<T>(device)),
                 name, "weights are asked for in another format than the packed ones of ",
                 file->name(), ", which are ", key_line(packed.key(), "weights"));
    try {
      auto model = packed.read<T>(device, {.length = options.length}, f);
      file->advise(file->bytes(), FileAdvice::soon);
      return model;
    } catch (const std::logic_error& error) {  // sizes that overflow, or a part that is missing
      fail_model(file->name(), "", error.what());
    }
  } else {
    fail<std::invalid_argument>("load_model: packed files are for devices of the CPU");
  }
}

}  // namespace detail

/// The model in a folder, in a file whose name ends with .gguf, or in one that pack_model wrote.
/// Throws ModelFileError; std::invalid_argument for a cache of a packed file, or another format of
/// its weights than they have.
template <FloatingScalar T = float, Device D>
Model<T, D> load_model(const D& device, const std::filesystem::path& path,
                       const LoadOptions& options = {}) {
  const auto whole = [&](ModelConfig config, Tokenizer tokenizer, auto weights) {
    return Model<T, D>(std::move(config), std::move(tokenizer), std::move(weights), device);
  };
  std::error_code problem;
  if (path.extension() != ".gguf" && std::filesystem::is_regular_file(path, problem))
    return detail::open_packed_model<T>(device, path, options, whole);
  return detail::with_model_source(path, [&](const auto& source) {
    ModelConfig config = source.config({.length = options.length});
    Tokenizer tokenizer = source.tokenizer();
    auto weights = detail::kept_weights<T>(
        device, path, options.cache, config, options.weights,
        [&] {
          return source.template weights<T>(device, config, options.weights, options.progress);
        },
        [&](const char* text) {
          if (options.warning) options.warning(text);
        });
    return whole(std::move(config), std::move(tokenizer), std::move(weights));
  });
}
template <FloatingScalar T = float>
Model<T> load_model(const std::filesystem::path& path, const LoadOptions& options = {}) {
  static const Eigen::DefaultDevice here;
  return load_model<T>(here, path, options);
}

/// Packs a model, a folder or a .gguf file, into one file that load_model maps: weights in
/// options.weights for the kernels of `device`, which must be a CPU's, and what is beside them. The
/// file appears whole or not at all; another packed file is replaced, any other is not. Throws what
/// load_model throws; std::invalid_argument where `packed` ends with .gguf, which load_model would
/// read as such a file.
template <FloatingScalar T = float, Device D>
void pack_model(const D& device, const std::filesystem::path& path,
                const std::filesystem::path& packed, const LoadOptions& options = {}) {
  static_assert(CpuDevice<D>, "eigenformer: files of packed models are for CPU devices");
  detail::require_that(options.cache.empty(), "pack_model", "cache is given, expected none");
  detail::require_replaceable(packed);
  detail::with_model_source(path, [&](const auto& source) {
    const ModelConfig config = source.config({.length = options.length});
    source.tokenizer();  // refused now rather than where the file is opened
    const auto weights =
        source.template weights<T>(device, config, options.weights, options.progress);
    detail::write_packed_model(device, *weights, source, packed);
  });
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "model/generate.h"
