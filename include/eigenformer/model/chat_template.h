/// \file
/// Chats as the text that a model was trained on, by the chat template of its files.
///
///   const ef::Tokenizer& tokenizer = model.tokenizer();
///   std::vector<ef::ChatMessage> chat = {{"system", "Be brief."}, {"user", "Hello!"}};
///   std::vector<std::int32_t> ids = ef::encode_chat(tokenizer, chat);
///   std::string text = ef::render_chat(tokenizer, chat, {.add_generation_prompt = false});
///
/// Templates are written in Jinja (jinja.palletsprojects.com), and transformers'
/// apply_chat_template says which names they find: messages, tools, documents,
/// add_generation_prompt, bos_token, eos_token, unk_token, pad_token, raise_exception(),
/// strftime_now() and what the caller adds. The part of the language that templates of models in
/// use need is read:
///
///   statements   if, for (with if, else, break, continue; loop.index, first, last, ...), set (also
///                of a block and of members of a namespace), macro, raw, generation, comments;
///                white space control, with trim_blocks and lstrip_blocks as transformers has them
///   expressions  all operators but **; lists, dictionaries, slices, x if y else z
///   filters      trim, length, tojson, default, lower, upper, capitalize, title, string, replace,
///                indent, join, first, last, list, reverse, unique, items, dictsort, map, select,
///                reject, selectattr, rejectattr, int, float, abs, safe
///   tests        defined, none, string, number, integer, float, boolean, mapping, sequence,
///                iterable, equalto, in, odd, even, divisibleby, ...
///   methods      of texts strip, lstrip, rstrip, split, splitlines, startswith, endswith, replace,
///                upper, lower, title, capitalize, join, find, count, isdigit; of dictionaries get,
///                items, keys, values; of lists index, count
///   functions    range, namespace, dict
///
/// Tuples are lists. Anything else is refused by its name and line. Templates are not trusted:
/// depth, steps and text are bounded (chat_template/value.h), and nothing of the machine can be
/// reached but the date.
#pragma once

#include <chrono>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "chat_template/interpreter.h"
#include "chat_template/lexer.h"
#include "chat_template/parser.h"
#include "chat_template/value.h"
#include "tokenizer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Text in UTF-8.
struct ChatMessage {
  std::string role;  ///< "system", "user", "assistant", ...
  std::string content;
};

struct ChatOptions {
  bool add_generation_prompt = true;  ///< ends where the assistant's answer begins
  /// More names for the template: tools, enable_thinking, date_string, ... An object.
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  /// What strftime_now() says, in UTC; the time of the call where there is none.
  std::optional<std::time_t> now = std::nullopt;
};

/// A template, read once. Copies share it; const calls from many threads are safe.
class ChatTemplate {
 public:
  /// Throws ModelFileError for what is no template or uses what is not supported. `file`: for
  /// messages.
  explicit ChatTemplate(std::string_view source, std::string file = "tokenizer")
      : file_(std::move(file)) {
    constexpr std::size_t kLongest = 1 << 20;
    if (source.size() > kLongest)
      detail::fail_model(file_, "chat template",
                         "has more than " + std::to_string(kLongest) + " bytes");
    detail::chat::Budget budget(file_);
    detail::chat::Lexer lexer(source, budget);
    tree_ = detail::chat::Parser(lexer.tokens(), budget).parse();
  }

  /// `messages`: a list of objects with role and content, and what else the template looks at.
  /// Throws std::invalid_argument where the template calls raise_exception(), and ModelFileError
  /// where it goes wrong or on for too long.
  std::string render(const nlohmann::ordered_json& messages,
                     const ChatOptions& options = {}) const {
    detail::chat::Budget budget(file_);
    detail::chat::Interpreter::Scope names;
    const auto set = [&](const std::string& name, const nlohmann::ordered_json& value) {
      names[name] = detail::chat::value_of(value, budget);
    };
    set("messages", messages);
    set("add_generation_prompt", options.add_generation_prompt);
    for (const char* name : {"tools", "documents"}) set(name, nullptr);
    if (!options.variables.is_object())
      detail::fail<std::invalid_argument>("chat template: variables are no object");
    for (const auto& [name, value] : options.variables.items()) set(name, value);
    return detail::chat::Interpreter(std::move(names), date(options), budget).run(*tree_);
  }

 private:
  static std::tm date(const ChatOptions& options) {
    using namespace std::chrono;
    const auto now = sys_seconds(seconds(options.now.value_or(std::time(nullptr))));
    const auto day = floor<days>(now);
    const year_month_day date(day);
    const auto second = static_cast<int>((now - day).count());  // of the day
    std::tm result{};
    result.tm_year = static_cast<int>(date.year()) - 1900;
    result.tm_mon = static_cast<int>(static_cast<unsigned>(date.month())) - 1;
    result.tm_mday = static_cast<int>(static_cast<unsigned>(date.day()));
    result.tm_hour = second / 3600;
    result.tm_min = second / 60 % 60;
    result.tm_sec = second % 60;
    result.tm_wday = static_cast<int>(weekday(day).c_encoding());
    result.tm_yday = static_cast<int>((day - sys_days(date.year() / 1 / 1)).count());
    return result;
  }

  std::string file_;
  std::shared_ptr<const detail::chat::Node> tree_;
};

/// By the tokenizer's template, with its special tokens. Throws std::invalid_argument where it has
/// none.
inline std::string render_chat(const Tokenizer& tokenizer, const nlohmann::ordered_json& messages,
                               ChatOptions options = {}) {
  if (tokenizer.chat_template().empty())
    detail::fail<std::invalid_argument>("render_chat: the tokenizer has no chat template");
  const auto set = [&](const char* name, std::optional<std::int32_t> id) {
    if (id && !options.variables.contains(name)) options.variables[name] = tokenizer.token(*id);
  };
  set("bos_token", tokenizer.bos());
  set("unk_token", tokenizer.unk());
  set("pad_token", tokenizer.pad());
  set("eos_token", tokenizer.eos_of_texts());
  return ChatTemplate(tokenizer.chat_template()).render(messages, options);
}
inline std::string render_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                               const ChatOptions& options = {}) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const ChatMessage& message : messages)
    list.push_back({{"role", message.role}, {"content", message.content}});
  return render_chat(tokenizer, list, options);
}

/// The ids of that text. Special tokens in the messages' own text count as such, as they do in
/// transformers: programs that pass on text of strangers take them out first.
template <typename Messages>
std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer, const Messages& messages,
                                      const ChatOptions& options = {}) {
  return tokenizer.encode(render_chat(tokenizer, messages, options), {.add_special = false});
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
