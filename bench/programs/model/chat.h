/// \file
/// A chat as the ids of its tokens: what was said stays as it was written, so that a model that
/// keeps its cache computes what is new alone.
#pragma once

#include <eigenformer/model/chat_template.h>

#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace programs {

namespace ef = eigenformer;

class Chat {
 public:
  Chat(const ef::Tokenizer& tokenizer, const std::string& system) : tokenizer_(tokenizer) {
    if (tokenizer.chat_template().empty())
      throw std::invalid_argument(
          "this model has no chat template: it continues texts, leave --chat out");
    if (!system.empty()) messages_.push_back({"system", system});
  }

  /// The chat with this message of the user's, up to where the answer begins. What follows an
  /// answer is appended to its own tokens, whatever others would spell the same text.
  std::span<const std::int32_t> ask(const std::string& message) {
    messages_.push_back({"user", message});
    const std::string all = ef::render_chat(tokenizer_, messages_);
    const bool continues = all.starts_with(text_);
    if (!continues) ids_.clear();
    const auto ids = tokenizer_.encode(all.substr(continues ? text_.size() : 0),
                                       {.add_special = false, .parse_special = true});
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_ = all;
    return ids_;
  }

  void answer(std::span<const std::int32_t> ids) {
    messages_.push_back({"assistant", text_after(ids, {.skip_special = true})});
    text_ += text_after(ids, {.skip_special = false});
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }

 private:
  /// What ids say behind the chat: at the beginning of a text a token may lose its space.
  std::string text_after(std::span<const std::int32_t> ids, const ef::DecodeOptions& options) {
    auto stream = tokenizer_.stream(options);
    for (const std::int32_t id : ids_) stream.push(id);
    std::string text;
    for (const std::int32_t id : ids) text += stream.push(id);
    return text + stream.finish();
  }

  const ef::Tokenizer& tokenizer_;
  std::vector<ef::ChatMessage> messages_;
  std::string text_;  // that ids_ spell
  std::vector<std::int32_t> ids_;
};

}  // namespace programs
