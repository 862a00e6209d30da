/// \file
/// A GGUF file without its weights: what says which model it is, and its tokenizer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "gguf.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A GGUF file (version 3) with the metadata of `file` and the names of its tensors. Those of
/// rope_* keep their numbers, others have rows of no element.
inline std::string gguf_outline(const Gguf& file) {
  std::string head = "GGUF", data;
  const auto put = [&head](auto number) {
    head.append(reinterpret_cast<const char*>(&number), sizeof(number));
  };
  const auto put_text = [&](std::string_view text) {
    put(std::uint64_t{text.size()});
    head += text;
  };
  const auto bytes_of = [](std::span<const std::byte> bytes) {
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  constexpr auto kAlign = "general.alignment";  // left out: what it asks for is 32 then
  const auto pad = [](std::string& text) { text.resize((text.size() + 31) / 32 * 32); };
  put(std::uint32_t{3});
  put(std::uint64_t{file.tensors().map().size()});
  put(std::uint64_t{file.metadata().map().size() - (file.metadata().contains(kAlign) ? 1 : 0)});
  for (const auto& [key, value] : file.metadata().map()) {
    if (key == kAlign) continue;
    put_text(key);
    put(static_cast<std::uint32_t>(value.type));
    if (value.type == GgufType::string) put(std::uint64_t{value.bytes.size()});
    if (value.type == GgufType::array) {
      put(static_cast<std::uint32_t>(value.element_type));
      put(value.count);
    }
    head += bytes_of(value.bytes);
  }
  for (const auto& [name, tensor] : file.tensors().map()) {
    const bool kept = name.starts_with("rope_");
    put_text(name);
    put(static_cast<std::uint32_t>(tensor.shape.size()));
    for (std::size_t d = tensor.shape.size(); d > 0; --d)
      put(kept || d < tensor.shape.size() ? tensor.shape[d - 1] : std::int64_t{0});
    put(gguf_number(tensor.format));
    put(std::uint64_t{data.size()});
    if (!kept) continue;
    data += bytes_of(tensor.bytes);
    pad(data);
  }
  pad(head);
  return head + data;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
