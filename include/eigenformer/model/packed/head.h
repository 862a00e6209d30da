/// \file
/// The head of a file of packed weights, and the numbers that stand for scalars in it
/// (packed_file.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../../core/tensor.h"
#include "../../kv/paged_layers.h"
#include "../../linear.h"
#include "../error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What stands before the data.
struct PackedHead {
  static constexpr std::string_view kMagic = "EFPACKED";
  static constexpr std::int64_t kOrder = 0x0102030405060708, kVersion = 4;
  static constexpr std::size_t kFixed = 7 * 8;  // magic, order, version and the four sizes
  static constexpr std::uint64_t kPage = 4096;
  static constexpr const char* kDamaged = "is damaged: delete it to have it made again";

  std::string key;
  std::vector<std::int64_t> numbers;
  std::uint64_t data_bytes = 0;

  static std::uint64_t rounded(std::uint64_t bytes, std::uint64_t to) {
    return (bytes + to - 1) / to * to;
  }

  std::string bytes() const {
    std::string padded = key;
    padded.resize(rounded(key.size(), 8), '\0');
    const std::size_t size = kFixed + padded.size() + 8 * numbers.size() + 8;
    std::string text(kMagic);
    const auto put = [&text](std::int64_t number) {
      text.append(reinterpret_cast<const char*>(&number), sizeof(number));
    };
    put(kOrder), put(kVersion), put(static_cast<std::int64_t>(size));
    put(static_cast<std::int64_t>(key.size())), put(static_cast<std::int64_t>(numbers.size()));
    put(static_cast<std::int64_t>(data_bytes));
    text += padded;
    for (const std::int64_t number : numbers) put(number);
    put(PagedChecksum::of(text.data(), text.size()));
    text.resize(rounded(size, kPage), '\0');
    return text;
  }
};

/// The head of a file and its data. Throws ModelFileError for a file that is none of these, or is
/// damaged. A file of another version has an empty key and no data.
struct PackedContents {
  PackedHead head;
  std::span<const std::byte> data;

  PackedContents(std::span<const std::byte> file, const std::string& name) {
    const auto number = [&](std::size_t at) {
      std::int64_t value = 0;
      std::memcpy(&value, file.data() + at, sizeof(value));
      return value;
    };
    const auto demand = [&](bool ok, const char* reason) {
      if (!ok) fail_model(name, "", reason);
    };
    demand(file.size() >= PackedHead::kFixed &&
               std::memcmp(file.data(), PackedHead::kMagic.data(), 8) == 0,
           "is no file of packed weights, nor a .gguf file: of a model in several files give the "
           "folder");
    if (number(8) != PackedHead::kOrder || number(16) != PackedHead::kVersion) return;
    const auto size = [&](std::size_t at) { return static_cast<std::uint64_t>(number(at)); };
    const std::uint64_t head_bytes = size(24), key_bytes = size(32), count = size(40);
    constexpr auto damaged = PackedHead::kDamaged;
    demand(head_bytes <= file.size() && key_bytes <= head_bytes && count <= head_bytes / 8 &&
               PackedHead::kFixed + PackedHead::rounded(key_bytes, 8) + 8 * count + 8 == head_bytes,
           damaged);
    demand(PagedChecksum::of(file.data(), head_bytes - 8) == number(head_bytes - 8), damaged);
    const std::uint64_t begin = PackedHead::rounded(head_bytes, PackedHead::kPage);
    head.data_bytes = size(48);
    demand(begin <= file.size() && head.data_bytes == file.size() - begin, damaged);
    head.key.assign(reinterpret_cast<const char*>(file.data()) + PackedHead::kFixed, key_bytes);
    head.numbers.resize(count);
    if (count > 0)
      std::memcpy(head.numbers.data(),
                  file.data() + PackedHead::kFixed + PackedHead::rounded(key_bytes, 8), 8 * count);
    data = file.subspan(begin);
  }
};

/// The scalar of a matrix or of an embedding, in files.
template <typename S>
inline constexpr std::int64_t kPackedCode = 0;
template <>
inline constexpr std::int64_t kPackedCode<float> = 1;
template <>
inline constexpr std::int64_t kPackedCode<double> = 2;
template <>
inline constexpr std::int64_t kPackedCode<bfloat16> = 3;
template <>
inline constexpr std::int64_t kPackedCode<half> = 4;
template <>
inline constexpr std::int64_t kPackedCode<std::int8_t> = 5;
template <>
inline constexpr std::int64_t kPackedCode<int4> = 6;

/// In its place, of an embedding that is the head, and of one in blocks, before their format.
inline constexpr std::int64_t kPackedHead = -1, kPackedBlocks = -2;
/// Before a text.
inline constexpr std::int64_t kPackedText = 1;

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
