/// \file
/// A whole model in one file that is mapped: packed weights (packed_file.h), and before them what
/// the model's own files say besides (model_texts.h), to be read again under the same checks.
/// model.h is the manual: pack_model writes such a file, load_model opens it.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model_source.h"
#include "packed_cache.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// The key of a whole model, whose files may be gone.
template <typename T, typename D>
std::string whole_model_key(const D& device, const WeightStorage& storage) {
  return packing_key<T>(device, storage) + "whole model\n";
}

/// The rest of a key's line that begins with this word; empty where it has none.
inline std::string_view key_line(std::string_view key, std::string_view word) {
  while (!key.empty()) {
    const std::string_view line = key.substr(0, key.find('\n'));
    if (line.starts_with(word) && line.substr(word.size()).starts_with(' '))
      return line.substr(word.size() + 1);
    key.remove_prefix((std::min)(key.size(), line.size() + 1));
  }
  return {};
}

/// A whole model's file, whose bytes `owner` keeps.
class PackedModelFile {
 public:
  PackedModelFile(std::span<const std::byte> bytes, std::string name,
                  std::shared_ptr<const void> owner)
      : name_(std::move(name)), owner_(std::move(owner)), contents_(bytes, name_) {
    if (contents_.head.key.empty())
      fail_model(name_, "", "is of another version of eigenformer: pack the model again");
    if (!contents_.head.key.ends_with("\nwhole model\n"))
      fail_model(name_, "", "has packed weights alone, and is a cache of a model's files");
  }

  /// Of a key for activations of T: what its weights were packed as. Throws ModelFileError where
  /// they were packed for another version, scalar or ISA.
  template <typename T, typename D>
  WeightStorage storage(const D& device) const {
    const std::string_view key = contents_.head.key, line = key_line(key, "weights");
    const std::string_view int4 = key_line(key, "int4");
    const std::string here = packing_key<T>(device, {});
    for (const std::string_view word : {"eigenformer", "activations", "isa", "packing"})
      if (key_line(key, word) != key_line(here, word))
        fail_model(name_, "",
                   "was packed for " + described(word, key_line(key, word)) +
                       ", here it would be " + described(word, key_line(here, word)) +
                       ": pack the model again");
    for (std::size_t f = 0; f < std::size(kWeightFormatNames); ++f) {
      const std::string_view format = kWeightFormatNames[f];
      if (!line.starts_with(format) || !line.substr(format.size()).starts_with(' ')) continue;
      const std::string_view digits = line.substr(format.size() + 1);
      Index group = -1;
      const auto end = std::from_chars(digits.data(), digits.data() + digits.size(), group).ptr;
      if (group >= 0 && end == digits.data() + digits.size())
        return {static_cast<WeightFormat>(f), group, {int4.starts_with('1'), int4.ends_with('1')}};
    }
    fail_model(name_, "", "does not say what its weights are");
  }
  std::string_view key() const { return contents_.head.key; }

  /// Everything in it. Its configuration is read with `options`.
  template <typename T, typename D, typename F>
  auto read(const D& device, const ModelConfigOptions& options, F&& f) const {
    const WeightStorage storage = this->storage<T>(device);
    require_storage<T>(storage, "load_model");
    PackedFinder<D> finder(device, contents_, name_, owner_);
    PackedTexts texts(name_);
    for (const std::string_view name : kModelTexts)
      if (const auto text = finder.text()) texts.set(name, *text);
    const auto finish = [&](ModelConfig config, Tokenizer tokenizer) {
      auto weights = take_packed_weights<T>(finder, config.shape, storage, config.form);
      return f(std::move(config), std::move(tokenizer), std::move(weights));
    };
    constexpr auto kConfig = "config.json";
    if (texts.has(kGgufText)) {
      const Gguf outline(std::as_bytes(std::span(texts.text(kGgufText))), texts.name(kGgufText));
      return finish(gguf_model_config(outline, options), Tokenizer::from_gguf(outline));
    }
    ModelConfig config = parse_model_config(texts.text(kConfig), texts.name(kConfig), options);
    return finish(std::move(config), Tokenizer::from_texts(texts));
  }

 private:
  static std::string described(std::string_view word, std::string_view value) {
    if (word == "eigenformer") return "version " + printable(value);
    if (word == "isa") return "the ISA " + printable(value);
    if (word == "packing") return "way of packing no. " + printable(value);
    constexpr const char* scalars[] = {"", "float", "double", "bfloat16", "half"};
    const bool known = value.size() == 1 && value[0] >= '1' && value[0] <= '4';
    return "activations of " + (known ? scalars[value[0] - '0'] : printable(value));
  }

  std::string name_;
  std::shared_ptr<const void> owner_;
  PackedContents contents_;
};

/// Keeps weights with the texts of their source. What is there and no packed file stays.
template <typename T, typename D, typename Source>
void write_packed_model(const D& device, const PackedDecoderWeights<T>& weights,
                        const Source& source, const std::filesystem::path& path) {
  std::array<std::optional<std::string>, kModelTexts.size()> texts;
  source.each_text([&](std::string_view name, std::string text) {
    const auto at = std::find(kModelTexts.begin(), kModelTexts.end(), name);
    texts[static_cast<std::size_t>(at - kModelTexts.begin())] = std::move(text);
  });
  PackedWriter parts;
  for (const auto& text : texts) parts.text(text);
  PackedParts::all(weights, parts);
  write_packed_parts(parts, weights.bytes(), path, whole_model_key<T>(device, weights.storage()));
}

/// Before work is done for it. Throws ModelFileError where a file cannot be made there, or
/// something is there that is no packed file, std::invalid_argument for a name that load_model
/// would take for another file's.
inline void require_replaceable(const std::filesystem::path& path) {
  require_that(path.extension() != ".gguf", "pack_model", "packed is ", path.string(),
               ", expected a name that does not end with .gguf");
  require_writable(path);
  std::error_code problem;
  if (!std::filesystem::exists(path, problem)) return;
  const MappedFile file(path);
  if (!file.text().starts_with(PackedHead::kMagic))
    fail_model(file.name(), "", "is there, and is no packed file: it stays what it is");
}

}  // namespace detail

/// Whether a file holds a whole model for activations of T. Throws ModelFileError for a packed file
/// that is damaged.
template <FloatingScalar T>
bool is_packed_model(const std::filesystem::path& path) {
  std::error_code problem;
  if (path.extension() == ".gguf" || !std::filesystem::is_regular_file(path, problem)) return false;
  const MappedFile file(path);
  if (!file.text().starts_with(detail::PackedHead::kMagic)) return false;
  const detail::PackedContents contents(file.bytes(), file.name());
  const std::string_view key = contents.head.key;
  return key.ends_with("\nwhole model\n") &&
         detail::key_line(key, "activations") == std::to_string(detail::kPackedCode<T>);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
