/// \file
/// What files say of a model besides its weights, as texts that go along with packed ones: a
/// folder's JSON files and templates as they are, of a GGUF file its metadata (gguf_outline.h).
#pragma once

#include <array>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "mapped_file.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A GGUF file's metadata among the texts.
inline constexpr std::string_view kGgufText = "model.gguf";

/// In the order of files of packed models.
inline constexpr std::array<std::string_view, 8> kModelTexts{"config.json",
                                                             "tokenizer.json",
                                                             "generation_config.json",
                                                             "tokenizer_config.json",
                                                             "special_tokens_map.json",
                                                             "chat_template.json",
                                                             "chat_template.jinja",
                                                             kGgufText};

/// The texts of a folder, mapped. Those that it has not are empty.
class FolderTexts {
 public:
  explicit FolderTexts(std::filesystem::path folder) : folder_(std::move(folder)) {}

  bool has(std::string_view name) const {
    std::error_code problem;
    return std::filesystem::exists(folder_ / name, problem);
  }
  /// Throws ModelFileError where it is not there.
  std::string_view text(std::string_view name) {
    return files_.try_emplace(std::string(name), folder_ / name).first->second.text();
  }
  /// For messages.
  std::string name(std::string_view name) const { return (folder_ / name).string(); }

 private:
  std::filesystem::path folder_;
  std::map<std::string, MappedFile> files_;
};

/// Those of a file of a packed model, views of it.
class PackedTexts {
 public:
  explicit PackedTexts(std::string file) : file_(std::move(file)) {}

  bool has(std::string_view name) const { return texts_.contains(name); }
  std::string_view text(std::string_view name) const {
    const auto found = texts_.find(name);
    if (found == texts_.end()) fail_model(file_, name, "this part is missing");
    return found->second;
  }
  std::string name(std::string_view name) const { return file_ + ": " + std::string(name); }
  void set(std::string_view name, std::string_view text) { texts_[name] = text; }

 private:
  std::string file_;
  std::map<std::string_view, std::string_view> texts_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
