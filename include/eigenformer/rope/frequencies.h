/// \file
/// Rotary frequencies that serve contexts longer than those trained, as the configurations of
/// models name them (Hugging Face's rope_type). Each function returns RopeOptions with frequencies,
/// one for each pair of rotary_dim, and an attention factor; the layout is the caller's:
///
///   ef::RopeOptions options = ef::llama3_rope(head_dim, 500000.0, {.factor = 8, .trained_length = 8192});
///   options.layout = ef::RopeLayout::interleaved;
///
/// With f_i = base^(-2 i / rotary_dim), t the length trained and w_i = 2 pi / f_i the wavelength:
///
///   linear   f_i / factor (Chen et al., 2023): RopeOptions{.scale = 1 / factor}, no function
///   NTK      base * (factor * length / t - (factor - 1))^(rotary_dim / (rotary_dim - 2)) in place of base, length = max(length, t)
///   Llama 3  f_i where w_i < t / high, f_i / factor where w_i > t / low, else (1 - s) f_i / factor + s f_i
///            with s = (t / w_i - low) / (high - low) (Grattafiori et al., "The Llama 3 Herd of Models", 2024)
///   YaRN     f_i / factor * r_i + f_i * (1 - r_i), r_i a ramp from 0 to 1 over the pairs that turn between beta_fast and
///            beta_slow times in t positions; attention factor 0.1 ln(factor) + 1 (Peng et al., 2023)
///   LongRoPE f_i / factors_i, a table for length <= t and another beyond; attention factor
///            sqrt(1 + ln(factor) / ln(t)) (Ding et al., 2024)
///
/// NTK and LongRoPE depend on the length that is served. It is said once, so that a sequence has
/// the same bits in chunks and whole; systems that change it as a sequence grows leave keys in
/// their caches that were turned by other frequencies.
///
/// All throw std::invalid_argument for an odd or negative rotary_dim and for numbers that are not
/// positive and finite. Cost: O(rotary_dim).
#pragma once

#include <numbers>

#include "../rope.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct Llama3RopeOptions {
  double factor = 8;
  double low_frequency_factor = 1;
  double high_frequency_factor = 4;
  double trained_length = 8192;  ///< original_max_position_embeddings
};

struct YarnRopeOptions {
  double factor = 1;
  double trained_length = 4096;  ///< original_max_position_embeddings
  double beta_fast = 32;
  double beta_slow = 1;
  double attention_factor = 0;  ///< 0: the paper's, by mscale and mscale_all_dim where both are set
  double mscale = 0;
  double mscale_all_dim = 0;
  bool truncate = true;  ///< the ramp begins and ends at whole pairs
};

struct LongRopeOptions {
  double factor = 1;             ///< length that the model was extended to, over trained_length
  double trained_length = 4096;  ///< original_max_position_embeddings
  double length = 4096;          ///< served: beyond trained_length `long_factors` hold
  double attention_factor = 0;   ///< 0: the paper's
  Values<double> short_factors = {};
  Values<double> long_factors = {};
};

namespace detail {

inline void require_positive(std::string_view name, std::string_view argument, double value) {
  require_that(value > 0 && std::isfinite(value), name, argument, " is ", value,
               ", expected positive and finite");
}

/// frequency(i, base^(-2 i / rotary_dim)) of every pair.
template <typename Frequency>
RopeOptions rope_with(std::string_view name, Index rotary_dim, double base, double attention_factor,
                      Frequency&& frequency) {
  require_that(rotary_dim >= 0 && rotary_dim % 2 == 0, name, "rotary_dim is ", rotary_dim,
               ", expected an even number of 0 or more");
  require_positive(name, "base", base);
  require_positive(name, "attention_factor", attention_factor);
  RopeOptions options;
  options.base = static_cast<float>(base);
  options.rotary_dim = rotary_dim;
  options.attention_factor = static_cast<float>(attention_factor);
  options.frequencies =
      Values<double>::owned(static_cast<std::size_t>(rotary_dim / 2), [&](std::size_t i) {
        const double pair = static_cast<double>(i);
        return static_cast<double>(
            frequency(i, std::pow(base, -2.0 * pair / static_cast<double>(rotary_dim))));
      });
  return options;
}

}  // namespace detail

/// "dynamic": NTK-aware scaling of the base for `length` positions.
inline RopeOptions ntk_rope(Index rotary_dim, double base, double factor, double trained_length,
                            double length) {
  constexpr auto name = "ntk_rope";
  detail::require_positive(name, "base", base);
  detail::require_positive(name, "factor", factor);
  detail::require_positive(name, "trained_length", trained_length);
  detail::require_positive(name, "length", length);
  detail::require_that(rotary_dim != 2, name, "rotary_dim is 2, expected 4 or more");
  const double served = (std::max)(length, trained_length), dim = static_cast<double>(rotary_dim);
  const double stretched =
      base * std::pow(factor * served / trained_length - (factor - 1), dim / (dim - 2));
  return detail::rope_with(name, rotary_dim, stretched, 1.0,
                           [](std::size_t, double f) { return f; });
}

/// "llama3"
inline RopeOptions llama3_rope(Index rotary_dim, double base, const Llama3RopeOptions& how = {}) {
  constexpr auto name = "llama3_rope";
  detail::require_positive(name, "factor", how.factor);
  detail::require_positive(name, "low_frequency_factor", how.low_frequency_factor);
  detail::require_positive(name, "trained_length", how.trained_length);
  detail::require_that(std::isfinite(how.high_frequency_factor) &&
                           how.high_frequency_factor > how.low_frequency_factor,
                       name, "high_frequency_factor is ", how.high_frequency_factor,
                       ", expected more than low_frequency_factor, ", how.low_frequency_factor);
  return detail::rope_with(name, rotary_dim, base, 1.0, [&](std::size_t, double f) {
    const double turns = how.trained_length * f / (2 * std::numbers::pi);
    if (turns > how.high_frequency_factor) return f;
    if (turns < how.low_frequency_factor) return f / how.factor;
    const double smooth =
        (turns - how.low_frequency_factor) / (how.high_frequency_factor - how.low_frequency_factor);
    return (1 - smooth) * f / how.factor + smooth * f;
  });
}

/// "yarn"
inline RopeOptions yarn_rope(Index rotary_dim, double base, const YarnRopeOptions& how = {}) {
  constexpr auto name = "yarn_rope";
  detail::require_positive(name, "factor", how.factor);
  detail::require_positive(name, "trained_length", how.trained_length);
  detail::require_positive(name, "beta_fast", how.beta_fast);
  detail::require_positive(name, "beta_slow", how.beta_slow);
  detail::require_that(base > 1, name, "base is ", base, ", expected more than 1");
  detail::require_that(std::isfinite(how.mscale) && std::isfinite(how.mscale_all_dim), name,
                       "mscale is ", how.mscale, " and mscale_all_dim ", how.mscale_all_dim,
                       ", expected finite numbers");
  const double dim = static_cast<double>(rotary_dim);
  // The pair that turns so many times in the length trained.
  const auto pair_of = [&](double turns) {
    return dim * std::log(how.trained_length / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(base));
  };
  double low = pair_of(how.beta_fast), high = pair_of(how.beta_slow);
  if (how.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = (std::max)(low, 0.0);
  high = (std::min)(high, dim - 1);
  if (low == high) high += 0.001;
  const auto growth = [&](double mscale) {
    return how.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(how.factor) + 1.0;
  };
  double attention = how.attention_factor;
  if (attention == 0)
    attention = how.mscale != 0 && how.mscale_all_dim != 0
                    ? growth(how.mscale) / growth(how.mscale_all_dim)
                    : growth(1.0);
  return detail::rope_with(name, rotary_dim, base, attention, [&](std::size_t i, double f) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    return f / how.factor * ramp + f * (1 - ramp);
  });
}

/// "longrope" (Phi-3, Phi-4)
inline RopeOptions longrope(Index rotary_dim, double base, const LongRopeOptions& how) {
  constexpr auto name = "longrope";
  detail::require_positive(name, "factor", how.factor);
  detail::require_positive(name, "length", how.length);
  detail::require_that(std::isfinite(how.trained_length) && how.trained_length > 1, name,
                       "trained_length is ", how.trained_length, ", expected more than 1");
  const bool beyond = how.length > how.trained_length;
  const Values<double>& factors = beyond ? how.long_factors : how.short_factors;
  const auto which = beyond ? "long_factors" : "short_factors";
  detail::require_that(2 * static_cast<Index>(factors.size()) == rotary_dim, name, which, " has ",
                       factors.size(), " elements, expected one for each pair of rotary_dim, ",
                       rotary_dim);
  for (const double factor : factors) detail::require_positive(name, which, factor);
  const double attention = how.attention_factor != 0 ? how.attention_factor
                           : how.factor <= 1
                               ? 1.0
                               : std::sqrt(1 + std::log(how.factor) / std::log(how.trained_length));
  return detail::rope_with(name, rotary_dim, base, attention,
                           [&](std::size_t i, double f) { return f / factors[i]; });
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
