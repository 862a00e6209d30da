/// \file
/// Tiny models of experts in the layouts that files have: each expert's matrices by themselves, and
/// gpt-oss in MXFP4.
#pragma once

#include <array>
#include <cmath>

#include "family_files.h"

namespace eigenformer_test {

/// The tensors of a golden model with those of its experts as files of the hub have them; `names`
/// are those of gate, up and down.
inline FileTensors hub_tensors(const nlohmann::json& golden,
                               const std::array<std::string, 3>& names,
                               const std::string& block = "mlp") {
  FileTensors tensors;
  for (const auto& tensor : golden.at("tensors")) {
    auto name = tensor[0].get<std::string>();
    const auto shape = tensor[1].get<std::vector<std::int64_t>>();
    const auto values = golden_values(name, shape);
    const bool mlp = name.find(".mlp.") != std::string::npos;
    if (mlp) name.replace(name.find(".mlp."), 5, "." + block + ".");
    const std::size_t experts = name.find(".experts.");
    if (experts == std::string::npos) {
      tensors[name] = FileTensor::of(shape, values);
      continue;
    }
    const bool down = name.ends_with("down_proj");
    const std::int64_t parts = down ? 1 : 2, rows = shape[1] / parts, columns = shape[2];
    for (std::int64_t e = 0; e < shape[0]; ++e)
      for (std::int64_t part = 0; part < parts; ++part) {
        const auto* const first = values.data() + (e * parts + part) * rows * columns;
        const std::string& own = names[down ? 2 : static_cast<std::size_t>(part)];
        tensors[name.substr(0, experts + 9) + std::to_string(e) + "." + own + ".weight"] =
            FileTensor::of({rows, columns}, {first, first + rows * columns});
      }
  }
  return tensors;
}

/// gpt-oss of 32 features, experts in MXFP4 or the same numbers as floats (experts, in, out).
inline FileTensors gpt_oss_tensors(const nlohmann::json& golden, bool mxfp4) {
  constexpr std::size_t experts = 4, width = 32;
  FileTensors tensors;
  for (const auto& tensor : golden.at("tensors")) {
    const auto name = tensor[0].get<std::string>();
    auto shape = tensor[1].get<std::vector<std::int64_t>>();
    const bool keys_or_values =
        name.find("k_proj") != std::string::npos || name.find("v_proj") != std::string::npos;
    // 16 features and 24 hidden; 48 are gate and up, 32 heads' rows or ids.
    for (auto& size : shape) {
      if (size == 24 || (size == 16 && !keys_or_values)) size = width;
      if (size == 48) size = 2 * width;
    }
    if (keys_or_values && name.ends_with(".weight")) shape[1] = width;
    if (shape.size() < 3) {
      tensors[name] = FileTensor::of(shape, golden_values(name, shape));
      continue;
    }
    // (experts, in, out) in the model; rows of `width` inputs in the file
    const auto out = static_cast<std::size_t>(shape[2]);
    std::string blocks(experts * out * width / 2, 0), scales(experts * out, 0);
    std::vector<float> values(experts * out * width);
    const float numbers[]{0, .5f, 1, 1.5f, 2, 3, 4, 6};
    const Weights random(name, true);
    for (std::size_t row = 0; row < experts * out; ++row) {
      const int exponent = 122 + static_cast<int>(row % 4);
      scales[row] = static_cast<char>(exponent);
      for (std::size_t i = 0; i < width; ++i) {
        const auto code = static_cast<unsigned>((random(row * width + i) + 1) * 8) & 15;
        blocks[(row * width + i) / 2] = static_cast<char>(
            static_cast<unsigned char>(blocks[(row * width + i) / 2]) | code << (i % 2 * 4));
        const std::size_t e = row / out, o = row % out;
        values[(e * width + i) * out + o] =
            std::ldexp((code & 8) != 0 ? -numbers[code & 7] : numbers[code & 7], exponent - 127);
      }
    }
    if (mxfp4) {
      tensors[name + "_blocks"] = {ef::StoredFormat::u8, {experts, shape[2], 1, 16}, blocks};
      tensors[name + "_scales"] = {ef::StoredFormat::u8, {experts, shape[2], 1}, scales};
    } else {
      tensors[name] = FileTensor::of(shape, values);
    }
  }
  return tensors;
}

}  // namespace eigenformer_test
