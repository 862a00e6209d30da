/// \file
/// Values of chat templates: what Python's would be, immutable but for namespaces, and the bounds
/// on work and memory that make templates of strangers harmless.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

#include "../error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

/// Work left: a node of a template costs 1, as do an element looked at and 16 bytes of text made.
class Budget {
 public:
  static constexpr std::int64_t kSteps = 10'000'000;
  static constexpr int kDeepest = 100;  ///< lists in lists, blocks in blocks, macros in macros

  explicit Budget(std::string file) : file_(std::move(file)) {}
  void spend(std::size_t steps) {
    left_ -= static_cast<std::int64_t>((std::min)(steps, std::size_t{1} << 30));
    if (left_ < 0) fail("takes too much work");
  }
  void spend_text(std::size_t bytes) { spend(1 + bytes / 16); }
  void set_line(int line) { line_ = line; }
  [[noreturn]] void fail(std::string_view why) const {
    fail_model(file_, "chat template, line " + std::to_string(line_), why);
  }

 private:
  std::string file_;
  std::int64_t left_ = kSteps;
  int line_ = 1;
};

struct Node;
class Value;
using List = std::vector<Value>;
/// In order of insertion, as Python's.
using Dict = std::vector<std::pair<std::string, Value>>;
struct Nothing {};

/// A default-constructed one is undefined.
class Value {
 public:
  Value() = default;
  Value(Nothing nothing) : what_(nothing) {}
  Value(bool value) : what_(value) {}
  Value(std::int64_t value) : what_(value) {}
  Value(double value) : what_(value) {}
  Value(std::string text) : what_(std::make_shared<const std::string>(std::move(text))) {}
  Value(const char* text) : Value(std::string(text)) {}
  Value(List list) : depth_(deepest(list) + 1) {
    what_ = std::make_shared<const List>(std::move(list));
  }
  Value(Dict dict) : depth_(1) {
    for (const auto& [key, value] : dict) depth_ = (std::max)(depth_, value.depth_ + 1);
    what_ = std::make_shared<const Dict>(std::move(dict));
  }
  /// What `namespace()` makes: the only value that changes.
  static Value space(Dict dict) {
    Value value;
    value.depth_ = 1;
    value.what_ = std::make_shared<Dict>(std::move(dict));
    return value;
  }
  static Value macro(const Node* node) {
    Value value;
    value.what_ = node;
    return value;
  }

  bool is_undefined() const { return is<std::monostate>(); }
  bool is_none() const { return is<Nothing>(); }
  bool is_bool() const { return is<bool>(); }
  bool is_integer() const { return is<std::int64_t>(); }
  bool is_real() const { return is<double>(); }
  bool is_number() const { return is_integer() || is_real() || is_bool(); }
  bool is_text() const { return is<Text>(); }
  bool is_list() const { return is<std::shared_ptr<const List>>(); }
  bool is_dict() const { return is<std::shared_ptr<const Dict>>(); }
  bool is_space() const { return is<std::shared_ptr<Dict>>(); }
  bool is_macro() const { return is<const Node*>(); }

  /// Of a value that is one.
  const std::string& text() const { return *std::get<Text>(what_); }
  const List& list() const { return *std::get<std::shared_ptr<const List>>(what_); }
  const Dict& dict() const {
    if (is_space()) return *std::get<std::shared_ptr<Dict>>(what_);
    return *std::get<std::shared_ptr<const Dict>>(what_);
  }
  Dict& space() const { return *std::get<std::shared_ptr<Dict>>(what_); }
  const Node* macro() const { return std::get<const Node*>(what_); }
  std::int64_t integer() const {
    return is_bool() ? std::int64_t{std::get<bool>(what_)} : std::get<std::int64_t>(what_);
  }
  double real() const {
    return is_real() ? std::get<double>(what_) : static_cast<double>(integer());
  }
  int depth() const { return depth_; }

  bool truth() const {
    if (is_text()) return !text().empty();
    if (is_list()) return !list().empty();
    if (is_dict()) return !dict().empty();
    if (is_number()) return real() != 0;
    return is_space() || is_macro();
  }
  /// The member of a dictionary; undefined: none.
  Value member(std::string_view key) const {
    for (const auto& [name, value] : dict())
      if (name == key) return value;
    return {};
  }

 private:
  using Text = std::shared_ptr<const std::string>;
  template <typename T>
  bool is() const {
    return std::holds_alternative<T>(what_);
  }
  static int deepest(const List& list) {
    int depth = 0;
    for (const Value& value : list) depth = (std::max)(depth, value.depth_);
    return depth;
  }

  std::variant<std::monostate, Nothing, bool, std::int64_t, double, Text,
               std::shared_ptr<const List>, std::shared_ptr<const Dict>, std::shared_ptr<Dict>,
               const Node*>
      what_;
  int depth_ = 0;
};

inline bool equal(const Value& a, const Value& b, Budget& budget) {
  budget.spend(1);
  if (a.is_number() && b.is_number())
    return a.is_real() || b.is_real() ? a.real() == b.real() : a.integer() == b.integer();
  if (a.is_text() && b.is_text()) return a.text() == b.text();
  if (a.is_none() || a.is_undefined())
    return a.is_none() == b.is_none() && a.is_undefined() == b.is_undefined();
  if (a.is_list() && b.is_list())
    return std::equal(a.list().begin(), a.list().end(), b.list().begin(), b.list().end(),
                      [&](const Value& x, const Value& y) { return equal(x, y, budget); });
  if (!a.is_dict() || !b.is_dict() || a.dict().size() != b.dict().size()) return false;
  for (const auto& [key, value] : a.dict())
    if (!equal(value, b.member(key), budget)) return false;
  return true;
}

/// How Python and JSON write a value; they differ in words and quotes.
class Writer {
 public:
  enum class Style { python, json };
  /// indent: spaces of a level; -1: one line.
  Writer(Style style, Budget& budget, std::int64_t indent = -1)
      : json_(style == Style::json), budget_(budget), indent_(indent) {}

  std::string write(const Value& value) {
    put(value, 1);
    return std::move(out_);
  }

 private:
  void put(const Value& value, std::int64_t level) {
    const std::size_t before = out_.size();
    if (value.is_text()) {
      put_text(value.text());
    } else if (value.is_integer()) {
      out_ += std::to_string(value.integer());
    } else if (value.is_bool()) {
      out_ += value.truth() ? (json_ ? "true" : "True") : (json_ ? "false" : "False");
    } else if (value.is_real()) {
      out_ += nlohmann::json(value.real()).dump();
    } else if (value.is_list()) {
      put_parts('[', ']', value.list(), level, [&](const Value& part) { put(part, level + 1); });
    } else if (value.is_dict() || value.is_space()) {
      put_parts('{', '}', value.dict(), level, [&](const auto& part) {
        put_text(part.first);
        out_ += ": ";
        put(part.second, level + 1);
      });
    } else if (value.is_none()) {
      out_ += json_ ? "null" : "None";
    } else if (json_) {
      budget_.fail("has no JSON of something undefined");
    }
    if (!value.is_list() && !value.is_dict()) budget_.spend_text(out_.size() - before);
  }
  template <typename Parts, typename Put>
  void put_parts(char open, char close, const Parts& parts, std::int64_t level, Put&& put_one) {
    if (level > 2 * Budget::kDeepest) budget_.fail("nests too deep");
    budget_.spend(1 + parts.size());
    out_ += open;
    bool first = true;
    for (const auto& part : parts) {
      if (!first) out_ += indent_ >= 0 ? "," : ", ";
      first = false;
      new_line(level);
      put_one(part);
    }
    if (!parts.empty()) new_line(level - 1);
    out_ += close;
  }
  void new_line(std::int64_t level) {
    if (indent_ < 0) return;
    budget_.spend_text(static_cast<std::size_t>(indent_ * level));
    out_ += '\n';
    out_.append(static_cast<std::size_t>(indent_ * level), ' ');
  }
  void put_text(const std::string& text) {
    if (json_) {
      out_ += nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
      return;
    }
    const bool double_quotes = text.find('\'') != text.npos && text.find('"') == text.npos;
    const char quote = double_quotes ? '"' : '\'';
    out_ += quote;
    for (const char c : text) {
      if (c == '\n') {
        out_ += "\\n";
      } else if (c == '\t') {
        out_ += "\\t";
      } else if (c == '\r') {
        out_ += "\\r";
      } else {
        if (c == quote || c == '\\') out_ += '\\';
        out_ += c;
      }
    }
    out_ += quote;
  }

  bool json_;
  Budget& budget_;
  std::int64_t indent_;
  std::string out_;
};

/// str(): text as it is, everything else as Python writes it, undefined as nothing.
inline std::string text_of(const Value& value, Budget& budget) {
  return value.is_text() ? value.text() : Writer(Writer::Style::python, budget).write(value);
}

inline Value value_of(const nlohmann::ordered_json& json, Budget& budget, int level = 0) {
  if (level > Budget::kDeepest) budget.fail("nests too deep");
  budget.spend(1);
  if (json.is_string()) return Value(json.get_ref<const std::string&>());
  if (json.is_boolean()) return Value(json.get<bool>());
  if (json.is_number_integer()) return Value(json.get<std::int64_t>());
  if (json.is_number()) return Value(json.get<double>());
  if (json.is_array()) {
    List list;
    for (const auto& part : json) list.push_back(value_of(part, budget, level + 1));
    return Value(std::move(list));
  }
  if (json.is_object()) {
    Dict dict;
    for (const auto& [key, part] : json.items())
      dict.emplace_back(key, value_of(part, budget, level + 1));
    return Value(std::move(dict));
  }
  return Value(Nothing());
}

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
