/// \file
/// Text as tokenizers see it: UTF-8 that is whole, and the alphabet of byte-level BPE.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "../../core/isa.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  ///< U+FFFD

/// What a text begins with.
struct Utf8Front {
  std::size_t bytes = 0;      ///< of the character, or of the longest part that could begin one
  char32_t code_point = 0;    ///< where it is whole
  bool whole = false;         ///< a character of well-formed UTF-8 (Unicode 15, table 3-7)
  bool may_continue = false;  ///< not whole, and the text ends before this is decided
};

/// `text` is not empty.
inline Utf8Front utf8_front(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {1, first, true, false};
  // Bytes that follow lie in 80..BF; the first of them is narrower after E0, ED, F0 and F4.
  const std::size_t length = first < 0xC2   ? 0
                             : first < 0xE0 ? 2
                             : first < 0xF0 ? 3
                             : first < 0xF5 ? 4
                                            : 0;
  if (length == 0) return {1, 0, false, false};
  const unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  char32_t code_point = first & (0x7Fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, 0, false, true};
    if (byte(i) < (i == 1 ? low : 0x80) || byte(i) > (i == 1 ? high : 0xBF))
      return {i, 0, false, false};
    code_point = code_point << 6 | (byte(i) & 0x3F);
  }
  return {length, code_point, true, false};
}

/// Bytes of the character at the front of text that is whole UTF-8 and not empty.
inline std::size_t character_bytes(std::string_view text) { return utf8_front(text).bytes; }

/// The text with U+FFFD in place of each longest part that could have begun a character and of
/// every other stray byte, as Python's errors="replace" and Rust's from_utf8_lossy have it.
inline std::string whole_utf8(std::string_view text) {
  std::string whole;
  whole.reserve(text.size());
  while (!text.empty()) {
    const Utf8Front front = utf8_front(text);
    whole += front.whole ? text.substr(0, front.bytes) : kReplacementCharacter;
    text.remove_prefix(front.bytes);
  }
  return whole;
}

inline bool is_whole_utf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Front front = utf8_front(text);
    if (!front.whole) return false;
    text.remove_prefix(front.bytes);
  }
  return true;
}

inline void append_utf8(std::string& text, char32_t code_point) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (code_point < 0x80) return put(code_point);
  if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
  }
  put(0x80 | (code_point & 0x3F));
}

/// GPT-2's alphabet of bytes: printable Latin-1 stands for itself, the other 68 bytes, in order,
/// are U+0100 and up.
struct ByteAlphabet {
  static constexpr std::size_t kCharacters = 0x144;  ///< U+0000 up to the last one in use
  std::array<std::string, 256> character;
  std::array<std::int16_t, kCharacters> byte;  ///< -1: stands for none

  ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool prints = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      const char32_t code_point = prints ? static_cast<char32_t>(b) : next++;
      append_utf8(character[static_cast<std::size_t>(b)], code_point);
      byte[code_point] = static_cast<std::int16_t>(b);
    }
  }
  static const ByteAlphabet& instance() {
    static const ByteAlphabet alphabet;
    return alphabet;
  }

  std::string encode(std::string_view bytes) const {
    std::string text;
    text.reserve(bytes.size() * 2);
    for (const char b : bytes) text += character[static_cast<unsigned char>(b)];
    return text;
  }
  /// Appends the bytes that `text` stands for; text with another character stands for its own.
  void decode(std::string_view text, std::string& bytes) const {
    const std::size_t before = bytes.size();
    for (std::string_view rest = text; !rest.empty();) {
      const Utf8Front front = utf8_front(rest);
      if (!front.whole || front.code_point >= kCharacters || byte[front.code_point] < 0) {
        bytes.resize(before);
        bytes += text;
        return;
      }
      bytes += static_cast<char>(byte[front.code_point]);
      rest.remove_prefix(front.bytes);
    }
  }
};

/// "<0x0A>": how vocabularies with byte fallback spell a byte.
inline std::string byte_token(unsigned char byte) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  return {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
}

/// The byte that a token spells so, in digits of either case; -1: it spells none.
inline int byte_of_token(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int byte = 0;
  for (const char digit : token.substr(3, 2)) {
    const int lower = digit | 0x20;
    if (digit >= '0' && digit <= '9')
      byte = byte * 16 + (digit - '0');
    else if (lower >= 'a' && lower <= 'f')
      byte = byte * 16 + (lower - 'a' + 10);
    else
      return -1;
  }
  return byte;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
