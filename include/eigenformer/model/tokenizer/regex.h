/// \file
/// Regular expressions of tokenizer files by PCRE2 (10.40 or later, 8-bit library).
///
/// The files are written for Oniguruma in Ruby's syntax. Where PCRE2 reads a pattern otherwise, it
/// is rewritten: \s is Unicode's White_Space (PCRE2's has U+180E besides); \w, and so \b, is
/// Alphabetic, marks, decimal digits, connectors and Latin-1's fractions and superscripts; \p{Han}
/// and other scripts leave out what several share; ^ and $ match at every line. What remains (\h,
/// \S inside a class, classes in classes, &&, {,n}, (?m) and other rarities) is refused by name.
///
/// Patterns come from files, so work is bounded: matches of a text may take kFewSteps each, and
/// those that need more kSteps and kStepsPerByte for each byte together; past that ModelFileError
/// is thrown. One walk over a run of characters is one step for each.
#pragma once

#if defined(__has_include)
#if !__has_include(<pcre2.h>)
#error "eigenformer: tokenizers need PCRE2's 8-bit library (Debian: libpcre2-dev)"
#endif
#endif
#if !defined(PCRE2_CODE_UNIT_WIDTH)
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "../error.h"
#include "text.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Members of classes, as PCRE2 reads them. U+0085 and the separators beside five controls are all
/// of White_Space.
inline constexpr std::string_view kWhiteSpace = R"(\t-\r\x{85}\p{Z})";
/// \w of Oniguruma; and of Unicode (Technical Standard 18), as Rust has it.
inline constexpr std::string_view kOnigWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";
inline constexpr std::string_view kUnicodeWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D})";

/// Writes a pattern of Oniguruma's (syntax Ruby) as PCRE2 reads it.
class PatternTranslator {
 public:
  PatternTranslator(std::string_view pattern, std::string_view file)
      : pattern_(pattern), file_(file) {}

  std::string translate() {
    while (at_ < pattern_.size()) {
      if (next_is("\\")) {
        escape();
      } else if (in_class_) {
        character_of_class();
      } else {
        for (const std::string_view other : {"(*", "{,", "}+"}) refuse_if(next_is(other), other);
        if (next_is("(?")) group();
        const char c = pattern_[at_++];
        in_class_ = c == '[';
        out_ += c == '^' ? "(?m:^)" : c == '$' ? "(?m:$)" : std::string(1, c);
        if (in_class_ && next_is("^")) out_ += pattern_[at_++];
        refuse_if(in_class_ && next_is("]"), "[]");
      }
    }
    return out_;
  }

 private:
  bool next_is(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void refuse_if(bool bad, std::string_view what) const {
    if (bad)
      fail_model(file_, "pattern " + std::string(pattern_),
                 "uses " + std::string(what) + ", which is not supported");
  }
  void character_of_class() {
    for (const std::string_view other : {"&&", "["})
      refuse_if(next_is(other), std::string(other) + " in a class");
    in_class_ = !next_is("]");
    out_ += pattern_[at_++];
  }
  void escape() {
    const char c = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    const std::string name = std::string("\\") + c, word = "[" + std::string(kOnigWord) + "]";
    refuse_if(std::string_view("hHZRXCQE").find(c) != std::string_view::npos, name);
    refuse_if(in_class_ && std::string_view("SWbB").find(c) != std::string_view::npos,
              name + " in a class");
    const std::string_view set = c == 's' || c == 'S' ? kWhiteSpace : kOnigWord;
    if (c == 'b' || c == 'B') {
      const std::string before = c == 'b' ? "(?<=" : "(?<!", other = c == 'b' ? "(?<!" : "(?<=";
      out_ += "(?:" + before + word + ")(?!" + word + ")|" + other + word + ")(?=" + word + "))";
    } else if (c != 's' && c != 'S' && c != 'w' && c != 'W') {
      // Braces of \p{L} and \x{2581} are none of a repetition.
      const std::size_t end = pattern_.substr((std::min)(at_ + 2, pattern_.size())).starts_with('{')
                                  ? pattern_.find('}', at_)
                                  : 0;
      const std::size_t bytes = end == 0 || end == pattern_.npos ? 2 : end + 1 - at_;
      out_ += property(pattern_.substr(at_, bytes));
      at_ += bytes - 2;
    } else if (in_class_) {
      out_ += set;
    } else {
      out_ += (c == 's' || c == 'w' ? "[" : "[^") + std::string(set) + "]";
    }
    at_ += (std::min)(std::size_t{2}, pattern_.size() - at_);
  }
  /// A script's name means script extensions to PCRE2 from 10.40.
  static std::string property(std::string_view name) {
    for (const std::string_view script : {"Han", "Hiragana", "Katakana", "Hangul", "Latin", "Greek",
                                          "Cyrillic", "Arabic", "Hebrew", "Devanagari", "Thai"})
      if (name.substr((std::min)(name.size(), std::size_t{3})) == std::string(script) + "}")
        return std::string(name.substr(0, 3)) + "sc:" + std::string(script) + "}";
    return std::string(name);
  }
  /// Options of a group mean other things under the same letters, but for i.
  void group() const {
    for (std::size_t i = at_ + 2; i < pattern_.size(); ++i) {
      const char c = pattern_[i];
      if (c == ':' || c == ')' || c == '=' || c == '!' || c == '<' || c == '>') return;
      refuse_if(c != 'i' && c != '-', std::string("(?") + c);
    }
  }

  std::string_view pattern_, file_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

/// A compiled pattern. Copies share it; calls from many threads are safe.
class Regex {
 public:
  static constexpr std::uint32_t kFewSteps = 1000;
  static constexpr std::uint32_t kMostSteps = 1 << 28;  ///< of one match
  static constexpr std::uint64_t kSteps = 10'000'000;
  static constexpr std::uint64_t kStepsPerByte = 64;

  /// `file` is for messages. Throws ModelFileError for what is no pattern.
  Regex(std::string_view pattern, std::string_view file, bool is_pcre = false) : file_(file) {
    constexpr std::size_t kLongest = 1 << 16;
    if (pattern.size() > kLongest)
      fail_model(file, "pattern", "has more than " + std::to_string(kLongest) + " bytes");
    const std::string text =
        "(*LF)" + (is_pcre ? std::string(pattern) : PatternTranslator(pattern, file).translate());
    int error = 0;
    PCRE2_SIZE at = 0;
    code_.reset(
        pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(text.data()), text.size(),
                        PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_DOLLAR_ENDONLY,
                        &error, &at, nullptr),
        pcre2_code_free_8);
    if (!code_)
      fail_model(file, "pattern " + std::string(pattern),
                 "is no regular expression: " + says(error));
    pcre2_jit_compile_8(code_.get(), PCRE2_JIT_COMPLETE);  // where it fails, matching interprets
  }

  /// Matches of one text, one after the other; of two empty ones at a place the second is skipped.
  /// The text is whole UTF-8 and outlives this.
  class Matches {
   public:
    Matches(const Regex& regex, std::string_view text)
        : regex_(regex),
          text_(text),
          data_(pcre2_match_data_create_8(1, nullptr), pcre2_match_data_free_8),
          context_(pcre2_match_context_create_8(nullptr), pcre2_match_context_free_8) {
      if (!data_ || !context_) fail<std::bad_alloc>();
    }
    /// [begin, end) of the next match.
    std::optional<std::pair<std::size_t, std::size_t>> next() {
      while (at_ <= text_.size()) {
        const int found = match();
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) fail_model(regex_.file_, "a pattern", "cannot be matched: " + says(found));
        const PCRE2_SIZE* const bounds = pcre2_get_ovector_pointer_8(data_.get());
        const std::size_t begin = bounds[0], end = bounds[1];
        if (end < begin || begin < last_end_)
          fail_model(regex_.file_, "a pattern", "matches outside of its match");
        if (begin == end && had_one_ && end == last_end_) {
          at_ += end < text_.size() ? character_bytes(text_.substr(end)) : 1;
          continue;
        }
        had_one_ = true;
        at_ = last_end_ = end;
        return std::pair{begin, end};
      }
      at_ = text_.size() + 1;
      return std::nullopt;
    }

   private:
    /// PCRE2 counts steps at each place anew, and does not tell how many it took. So where few do
    /// not suffice, every place is tried on its own, with limits that grow and are paid for.
    int match() {
      int found = match_at(at_, kFewSteps, 0);
      for (std::size_t at = at_; found == PCRE2_ERROR_MATCHLIMIT;) {
        for (std::uint32_t limit = kFewSteps;; limit *= 8) {
          found = match_at(at, limit, PCRE2_ANCHORED);
          if (found != PCRE2_ERROR_MATCHLIMIT) break;
          if (steps_left_ < limit || limit > kMostSteps) return found;
          steps_left_ -= limit;
        }
        if (found != PCRE2_ERROR_NOMATCH || at == text_.size()) break;
        at += character_bytes(text_.substr(at));
        found = PCRE2_ERROR_MATCHLIMIT;
      }
      return found;
    }
    int match_at(std::size_t at, std::uint32_t limit, std::uint32_t options) {
      pcre2_set_match_limit_8(context_.get(), limit);
      const auto call = [&](std::uint32_t more) {
        return pcre2_match_8(regex_.code_.get(), reinterpret_cast<PCRE2_SPTR8>(text_.data()),
                             text_.size(), at, PCRE2_NO_UTF_CHECK | options | more, data_.get(),
                             context_.get());
      };
      const int found = call(0);
      // The stack of compiled code is 32 KiB; the interpreter's lies on the heap.
      return found == PCRE2_ERROR_JIT_STACKLIMIT ? call(PCRE2_NO_JIT) : found;
    }

    const Regex& regex_;
    std::string_view text_;
    std::unique_ptr<pcre2_match_data_8, decltype(&pcre2_match_data_free_8)> data_;
    std::unique_ptr<pcre2_match_context_8, decltype(&pcre2_match_context_free_8)> context_;
    std::size_t at_ = 0, last_end_ = 0;
    std::uint64_t steps_left_ = kSteps + text_.size() * kStepsPerByte;
    bool had_one_ = false;
  };
  Matches matches(std::string_view text) const { return {*this, text}; }

  /// `text` with the content in place of every match.
  std::string replace(std::string_view text, std::string_view content) const {
    std::string result;
    std::size_t done = 0;
    Matches all = matches(text);
    while (const auto match = all.next()) {
      result.append(text, done, match->first - done).append(content);
      done = match->second;
    }
    return result.append(text, done);
  }

 private:
  static std::string says(int error) {
    unsigned char text[160] = {};
    pcre2_get_error_message_8(error, text, sizeof(text));
    return reinterpret_cast<const char*>(text);
  }

  std::shared_ptr<pcre2_code_8> code_;
  std::string file_;
};

/// A pattern that stands for `text` itself.
inline std::string quoted_pattern(std::string_view text) {
  std::string pattern;
  for (const char c : text) {
    if (std::string_view("\\^$.[]|()?*+{}-#&~/ ").find(c) != std::string_view::npos)
      pattern += '\\';
    pattern += c;
  }
  return pattern;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
