/// \file
/// The rotary embedding of a GGUF file: rope.* of its metadata, and the tensors rope_freqs (Llama
/// 3: a factor for each pair) and rope_factors_long and rope_factors_short (LongRoPE).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../rope/frequencies.h"
#include "config.h"
#include "dequantize.h"
#include "gguf_keys.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class GgufRope {
 public:
  /// `length` positions will be served, of `positions` that the model was made for.
  GgufRope(const GgufKeys& keys, const StoredTensors& tensors, Index head_dim, Index positions,
           Index length)
      : keys_(keys), tensors_(tensors), length_(length) {
    dim_ = static_cast<Index>(keys.integer("rope.dimension_count", head_dim));
    if (dim_ < 0 || dim_ > head_dim || dim_ % 2 != 0)
      refuse(keys.key("rope.dimension_count"), "is not an even number of at most the heads' width");
    type_ = keys.text("rope.scaling.type", "linear");
    factor_ = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1));
    if (factor_ == 0) factor_ = 1;  // what files without scaling may say
    const double made_for = static_cast<double>(positions);
    trained_ = keys.number("rope.scaling.original_context_length", made_for);
    attention_factor_ = keys.number("rope.scaling.attn_factor", 1);
    read_yarn();
    if (type_ != "none" && type_ != "linear" && type_ != "yarn" && type_ != "longrope")
      refuse(keys.key("rope.scaling.type"), "is " + printable(type_) + ", which is not supported");
  }

  /// Scaled as the file says.
  RopeOptions scaled(double base) const {
    return guarded([&] {
      RopeOptions options = type_ == "yarn" ? yarn_rope(dim_, base, yarn_) : divided(base);
      options.attention_factor *= static_cast<float>(attention_factor_);
      return options;
    });
  }
  /// As the model was trained.
  RopeOptions plain(double base) const {
    return guarded([&] {
      return rope_with("rope", dim_, base, 1.0, [](std::size_t, double f) { return f; });
    });
  }

 private:
  [[noreturn]] void refuse(std::string_view part, std::string_view why) const {
    fail_model(tensors_.file(), part, why);
  }
  template <typename Make>
  RopeOptions guarded(Make&& make) const {
    try {
      return make();
    } catch (const std::invalid_argument& error) {
      refuse(keys_.key("rope.freq_base"), error.what());
    }
  }

  void read_yarn() {
    yarn_.factor = factor_;
    yarn_.trained_length = trained_;
    yarn_.beta_fast = keys_.number("rope.scaling.yarn_beta_fast", 32);
    yarn_.beta_slow = keys_.number("rope.scaling.yarn_beta_slow", 1);
    yarn_.attention_factor = keys_.number("rope.scaling.yarn_attn_factor", 0);
    yarn_.truncate = keys_.architecture() != "gpt-oss";  // whose files do not say it
    if (type_ != "yarn") return;
    if (keys_.number("rope.scaling.yarn_ext_factor", 1) != 1)
      refuse(keys_.key("rope.scaling.yarn_ext_factor"), "is not 1, which is not supported");
    for (const char* const table :
         {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
      if (tensors_.find(table) != nullptr)
        refuse(table, "is there beside YaRN, which is not supported");
  }

  /// Frequencies divided by the factors of a tensor, where there is one, and by the file's.
  RopeOptions divided(double base) const {
    const char* name = static_cast<double>(length_) > trained_ ? "rope_factors_long.weight"
                                                               : "rope_factors_short.weight";
    if (tensors_.find(name) == nullptr) {
      if (type_ == "longrope") refuse(name, "this tensor is missing");
      name = "rope_freqs.weight";
    }
    std::vector<float> factors(static_cast<std::size_t>(dim_ / 2), 1.0f);
    if (const StoredTensor* const stored = tensors_.find(name)) {
      if (stored->rows() != 1 || stored->columns() != dim_ / 2)
        refuse(stored->name, "has not an element for each pair of features that turns");
      dequantize_rows(*stored, 0, factors);
    }
    const double all = type_ == "linear" ? factor_ : 1.0;
    return rope_with("rope", dim_, base, 1.0, [&](std::size_t i, double f) {
      return f / static_cast<double>(factors[i]) / all;
    });
  }

  const GgufKeys& keys_;
  const StoredTensors& tensors_;
  Index length_, dim_ = 0;
  std::string type_;
  double factor_ = 1, trained_ = 0, attention_factor_ = 1;
  YarnRopeOptions yarn_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
