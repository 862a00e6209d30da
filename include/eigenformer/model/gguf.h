/// \file
/// GGUF files, versions 2 and 3, little endian (github.com/ggml-org/ggml, docs/gguf.md): metadata
/// of 13 types under keys, then names, shapes and formats of tensors, then their data, each at a
/// multiple of `general.alignment`.
///
///   const ef::Gguf file("model.gguf");
///   std::int64_t layers = file.metadata().integer("llama.block_count");
///   std::vector<std::string_view> tokens = file.metadata().texts("tokenizer.ggml.tokens");
///   const ef::StoredTensor& embedding = file.tensors().at("token_embd.weight");
///
/// Shapes are row-major: the reverse of the file's. The file is mapped, and nothing is believed:
/// ModelFileError names file, key or tensor, and reason where the file ends early, a key or a
/// tensor is there twice, a type or a format is not among the known, arrays are nested more than 4
/// deep, a shape has more than 4 sizes or overflows, a tensor's place is not aligned, lies outside
/// the file or overlaps another's, or bytes between tensors belong to none; also for parts of a
/// split file. Costs O(metadata); data are not read.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mapped_file.h"
#include "stored_tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Types of metadata by their numbers in the file.
enum class GgufType : std::uint32_t {
  uint8,
  int8,
  uint16,
  int16,
  uint32,
  int32,
  float32,
  boolean,
  string,
  array,
  uint64,
  int64,
  float64
};

/// A value of the metadata, a view of the mapped file: the bytes of a number, of a string without
/// its length, or of an array's elements.
struct GgufValue {
  GgufType type = GgufType::uint8;
  GgufType element_type = GgufType::uint8;  ///< of an array
  std::uint64_t count = 0;                  ///< elements of an array
  std::span<const std::byte> bytes;
};

namespace detail {

/// Reads a GGUF file from front to back and stops at its end.
class GgufCursor {
 public:
  static constexpr int kDeepest = 4;

  GgufCursor(std::span<const std::byte> rest, std::string_view file) : rest_(rest), file_(file) {}

  std::span<const std::byte> rest() const { return rest_; }
  /// What messages name: a key or a tensor.
  void set_part(std::string_view part) { part_ = part; }
  [[noreturn]] void refuse(std::string_view why) const { fail_model(file_, part_, why); }

  std::span<const std::byte> take(std::uint64_t count) {
    if (count > rest_.size()) refuse("the file ends here, too early");
    const auto taken = rest_.first(static_cast<std::size_t>(count));
    rest_ = rest_.subspan(static_cast<std::size_t>(count));
    return taken;
  }
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::string_view text() {
    const auto bytes = take(number<std::uint64_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  GgufType type() {
    const auto number_of_type = number<std::uint32_t>();
    if (number_of_type > static_cast<std::uint32_t>(GgufType::float64))
      refuse("has the unknown type " + std::to_string(number_of_type));
    return static_cast<GgufType>(number_of_type);
  }
  GgufValue value(GgufType type, int depth = 0) {
    GgufValue value{.type = type, .element_type = type, .count = 0, .bytes = {}};
    if (type == GgufType::string) {
      const std::string_view characters = text();
      value.bytes = std::as_bytes(std::span(characters.data(), characters.size()));
    } else if (type != GgufType::array) {
      value.bytes = take(bytes_of(type));
      if (type == GgufType::boolean && std::to_integer<int>(value.bytes[0]) > 1)
        refuse("is a boolean that is neither 0 nor 1");
    } else {
      if (depth == kDeepest)
        refuse("has arrays nested more than " + std::to_string(kDeepest) + " deep");
      value.element_type = this->type();
      value.count = number<std::uint64_t>();
      const auto before = rest_;
      if (const std::uint64_t size = bytes_of(value.element_type);
          size > 0 && value.element_type != GgufType::boolean) {
        if (value.count > rest_.size() / size) refuse("the file ends here, too early");
        take(value.count * size);
      } else {  // each is read: it takes bytes, so the file's end is the limit
        for (std::uint64_t i = 0; i < value.count; ++i) this->value(value.element_type, depth + 1);
      }
      value.bytes = before.first(before.size() - rest_.size());
    }
    return value;
  }
  /// Of a number; 0 of strings and arrays.
  static constexpr std::uint64_t bytes_of(GgufType type) {
    constexpr std::uint64_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return sizes[static_cast<std::size_t>(type)];
  }

 private:
  std::span<const std::byte> rest_;
  std::string_view file_, part_;
};

}  // namespace detail

/// The metadata of a file. Calls throw ModelFileError where there is no such key or its value is of
/// another kind.
class GgufMetadata {
 public:
  using Map = std::map<std::string, GgufValue, std::less<>>;
  GgufMetadata() = default;
  GgufMetadata(std::string file, Map map) : file_(std::move(file)), map_(std::move(map)) {}

  const Map& map() const { return map_; }
  bool contains(std::string_view key) const { return map_.find(key) != map_.end(); }
  /// A string, which lies in the file.
  std::string_view text(std::string_view key) const { return text_of(key, at(key)); }
  bool boolean(std::string_view key) const {
    const GgufValue& value = at(key);
    require_kind(value.type == GgufType::boolean, key, "a boolean");
    return std::to_integer<int>(value.bytes[0]) == 1;
  }
  /// An integer of any type. Throws also where it exceeds 2^63 - 1.
  std::int64_t integer(std::string_view key) const { return integer_of(key, at(key)); }
  /// A floating-point number or an integer.
  double number(std::string_view key) const { return number_of(key, at(key)); }

  /// Arrays of these.
  std::vector<std::string_view> texts(std::string_view key) const {
    std::vector<std::string_view> list;
    for_elements(key, [&](const GgufValue& value) { list.push_back(text_of(key, value)); });
    return list;
  }
  std::vector<std::int64_t> integers(std::string_view key) const {
    std::vector<std::int64_t> list;
    for_elements(key, [&](const GgufValue& value) { list.push_back(integer_of(key, value)); });
    return list;
  }
  std::vector<double> numbers(std::string_view key) const {
    std::vector<double> list;
    for_elements(key, [&](const GgufValue& value) { list.push_back(number_of(key, value)); });
    return list;
  }
  /// The elements of an array of anything, arrays among them.
  std::vector<GgufValue> elements(std::string_view key) const {
    std::vector<GgufValue> list;
    for_elements(key, [&](const GgufValue& value) { list.push_back(value); });
    return list;
  }
  const GgufValue& at(std::string_view key) const {
    const auto found = map_.find(key);
    if (found == map_.end()) detail::fail_model(file_, key, "this key is missing");
    return found->second;
  }

 private:
  void require_kind(bool ok, std::string_view key, const char* kind) const {
    if (!ok) detail::fail_model(file_, key, std::string("is not ") + kind);
  }
  std::string_view text_of(std::string_view key, const GgufValue& value) const {
    require_kind(value.type == GgufType::string, key, "a string");
    return {reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size()};
  }
  template <typename T>
  static T load(const GgufValue& value) {
    T number;
    std::memcpy(&number, value.bytes.data(), sizeof(T));
    return number;
  }
  std::int64_t integer_of(std::string_view key, const GgufValue& value) const {
    switch (value.type) {
      case GgufType::uint8:
        return load<std::uint8_t>(value);
      case GgufType::int8:
        return load<std::int8_t>(value);
      case GgufType::uint16:
        return load<std::uint16_t>(value);
      case GgufType::int16:
        return load<std::int16_t>(value);
      case GgufType::uint32:
        return load<std::uint32_t>(value);
      case GgufType::int32:
        return load<std::int32_t>(value);
      case GgufType::int64:
        return load<std::int64_t>(value);
      case GgufType::uint64:
        if (load<std::int64_t>(value) >= 0) return load<std::int64_t>(value);
        break;
      default:
        break;
    }
    detail::fail_model(file_, key, "is not an integer below 2^63");
  }
  double number_of(std::string_view key, const GgufValue& value) const {
    if (value.type == GgufType::float32) return static_cast<double>(load<float>(value));
    if (value.type == GgufType::float64) return load<double>(value);
    if (value.type == GgufType::uint64) return static_cast<double>(load<std::uint64_t>(value));
    require_kind(value.type != GgufType::boolean && value.type != GgufType::string &&
                     value.type != GgufType::array,
                 key, "a number");
    return static_cast<double>(integer_of(key, value));
  }
  template <typename Each>
  void for_elements(std::string_view key, Each&& each) const {
    const GgufValue& array = at(key);
    require_kind(array.type == GgufType::array, key, "an array");
    detail::GgufCursor cursor(array.bytes, file_);
    cursor.set_part(key);
    for (std::uint64_t i = 0; i < array.count; ++i) each(cursor.value(array.element_type, 1));
  }

  std::string file_;
  Map map_;
};

namespace detail {

struct GgufContents {
  std::uint32_t version = 0;
  GgufMetadata metadata;
  StoredTensors::Map tensors;
};

inline std::optional<StoredFormat> gguf_format(std::uint32_t number) {
  switch (number) {
    case 0:
      return StoredFormat::f32;
    case 1:
      return StoredFormat::f16;
    case 2:
      return StoredFormat::q4_0;
    case 3:
      return StoredFormat::q4_1;
    case 6:
      return StoredFormat::q5_0;
    case 7:
      return StoredFormat::q5_1;
    case 8:
      return StoredFormat::q8_0;
    case 12:
      return StoredFormat::q4_k;
    case 13:
      return StoredFormat::q5_k;
    case 14:
      return StoredFormat::q6_k;
    case 24:
      return StoredFormat::i8;
    case 25:
      return StoredFormat::i16;
    case 26:
      return StoredFormat::i32;
    case 27:
      return StoredFormat::i64;
    case 28:
      return StoredFormat::f64;
    case 30:
      return StoredFormat::bf16;
    case 39:
      return StoredFormat::mxfp4;
    default:
      return std::nullopt;
  }
}

/// The other way round.
inline std::uint32_t gguf_number(StoredFormat format) {
  std::uint32_t number = 0;
  while (gguf_format(number) != format) ++number;
  return number;
}

/// For messages: what people know a format by.
inline std::string gguf_format_text(std::uint32_t number) {
  constexpr std::string_view names[] = {
      "",        "",      "",       "",      "Q4_2",  "Q4_3",   "",     "",        "",
      "Q8_1",    "Q2_K",  "Q3_K",   "",      "",      "",       "Q8_K", "IQ2_XXS", "IQ2_XS",
      "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "",     "",        "",
      "",        "",      "IQ1_M",  "",      "",      "",       "",     "TQ1_0",   "TQ2_0"};
  if (number < std::size(names) && !names[number].empty()) return std::string(names[number]);
  return "number " + std::to_string(number);
}

inline GgufMetadata::Map read_gguf_metadata(GgufCursor& cursor, std::uint64_t count) {
  GgufMetadata::Map map;
  for (std::uint64_t i = 0; i < count; ++i) {
    cursor.set_part("metadata");
    const std::string_view key = cursor.text();
    cursor.set_part(key);
    const GgufType type = cursor.type();
    const GgufValue value = cursor.value(type);
    if (!map.emplace(key, value).second) cursor.refuse("is there twice");
  }
  return map;
}

/// A tensor as the file describes it, and where its bytes are: `offset` after the beginning of the
/// data.
struct GgufEntry {
  StoredTensor tensor;
  std::uint64_t offset, bytes;
};

inline GgufEntry read_gguf_entry(GgufCursor& cursor) {
  cursor.set_part("tensors");
  GgufEntry entry{};
  entry.tensor.name = cursor.text();
  cursor.set_part(entry.tensor.name);
  const auto rank = cursor.number<std::uint32_t>();
  if (rank > 4) cursor.refuse("has " + std::to_string(rank) + " dimensions, more than 4");
  for (std::uint32_t d = 0; d < rank; ++d)
    entry.tensor.shape.insert(entry.tensor.shape.begin(), cursor.number<std::int64_t>());
  const auto number = cursor.number<std::uint32_t>();
  const auto format = gguf_format(number);
  if (!format)
    cursor.refuse("is stored in the format " + gguf_format_text(number) + ", which is not read");
  entry.tensor.format = *format;
  entry.offset = cursor.number<std::uint64_t>();
  const std::int64_t bytes = stored_bytes(*format, entry.tensor.shape);
  if (bytes < 0)
    cursor.refuse("its shape " + stored_shape_text(entry.tensor.shape) +
                  " overflows, or its rows are no multiple of a block of " +
                  std::string(layout_of(*format).name));
  entry.bytes = static_cast<std::uint64_t>(bytes);
  return entry;
}

/// Gives the tensors their bytes. One follows the other, but for what alignment asks for.
inline StoredTensors::Map place_gguf_tensors(std::vector<GgufEntry> entries,
                                             std::span<const std::byte> data,
                                             std::uint64_t alignment, std::string_view file) {
  std::sort(entries.begin(), entries.end(), [](const GgufEntry& a, const GgufEntry& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  StoredTensors::Map tensors;
  std::uint64_t next = 0;  // where a tensor must begin: at most data.size() + alignment
  for (GgufEntry& entry : entries) {
    const std::string& name = entry.tensor.name;
    if (entry.offset % alignment != 0)
      fail_model(file, name, "its data are not at a multiple of " + std::to_string(alignment));
    if (entry.offset > data.size() || entry.bytes > data.size() - entry.offset)
      fail_model(file, name, "its data lie outside the file");
    if (entry.offset < next) fail_model(file, name, "its data overlap those of another tensor");
    if (entry.offset > next) fail_model(file, name, "bytes of data before it belong to no tensor");
    const std::uint64_t end = entry.offset + entry.bytes;
    next = (end + alignment - 1) / alignment * alignment;
    entry.tensor.bytes =
        data.subspan(static_cast<std::size_t>(entry.offset), static_cast<std::size_t>(entry.bytes));
    std::string key = name;
    if (!tensors.emplace(std::move(key), std::move(entry.tensor)).second)
      fail_model(file, name, "this tensor is there twice");
  }
  return tensors;
}

inline GgufContents parse_gguf(std::span<const std::byte> bytes, std::string_view file) {
  GgufCursor cursor(bytes, file);
  cursor.set_part("header");
  const auto magic = cursor.take(4);
  if (std::memcmp(magic.data(), "GGUF", 4) != 0) cursor.refuse("does not begin with GGUF");
  GgufContents contents;
  contents.version = cursor.number<std::uint32_t>();
  if (contents.version != 2 && contents.version != 3)
    cursor.refuse(contents.version != 0 && contents.version % 65536 == 0
                      ? "is of a big-endian file, which is not read"
                      : "has version " + std::to_string(contents.version) + ", 2 and 3 are read");
  const auto tensor_count = cursor.number<std::uint64_t>(),
             value_count = cursor.number<std::uint64_t>();
  contents.metadata = {std::string(file), read_gguf_metadata(cursor, value_count)};
  std::vector<GgufEntry> entries;
  for (std::uint64_t i = 0; i < tensor_count; ++i) entries.push_back(read_gguf_entry(cursor));

  const GgufMetadata& metadata = contents.metadata;
  constexpr auto kAlignmentKey = "general.alignment", kSplitKey = "split.count";
  const std::int64_t alignment =
      metadata.contains(kAlignmentKey) ? metadata.integer(kAlignmentKey) : 32;
  if (alignment < 1 || alignment > 1 << 30 ||
      !std::has_single_bit(static_cast<std::uint64_t>(alignment)))
    fail_model(file, kAlignmentKey,
               "is " + std::to_string(alignment) + ", expected a power of two of at most 2^30");
  if (metadata.contains(kSplitKey) && metadata.integer(kSplitKey) > 1)
    fail_model(file, kSplitKey, "this is one of several files of a model: join them first");
  const auto unit = static_cast<std::size_t>(alignment);
  const std::size_t padding = (unit - (bytes.size() - cursor.rest().size()) % unit) % unit;
  const auto data = cursor.rest().subspan((std::min)(padding, cursor.rest().size()));
  contents.tensors = place_gguf_tensors(std::move(entries), data, unit, file);
  return contents;
}

}  // namespace detail

/// A GGUF file, mapped. Tensors and views of strings end with this object.
class Gguf {
 public:
  Gguf() = default;
  explicit Gguf(const std::filesystem::path& path) : file_(path) {
    read(file_.bytes(), file_.name());
  }
  /// Of bytes that outlive it; `name` is for messages.
  Gguf(std::span<const std::byte> bytes, const std::string& name) { read(bytes, name); }

  std::uint32_t version() const { return version_; }
  const GgufMetadata& metadata() const { return metadata_; }
  const StoredTensors& tensors() const { return tensors_; }
  const MappedFile& file() const { return file_; }

 private:
  void read(std::span<const std::byte> bytes, const std::string& name) {
    auto contents = detail::parse_gguf(bytes, name);
    version_ = contents.version;
    metadata_ = std::move(contents.metadata);
    tensors_ = {name, std::move(contents.tensors)};
  }

  MappedFile file_;
  std::uint32_t version_ = 0;
  GgufMetadata metadata_;
  StoredTensors tensors_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
