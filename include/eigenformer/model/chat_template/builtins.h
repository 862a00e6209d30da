/// \file
/// Filters, tests and methods of chat templates: those that templates of models in use call, with
/// Python's results. Case and white space of text are those of tokenizer/unicode.h and ASCII.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../tokenizer/text.h"
#include "../tokenizer/unicode.h"
#include "value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

struct Arguments {
  List values;
  Dict named;

  /// By place or by name; undefined: neither.
  Value get(std::size_t place, std::string_view name) const {
    if (place < values.size()) return values[place];
    for (const auto& [key, value] : named)
      if (key == name) return value;
    return {};
  }
  std::size_t size() const { return values.size() + named.size(); }
};

/// Characters of text, whose bytes are whole UTF-8.
inline std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> all;
  while (!text.empty()) {
    all.push_back(text.substr(0, character_bytes(text)));
    text.remove_prefix(all.back().size());
  }
  return all;
}
inline char ascii_upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; }

class Builtins {
 public:
  explicit Builtins(Budget& budget) : budget_(budget) {}

  // ---- what all values can do ---------------------------------------------------------------
  const std::string& need_text(const Value& value, std::string_view what) const {
    if (!value.is_text()) budget_.fail(std::string(what) + " needs text");
    return value.text();
  }
  std::int64_t need_integer(const Value& value, std::string_view what) const {
    if (!value.is_integer() && !value.is_bool())
      budget_.fail(std::string(what) + " needs an integer");
    return value.integer();
  }
  Value made(std::string text) const {
    budget_.spend_text(text.size());
    if (text.size() > kLongestText) budget_.fail("makes a text that is too long");
    return Value(std::move(text));
  }
  Value made(List list) const {
    budget_.spend(list.size());
    return checked(Value(std::move(list)));
  }
  Value checked(Value value) const {
    if (value.depth() > Budget::kDeepest) budget_.fail("makes a list that is too deep");
    return value;
  }
  /// The elements that a loop goes over: of a list, a dictionary's keys, a text's characters.
  List elements(const Value& value) const {
    if (value.is_list()) {
      budget_.spend(value.list().size());
      return value.list();
    }
    List list;
    if (value.is_dict()) {
      for (const auto& [key, member] : value.dict()) list.push_back(made(key));
    } else if (value.is_text()) {
      for (const std::string_view c : characters(value.text()))
        list.push_back(made(std::string(c)));
    } else if (!value.is_undefined()) {
      budget_.fail("goes over what is no list");
    }
    return list;
  }
  std::int64_t length(const Value& value) const {
    if (value.is_list()) return static_cast<std::int64_t>(value.list().size());
    if (value.is_dict()) return static_cast<std::int64_t>(value.dict().size());
    if (value.is_undefined()) return 0;
    budget_.spend_text(need_text(value, "length").size());
    return static_cast<std::int64_t>(characters(value.text()).size());
  }
  bool contains(const Value& in, const Value& value) const {
    if (in.is_text()) {
      budget_.spend_text(in.text().size());
      return in.text().find(need_text(value, "in")) != std::string::npos;
    }
    if (in.is_dict() || in.is_space())
      return value.is_text() &&
             std::ranges::any_of(in.dict(), [&](const auto& m) { return m.first == value.text(); });
    if (in.is_undefined()) return false;
    if (!in.is_list()) budget_.fail("looks into what is no list");
    return std::ranges::any_of(in.list(),
                               [&](const Value& one) { return equal(one, value, budget_); });
  }
  /// Of a member or an element; undefined: there is none.
  Value at(const Value& value, const Value& key) const {
    if (value.is_undefined()) budget_.fail("asks something undefined for a member");
    if ((value.is_dict() || value.is_space()) && key.is_text()) return value.member(key.text());
    if (!key.is_integer() && !key.is_bool()) return {};
    std::int64_t index = key.integer();
    if (!value.is_list() && !value.is_text()) return {};
    const std::int64_t size = length(value);
    if (index < 0) index += size;
    if (index < 0 || index >= size) return {};
    if (value.is_list()) return value.list()[static_cast<std::size_t>(index)];
    return made(std::string(characters(value.text())[static_cast<std::size_t>(index)]));
  }
  Value slice(const Value& value, const Value& from, const Value& to, const Value& by) const {
    const auto given = [](const Value& bound) { return !bound.is_undefined() && !bound.is_none(); };
    const std::int64_t step = given(by) ? need_integer(by, "a slice") : 1;
    if (step == 0) budget_.fail("has a slice of step 0");
    const List all = elements(value);
    const auto size = static_cast<std::int64_t>(all.size());
    const std::int64_t low = step > 0 ? 0 : -1, high = step > 0 ? size : size - 1;
    const auto bound = [&](const Value& at, std::int64_t otherwise) {
      if (!given(at)) return otherwise;
      std::int64_t index = need_integer(at, "a slice");
      if (index < 0) index += size;
      return std::clamp(index, low, high);
    };
    const std::int64_t end = bound(to, step > 0 ? high : low);
    List list;
    for (std::int64_t i = bound(from, step > 0 ? low : high); step > 0 ? i < end : i > end;) {
      list.push_back(all[static_cast<std::size_t>(i)]);
      if (step > size || step < -size) break;
      i += step;
    }
    return value.is_text() ? joined(list, "") : made(std::move(list));
  }
  Value joined(const List& list, std::string_view between) const {
    std::string text;
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (i > 0) text += between;
      text += text_of(list[i], budget_);
      if (text.size() > kLongestText) budget_.fail("makes a text that is too long");
    }
    return made(std::move(text));
  }

  // ---- text ---------------------------------------------------------------------------------
  static std::string upper(std::string text) {
    for (char& c : text) c = ascii_upper(c);
    return text;
  }
  /// The first letter of the text, or of every word, in upper case, the others in lower.
  static std::string capitalized(std::string_view text, bool every_word) {
    std::string result = lowercase(text);
    bool first = true;
    for (char& c : result) {
      const bool letter = (c >= 'a' && c <= 'z') || static_cast<unsigned char>(c) >= 0x80;
      if (first) c = ascii_upper(c);
      first = every_word && !letter;
    }
    return result;
  }
  /// Without the characters of `set` at its ends; of white space where there is no set.
  static std::string stripped(std::string_view text, const Value& set, bool left, bool right) {
    const auto goes = [&](std::string_view c) {
      if (set.is_text()) return set.text().find(c) != std::string::npos;
      constexpr std::string_view kAscii = " \t\n\r\v\f\x1c\x1d\x1e\x1f";
      return c.size() == 1 ? kAscii.find(c) != std::string_view::npos
                           : c == "\xC2\x85" || c == "\xC2\xA0" || c == "\xE3\x80\x80" ||
                                 (c >= "\xE2\x80\x80" && c <= "\xE2\x80\x8A") ||
                                 c == "\xE2\x80\xA8" || c == "\xE2\x80\xA9" ||
                                 c == "\xE2\x80\xAF" || c == "\xE2\x81\x9F" || c == "\xE1\x9A\x80";
    };
    while (left && !text.empty() && goes(text.substr(0, character_bytes(text))))
      text.remove_prefix(character_bytes(text));
    while (right && !text.empty()) {
      std::size_t last = text.size() - 1;
      while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
      if (!goes(text.substr(last))) break;
      text = text.substr(0, last);
    }
    return std::string(text);
  }
  Value replaced(const std::string& text, const std::string& from, const std::string& to,
                 std::int64_t most) const {
    if (from.empty()) budget_.fail("replaces an empty text, which is not supported");
    std::string result;
    std::size_t done = 0;
    for (std::size_t at; most-- != 0 && (at = text.find(from, done)) != std::string::npos;) {
      result.append(text, done, at - done).append(to);
      done = at + from.size();
      if (result.size() > kLongestText) budget_.fail("makes a text that is too long");
    }
    return made(result.append(text, done));
  }
  /// At a separator, or at runs of white space where there is none; at most `most` times.
  Value split(std::string_view text, const Value& separator, std::int64_t most) const {
    List list;
    budget_.spend_text(text.size());
    if (!separator.is_text()) {
      constexpr std::string_view kBlank = " \t\n\r\v\f";
      for (;;) {
        text.remove_prefix((std::min)(text.find_first_not_of(kBlank), text.size()));
        if (text.empty()) return made(std::move(list));
        const std::size_t end =
            most == 0 ? text.size() : (std::min)(text.find_first_of(kBlank), text.size());
        list.push_back(made(std::string(text.substr(0, end))));
        text.remove_prefix(end);
        --most;
      }
    }
    const std::string& mark = separator.text();
    if (mark.empty()) budget_.fail("splits at an empty text");
    for (std::size_t at; most-- != 0 && (at = text.find(mark)) != std::string_view::npos;) {
      list.push_back(made(std::string(text.substr(0, at))));
      text.remove_prefix(at + mark.size());
    }
    list.push_back(made(std::string(text)));
    return made(std::move(list));
  }
  bool begins_or_ends(const std::string& text, const Value& with, bool begins) const {
    if (with.is_list())
      return std::ranges::any_of(
          with.list(), [&](const Value& one) { return begins_or_ends(text, one, begins); });
    const std::string& part = need_text(with, begins ? "startswith" : "endswith");
    return begins ? text.starts_with(part) : text.ends_with(part);
  }

  // ---- methods ------------------------------------------------------------------------------
  Value method(const Value& object, const std::string& name, const Arguments& arguments) const {
    if (object.is_text()) return text_method(object.text(), name, arguments);
    if (object.is_dict() || object.is_space()) {
      if (name == "get") {
        const Value value = at(object, arguments.get(0, "key"));
        if (!value.is_undefined()) return value;
        const Value otherwise = arguments.get(1, "default");
        return otherwise.is_undefined() ? Value(Nothing()) : otherwise;
      }
      if (name == "items" || name == "keys" || name == "values") return parts(object, name);
    }
    if (object.is_list() && (name == "index" || name == "count")) {
      std::int64_t count = 0;
      for (std::size_t i = 0; i < object.list().size(); ++i) {
        if (!equal(object.list()[i], arguments.get(0, "value"), budget_)) continue;
        if (name == "index") return Value(static_cast<std::int64_t>(i));
        ++count;
      }
      if (name == "count") return Value(count);
    }
    budget_.fail("calls " + printable(name) + ", which this value has not or is not supported");
  }
  Value parts(const Value& dict, std::string_view which) const {
    List list;
    for (const auto& [key, value] : dict.dict()) {
      if (which == "values")
        list.push_back(value);
      else if (which == "keys")
        list.push_back(made(key));
      else
        list.push_back(made(List{made(key), value}));
    }
    return made(std::move(list));
  }

 private:
  static constexpr std::size_t kLongestText = 1 << 24;

  Value text_method(const std::string& text, const std::string& name,
                    const Arguments& arguments) const {
    budget_.spend_text(text.size());
    const auto argument = [&](std::size_t i) { return arguments.get(i, ""); };
    const auto most = [&](std::size_t i, std::string_view by_name) {
      const Value value = arguments.get(i, by_name);
      return value.is_undefined() ? std::int64_t{-1} : need_integer(value, name);
    };
    if (name == "strip" || name == "lstrip" || name == "rstrip")
      return made(stripped(text, argument(0), name != "rstrip", name != "lstrip"));
    if (name == "split") return split(text, arguments.get(0, "sep"), most(1, "maxsplit"));
    if (name == "splitlines") return lines(text);
    if (name == "startswith" || name == "endswith")
      return Value(begins_or_ends(text, argument(0), name == "startswith"));
    if (name == "replace")
      return replaced(text, need_text(argument(0), name), need_text(argument(1), name),
                      most(2, "count"));
    if (name == "upper") return made(upper(text));
    if (name == "lower") return made(lowercase(text));
    if (name == "title" || name == "capitalize") return made(capitalized(text, name == "title"));
    if (name == "join") return joined(elements(argument(0)), text);
    if (name == "find") {
      const std::size_t at = text.find(need_text(argument(0), name));
      return at == std::string::npos ? Value(std::int64_t{-1})
                                     : Value(length(made(text.substr(0, at))));
    }
    if (name == "count") {
      const Value pieces = split(text, argument(0), -1);
      return Value(static_cast<std::int64_t>(pieces.list().size()) - 1);
    }
    if (name == "isdigit")
      return Value(!text.empty() && text.find_first_not_of("0123456789") == std::string::npos);
    budget_.fail("calls " + printable(name) + " of a text, which is not supported");
  }
  Value lines(std::string_view text) const {
    List list;
    while (!text.empty()) {
      const std::size_t end = (std::min)(text.find('\n'), text.size());
      list.push_back(made(std::string(text.substr(0, end))));
      text.remove_prefix((std::min)(end + 1, text.size()));
    }
    return made(std::move(list));
  }

  Budget& budget_;
};

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
