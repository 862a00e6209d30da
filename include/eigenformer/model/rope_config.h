/// \file
/// The rotary embedding of config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` as
/// older files have them.
#pragma once

#include <string>

#include "../rope/frequencies.h"
#include "config.h"
#include "json_object.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What the rotation depends on besides its own parameters.
struct RopeContext {
  Index head_dim;
  double base;       ///< where the parameters name none
  double partial;    ///< share of a head that turns, where the parameters name none
  double positions;  ///< max_position_embeddings
  double trained;    ///< original_max_position_embeddings, where the parameters name none
  double length;     ///< that will be served
};

/// The rotation that `parameters` describe.
inline RopeOptions rope_of(const JsonObject& parameters, const RopeContext& context) {
  const std::string type = parameters.text("rope_type", parameters.text("type", "default"));
  const double base = parameters.number("rope_theta", context.base),
               partial = parameters.number("partial_rotary_factor", context.partial);
  const double turning = static_cast<double>(context.head_dim) * partial;
  if (!(turning >= 0) || turning > static_cast<double>(context.head_dim))
    parameters.refuse("partial_rotary_factor", "is not within 0 to 1");
  const auto dim = static_cast<Index>(turning);
  RopeOptions options;
  options.base = static_cast<float>(base);
  options.rotary_dim = dim;
  const auto factor = [&] { return parameters.number("factor"); };
  const double trained = parameters.number("original_max_position_embeddings", context.trained);
  const auto numbers = [&](std::string_view key) {
    const auto list = parameters.numbers(key);
    return Values<double>::owned(list.size(), [&](std::size_t i) { return list[i]; });
  };
  try {
    if (type == "default") return options;
    if (dim > 65536)  // before a table of that size is made
      parameters.refuse("rope_type",
                        "turns " + std::to_string(dim) + " of a head, expected 65536 at most");
    if (type == "linear") {
      const double by = factor();
      return rope_with("linear", dim, base, 1.0, [by](std::size_t, double f) { return f / by; });
    }
    if (type == "dynamic") return ntk_rope(dim, base, factor(), context.positions, context.length);
    if (type == "llama3")
      return llama3_rope(dim, base,
                         {.factor = factor(),
                          .low_frequency_factor = parameters.number("low_freq_factor"),
                          .high_frequency_factor = parameters.number("high_freq_factor"),
                          .trained_length = trained});
    if (type == "yarn") {
      YarnRopeOptions how;
      how.factor = parameters.number("factor", context.positions / trained);
      how.trained_length = trained;
      how.beta_fast = parameters.number("beta_fast", 32);
      how.beta_slow = parameters.number("beta_slow", 1);
      how.attention_factor = parameters.number("attention_factor", 0);
      how.mscale = parameters.number("mscale", 0);
      how.mscale_all_dim = parameters.number("mscale_all_dim", 0);
      how.truncate = parameters.boolean("truncate", true);
      return yarn_rope(dim, base, how);
    }
    if (type == "longrope" || type == "su") {
      LongRopeOptions how;
      how.factor = parameters.number("factor", context.positions / trained);
      how.trained_length = trained;
      how.length = context.length;
      how.attention_factor = parameters.number("attention_factor", 0);
      how.short_factors = numbers("short_factor");
      how.long_factors = numbers("long_factor");
      return longrope(dim, base, how);
    }
  } catch (const std::invalid_argument& error) {
    parameters.refuse("rope_type", error.what());
  }
  parameters.refuse("rope_type", "is " + printable(type) + ", which is not supported");
}

/// The rotation of a model with one for all layers.
inline RopeOptions rope_of_model(const JsonObject& config, const RopeContext& context) {
  static const nlohmann::json kNone = nlohmann::json::object();
  if (config.has("rope_parameters")) return rope_of(config.object("rope_parameters"), context);
  if (config.has("rope_scaling")) return rope_of(config.object("rope_scaling"), context);
  return rope_of(JsonObject(kNone, config.file()), context);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
