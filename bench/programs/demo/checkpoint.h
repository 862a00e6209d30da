/// \file
/// Trained weights as a safetensors file: names of Llama checkpoints, the decoder's shape in the
/// metadata.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/decoder/weights.h>
#include <eigenformer/model/dequantize.h>
#include <eigenformer/model/safetensors.h>

namespace demo {

namespace ef = eigenformer;
using ef::Index;

inline std::filesystem::path weights_file(const std::filesystem::path& folder) {
  return folder / "model.safetensors";
}

inline void save(const ef::DecoderWeights& weights, const std::filesystem::path& folder) {
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
  const ef::DecoderConfig& c = weights.config();
  const auto text = [](Index value) { return std::to_string(value); };
  ef::write_safetensors(weights_file(folder), tensors,
                        {{"vocabulary", text(c.vocabulary)},
                         {"features", text(c.features)},
                         {"layers", text(c.layers)},
                         {"heads", text(c.heads)},
                         {"kv_heads", text(c.kv_heads)},
                         {"head_dim", text(c.head_dim)},
                         {"hidden", text(c.hidden)}});
  std::printf("saved %s\n", weights_file(folder).c_str());
}

/// The shape a file claims, each size within reason.
inline ef::DecoderConfig read_config(const ef::Safetensors& file) {
  const auto number = [&](const char* key) -> Index {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end())
      throw ef::ModelFileError(std::string("safetensors: the metadata lacks ") + key +
                               "; was it saved by --save?");
    char* end = nullptr;
    const long long value = std::strtoll(found->second.c_str(), &end, 10);
    if (end == found->second.c_str() || *end != '\0' || value < 1 || value > 1 << 20)
      throw ef::ModelFileError(std::string("safetensors: metadata ") + key + " is not a size");
    return value;
  };
  const ef::DecoderConfig config{.vocabulary = number("vocabulary"),
                                 .features = number("features"),
                                 .layers = number("layers"),
                                 .heads = number("heads"),
                                 .kv_heads = number("kv_heads"),
                                 .head_dim = number("head_dim"),
                                 .hidden = number("hidden")};
  if (config.vocabulary != 256)
    throw ef::ModelFileError("safetensors: this job serves bytes and needs a vocabulary of 256");
  config.validate();
  return config;
}

inline std::shared_ptr<ef::DecoderWeights> load(const std::filesystem::path& folder) {
  const ef::Safetensors file(weights_file(folder));
  const ef::DecoderConfig config = read_config(file);
  // The file must hold what its metadata claims before memory is taken for it: the sizes multiply
  // to at most 2^62.
  Index held = 0;
  for (const auto& [name, tensor] : file.tensors().map()) held += tensor.rows() * tensor.columns();
  const Index features = config.features;
  if (static_cast<Index>(file.tensors().map().size()) != 9 * config.layers + 3 ||
      held < 2 * features * config.vocabulary || held < 3 * features * config.hidden ||
      held < 2 * features * config.heads || held / config.head_dim < 2 * features * config.heads)
    throw ef::ModelFileError("safetensors: the file holds less than its metadata claims");
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
