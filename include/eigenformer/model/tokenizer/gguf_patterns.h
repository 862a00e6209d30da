/// \file
/// What tokenizer.ggml.pre stands for: the words of each family, as its tokenizer.json has them.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include "pieces.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

struct GgufWords {
  std::vector<std::string_view> names;
  std::vector<std::string_view> patterns;  ///< each cuts what the one before has left
  bool composes = false;                   ///< NFC first, as the families' own files say
  bool ignore_merges = false;
  bool adds_bos = false;  ///< unless the file says otherwise
};

// clang-format off
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kQwen35Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N})"
    R"(| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kTekkenPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kGpt4oPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// clang-format on

/// Null: a name that is not known.
inline const GgufWords* gguf_words(std::string_view name) {
  static const std::vector<GgufWords> every = {
      {.names = {"gpt-2", "phi-2", "mpt", "jais", "trillion"}, .patterns = {kGpt2Pattern}},
      {.names = {"olmo"}, .patterns = {kGpt2Pattern}, .composes = true},
      {.names = {"starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b"},
       .patterns = {R"(\p{N})", kGpt2Pattern}},
      {.names = {"command-r"}, .patterns = {R"(\p{N})", kGpt2Pattern}, .composes = true},
      {.names = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"},
       .patterns = {kLlama3Pattern},
       .ignore_merges = true,
       .adds_bos = true},
      {.names = {"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}, .patterns = {kLlama3Pattern}},
      {.names = {"qwen2", "deepseek-r1-qwen", "stablelm2"},
       .patterns = {kQwen2Pattern},
       .composes = true},
      {.names = {"qwen35"}, .patterns = {kQwen35Pattern}, .composes = true},
      {.names = {"falcon"},
       .patterns = {R"([!-/:-@\[-`{-~\p{P}]+)", kGpt2Pattern, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
      {.names = {"tekken"}, .patterns = {kTekkenPattern}, .ignore_merges = true, .adds_bos = true},
      {.names = {"gpt-4o", "llama4"}, .patterns = {kGpt4oPattern}},
      {.names = {"", "default"},
       .patterns = {R"([\p{P}\$\+<=>\^\~\|]+)", kGpt2Pattern, R"(\p{N}+)", "[0-9][0-9][0-9]"}}};
  for (const GgufWords& words : every)
    if (std::ranges::find(words.names, name) != words.names.end()) return &words;
  return nullptr;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
