/// \file
/// safetensors files: eight bytes of header length (little endian), a JSON header, the data.
/// Written and read here for float32 tensors. A file is hostile until proven otherwise: every size
/// and offset is checked before a byte is read through it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <eigenformer/core/compiler.h>
#include <nlohmann/json.hpp>

namespace safetensors {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A float32 tensor: its shape and its elements, row-major.
struct TensorRef {
  std::vector<std::int64_t> shape;
  std::span<const float> values;
};

/// A parsed file. Tensors are copied out, because data in a file need not be aligned.
struct File {
  struct Entry {
    std::vector<std::int64_t> shape;
    std::vector<float> values;
  };
  std::map<std::string, Entry> tensors;
  std::map<std::string, std::string> metadata;
};

namespace detail {

// the limit of the reference implementation
inline constexpr std::uint64_t kMaxHeader = 100'000'000;

[[noreturn]] inline void fail(const std::string& what) { throw Error("safetensors: " + what); }

inline std::uint64_t unsigned_number(const nlohmann::json& value, const std::string& what) {
  if (!value.is_number_unsigned()) fail(what + " is not a non-negative integer");
  return value.get<std::uint64_t>();
}

inline File::Entry read_entry(const std::string& name, const nlohmann::json& description,
                              std::span<const std::byte> data) {
  if (!description.is_object()) fail("the entry of \"" + name + "\" is not an object");
  if (!description.contains("dtype") || description["dtype"] != "F32")
    fail("\"" + name + "\" has a dtype other than F32");
  if (!description.contains("shape") || !description["shape"].is_array())
    fail("\"" + name + "\" has no shape");
  if (!description.contains("data_offsets") || !description["data_offsets"].is_array() ||
      description["data_offsets"].size() != 2)
    fail("\"" + name + "\" has no data_offsets");
  File::Entry entry;
  std::uint64_t bytes = sizeof(float);
  for (const auto& size : description["shape"]) {
    const std::uint64_t extent = unsigned_number(size, "a size of \"" + name + "\"");
    if (extent > static_cast<std::uint64_t>(INT64_MAX) ||
        !eigenformer::detail::multiply_fits(bytes, extent, bytes))
      fail("the shape of \"" + name + "\" overflows");
    entry.shape.push_back(static_cast<std::int64_t>(extent));
  }
  const std::uint64_t begin =
      unsigned_number(description["data_offsets"][0], "an offset of \"" + name + "\"");
  const std::uint64_t end =
      unsigned_number(description["data_offsets"][1], "an offset of \"" + name + "\"");
  if (begin > end || end > data.size()) fail("the data of \"" + name + "\" lies outside the file");
  if (end - begin != bytes)
    fail("\"" + name + "\" has " + std::to_string(end - begin) + " bytes, its shape needs " +
         std::to_string(bytes));
  entry.values.resize(static_cast<std::size_t>(bytes / sizeof(float)));
  if (bytes > 0)
    std::memcpy(entry.values.data(), data.data() + begin, static_cast<std::size_t>(bytes));
  return entry;
}

}  // namespace detail

/// Parses a whole file. Throws Error for anything that is not a safetensors file of float32
/// tensors.
inline File parse(std::span<const std::byte> bytes) {
  using detail::fail;
  if (bytes.size() < 8) fail("the file is shorter than its 8 byte length");
  std::uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i)
    header_size =
        header_size << 8 | std::to_integer<std::uint64_t>(bytes[static_cast<std::size_t>(i)]);
  if (header_size > detail::kMaxHeader || header_size > bytes.size() - 8)
    fail("the header length " + std::to_string(header_size) + " exceeds the file");
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  int depth = 0;  // the format is two objects deep; a bomb of brackets is not worth a stack
  const auto shallow = [&depth](int level, nlohmann::json::parse_event_t event, nlohmann::json&) {
    if (event == nlohmann::json::parse_event_t::object_start ||
        event == nlohmann::json::parse_event_t::array_start)
      depth = level;
    if (depth > 8) fail("the header is nested too deeply");
    return true;
  };
  nlohmann::json header;
  try {
    header = nlohmann::json::parse(text, text + header_size, shallow);
  } catch (const nlohmann::json::exception& error) {
    fail(std::string("the header is not JSON: ") + error.what());
  }
  if (!header.is_object()) fail("the header is not an object");
  const auto data = bytes.subspan(8 + static_cast<std::size_t>(header_size));
  File file;
  for (const auto& [name, description] : header.items()) {
    if (name == "__metadata__") {
      if (!description.is_object()) fail("__metadata__ is not an object");
      for (const auto& [key, value] : description.items()) {
        if (!value.is_string()) fail("a value of __metadata__ is not a string");
        file.metadata[key] = value.get<std::string>();
      }
    } else {
      file.tensors.emplace(name, detail::read_entry(name, description, data));
    }
  }
  return file;
}

inline File read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) detail::fail("cannot open " + path.string());
  std::vector<std::byte> bytes(static_cast<std::size_t>(stream.tellg()));
  stream.seekg(0);
  if (!stream.read(reinterpret_cast<char*>(bytes.data()),
                   static_cast<std::streamsize>(bytes.size())))
    detail::fail("cannot read " + path.string());
  try {
    return parse(bytes);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + " (" + path.string() + ")");
  }
}

/// Writes a file; data start at a multiple of 8 bytes. The file appears whole or not at all.
inline void write(const std::filesystem::path& path,
                  const std::vector<std::pair<std::string, TensorRef>>& tensors,
                  const std::map<std::string, std::string>& metadata = {}) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const std::uint64_t size = tensor.values.size_bytes();
    header[name] = {
        {"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + size}}};
    offset += size;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const auto partial = std::filesystem::path(path).concat(".partial");
  std::ofstream stream(partial, std::ios::binary);
  char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  stream.write(length, 8);
  stream.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const auto& [name, tensor] : tensors)
    stream.write(reinterpret_cast<const char*>(tensor.values.data()),
                 static_cast<std::streamsize>(tensor.values.size_bytes()));
  stream.close();
  if (!stream)
    detail::fail("cannot write " + partial.string() +
                 ": is the disk full, or the folder not writable?");
  std::filesystem::rename(partial, path);
}

}  // namespace safetensors
