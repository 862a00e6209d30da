/// \file
/// Runs the tree of a chat template.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "builtins.h"
#include "filters.h"
#include "parser.h"
#include "value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

class Interpreter {
 public:
  using Scope = std::unordered_map<std::string, Value>;

  /// `now`: the date that templates may ask for.
  Interpreter(Scope globals, std::tm now, Budget& budget)
      : budget_(budget), builtins_(budget), filters_(budget), now_(now) {
    scopes_.push_back(std::move(globals));
  }

  std::string run(const Node& all) {
    execute(all);
    return std::move(out_);
  }

 private:
  using Kind = Node::Kind;
  enum class Flow { next, break_loop, continue_loop };

  // ---- names --------------------------------------------------------------------------------
  Value find(const std::string& name) const {
    for (std::size_t i = scopes_.size(); i-- > 0;) {
      const auto at = scopes_[i].find(name);
      if (at != scopes_[i].end()) return at->second;
    }
    return {};
  }
  void assign(const std::vector<std::string>& names, const Value& value) {
    if (names.size() == 1) {
      scopes_.back()[names[0]] = value;
      return;
    }
    const List list = builtins_.elements(value);
    if (list.size() != names.size())
      budget_.fail("unpacks " + std::to_string(list.size()) + " values into " +
                   std::to_string(names.size()) + " names");
    for (std::size_t i = 0; i < names.size(); ++i) scopes_.back()[names[i]] = list[i];
  }
  void put(std::string_view text) {
    budget_.spend_text(text.size());
    out_ += text;
  }
  /// What runs inside writes here instead of to the output.
  template <typename Run>
  std::string captured(Run&& run) {
    std::string outside = std::exchange(out_, {});
    run();
    return std::exchange(out_, std::move(outside));
  }

  // ---- statements ---------------------------------------------------------------------------
  Flow execute(const Node& node) {
    budget_.set_line(node.line);
    budget_.spend(1);
    switch (node.kind) {
      case Kind::block:
        for (const NodePtr& part : node.parts)
          if (const Flow flow = execute(*part); flow != Flow::next) return flow;
        break;
      case Kind::text:
        put(node.text);
        break;
      case Kind::output:
        put(text_of(evaluate(*node.parts[0]), budget_));
        break;
      case Kind::if_else: {
        const std::size_t taken = evaluate(*node.parts[0]).truth() ? 1 : 2;
        if (node.parts[taken]) return execute(*node.parts[taken]);
        break;
      }
      case Kind::for_each:
        loop(node);
        break;
      case Kind::assign:
        set(node);
        break;
      case Kind::capture: {
        piped_ = builtins_.made(captured([&] { execute(*node.parts[0]); }));
        scopes_.back()[node.names[0]] = evaluate(*node.parts[1]);
        break;
      }
      case Kind::macro:
        scopes_.back()[node.text] = Value::macro(&node);
        break;
      case Kind::break_loop:
        return Flow::break_loop;
      case Kind::continue_loop:
        return Flow::continue_loop;
      default:
        break;
    }
    return Flow::next;
  }
  void set(const Node& node) {
    const Value value = evaluate(*node.parts[0]);
    if (node.text.empty()) return assign(node.names, value);
    const Value space = find(node.names[0]);
    if (!space.is_space()) budget_.fail("sets a member of what is no namespace");
    budget_.spend(space.dict().size());
    for (auto& [name, member] : space.space())
      if (name == node.text) {
        member = builtins_.checked(held(value));
        return;
      }
    space.space().emplace_back(node.text, builtins_.checked(held(value)));
  }
  /// A namespace inside a namespace could hold itself.
  Value held(const Value& value) const {
    if (value.is_space()) budget_.fail("puts a namespace into another, which is not supported");
    return value;
  }
  void loop(const Node& node) {
    List list = builtins_.elements(evaluate(*node.parts[0]));
    if (node.parts[1]) {
      List kept;
      scopes_.emplace_back();
      for (const Value& one : list) {
        assign(node.names, one);
        if (evaluate(*node.parts[1]).truth()) kept.push_back(one);
      }
      scopes_.pop_back();
      list = std::move(kept);
    }
    if (list.empty() && node.parts[3]) {
      execute(*node.parts[3]);
      return;
    }
    for (std::size_t i = 0; i < list.size(); ++i) {
      scopes_.emplace_back();
      scopes_.back()["loop"] = loop_value(list, i);
      assign(node.names, list[i]);
      const Flow flow = execute(*node.parts[2]);
      scopes_.pop_back();
      if (flow == Flow::break_loop) break;
    }
  }
  Value loop_value(const List& list, std::size_t i) const {
    budget_.spend(8);
    const auto at = static_cast<std::int64_t>(i), size = static_cast<std::int64_t>(list.size());
    return Value(Dict{{"index", Value(at + 1)},
                      {"index0", Value(at)},
                      {"first", Value(at == 0)},
                      {"last", Value(at + 1 == size)},
                      {"length", Value(size)},
                      {"revindex", Value(size - at)},
                      {"revindex0", Value(size - at - 1)},
                      {"previtem", i > 0 ? list[i - 1] : Value()},
                      {"nextitem", i + 1 < list.size() ? list[i + 1] : Value()}});
  }

  // ---- expressions --------------------------------------------------------------------------
  /// Undefined for a part left out.
  Value evaluate_if(const NodePtr& node) { return node ? evaluate(*node) : Value(); }

  Value evaluate(const Node& node) {
    budget_.set_line(node.line);
    budget_.spend(1);
    switch (node.kind) {
      case Kind::constant:
        return node.value;
      case Kind::name:
        return find(node.text);
      case Kind::piped:
        return piped_;
      case Kind::list: {
        List list;
        for (const NodePtr& part : node.parts) list.push_back(held(evaluate(*part)));
        return builtins_.made(std::move(list));
      }
      case Kind::dict:
        return dict(node);
      case Kind::member:
        return builtins_.at(evaluate(*node.parts[0]), Value(node.text));
      case Kind::index: {
        const Value object = evaluate(*node.parts[0]);
        return builtins_.at(object, evaluate(*node.parts[1]));
      }
      case Kind::slice: {
        const Value object = evaluate(*node.parts[0]), begin = evaluate_if(node.parts[1]),
                    end = evaluate_if(node.parts[2]);
        return builtins_.slice(object, begin, end, evaluate_if(node.parts[3]));
      }
      case Kind::call:
        return call(node);
      case Kind::filter: {
        const Value value = evaluate(*node.parts[0]);
        const Arguments given = arguments(node);
        budget_.set_line(node.line);
        return filters_.apply(node.text, value, given);
      }
      case Kind::test: {
        const Value value = evaluate(*node.parts[0]);
        const Arguments given = arguments(node);
        budget_.set_line(node.line);
        return Value(filters_.test(node.text, value, given));
      }
      case Kind::choice:
        return evaluate(*node.parts[0]).truth() ? evaluate(*node.parts[1])
                                                : evaluate_if(node.parts[2]);
      case Kind::unary:
        return unary(node.text, evaluate(*node.parts[0]));
      default:
        return binary(node);
    }
  }
  Value dict(const Node& node) {
    Dict dict;
    for (std::size_t i = 0; i + 1 < node.parts.size(); i += 2) {
      const std::string key = builtins_.need_text(evaluate(*node.parts[i]), "a key");
      Value value = held(evaluate(*node.parts[i + 1]));
      budget_.spend(1 + dict.size());
      std::erase_if(dict, [&](const auto& member) { return member.first == key; });
      dict.emplace_back(key, std::move(value));
    }
    return builtins_.checked(Value(std::move(dict)));
  }
  /// Of a call, a filter or a test: all parts but the first.
  Arguments arguments(const Node& node) {
    Arguments all;
    const std::size_t plain = node.parts.size() - node.names.size();
    for (std::size_t i = 1; i < node.parts.size(); ++i) {
      Value value = held(evaluate(*node.parts[i]));
      if (i < plain)
        all.values.push_back(std::move(value));
      else
        all.named.emplace_back(node.names[i - plain], std::move(value));
    }
    return all;
  }
  Value call(const Node& node) {
    const Node& function = *node.parts[0];
    if (function.kind == Kind::member) {
      const Value object = evaluate(*function.parts[0]);
      const Arguments given = arguments(node);
      budget_.set_line(node.line);
      return builtins_.method(object, function.text, given);
    }
    if (function.kind == Kind::name) {
      const Value value = find(function.text);
      const Arguments given = arguments(node);
      budget_.set_line(node.line);
      if (value.is_macro()) return call_macro(*value.macro(), given);
      if (value.is_undefined()) return call_function(function.text, given);
    }
    budget_.fail("calls what is no function");
  }
  Value call_macro(const Node& macro, const Arguments& given) {
    if (++calls_ > kDeepestCall) budget_.fail("calls macros too deep");
    // A macro sees what is set at the top, and its arguments.
    std::vector<Scope> outside;
    outside.swap(scopes_);
    scopes_.push_back(std::move(outside[0]));
    scopes_.emplace_back();
    const std::size_t defaults = macro.parts.size() - 1, names = macro.names.size();
    if (given.values.size() > names) budget_.fail("gives a macro too many arguments");
    for (std::size_t i = 0; i < names; ++i) {
      Value value = given.get(i, macro.names[i]);
      if (value.is_undefined() && i + defaults >= names)
        value = evaluate(*macro.parts[1 + i + defaults - names]);
      scopes_.back()[macro.names[i]] = std::move(value);
    }
    std::string text = captured([&] { execute(*macro.parts[0]); });
    outside[0] = std::move(scopes_[0]);
    scopes_ = std::move(outside);
    --calls_;
    return builtins_.made(std::move(text));
  }
  Value call_function(const std::string& name, const Arguments& arguments) {
    if (name == "namespace" || name == "dict") {
      Dict dict = arguments.named;
      if (!arguments.values.empty() && arguments.values[0].is_dict()) {
        dict = arguments.values[0].dict();
        dict.insert(dict.end(), arguments.named.begin(), arguments.named.end());
      }
      return name == "dict" ? builtins_.checked(Value(std::move(dict)))
                            : Value::space(std::move(dict));
    }
    if (name == "range") return range(arguments);
    if (name == "raise_exception") {
      fail<std::invalid_argument>("chat template: " +
                                  text_of(arguments.get(0, "message"), budget_));
    }
    if (name == "strftime_now") {
      const std::string format = builtins_.need_text(arguments.get(0, "format"), name);
      char text[256];
      const std::size_t bytes = std::strftime(text, sizeof(text), checked_format(format), &now_);
      return builtins_.made(std::string(text, bytes));
    }
    budget_.fail("calls " + printable(name) + ", which is undefined");
  }
  /// Directives of C; others are undefined behaviour there.
  const char* checked_format(const std::string& format) const {
    for (std::size_t at = 0; (at = format.find('%', at)) != std::string::npos; at += 2)
      if (at + 1 == format.size() ||
          std::string_view("aAbBdHIjmMpSUwWyY%").find(format[at + 1]) == std::string_view::npos)
        budget_.fail("has a format of dates that is not supported");
    return format.c_str();
  }
  Value range(const Arguments& arguments) const {
    std::int64_t bounds[3] = {0, 0, 1};
    const std::size_t count = arguments.values.size();
    if (count == 0 || count > 3) budget_.fail("range takes 1 to 3 integers");
    for (std::size_t i = 0; i < count; ++i)
      bounds[count == 1 ? 1 : i] = builtins_.need_integer(arguments.values[i], "range");
    constexpr std::int64_t kMost = 100'000;
    for (const std::int64_t bound : bounds)
      if (bound > kMost || bound < -kMost) budget_.fail("has a range that is too large");
    if (bounds[2] == 0) budget_.fail("has a range of step 0");
    List list;
    for (std::int64_t i = bounds[0]; bounds[2] > 0 ? i < bounds[1] : i > bounds[1]; i += bounds[2])
      list.push_back(Value(i));
    return builtins_.made(std::move(list));
  }
  Value unary(const std::string& sign, const Value& value) const {
    if (sign == "not") return Value(!value.truth());
    if (!value.is_number()) budget_.fail("gives a sign to what is no number");
    if (sign == "+") return value;
    if (value.is_real()) return Value(-value.real());
    return Value(arithmetic("-", 0, value.integer()));
  }
  Value binary(const Node& node) {
    const std::string& sign = node.text;
    Value left = evaluate(*node.parts[0]);
    if (sign == "and") return left.truth() ? evaluate(*node.parts[1]) : left;
    if (sign == "or") return left.truth() ? left : evaluate(*node.parts[1]);
    const Value right = evaluate(*node.parts[1]);
    budget_.set_line(node.line);
    if (sign == "==") return Value(equal(left, right, budget_));
    if (sign == "!=") return Value(!equal(left, right, budget_));
    if (sign == "in") return Value(builtins_.contains(right, left));
    if (sign == "not in") return Value(!builtins_.contains(right, left));
    if (sign == "~") return builtins_.made(text_of(left, budget_) + text_of(right, budget_));
    if (sign[0] == '<' || sign[0] == '>') return Value(ordered(sign, left, right));
    if (sign == "+" && left.is_text() && right.is_text())
      return builtins_.made(left.text() + right.text());
    if (sign == "+" && left.is_list() && right.is_list()) {
      List list = left.list();
      list.insert(list.end(), right.list().begin(), right.list().end());
      return builtins_.made(std::move(list));
    }
    if (sign == "*" && left.is_text() && right.is_integer()) return repeated(left, right.integer());
    if (!left.is_number() || !right.is_number())
      budget_.fail("has values on the sides of " + sign + " that do not go together");
    if (sign == "/" || left.is_real() || right.is_real())
      return Value(arithmetic(sign, left.real(), right.real()));
    return Value(arithmetic(sign, left.integer(), right.integer()));
  }
  Value repeated(const Value& text, std::int64_t times) const {
    if (times > 10'000) budget_.fail("repeats a text too often");
    std::string result;
    for (std::int64_t i = 0; i < times; ++i) {
      budget_.spend_text(text.text().size());
      result += text.text();
    }
    return builtins_.made(std::move(result));
  }
  bool ordered(const std::string& sign, const Value& left, const Value& right) const {
    int order = 0;
    if (left.is_text() && right.is_text())
      order = left.text().compare(right.text());
    else if (left.is_number() && right.is_number())
      order = left.real() < right.real() ? -1 : left.real() > right.real() ? 1 : 0;
    else
      budget_.fail("orders values that have no order");
    if (order == 0) return sign.size() == 2;
    return (order < 0) == (sign[0] == '<');
  }
  double arithmetic(const std::string& sign, double a, double b) const {
    if (sign == "+") return a + b;
    if (sign == "-") return a - b;
    if (sign == "*") return a * b;
    if (b == 0) budget_.fail("divides by 0");
    if (sign == "/") return a / b;
    const double whole = std::floor(a / b);
    return sign == "//" ? whole : a - whole * b;
  }
  std::int64_t arithmetic(const std::string& sign, std::int64_t a, std::int64_t b) const {
    constexpr std::int64_t kMost = std::int64_t{1} << 31;  // of each side: nothing overflows
    if (a > kMost || a < -kMost || b > kMost || b < -kMost)
      budget_.fail("counts with integers that are too large");
    if (sign == "+") return a + b;
    if (sign == "-") return a - b;
    if (sign == "*") return a * b;
    if (b == 0) budget_.fail("divides by 0");
    const std::int64_t rest = ((a % b) + b) % b;  // of the sign of b, as Python's
    return sign == "//" ? (a - rest) / b : rest;
  }

  static constexpr int kDeepestCall = 20;

  Budget& budget_;
  Builtins builtins_;
  Filters filters_;
  std::tm now_;
  std::vector<Scope> scopes_;
  std::string out_;
  Value piped_;
  int calls_ = 0;
};

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
