/// \file
/// Chat templates as trees, by recursive descent over Jinja's grammar.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lexer.h"
#include "node.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {
namespace chat {

class Parser {
 public:
  Parser(std::vector<Token> tokens, Budget& budget) : tokens_(std::move(tokens)), budget_(budget) {}

  NodePtr parse() {
    NodePtr all = statements({});
    if (peek().kind != Token::Kind::end) fail("has an end of a block that was not begun");
    return all;
  }

 private:
  using Kind = Node::Kind;

  [[noreturn]] void fail(std::string_view why) {
    budget_.set_line(peek().line);
    budget_.fail(why);
  }
  /// Counts how deep the recursion is.
  struct Level {
    explicit Level(Parser& parser) : parser_(parser) {
      if (++parser_.depth_ > 4 * Budget::kDeepest) parser_.fail("nests too deep");
    }
    ~Level() { --parser_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;
    Parser& parser_;
  };

  const Token& peek() const { return tokens_[at_]; }
  Token take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool is_sign(std::string_view text) const {
    return peek().kind == Token::Kind::sign && peek().text == text;
  }
  bool is_word(std::string_view text) const {
    return peek().kind == Token::Kind::name && peek().text == text;
  }
  bool take_sign(std::string_view text) {
    const bool is = is_sign(text);
    if (is) take();
    return is;
  }
  bool take_word(std::string_view text) {
    const bool is = is_word(text);
    if (is) take();
    return is;
  }
  void need_sign(std::string_view text) {
    if (!take_sign(text)) fail("needs \"" + std::string(text) + "\" here");
  }
  std::string need_name() {
    if (peek().kind != Token::Kind::name) fail("needs a name here");
    return take().text;
  }
  void end_block() {
    if (peek().kind != Token::Kind::end_block) fail("needs the end of the tag here");
    take();
  }
  NodePtr make(Kind kind, std::string text = {}) const {
    auto node = std::make_unique<Node>();
    node->kind = kind;
    node->line = peek().line;
    node->text = std::move(text);
    return node;
  }
  void add(Node& node, NodePtr part) {
    if (part) node.height = (std::max)(node.height, part->height + 1);
    if (node.height > 4 * Budget::kDeepest) fail("nests too deep");
    node.parts.push_back(std::move(part));
  }
  void replace_last(Node& node, NodePtr part) {
    node.parts.pop_back();
    add(node, std::move(part));
  }
  template <typename... Parts>
  NodePtr make_of(Kind kind, std::string text, Parts... parts) {
    NodePtr node = make(kind, std::move(text));
    (add(*node, std::move(parts)), ...);
    return node;
  }

  // ---- statements ---------------------------------------------------------------------------
  /// Up to a block that begins with one of `ends`, whose first word is left to be read.
  NodePtr statements(std::initializer_list<std::string_view> ends) {
    const Level level(*this);
    NodePtr block = make(Kind::block);
    for (;;) {
      if (peek().kind == Token::Kind::text) {
        NodePtr text = make(Kind::text);
        text->text = take().text;
        add(*block, std::move(text));
      } else if (peek().kind == Token::Kind::begin_output) {
        take();
        add(*block, make_of(Kind::output, "", expression()));
        if (peek().kind != Token::Kind::end_output) fail("needs \"}}\" here");
        take();
      } else if (peek().kind == Token::Kind::begin_block) {
        take();
        for (const std::string_view end : ends)
          if (is_word(end)) return block;
        if (NodePtr one = statement()) add(*block, std::move(one));
      } else {
        if (ends.size() > 0 || peek().kind != Token::Kind::end) fail("has a block without an end");
        return block;
      }
    }
  }
  NodePtr statement() {
    const std::string word = need_name();
    if (word == "if") return if_statement();
    if (word == "for") return for_statement();
    if (word == "set") return set_statement();
    if (word == "macro") return macro_statement();
    if (word == "break" || word == "continue") {
      if (loops_ == 0) fail("leaves a loop outside of one");
      end_block();
      return make(word == "break" ? Kind::break_loop : Kind::continue_loop);
    }
    if (word == "generation") {  // marks what a model is trained on
      end_block();
      NodePtr body = statements({"endgeneration"});
      take();
      end_block();
      return body;
    }
    fail("uses " + printable(word) + ", which is not supported");
  }
  NodePtr if_statement() {
    const Level level(*this);
    NodePtr node = make_of(Kind::if_else, "", expression());
    end_block();
    add(*node, statements({"elif", "else", "endif"}));
    const std::string word = take().text;
    if (word == "elif") {
      add(*node, if_statement());
      return node;
    }
    end_block();
    add(*node, nullptr);
    if (word == "else") {
      replace_last(*node, statements({"endif"}));
      take();
      end_block();
    }
    return node;
  }
  NodePtr for_statement() {
    NodePtr node = make(Kind::for_each);
    node->names = targets();
    if (!take_word("in")) fail("needs \"in\" here");
    add(*node, or_expression());
    add(*node, take_word("if") ? expression() : nullptr);
    if (is_word("recursive")) fail("has a recursive loop, which is not supported");
    end_block();
    ++loops_;
    add(*node, statements({"else", "endfor"}));
    --loops_;
    add(*node, nullptr);
    if (take().text == "else") {
      end_block();
      replace_last(*node, statements({"endfor"}));
      take();
    }
    end_block();
    return node;
  }
  std::vector<std::string> targets() {
    std::vector<std::string> names;
    const bool round = take_sign("(");
    do names.push_back(need_name());
    while (take_sign(","));
    if (round) need_sign(")");
    return names;
  }
  NodePtr set_statement() {
    NodePtr node = make(Kind::assign);
    node->names = targets();
    if (take_sign(".")) node->text = need_name();
    if (take_sign("=")) {
      add(*node, tuple());
      end_block();
      return node;
    }
    node->kind = Kind::capture;
    if (node->names.size() != 1 || !node->text.empty()) fail("needs \"=\" here");
    NodePtr filters = make(Kind::piped);
    while (take_sign("|")) filters = filter(std::move(filters));
    end_block();
    add(*node, statements({"endset"}));
    take();
    end_block();
    add(*node, std::move(filters));
    return node;
  }
  NodePtr macro_statement() {
    NodePtr node = make(Kind::macro, need_name());
    std::vector<NodePtr> defaults;
    need_sign("(");
    while (!take_sign(")")) {
      node->names.push_back(need_name());
      if (take_sign("="))
        defaults.push_back(expression());
      else if (!defaults.empty())
        fail("has an argument without a default after one with it");
      if (!is_sign(")")) need_sign(",");
    }
    end_block();
    const int loops = std::exchange(loops_, 0);
    add(*node, statements({"endmacro"}));
    loops_ = loops;
    take();
    if (peek().kind == Token::Kind::name) take();
    end_block();
    for (NodePtr& one : defaults) add(*node, std::move(one));
    return node;
  }

  // ---- expressions, the loosest operators first ---------------------------------------------
  NodePtr tuple() {
    NodePtr first = expression();
    if (!is_sign(",")) return first;
    NodePtr all = make_of(Kind::list, "", std::move(first));
    while (take_sign(",")) {
      if (peek().kind == Token::Kind::end_block || is_sign(")")) break;
      add(*all, expression());
    }
    return all;
  }
  NodePtr expression() {
    const Level level(*this);
    NodePtr value = or_expression();
    while (take_word("if")) {
      NodePtr condition = or_expression();
      NodePtr other = take_word("else") ? expression() : nullptr;
      value = make_of(Kind::choice, "", std::move(condition), std::move(value), std::move(other));
    }
    return value;
  }
  NodePtr or_expression() {
    NodePtr left = and_expression();
    while (take_word("or")) left = make_of(Kind::binary, "or", std::move(left), and_expression());
    return left;
  }
  NodePtr and_expression() {
    NodePtr left = not_expression();
    while (take_word("and")) left = make_of(Kind::binary, "and", std::move(left), not_expression());
    return left;
  }
  NodePtr not_expression() {
    const Level level(*this);
    if (take_word("not")) return make_of(Kind::unary, "not", not_expression());
    return comparison();
  }
  NodePtr comparison() {
    NodePtr left = sum();
    for (;;) {
      std::string sign;
      for (const std::string_view one : {"==", "!=", "<=", ">=", "<", ">"})
        if (take_sign(one)) {
          sign = one;
          break;
        }
      if (sign.empty() && take_word("in")) sign = "in";
      if (sign.empty() && is_word("not") && tokens_[at_ + 1].text == "in") {
        take();
        take();
        sign = "not in";
      }
      if (sign.empty()) return left;
      left = make_of(Kind::binary, sign, std::move(left), sum());
    }
  }
  NodePtr sum() {
    NodePtr left = joined();
    for (;;) {
      const std::string sign = peek().text;
      if (!take_sign("+") && !take_sign("-")) return left;
      left = make_of(Kind::binary, sign, std::move(left), joined());
    }
  }
  NodePtr joined() {
    NodePtr left = product();
    while (take_sign("~")) left = make_of(Kind::binary, "~", std::move(left), product());
    return left;
  }
  NodePtr product() {
    NodePtr left = unary();
    for (;;) {
      const std::string sign = peek().text;
      if (!take_sign("*") && !take_sign("/") && !take_sign("//") && !take_sign("%")) return left;
      left = make_of(Kind::binary, sign, std::move(left), unary());
    }
  }
  /// A sign binds tighter than a filter: -3|abs is 3.
  NodePtr unary(bool with_filters = true) {
    const Level level(*this);
    NodePtr value;
    for (const std::string_view sign : {"-", "+"})
      if (!value && take_sign(sign)) value = make_of(Kind::unary, std::string(sign), unary(false));
    if (!value) value = primary();
    value = postfixed(std::move(value));
    return with_filters ? filtered(std::move(value)) : std::move(value);
  }
  NodePtr filtered(NodePtr value) {
    for (;;) {
      if (take_sign("|"))
        value = filter(std::move(value));
      else if (take_word("is"))
        value = postfixed(test(std::move(value)));
      else
        return value;
    }
  }
  NodePtr filter(NodePtr value) {
    NodePtr node = make_of(Kind::filter, need_name(), std::move(value));
    if (take_sign("(")) arguments(*node);
    return node;
  }
  NodePtr test(NodePtr value) {
    const bool negated = take_word("not");
    NodePtr node = make_of(Kind::test, need_name(), std::move(value));
    if (take_sign("(")) {
      arguments(*node);
    } else if (begins_value()) {
      add(*node, postfixed(primary()));
    }
    return negated ? make_of(Kind::unary, "not", std::move(node)) : std::move(node);
  }
  /// Whether an argument follows a test without brackets: `is divisibleby 3`.
  bool begins_value() const {
    const Token::Kind kind = peek().kind;
    if (kind == Token::Kind::name) {
      for (const std::string_view word : {"else", "or", "and", "is", "in", "if", "not"})
        if (peek().text == word) return false;
      return true;
    }
    return kind == Token::Kind::string || kind == Token::Kind::integer ||
           kind == Token::Kind::real || is_sign("[") || is_sign("{");
  }
  NodePtr postfixed(NodePtr value) {
    for (;;) {
      if (take_sign(".")) {
        if (peek().kind == Token::Kind::integer) {
          value = make_of(Kind::index, "", std::move(value), primary());
        } else {
          value = make_of(Kind::member, need_name(), std::move(value));
        }
      } else if (take_sign("[")) {
        value = subscript(std::move(value));
      } else if (take_sign("(")) {
        value = make_of(Kind::call, "", std::move(value));
        arguments(*value);
      } else {
        return value;
      }
    }
  }
  NodePtr subscript(NodePtr value) {
    NodePtr bounds[3];
    int colons = 0;
    while (!is_sign("]")) {
      if (take_sign(":")) {
        if (++colons > 2) fail("has a slice of more than three parts");
      } else {
        if (bounds[colons]) fail("needs \"]\" here");
        bounds[colons] = expression();
      }
    }
    take();
    if (colons == 0) {
      if (!bounds[0]) fail("has an empty index");
      return make_of(Kind::index, "", std::move(value), std::move(bounds[0]));
    }
    return make_of(Kind::slice, "", std::move(value), std::move(bounds[0]), std::move(bounds[1]),
                   std::move(bounds[2]));
  }
  /// After the bracket.
  void arguments(Node& call) {
    while (!take_sign(")")) {
      if (is_sign("*") || is_sign("**")) fail("unpacks arguments, which is not supported");
      if (peek().kind == Token::Kind::name && tokens_[at_ + 1].kind == Token::Kind::sign &&
          tokens_[at_ + 1].text == "=") {
        call.names.push_back(take().text);
        take();
      } else if (!call.names.empty()) {
        fail("has an argument without a name after one with it");
      }
      add(call, expression());
      if (!is_sign(")")) need_sign(",");
    }
  }
  NodePtr primary() {
    const Level level(*this);
    NodePtr node = make(Kind::constant);
    const Token token = take();
    if (token.kind == Token::Kind::string) {
      std::string text = token.text;
      while (peek().kind == Token::Kind::string) text += take().text;
      node->value = Value(std::move(text));
    } else if (token.kind == Token::Kind::integer) {
      node->value = Value(std::int64_t{std::strtoll(token.text.c_str(), nullptr, 10)});
    } else if (token.kind == Token::Kind::real) {
      node->value = Value(real_of(token.text));
    } else if (token.kind == Token::Kind::name) {
      const std::string& name = token.text;
      if (name == "true" || name == "True" || name == "false" || name == "False") {
        node->value = Value(name == "true" || name == "True");
      } else if (name == "none" || name == "None") {
        node->value = Value(Nothing());
      } else {
        node->kind = Kind::name;
        node->text = name;
      }
    } else if (token.kind == Token::Kind::sign && token.text == "(") {
      node = is_sign(")") ? make(Kind::list) : tuple();
      need_sign(")");
    } else if (token.kind == Token::Kind::sign && token.text == "[") {
      node->kind = Kind::list;
      while (!take_sign("]")) {
        add(*node, expression());
        if (!is_sign("]")) need_sign(",");
      }
    } else if (token.kind == Token::Kind::sign && token.text == "{") {
      node->kind = Kind::dict;
      while (!take_sign("}")) {
        add(*node, expression());
        need_sign(":");
        add(*node, expression());
        if (!is_sign("}")) need_sign(",");
      }
    } else {
      fail("needs a value here");
    }
    return node;
  }
  /// Of digits with a point, whatever the locale says a point is.
  static double real_of(const std::string& digits) {
    double value = 0, scale = 1;
    bool fraction = false;
    for (const char c : digits) {
      if (c == '.') {
        fraction = true;
        continue;
      }
      value = value * 10 + (c - '0');
      if (fraction) scale *= 10;
    }
    return value / scale;
  }

  std::vector<Token> tokens_;
  Budget& budget_;
  std::size_t at_ = 0;
  int depth_ = 0, loops_ = 0;
};

}  // namespace chat
}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
