/// \file
/// Where a model comes from: a folder of Hugging Face's or a GGUF file. Each says what the model
/// is, has its tokenizer, and its weights to be packed.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <span>

#include "families.h"
#include "gguf_families.h"
#include "gguf_outline.h"
#include "load.h"
#include "model_texts.h"
#include "safetensors.h"
#include "tokenizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename T, typename D>
auto load_weights(const D& device, const ModelConfig& config, const StoredTensors& tensors,
                  std::shared_ptr<const void> owner, const WeightStorage& storage,
                  const LoadProgress& progress, std::span<const MappedFile> files) {
  const std::function<void(std::span<const std::byte>)> release = [&](auto bytes) {
    for (const MappedFile& file : files) file.advise(bytes, FileAdvice::done);
  };
  ModelPacking<T, D> packing(device, config, tensors, storage, progress, release);
  return load_tensors(packing, std::move(owner));
}

class GgufSource {
 public:
  explicit GgufSource(const std::filesystem::path& path)
      : file_(std::make_shared<const Gguf>(path)) {}

  ModelConfig config(const ModelConfigOptions& options) const {
    return gguf_model_config(*file_, options);
  }
  Tokenizer tokenizer() const { return Tokenizer::from_gguf(*file_); }
  template <typename T, typename D>
  auto weights(const D& device, const ModelConfig& config, const WeightStorage& storage,
               const LoadProgress& progress) const {
    return load_weights<T>(device, config, file_->tensors(), file_, storage, progress,
                           {&file_->file(), 1});
  }
  /// f(name, text) for what the file says besides its weights.
  template <typename F>
  void each_text(F&& f) const {
    f(kGgufText, gguf_outline(*file_));
  }

 private:
  std::shared_ptr<const Gguf> file_;
};

class FolderSource {
 public:
  explicit FolderSource(const std::filesystem::path& path) : path_(path) {}

  ModelConfig config(const ModelConfigOptions& options) const {
    return read_model_config(path_ / "config.json", options);
  }
  Tokenizer tokenizer() const { return Tokenizer::from_folder(path_); }
  template <typename T, typename D>
  auto weights(const D& device, const ModelConfig& config, const WeightStorage& storage,
               const LoadProgress& progress) const {
    const auto files = std::make_shared<const Safetensors>(path_);
    return load_weights<T>(device, config, files->tensors(), files, storage, progress,
                           files->files());
  }
  /// The same of the folder's.
  template <typename F>
  void each_text(F&& f) const {
    FolderTexts texts(path_);
    for (const std::string_view name : kModelTexts) {
      if (name == kGgufText || !texts.has(name)) continue;
      if (name == "tokenizer.json")  // sorted it is read in two thirds of the time
        f(name, parse_json(texts.text(name), texts.name(name)).dump());
      else
        f(name, std::string(texts.text(name)));
    }
  }

 private:
  std::filesystem::path path_;
};

/// f(source) of what is not packed.
template <typename F>
auto with_model_source(const std::filesystem::path& path, F&& f) {
  if (path.extension() == ".gguf") return f(GgufSource(path));
  std::error_code problem;
  if (std::filesystem::is_regular_file(path, problem))
    fail_model(path.string(), "", "is neither a folder nor a .gguf file");
  return f(FolderSource(path));
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
