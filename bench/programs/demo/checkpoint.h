/// \file
/// A trained decoder as a folder of Hugging Face's: config.json of a Llama, model.safetensors and a
/// tokenizer.json of bytes. load_model and transformers read it.
#pragma once

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <eigenformer/decoder/weights.h>
#include <eigenformer/model/dequantize.h>
#include <eigenformer/model/families.h>
#include <eigenformer/model/safetensors.h>
#include <eigenformer/model/tokenizer/text.h>
#include <nlohmann/json.hpp>

namespace demo {

namespace ef = eigenformer;
using ef::Index;

inline std::filesystem::path weights_file(const std::filesystem::path& folder) {
  return folder / "model.safetensors";
}

inline std::filesystem::path config_file(const std::filesystem::path& folder) {
  return folder / "config.json";
}

/// No byte begins or ends a text: without the nulls transformers would take bytes 1 and 2 for that.
inline nlohmann::json config_json(const ef::DecoderConfig& c, Index positions) {
  return {{"architectures", nlohmann::json::array({"LlamaForCausalLM"})},
          {"model_type", "llama"},
          {"vocab_size", c.vocabulary},
          {"hidden_size", c.features},
          {"num_hidden_layers", c.layers},
          {"num_attention_heads", c.heads},
          {"num_key_value_heads", c.kv_heads},
          {"head_dim", c.head_dim},
          {"intermediate_size", c.hidden},
          {"max_position_embeddings", positions},
          {"rms_norm_eps", c.epsilon},
          {"rope_theta", c.rope_base},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", false},
          {"bos_token_id", nullptr},
          {"eos_token_id", nullptr},
          {"torch_dtype", "float32"}};
}

/// Byte-level BPE that merges nothing: each byte of a text is the token of its number.
inline nlohmann::json byte_tokenizer_json() {
  nlohmann::json vocabulary;
  const auto& characters = ef::detail::ByteAlphabet::instance().character;
  for (std::size_t b = 0; b < characters.size(); ++b) vocabulary[characters[b]] = b;
  const nlohmann::json bytes{{"type", "ByteLevel"},
                             {"add_prefix_space", false},
                             {"trim_offsets", false},
                             {"use_regex", false}};
  return {{"version", "1.0"},
          {"added_tokens", nlohmann::json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", bytes},
          {"post_processor", nullptr},
          {"decoder", bytes},
          {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", nlohmann::json::array()}}}};
}

inline void write_json(const std::filesystem::path& path, const nlohmann::json& json) {
  std::ofstream file(path, std::ios::binary);
  file << json.dump(1) << '\n';
  if (!file.flush()) throw std::runtime_error(path.string() + " cannot be written");
}

/// `positions`: of the texts it was trained on.
inline void save(const ef::DecoderWeights& weights, Index positions,
                 const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  std::vector<ef::StoredTensor> tensors;
  for (std::size_t t = 0; t < weights.tensors().size(); ++t) {
    const ef::DecoderTensor& tensor = weights.tensors()[t];
    std::vector<std::int64_t> shape;
    if (tensor.rows > 1) shape.push_back(tensor.rows);
    shape.push_back(tensor.columns);
    const std::span<const float> values(weights.vector(t).data(),
                                        static_cast<std::size_t>(tensor.size()));
    tensors.push_back({tensor.name, ef::StoredFormat::f32, shape, std::as_bytes(values)});
  }
  ef::write_safetensors(weights_file(folder), tensors, {{"format", "pt"}});
  write_json(config_file(folder), config_json(weights.config(), positions));
  write_json(folder / "tokenizer.json", byte_tokenizer_json());
  std::printf("saved %s\n", weights_file(folder).c_str());
}

/// The shape of a model that save() has written, each size within reason.
inline ef::DecoderConfig read_config(const std::filesystem::path& folder) {
  const ef::MappedFile file(config_file(folder));
  const ef::ModelConfig model = ef::parse_model_config(file.text(), file.name());
  const ef::DecoderConfig& c = model.shape;
  if (nlohmann::json::parse(file.text()) != config_json(c, model.positions))
    throw ef::ModelFileError(file.name() + ": is another model's than --save keeps");
  if (c.vocabulary != 256)
    throw ef::ModelFileError(file.name() + ": this job serves bytes and needs a vocabulary of 256");
  for (const Index size : {c.features, c.layers, c.heads, c.kv_heads, c.head_dim, c.hidden})
    if (size > 1 << 20) throw ef::ModelFileError(file.name() + ": a size is beyond 2^20");
  return c;
}

inline std::shared_ptr<ef::DecoderWeights> load(const std::filesystem::path& folder) {
  const ef::DecoderConfig config = read_config(folder);
  const ef::Safetensors file(weights_file(folder));
  // The file must hold what config.json claims before memory is taken for it: the sizes multiply
  // to at most 2^62.
  Index held = 0;
  for (const auto& [name, tensor] : file.tensors().map()) held += tensor.rows() * tensor.columns();
  const Index features = config.features;
  if (static_cast<Index>(file.tensors().map().size()) != 9 * config.layers + 3 ||
      held < 2 * features * config.vocabulary || held < 3 * features * config.hidden ||
      held < 2 * features * config.heads || held / config.head_dim < 2 * features * config.heads)
    throw ef::ModelFileError("model.safetensors: holds less than config.json claims");
  auto weights = std::make_shared<ef::DecoderWeights>(config);
  for (std::size_t t = 0; t < weights->tensors().size(); ++t) {
    const ef::DecoderTensor& tensor = weights->tensors()[t];
    std::vector<std::int64_t> shape{tensor.rows, tensor.columns};
    if (tensor.rows == 1) shape.erase(shape.begin());
    ef::dequantize_rows(file.tensors().at(tensor.name, shape), 0,
                        {weights->matrix(t).data(), static_cast<std::size_t>(tensor.size())});
  }
  return weights;
}

}  // namespace demo
