/// \file
/// Tiny models of experts in the layouts that files have: each expert's matrices by themselves, and
/// gpt-oss in MXFP4.
#pragma once

#include <cmath>
#include <map>

#include "family_files.h"

namespace eigenformer_test {

/// A tensor of a safetensors file.
struct FileTensor {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::string bytes;

  static FileTensor floats(std::vector<std::uint64_t> shape, const std::vector<float>& values) {
    return {"F32", std::move(shape),
            std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4)};
  }
};
using FileTensors = std::map<std::string, FileTensor>;

inline void write_model(const Folder& folder, const nlohmann::json& config,
                        const FileTensors& tensors) {
  folder.write("config.json", config.dump());
  folder.write(
      "tokenizer.json",
      R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []})");
  nlohmann::json header;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t begin = data.size();
    data += tensor.bytes;
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  folder.write("model.safetensors",
               std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text + data);
}

inline std::vector<float> golden_values(const std::string& name,
                                        const std::vector<std::uint64_t>& shape) {
  const Weights weights(name, shape.size() > 1);
  std::vector<float> values(
      std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = weights(i);
  return values;
}

/// The tensors of a golden model with those of its experts as files of the hub have them; `names`
/// are those of gate, up and down.
inline FileTensors hub_tensors(const nlohmann::json& golden,
                               const std::array<std::string, 3>& names,
                               const std::string& block = "mlp") {
  FileTensors tensors;
  for (const auto& tensor : golden.at("tensors")) {
    auto name = tensor[0].get<std::string>();
    const auto shape = tensor[1].get<std::vector<std::uint64_t>>();
    const auto values = golden_values(name, shape);
    const bool mlp = name.find(".mlp.") != std::string::npos;
    if (mlp) name.replace(name.find(".mlp."), 5, "." + block + ".");
    const std::size_t experts = name.find(".experts.");
    if (experts == std::string::npos) {
      tensors[name] = FileTensor::floats(shape, values);
      continue;
    }
    const bool down = name.ends_with("down_proj");
    const std::uint64_t parts = down ? 1 : 2, rows = shape[1] / parts, columns = shape[2];
    for (std::uint64_t e = 0; e < shape[0]; ++e)
      for (std::uint64_t part = 0; part < parts; ++part) {
        const auto* const first = values.data() + (e * parts + part) * rows * columns;
        tensors[name.substr(0, experts + 9) + std::to_string(e) + "." + names[down ? 2 : part] +
                ".weight"] = FileTensor::floats({rows, columns}, {first, first + rows * columns});
      }
  }
  return tensors;
}

/// gpt-oss of 32 features, experts in MXFP4 or the same numbers as floats (experts, in, out).
inline FileTensors gpt_oss_tensors(const nlohmann::json& golden, bool mxfp4) {
  constexpr std::uint64_t experts = 4, width = 32;
  FileTensors tensors;
  for (const auto& tensor : golden.at("tensors")) {
    const auto name = tensor[0].get<std::string>();
    auto shape = tensor[1].get<std::vector<std::uint64_t>>();
    for (auto& size :
         shape)  // 16 features and 24 hidden; 48 are gate and up, 32 heads' rows or ids
      size = size == 16 && name.find("k_proj") == std::string::npos &&
                     name.find("v_proj") == std::string::npos
                 ? width
             : size == 24 ? width
             : size == 48 ? 2 * width
                          : size;
    if (name.find("k_proj.weight") != std::string::npos ||
        name.find("v_proj.weight") != std::string::npos)
      shape[1] = width;
    if (shape.size() < 3) {
      tensors[name] = FileTensor::floats(shape, golden_values(name, shape));
      continue;
    }
    // (experts, in, out) in the model; rows of `width` inputs in the file
    const std::uint64_t out = shape[2];
    std::string blocks(experts * out * width / 2, 0), scales(experts * out, 0);
    std::vector<float> values(experts * out * width);
    const float numbers[]{0, .5f, 1, 1.5f, 2, 3, 4, 6};
    const Weights random(name, true);
    for (std::uint64_t row = 0; row < experts * out; ++row) {
      const int exponent = 122 + static_cast<int>(row % 4);
      scales[row] = static_cast<char>(exponent);
      for (std::uint64_t i = 0; i < width; ++i) {
        const auto code = static_cast<unsigned>((random(row * width + i) + 1) * 8) & 15;
        blocks[(row * width + i) / 2] = static_cast<char>(
            static_cast<unsigned char>(blocks[(row * width + i) / 2]) | code << (i % 2 * 4));
        const std::uint64_t e = row / out, o = row % out;
        values[(e * width + i) * out + o] =
            std::ldexp((code & 8) != 0 ? -numbers[code & 7] : numbers[code & 7], exponent - 127);
      }
    }
    if (mxfp4) {
      tensors[name + "_blocks"] = {"U8", {experts, out, 1, 16}, blocks};
      tensors[name + "_scales"] = {"U8", {experts, out, 1}, scales};
    } else {
      tensors[name] = FileTensor::floats({experts, width, out}, values);
    }
  }
  return tensors;
}

}  // namespace eigenformer_test
