/// \file
/// The tiny models of golden/models.json as folders and as GGUF files.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <eigenformer/core/tensor.h>
#include <eigenformer/model/safetensors.h>

#include "gguf_writer.h"
#include "model_files.h"

namespace eigenformer_test {

namespace ef = eigenformer;

/// What golden/make_models.py gives the models.
inline const std::vector<std::int32_t> kIds{3, 17, 5, 29, 8, 8, 21, 1, 30, 12};

inline nlohmann::json golden_file(const char* name) {
  std::ifstream file(std::string(EIGENFORMER_GOLDEN_DIR "/") + name);
  return nlohmann::json::parse(file);
}

/// Element i of the tensor of this name, as golden/make_models.py has it.
class Weights {
 public:
  Weights(std::string_view name, bool matrix)
      : matrix_(matrix), mean_(!matrix && name.ends_with("weight") ? 1.0 : 0.0) {
    for (const char c : name)
      seed_ = (seed_ ^ static_cast<unsigned char>(c)) * std::uint64_t{0x100000001b3};
  }
  float operator()(std::uint64_t i) const {
    std::uint64_t z = seed_ + (i + 1) * std::uint64_t{0x9e3779b97f4a7c15};
    z = (z ^ (z >> 30)) * std::uint64_t{0xbf58476d1ce4e5b9};
    z = (z ^ (z >> 27)) * std::uint64_t{0x94d049bb133111eb};
    z ^= z >> 31;
    const double u = static_cast<double>(z >> 40) / 16777216.0 - 0.5;
    return static_cast<float>(matrix_ ? u * 2 : u * 0.5 + mean_);
  }

 private:
  bool matrix_;
  double mean_;
  std::uint64_t seed_ = 0xcbf29ce484222325;
};

/// All elements of it.
inline std::vector<float> golden_values(const std::string& name,
                                        const std::vector<std::int64_t>& shape) {
  const Weights weights(name, shape.size() > 1);
  std::vector<float> values(
      std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = weights(i);
  return values;
}

template <typename T>
inline constexpr auto kFormat = ef::StoredFormat::f32;
template <>
inline constexpr auto kFormat<ef::bfloat16> = ef::StoredFormat::bf16;
template <>
inline constexpr auto kFormat<ef::half> = ef::StoredFormat::f16;

/// A tensor of a safetensors file.
struct FileTensor {
  ef::StoredFormat format;
  std::vector<std::int64_t> shape;
  std::string bytes;

  template <typename T = float>
  static FileTensor of(std::vector<std::int64_t> shape, const std::vector<float>& values) {
    FileTensor tensor{kFormat<T>, std::move(shape), {}};
    for (const float value : values) {
      const T rounded(value);
      tensor.bytes.append(reinterpret_cast<const char*>(&rounded), sizeof(T));
    }
    return tensor;
  }
};
using FileTensors = std::map<std::string, FileTensor>;

/// A model as a folder of files.
inline void write_model(const Folder& folder, const nlohmann::json& config,
                        const FileTensors& tensors) {
  folder.write("config.json", config.dump());
  folder.write(
      "tokenizer.json",
      R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []})");
  std::vector<ef::StoredTensor> stored;
  for (const auto& [name, tensor] : tensors)
    stored.push_back({name, tensor.format, tensor.shape, bytes_of(tensor.bytes)});
  ef::write_safetensors(folder.path() / "model.safetensors", stored);
}

/// One of golden/models.json, its weights in T.
template <typename T>
void write_family(const Folder& folder, const nlohmann::json& model) {
  FileTensors tensors;
  for (const auto& tensor : model.at("tensors")) {
    const auto name = tensor[0].get<std::string>();
    const auto shape = tensor[1].get<std::vector<std::int64_t>>();
    tensors[name] = FileTensor::of<T>(shape, golden_values(name, shape));
  }
  write_model(folder, model.at("config"), tensors);
}

/// Values of a tensor of golden/gguf_models.json: given, or those of tensors of the model, one
/// below the other, with what the converter has done to them.
inline std::vector<float> converted(const nlohmann::json& tensor, const nlohmann::json& shapes) {
  const nlohmann::json& origin = tensor.at(1);
  if (origin.contains("values")) return origin.at("values").get<std::vector<float>>();
  std::vector<float> source;
  for (const auto& name : origin.at("of")) {
    const auto shape = shapes.at(name.get<std::string>()).get<std::vector<std::size_t>>();
    const Weights weights(name.get<std::string>(), shape.size() > 1);
    const std::size_t columns = shape.size() > 1 ? shape.back() : 1,
                      rows = shape.size() > 1 ? shape[shape.size() - 2] : 1;
    const auto count =
        std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>());
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t in = i % (rows * columns);  // its matrix, turned or not
      const std::size_t from = i - in + in % rows * columns + in / rows;
      source.push_back(weights(origin.contains("transposed") ? from : i) +
                       origin.value("plus", 0.0f));
    }
  }
  if (!origin.contains("rows")) return source;
  const auto shape = tensor.at(0).get<std::vector<std::ptrdiff_t>>();
  const auto size =
      std::accumulate(shape.begin(), shape.end(), std::ptrdiff_t{1}, std::multiplies<>());
  const auto width = size / static_cast<std::ptrdiff_t>(origin.at("rows").size());
  std::vector<float> ordered;
  for (const auto& row : origin.at("rows")) {
    const auto first = source.begin() + row.get<std::ptrdiff_t>() * width;
    ordered.insert(ordered.end(), first, first + width);
  }
  return ordered;
}

inline void write_vocabulary(GgufWriter& writer) {
  writer.text("tokenizer.ggml.model", "gpt2");
  writer.text("tokenizer.ggml.pre", "gpt-2");
  std::vector<std::string> tokens;
  for (int i = 0; i < 32; ++i) tokens.push_back(std::string(1, static_cast<char>('A' + i)));
  writer.texts("tokenizer.ggml.tokens", tokens);
  writer.texts("tokenizer.ggml.merges", {});
}

/// A model of golden/gguf_models.json as llama.cpp's converter wrote it.
inline std::string gguf_of(const nlohmann::json& golden, const nlohmann::json& model) {
  GgufWriter writer;
  for (const auto& [key, value] : golden.at("metadata").items()) writer.value(key, value);
  write_vocabulary(writer);
  nlohmann::json shapes;
  for (const auto& tensor : model.at("tensors")) shapes[tensor[0].get<std::string>()] = tensor[1];
  for (const auto& [name, tensor] : golden.at("tensors").items())
    writer.tensor(name, tensor.at(0).get<std::vector<std::uint64_t>>(), converted(tensor, shapes));
  return writer.file();
}

}  // namespace eigenformer_test
