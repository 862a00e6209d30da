/// \file
/// Chat templates cut into text and words, white space as Hugging Face has it: a newline after a
/// block goes (trim_blocks), and so do blanks before one at the front of a line (lstrip_blocks).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../tokenizer/text.h"
#include "value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

struct Token {
  enum class Kind {
    text,  ///< between tags
    begin_output,
    end_output,
    begin_block,
    end_block,
    name,
    string,
    integer,
    real,
    sign,  ///< operators and brackets
    end
  };
  Kind kind = Kind::end;
  std::string text = {};
  int line = 1;
};

class Lexer {
 public:
  Lexer(std::string_view source, Budget& budget) : budget_(budget) {
    for (std::size_t i = 0; i < source.size(); ++i) {  // \r\n and \r are newlines
      if (source[i] != '\r')
        source_ += source[i];
      else if (i + 1 == source.size() || source[i + 1] != '\n')
        source_ += '\n';
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  std::vector<Token> tokens() {
    while (at_ < source_.size()) {
      const std::size_t tag = next_tag();
      std::string text = source_.substr(at_, tag - at_);
      if (tag == source_.size()) {
        put(Token::Kind::text, std::move(text));
        break;
      }
      const char kind = source_[tag + 1];
      const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
      if (sign == '-')
        text.erase(text.find_last_not_of(kSpace) + 1);
      else if (sign != '+' && kind != '{')
        strip_line_front(text);
      put(Token::Kind::text, std::move(text));
      at_ = tag + 2 + (sign == '-' || sign == '+' ? 1 : 0);
      if (kind == '#')
        end_comment();
      else if (!raw_block(kind))
        words(kind);
    }
    put(Token::Kind::end, "");
    return std::move(tokens_);
  }

 private:
  static constexpr std::string_view kSpace = " \t\n\v\f";

  void put(Token::Kind kind, std::string text) {
    if (kind == Token::Kind::text && text.empty()) return;
    budget_.spend(1);
    tokens_.push_back({kind, std::move(text), line()});
  }
  int line() {
    for (; counted_ < at_ && counted_ < source_.size(); ++counted_)
      line_ += source_[counted_] == '\n';
    budget_.set_line(line_);
    return line_;
  }
  std::size_t next_tag() const {
    for (std::size_t at = source_.find('{', at_); at != std::string::npos;
         at = source_.find('{', at + 1))
      if (at + 1 < source_.size() &&
          (source_[at + 1] == '{' || source_[at + 1] == '%' || source_[at + 1] == '#'))
        return at;
    return source_.size();
  }
  void strip_line_front(std::string& text) const {
    const std::size_t newline = text.rfind('\n');
    if (newline == std::string::npos && !at_line_front_) return;
    const std::size_t front = newline == std::string::npos ? 0 : newline + 1;
    if (text.find_first_not_of(" \t\v\f", front) == std::string::npos) text.erase(front);
  }
  /// Past a closing tag at at_, of `bytes` bytes, its sign before it.
  void close(std::size_t bytes, bool strips, bool keeps, bool is_output) {
    at_ += bytes;
    at_line_front_ = false;
    if (strips) {
      const std::size_t begin = at_;
      at_ = source_.find_first_not_of(kSpace, at_);
      if (at_ == std::string::npos) at_ = source_.size();
      at_line_front_ = at_ > begin && source_[at_ - 1] == '\n';
    } else if (!is_output && !keeps && at_ < source_.size() && source_[at_] == '\n') {
      ++at_;
      at_line_front_ = true;
    }
  }
  void end_comment() {
    const std::size_t end = source_.find("#}", at_);
    if (end == std::string::npos) budget_.fail("has a comment without an end");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    at_ = end;
    close(2, sign == '-', sign == '+', false);
  }
  /// {% raw %}...{% endraw %}: text without tags.
  bool raw_block(char kind) {
    if (kind != '%') return false;
    std::size_t at = source_.find_first_not_of(kSpace, at_);
    if (at == std::string::npos || source_.compare(at, 3, "raw") != 0) return false;
    at = source_.find_first_not_of(kSpace, at + 3);
    const bool strips = at != std::string::npos && source_[at] == '-';
    if (at == std::string::npos || source_.compare(at + (strips ? 1 : 0), 2, "%}") != 0)
      return false;
    at_ = at + (strips ? 1 : 0);
    close(2, strips, false, false);
    const std::size_t end = source_.find("endraw", at_);
    const std::size_t tag = end == std::string::npos ? end : source_.rfind("{%", end);
    if (tag == std::string::npos || tag < at_) budget_.fail("has a raw block without an end");
    std::string text = source_.substr(at_, tag - at_);
    if (source_[tag + 2] == '-') text.erase(text.find_last_not_of(kSpace) + 1);
    put(Token::Kind::text, std::move(text));
    at_ = source_.find("%}", end);
    if (at_ == std::string::npos) budget_.fail("has a raw block without an end");
    close(2, source_[at_ - 1] == '-', false, false);
    return true;
  }
  void words(char kind) {
    const bool is_output = kind == '{';
    put(is_output ? Token::Kind::begin_output : Token::Kind::begin_block, "");
    const std::string_view end = is_output ? "}}" : "%}";
    int open = 0;  // brackets: }} may close two dictionaries
    for (;;) {
      at_ = source_.find_first_not_of(kSpace, at_);
      if (at_ == std::string::npos) {
        at_ = source_.size();
        line();
        budget_.fail("has a tag without an end");
      }
      const bool strips = source_[at_] == '-', keeps = source_[at_] == '+';
      if (open <= 0 && source_.compare(at_ + (strips || keeps ? 1 : 0), 2, end) == 0) {
        put(is_output ? Token::Kind::end_output : Token::Kind::end_block, "");
        return close(strips || keeps ? 3 : 2, strips, keeps, is_output);
      }
      const char c = source_[at_];
      if (c == '(' || c == '[' || c == '{') ++open;
      if (c == ')' || c == ']' || c == '}') --open;
      word();
    }
  }
  void word() {
    const char c = source_[at_];
    if (c == '"' || c == '\'') return quoted(c);
    if (is_letter(c)) {
      const std::size_t begin = at_;
      while (at_ < source_.size() && (is_letter(source_[at_]) || is_digit(source_[at_]))) ++at_;
      return put(Token::Kind::name, source_.substr(begin, at_ - begin));
    }
    if (is_digit(c)) {
      const std::size_t begin = at_;
      bool real = false;
      while (at_ < source_.size() && (is_digit(source_[at_]) || source_[at_] == '_' ||
                                      (source_[at_] == '.' && !real && at_ + 1 < source_.size() &&
                                       is_digit(source_[at_ + 1])))) {
        real = real || source_[at_] == '.';
        ++at_;
      }
      std::string digits = source_.substr(begin, at_ - begin);
      std::erase(digits, '_');
      if (digits.size() > 18) budget_.fail("has a number that is too long");
      return put(real ? Token::Kind::real : Token::Kind::integer, std::move(digits));
    }
    for (const std::string_view sign : {"==", "!=", "<=", ">=", "//", "**"})
      if (source_.compare(at_, 2, sign) == 0) {
        at_ += 2;
        return put(Token::Kind::sign, std::string(sign));
      }
    if (std::string_view("+-*/%~<>=()[]{}.,:|").find(c) == std::string_view::npos) {
      line();
      budget_.fail("has a character that begins no word");
    }
    ++at_;
    put(Token::Kind::sign, std::string(1, c));
  }
  void quoted(char quote) {
    std::string text;
    for (++at_; at_ < source_.size() && source_[at_] != quote; ++at_) {
      if (source_[at_] != '\\' || at_ + 1 == source_.size()) {
        text += source_[at_];
        continue;
      }
      const char c = source_[++at_];
      if (c == 'u' || c == 'x') {
        code_point(c == 'u' ? 4 : 2, text);
      } else {
        const std::size_t known = std::string_view("ntrbfva0").find(c);
        if (c == '\n') continue;  // a line that goes on
        if (known != std::string_view::npos)
          text += "\n\t\r\b\f\v\a\0"[known];
        else if (c == '\\' || c == '\'' || c == '"')
          text += c;
        else
          (text += '\\') += c;
      }
    }
    if (at_ == source_.size()) budget_.fail("has a string without an end");
    ++at_;
    put(Token::Kind::string, std::move(text));
  }
  /// The digits after at_.
  void code_point(std::size_t digits, std::string& text) {
    char32_t value = 0;
    for (std::size_t i = 0; i < digits; ++i) {
      const char c = at_ + 1 < source_.size() ? source_[++at_] : '\0';
      const int lower = c | 0x20;
      if (!is_digit(c) && (lower < 'a' || lower > 'f')) budget_.fail("has a wrong escape");
      value = value * 16 + static_cast<char32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    if (value >= 0xD800 && value < 0xE000) budget_.fail("has a wrong escape");
    append_utf8(text, value);
  }
  static bool is_digit(char c) { return c >= '0' && c <= '9'; }
  static bool is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           static_cast<unsigned char>(c) >= 0x80;
  }

  Budget& budget_;
  std::string source_;
  std::size_t at_ = 0, counted_ = 0;
  int line_ = 1;
  bool at_line_front_ = true;
  std::vector<Token> tokens_;
};

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
