/// \file
/// safetensors files (github.com/huggingface/safetensors): eight bytes that are the length of the
/// header, little endian; the header, JSON that gives each tensor its type, shape and place; the
/// data.
///
///   const ef::Safetensors files("folder");   // or a .safetensors, or a .safetensors.index.json
///   const ef::StoredTensor& head = files.tensors().at("lm_head.weight");
///
/// Files are mapped, and nothing is believed: ModelFileError names file, tensor and reason where
/// the header is no JSON, larger than 100 MB or than the file, names a tensor twice, gives one a
/// type that is none of F64, F32, F16, BF16, I64 to I8, U64 to U8 and BOOL, a shape whose product
/// overflows or is not its bytes, or a place outside the data; where tensors overlap or bytes
/// belong to none; and where an index names a file outside its folder, or index and files do not
/// list the same tensors. Costs O(header); data are not read.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/check.h"
#include "json.h"
#include "mapped_file.h"
#include "stored_tensor.h"
#include "written_file.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What a safetensors file says. The tensors' bytes are a part of the parsed ones.
struct SafetensorsContents {
  StoredTensors::Map tensors;
  std::map<std::string, std::string> metadata;
};

inline std::optional<StoredFormat> safetensors_format(std::string_view dtype) {
  for (auto format = StoredFormat::f64; format <= StoredFormat::boolean;
       format = static_cast<StoredFormat>(static_cast<int>(format) + 1))
    if (layout_of(format).name == dtype) return format;
  return std::nullopt;
}

/// A member of an entry that is an array of numbers of at most 2^63 - 1.
inline std::vector<std::int64_t> safetensors_numbers(const nlohmann::json& entry, const char* key,
                                                     std::string_view file, std::string_view name) {
  const auto array = entry.find(key);
  if (array == entry.end() || !array->is_array())
    fail_model(file, name, std::string("has no array ") + key);
  std::vector<std::int64_t> numbers;
  for (const auto& element : *array) {
    if (!element.is_number_unsigned() || element.get<std::uint64_t>() > INT64_MAX)
      fail_model(file, name, std::string("has a number in ") + key + " that is not 0 to 2^63 - 1");
    numbers.push_back(element.get<std::int64_t>());
  }
  return numbers;
}

inline StoredTensor read_safetensors_entry(const std::string& name, const nlohmann::json& entry,
                                           std::span<const std::byte> data, std::string_view file) {
  if (!entry.is_object()) fail_model(file, name, "its entry is not an object");
  StoredTensor tensor;
  tensor.name = name;
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) fail_model(file, name, "has no dtype");
  const auto& type = dtype->get_ref<const std::string&>();
  const auto format = safetensors_format(type);
  if (!format) fail_model(file, name, "has the dtype " + printable(type) + ", which is not read");
  tensor.format = *format;
  tensor.shape = safetensors_numbers(entry, "shape", file, name);
  const auto offsets = safetensors_numbers(entry, "data_offsets", file, name);
  if (offsets.size() != 2) fail_model(file, name, "has no two data_offsets");
  const std::int64_t needed = stored_bytes(tensor.format, tensor.shape);
  if (needed < 0)
    fail_model(file, name, "its shape " + stored_shape_text(tensor.shape) + " overflows");
  if (offsets[0] > offsets[1] || static_cast<std::uint64_t>(offsets[1]) > data.size())
    fail_model(file, name, "its data lie outside the file");
  const std::int64_t size = offsets[1] - offsets[0];
  if (size != needed)
    fail_model(file, name,
               "has " + std::to_string(size) + " bytes, its shape needs " + std::to_string(needed));
  tensor.bytes = data.subspan(static_cast<std::size_t>(offsets[0]), static_cast<std::size_t>(size));
  return tensor;
}

/// Every byte of the data belongs to one tensor.
inline void require_safetensors_cover(const StoredTensors::Map& tensors,
                                      std::span<const std::byte> data, std::string_view file) {
  struct Place {
    std::size_t begin, end;
    const std::string* name;
    bool operator<(const Place& other) const {
      return std::pair(begin, end) < std::pair(other.begin, other.end);
    }
  };
  std::vector<Place> places;
  for (const auto& [name, tensor] : tensors) {
    const auto begin = static_cast<std::size_t>(tensor.bytes.data() - data.data());
    places.push_back({begin, begin + tensor.bytes.size(), &name});
  }
  std::sort(places.begin(), places.end());
  std::size_t end = 0;
  const auto gap = [&](std::size_t next) {
    fail_model(file, "",
               "bytes " + std::to_string(end) + " to " + std::to_string(next) +
                   " of its data belong to no tensor");
  };
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (places[i].begin < end)
      fail_model(file, *places[i].name,
                 "its data overlap those of " + printable(*places[i - 1].name));
    if (places[i].begin > end) gap(places[i].begin);
    end = places[i].end;
  }
  if (end != data.size()) gap(data.size());
}

inline SafetensorsContents parse_safetensors(std::span<const std::byte> bytes,
                                             std::string_view file) {
  constexpr std::uint64_t kLargestHeader = 100'000'000;  // the limit of the reference
  std::uint64_t length = 0;
  if (bytes.size() < sizeof(length)) fail_model(file, "", "is shorter than its 8 byte length");
  std::memcpy(&length, bytes.data(), sizeof(length));
  bytes = bytes.subspan(sizeof(length));
  if (length > bytes.size() || length > kLargestHeader)
    fail_model(file, "",
               "its header length, " + std::to_string(length) + ", exceeds " +
                   (length > bytes.size() ? "the file" : "100 MB"));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()),
                              static_cast<std::size_t>(length));
  const auto header = parse_json(text, file, "header", 8);
  if (!header.is_object()) fail_model(file, "header", "is not an object");
  const auto data = bytes.subspan(static_cast<std::size_t>(length));
  SafetensorsContents contents;
  for (const auto& [name, entry] : header.items()) {
    if (name != "__metadata__") {
      contents.tensors.emplace(name, read_safetensors_entry(name, entry, data, file));
      continue;
    }
    if (!entry.is_object()) fail_model(file, name, "is not an object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) fail_model(file, name, "has a value that is not a string");
      contents.metadata.emplace(key, value.template get<std::string>());
    }
  }
  require_safetensors_cover(contents.tensors, data, file);
  return contents;
}

/// What an index (model.safetensors.index.json) says: the file of each tensor. File names are plain
/// ones, so that an index reads nothing outside its folder.
inline std::map<std::string, std::string, std::less<>> parse_safetensors_index(
    std::string_view text, std::string_view file) {
  const auto index = parse_json(text, file, "", 8);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (map == index.end() || !map->is_object()) fail_model(file, "", "has no object weight_map");
  constexpr std::string_view kEnding = ".safetensors";
  std::map<std::string, std::string, std::less<>> files;
  for (const auto& [name, value] : map->items()) {
    if (!value.is_string()) fail_model(file, name, "its file is not a string");
    const auto& shard = value.template get_ref<const std::string&>();
    using namespace std::string_view_literals;
    if (!shard.ends_with(kEnding) || shard.find_first_of("/\\:\0"sv) != std::string::npos)
      fail_model(
          file, name,
          "its file, " + printable(shard) + ", is not the plain name of a .safetensors file");
    files.emplace(name, shard);
  }
  return files;
}

}  // namespace detail

/// The tensors of a model in safetensors form. They end with this object.
class Safetensors {
 public:
  Safetensors() = default;
  /// A .safetensors file; an index (.json); or a folder with model.safetensors.index.json or else
  /// model.safetensors.
  explicit Safetensors(const std::filesystem::path& path) {
    std::filesystem::path file = path;
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) {
      file = path / "model.safetensors.index.json";
      if (!std::filesystem::exists(file, ignored)) file = path / "model.safetensors";
    }
    if (file.extension() == ".json") {
      read_index(file);
    } else {
      auto contents = read(file);
      metadata_ = std::move(contents.metadata);
      tensors_ = {files_.back().name(), std::move(contents.tensors)};
    }
  }

  const StoredTensors& tensors() const { return tensors_; }
  /// `__metadata__` of the file, or of all files together: the first one's where keys repeat.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<MappedFile>& files() const { return files_; }

 private:
  detail::SafetensorsContents read(const std::filesystem::path& path) {
    const MappedFile& file = files_.emplace_back(path);
    return detail::parse_safetensors(file.bytes(), file.name());
  }

  void read_index(const std::filesystem::path& path) {
    const MappedFile index(path);
    const auto file_of = detail::parse_safetensors_index(index.text(), index.name());
    std::set<std::string> shards;
    for (const auto& [name, shard] : file_of) shards.insert(shard);
    StoredTensors::Map map;
    for (const std::string& shard : shards) {
      auto contents = read(path.parent_path() / shard);
      for (const auto& [name, tensor] : contents.tensors) {
        const auto found = file_of.find(name);
        if (found == file_of.end() || found->second != shard)
          detail::fail_model(files_.back().name(), name, "this tensor is not there by the index");
      }
      map.merge(contents.tensors);
      metadata_.merge(contents.metadata);
    }
    for (const auto& [name, shard] : file_of)
      if (!map.contains(name))
        detail::fail_model((path.parent_path() / shard).string(), name,
                           "this tensor is missing, the index has it");
    tensors_ = {index.name(), std::move(map)};
  }

  std::vector<MappedFile> files_;
  StoredTensors tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a file; data start at a multiple of 64 bytes. It appears whole or not at all, by way of
/// `path`.partial. Throws std::invalid_argument where a tensor's bytes are not those that its
/// shape asks for, two have one name, or one is stored in blocks; ModelFileError where the disk
/// refuses.
inline void write_safetensors(const std::filesystem::path& path,
                              std::span<const StoredTensor> tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  constexpr auto name = "write_safetensors";
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const StoredTensor& tensor : tensors) {
    const auto size = static_cast<std::int64_t>(tensor.bytes.size());
    detail::require_that(tensor.format <= StoredFormat::boolean, name, tensor.name,
                         " is stored as ", layout_of(tensor.format).name,
                         ", expected plain numbers");
    detail::require_that(detail::stored_bytes(tensor.format, tensor.shape) == size, name,
                         tensor.name, " has ", size, " bytes, its shape is ",
                         detail::stored_shape_text(tensor.shape), " of ",
                         layout_of(tensor.format).name);
    detail::require_that(!header.contains(tensor.name), name, tensor.name, " is there twice");
    header[tensor.name] = {{"dtype", layout_of(tensor.format).name},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.append((64 - (text.size() + 8) % 64) % 64, ' ');
  const std::uint64_t length = text.size();
  detail::write_whole(path, ".partial", [&](std::ofstream& stream) {
    const auto write = [&stream](const void* bytes, std::size_t count) {
      stream.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(count));
    };
    write(&length, sizeof(length));
    write(text.data(), text.size());
    for (const StoredTensor& tensor : tensors) write(tensor.bytes.data(), tensor.bytes.size());
  });
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
