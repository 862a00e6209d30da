/// \file
/// Filters and tests of chat templates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "builtins.h"
#include "value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

class Filters {
 public:
  explicit Filters(Budget& budget) : budget_(budget), builtins_(budget) {}

  Value apply(const std::string& name, const Value& value, const Arguments& arguments) const {
    budget_.spend(1);
    Value result;
    if (of_text(name, value, arguments, result) || of_list(name, value, arguments, result) ||
        of_any(name, value, arguments, result))
      return result;
    budget_.fail("uses the filter " + printable(name) + ", which is not supported");
  }

  bool test(const std::string& name, const Value& value, const Arguments& arguments) const {
    budget_.spend(1);
    const Value other = arguments.get(0, "other");
    if (name == "defined" || name == "undefined")
      return value.is_undefined() == (name == "undefined");
    if (name == "none") return value.is_none();
    if (name == "string") return value.is_text();
    if (name == "number") return value.is_number();
    if (name == "integer") return value.is_integer();
    if (name == "float") return value.is_real();
    if (name == "boolean") return value.is_bool();
    if (name == "true" || name == "false")
      return value.is_bool() && value.truth() == (name == "true");
    if (name == "mapping") return value.is_dict();
    if (name == "sequence" || name == "iterable")
      return value.is_list() || value.is_dict() || value.is_text() ||
             (value.is_undefined() && name == "iterable");
    if (name == "callable") return value.is_macro();
    if (name == "equalto" || name == "eq") return equal(value, other, budget_);
    if (name == "ne") return !equal(value, other, budget_);
    if (name == "in") return builtins_.contains(other, value);
    if (name == "odd" || name == "even")
      return (builtins_.need_integer(value, name) % 2 != 0) == (name == "odd");
    if (name == "divisibleby") {
      const std::int64_t by = builtins_.need_integer(other, name);
      if (by == 0) budget_.fail("divides by 0");
      return by == -1 || builtins_.need_integer(value, name) % by == 0;
    }
    budget_.fail("uses the test " + printable(name) + ", which is not supported");
  }

 private:
  bool of_text(const std::string& name, const Value& value, const Arguments& arguments,
               Value& result) const {
    const auto text = [&] { return text_of(value, budget_); };
    if (name == "trim") {
      result = builtins_.made(Builtins::stripped(text(), arguments.get(0, "chars"), true, true));
    } else if (name == "lower") {
      result = builtins_.made(lowercase(text()));
    } else if (name == "upper") {
      result = builtins_.made(Builtins::upper(text()));
    } else if (name == "capitalize" || name == "title") {
      result = builtins_.made(Builtins::capitalized(text(), name == "title"));
    } else if (name == "string") {
      result = builtins_.made(text());
    } else if (name == "replace") {
      const Value count = arguments.get(2, "count");
      result = builtins_.replaced(text(), builtins_.need_text(arguments.get(0, "old"), name),
                                  builtins_.need_text(arguments.get(1, "new"), name),
                                  count.is_undefined() ? -1 : builtins_.need_integer(count, name));
    } else if (name == "indent") {
      result = indented(text(), arguments);
    } else {
      return false;
    }
    return true;
  }
  Value indented(const std::string& text, const Arguments& arguments) const {
    const Value width = arguments.get(0, "width");
    const std::int64_t spaces = width.is_undefined() ? 4 : builtins_.need_integer(width, "indent");
    if (spaces < 0 || spaces > 1000) budget_.fail("indents by too much");
    const std::string blank(static_cast<std::size_t>(spaces), ' ');
    const bool blank_lines = arguments.get(2, "blank").truth();
    std::string result = arguments.get(1, "first").truth() ? blank : "";
    for (std::size_t i = 0; i < text.size(); ++i) {
      result += text[i];
      if (text[i] == '\n' && i + 1 < text.size() && (blank_lines || text[i + 1] != '\n'))
        result += blank;
    }
    return builtins_.made(std::move(result));
  }

  bool of_list(const std::string& name, const Value& value, const Arguments& arguments,
               Value& result) const {
    const auto all = [&] { return builtins_.elements(value); };
    if (name == "first" || name == "last") {
      const List list = all();
      if (!list.empty()) result = name == "first" ? list.front() : list.back();
    } else if (name == "join") {
      List list = all();
      const Value attribute = arguments.get(1, "attribute");
      for (Value& one : list)
        if (!attribute.is_undefined()) one = builtins_.at(one, attribute);
      const Value between = arguments.get(0, "d");
      result = builtins_.joined(list, between.is_undefined() ? "" : text_of(between, budget_));
    } else if (name == "list") {
      result = builtins_.made(all());
    } else if (name == "reverse") {
      List list = all();
      std::ranges::reverse(list);
      result = value.is_text() ? builtins_.joined(list, "") : builtins_.made(std::move(list));
    } else if (name == "unique") {
      List kept;
      for (const Value& one : all())
        if (!builtins_.contains(Value(kept), one)) kept.push_back(one);
      result = builtins_.made(std::move(kept));
    } else if (name == "items" || name == "dictsort") {
      if (value.is_undefined() && name == "items")
        result = Value(List());
      else if (!value.is_dict())
        budget_.fail(name + " needs a dictionary");
      else
        result = builtins_.parts(value, "items");
      if (name == "dictsort") result = sorted(result.list());
    } else if (name == "map" || name == "select" || name == "reject" || name == "selectattr" ||
               name == "rejectattr") {
      result = chosen(name, all(), arguments);
    } else {
      return false;
    }
    return true;
  }
  /// Pairs by their first, a text, without regard to case, as Jinja does.
  Value sorted(List pairs) const {
    budget_.spend(pairs.size() * 20);
    std::ranges::stable_sort(pairs, {},
                             [](const Value& pair) { return lowercase(pair.list()[0].text()); });
    return builtins_.made(std::move(pairs));
  }
  Value chosen(const std::string& name, const List& list, Arguments arguments) const {
    const bool by_member = name.ends_with("attr");
    const Value attribute = arguments.get(0, "attribute");
    const bool maps_member = name == "map" && arguments.values.empty();
    const auto drop_first = [&] {
      if (!arguments.values.empty()) arguments.values.erase(arguments.values.begin());
    };
    if (by_member) drop_first();
    const Value called = arguments.get(0, "");
    if (!maps_member) drop_first();
    const std::string function = called.is_undefined() ? std::string() : text_of(called, budget_);
    List result;
    for (const Value& one : list) {
      const Value member = by_member || maps_member ? builtins_.at(one, attribute) : one;
      if (name == "map") {
        const Value otherwise = arguments.get(1, "default");
        if (!maps_member)
          result.push_back(apply(function, one, arguments));
        else
          result.push_back(member.is_undefined() ? otherwise : member);
      } else {
        const bool holds = function.empty() ? member.truth() : test(function, member, arguments);
        if (holds == name.starts_with("select")) result.push_back(one);
      }
    }
    return builtins_.made(std::move(result));
  }

  bool of_any(const std::string& name, const Value& value, const Arguments& arguments,
              Value& result) const {
    if (name == "length" || name == "count") {
      result = Value(builtins_.length(value));
    } else if (name == "default" || name == "d") {
      const bool also_false = arguments.get(1, "boolean").truth();
      const bool keeps = !value.is_undefined() && (value.truth() || !also_false);
      const Value otherwise = arguments.get(0, "default_value");
      result = keeps ? value : otherwise.is_undefined() ? Value("") : otherwise;
    } else if (name == "tojson") {
      const Value indent = arguments.get(0, "indent"), named = arguments.get(9, "indent");
      const Value given = indent.is_bool() ? named : indent;  // ensure_ascii comes first in some
      const bool one_line = given.is_undefined() || given.is_none();
      const std::int64_t spaces = one_line ? -1 : builtins_.need_integer(given, name);
      if (spaces > 100) budget_.fail("indents by too much");
      result = builtins_.made(Writer(Writer::Style::json, budget_, spaces).write(value));
    } else if (name == "safe") {
      result = value;
    } else if (name == "abs") {
      if (!value.is_number()) budget_.fail("abs needs a number");
      if (value.is_real())
        result = Value(std::abs(value.real()));
      else
        result = Value(value.integer() < 0 ? whole(-value.real()) : value.integer());
    } else if (name == "int") {
      result = Value(integer_of(value));
    } else if (name == "float") {
      result = Value(value.is_number() ? value.real()
                     : value.is_text() ? std::strtod(value.text().c_str(), nullptr)
                                       : 0.0);
    } else {
      return false;
    }
    return true;
  }
  static std::int64_t whole(double value) {
    constexpr double kMost = 9.2e18;
    return value == value ? static_cast<std::int64_t>(std::clamp(value, -kMost, kMost)) : 0;
  }
  static std::int64_t integer_of(const Value& value) {
    if (value.is_real()) return whole(value.real());
    if (value.is_number()) return value.integer();
    return value.is_text() ? std::strtoll(value.text().c_str(), nullptr, 10) : 0;
  }

  Budget& budget_;
  Builtins builtins_;
};

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
