/// \file
/// Normal forms of text, NFD, NFC, NFKD and NFKC (Unicode Standard Annex 15), and lower case.
/// Time is linear in the text, but for sorting runs of combining marks.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compatibility_tables.h"
#include "text.h"
#include "unicode_tables.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Hangul syllables are made of a leading consonant, a vowel and perhaps a trailing consonant by
/// arithmetic (Unicode 15, section 3.12).
struct Hangul {
  static constexpr char32_t kSyllables = 0xAC00, kLeading = 0x1100, kVowels = 0x1161,
                            kTrailing = 0x11A7, kLeadingCount = 19, kVowelCount = 21,
                            kTrailingCount = 28, kCount = 11172;
};

/// The last row whose first number is at most `code_point`, of a table of `Width` numbers a row
/// that is sorted by the first; null: none.
template <std::size_t Width, typename Number, std::size_t Size>
const Number* row_at(const Number (&table)[Size], char32_t code_point) {
  static_assert(Size % Width == 0);
  std::size_t begin = 0, end = Size / Width;
  while (begin < end) {
    const std::size_t middle = (begin + end) / 2;
    if (static_cast<char32_t>(table[middle * Width]) <= code_point)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin == 0 ? nullptr : table + (begin - 1) * Width;
}

inline std::uint32_t combining_class(char32_t c) {
  if (c < 0x300) return 0;
  const std::uint32_t* const row = row_at<3>(kCombiningClasses, c);
  return row != nullptr && c <= row[1] ? row[2] : 0;
}

inline void append_decomposed(std::u32string& to, char32_t c) {
  if (c - Hangul::kSyllables < Hangul::kCount) {
    const char32_t syllable = c - Hangul::kSyllables;
    const char32_t trailing = syllable % Hangul::kTrailingCount;
    to += Hangul::kLeading + syllable / (Hangul::kVowelCount * Hangul::kTrailingCount);
    to += Hangul::kVowels + syllable / Hangul::kTrailingCount % Hangul::kVowelCount;
    if (trailing > 0) to += Hangul::kTrailing + trailing;
    return;
  }
  const std::uint32_t* const row = c < 0xC0 ? nullptr : row_at<3>(kDecompositions, c);
  if (row == nullptr || row[0] != c) {
    to += c;
    return;
  }
  append_decomposed(to, row[1]);
  if (row[2] != 0) append_decomposed(to, row[2]);
}

/// What characters stand for that have a decomposition for compatibility, in NFKD.
inline const std::unordered_map<char32_t, std::u32string>& compatible_texts() {
  static const auto texts = [] {
    std::unordered_map<char32_t, std::u32string> made;
    char32_t first = 0;
    for (std::size_t i = 0; i < std::size(kCompatibleRanges); i += 4) {
      const std::int32_t* const row = kCompatibleRanges + i;
      first += static_cast<char32_t>(row[0]);
      for (std::int32_t past = 0; past <= row[1]; past += (std::max)(row[2], 1)) {
        const char32_t c = first + static_cast<char32_t>(past);
        made[c] = static_cast<char32_t>(static_cast<std::int32_t>(c) + row[3]);
      }
    }
    char32_t c = 0;
    for (std::size_t i = 0; i < std::size(kCompatibleTexts);) {
      c += kCompatibleTexts[i];
      const std::uint32_t* const begin = kCompatibleTexts + i + 2;
      i += 2 + kCompatibleTexts[i + 1];
      made[c].assign(begin, kCompatibleTexts + i);
    }
    return made;
  }();
  return texts;
}

/// The character that two compose to; 0: none.
inline char32_t composed(char32_t a, char32_t b) {
  if (a - Hangul::kLeading < Hangul::kLeadingCount && b - Hangul::kVowels < Hangul::kVowelCount)
    return Hangul::kSyllables +
           ((a - Hangul::kLeading) * Hangul::kVowelCount + (b - Hangul::kVowels)) *
               Hangul::kTrailingCount;
  if (a - Hangul::kSyllables < Hangul::kCount &&
      (a - Hangul::kSyllables) % Hangul::kTrailingCount == 0 && b > Hangul::kTrailing &&
      b - Hangul::kTrailing < Hangul::kTrailingCount)
    return a + (b - Hangul::kTrailing);
  using Pair = std::array<char32_t, 3>;  // a, b, what they compose to
  static const std::vector<Pair> pairs = [] {
    std::vector<Pair> made;
    for (std::size_t i = 0; i < std::size(kDecompositions); i += 3) {
      const std::uint32_t* const row = kDecompositions + i;
      if (row[2] != 0 &&
          !std::binary_search(std::begin(kNotComposed), std::end(kNotComposed), row[0]))
        made.push_back({row[1], row[2], row[0]});
    }
    std::sort(made.begin(), made.end());
    return made;
  }();
  const auto at = std::lower_bound(pairs.begin(), pairs.end(), Pair{a, b, 0});
  return at != pairs.end() && (*at)[0] == a && (*at)[1] == b ? (*at)[2] : 0;
}

/// Joins what composes, in place: `text` is in NFD.
inline void compose(std::u32string& text) {
  std::size_t out = 0, starter = text.size();  // no starter yet
  std::uint32_t last_class = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char32_t c = text[i];
    const std::uint32_t own = combining_class(c);
    if (starter < out) {
      // A mark reaches its starter past marks of lower class only, a starter past none.
      const bool reaches = out == starter + 1 || (last_class < own && last_class != 0);
      if (const char32_t joined = reaches ? composed(text[starter], c) : 0; joined != 0) {
        text[starter] = joined;
        continue;
      }
    }
    if (own == 0) starter = out;
    last_class = own;
    text[out++] = c;
  }
  text.resize(out);
}

enum class NormalForm { nfd, nfc, nfkd, nfkc };

/// A normal form of whole UTF-8.
inline std::string normalized(std::string_view text, NormalForm form) {
  const bool composes = form == NormalForm::nfc || form == NormalForm::nfkc;
  const bool compatible = form == NormalForm::nfkd || form == NormalForm::nfkc;
  std::u32string points;
  char32_t largest = 0;
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Front front = utf8_front(rest);
    points += front.code_point;
    largest = (std::max)(largest, front.code_point);
    rest.remove_prefix(front.bytes);
  }
  // Below the first combining mark all is composed already, below U+00C0 all is decomposed, and
  // U+00A0 is the first that stands for another.
  if (largest < (compatible ? 0xA0u : composes ? 0x300u : 0xC0u)) return std::string(text);
  std::u32string parts;
  for (const char32_t c : points) {
    if (compatible) {
      if (const auto at = compatible_texts().find(c); at != compatible_texts().end()) {
        parts += at->second;
        continue;
      }
    }
    append_decomposed(parts, c);
  }
  for (std::size_t i = 0; i < parts.size();) {
    if (combining_class(parts[i]) == 0) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < parts.size() && combining_class(parts[end]) != 0) ++end;
    std::stable_sort(parts.begin() + static_cast<std::ptrdiff_t>(i),
                     parts.begin() + static_cast<std::ptrdiff_t>(end), [](char32_t a, char32_t b) {
                       return combining_class(a) < combining_class(b);
                     });
    i = end;
  }
  if (composes) compose(parts);
  std::string result;
  for (const char32_t c : parts) append_utf8(result, c);
  return result;
}

/// Each character of whole UTF-8 in lower case, without regard to its neighbours.
inline std::string lowercase(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const Utf8Front front = utf8_front(text);
    const char32_t c = front.code_point;
    const std::int32_t* const row = row_at<4>(kLowercase, c);
    const auto past = row == nullptr ? 0 : static_cast<std::int32_t>(c) - row[0];
    if (c == 0x130)
      result += "i\xCC\x87";  // the one whose lower case is two characters
    else if (row != nullptr && past <= row[1] - row[0] && (row[2] != 2 || past % 2 == 0))
      append_utf8(result, static_cast<char32_t>(static_cast<std::int32_t>(c) + row[3]));
    else
      result += text.substr(0, front.bytes);
    text.remove_prefix(front.bytes);
  }
  return result;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
