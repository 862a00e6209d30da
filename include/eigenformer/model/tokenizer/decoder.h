/// \file
/// From texts of tokens back to text, in one go or token by token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "regex.h"
#include "text.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// One step. Each takes the texts of all tokens and gives as many, or fewer.
struct DecodeStep {
  enum class Kind { byte_level, byte_fallback, metaspace, replace, strip, fuse };
  Kind kind = Kind::fuse;
  std::string text = {};                        ///< metaspace: the mark; strip: what is taken away
  std::string content = {};                     ///< replace: what comes in place
  std::optional<Regex> pattern = std::nullopt;  ///< replace
  std::size_t start = 0, stop = 0;  ///< strip: how many at each end; metaspace: start 1, if the
                                    ///< marks of the first token stand for nothing
};

/// `text` without up to `start` times `what` in front and up to `stop` times behind.
inline std::string_view stripped(std::string_view text, const DecodeStep& step) {
  if (step.text.empty()) return text;
  for (std::size_t i = 0; i < step.start && text.starts_with(step.text); ++i)
    text.remove_prefix(step.text.size());
  for (std::size_t i = 0; i < step.stop && text.ends_with(step.text); ++i)
    text.remove_suffix(step.text.size());
  return text;
}

/// What a step makes of one token's text, where it looks at one at a time.
inline std::string decoded_one(const DecodeStep& step, std::string text, bool is_first) {
  if (step.kind == DecodeStep::Kind::replace) return step.pattern->replace(text, step.content);
  if (step.kind == DecodeStep::Kind::strip) return std::string(stripped(text, step));
  if (step.kind == DecodeStep::Kind::metaspace) {
    const std::string_view space = is_first && step.start > 0 ? "" : " ";
    std::string result;
    for (std::size_t at = 0; at < text.size();) {
      if (text.compare(at, step.text.size(), step.text) == 0) {
        result += space;
        at += step.text.size();
      } else {
        result += text[at++];
      }
    }
    return result;
  }
  return text;
}

/// Tokens that spell bytes as text, each run of them: whole UTF-8 as it is, any other run as one
/// U+FFFD for each byte.
inline std::vector<std::string> joined_bytes(const std::vector<std::string>& texts) {
  std::vector<std::string> result;
  std::string run;
  const auto end_run = [&] {
    if (run.empty()) return;
    if (!is_whole_utf8(run)) {
      std::string marks;
      for (std::size_t i = 0; i < run.size(); ++i) marks += kReplacementCharacter;
      run = std::move(marks);
    }
    result.push_back(std::move(run));
    run.clear();
  };
  for (const std::string& text : texts) {
    if (const int byte = byte_of_token(text); byte >= 0) {
      run += static_cast<char>(byte);
    } else {
      end_run();
      result.push_back(text);
    }
  }
  end_run();
  return result;
}

inline std::string joined_texts(const std::vector<std::string>& texts, std::string_view between) {
  std::string all;
  for (std::size_t i = 0; i < texts.size(); ++i) all.append(i > 0 ? between : "").append(texts[i]);
  return all;
}

/// The text of tokens. Without a step they are put together with spaces between.
inline std::string decoded(const std::vector<DecodeStep>& steps, std::vector<std::string> texts) {
  for (const DecodeStep& step : steps) {
    if (step.kind == DecodeStep::Kind::byte_fallback) {
      texts = joined_bytes(texts);
    } else if (step.kind == DecodeStep::Kind::fuse) {
      texts = {joined_texts(texts, "")};
    } else if (step.kind == DecodeStep::Kind::byte_level) {
      std::string bytes;
      for (const std::string& text : texts) ByteAlphabet::instance().decode(text, bytes);
      texts = {whole_utf8(bytes)};
    } else {
      for (std::size_t i = 0; i < texts.size(); ++i)
        texts[i] = decoded_one(step, std::move(texts[i]), i == 0);
    }
  }
  return joined_texts(texts, steps.empty() ? " " : "");
}

/// The same token by token. Steps up to the one that puts all texts together work on each token,
/// bytes gather until they are whole characters, and the steps after work on what comes out: a
/// pattern there does not see past the tokens that came at once.
class StreamDecoder {
 public:
  explicit StreamDecoder(const std::vector<DecodeStep>& steps) : steps_(&steps) {
    for (const DecodeStep& step : steps) left_to_strip_.push_back(step.start);
  }

  /// The text that is certain now that `text`, of one more token, has come.
  std::string push(std::string text) {
    bool is_bytes = false;
    std::size_t i = 0;
    for (; i < steps_->size(); ++i) {
      const DecodeStep& step = (*steps_)[i];
      if (step.kind == DecodeStep::Kind::fuse) break;
      if (step.kind == DecodeStep::Kind::byte_level) {
        std::string bytes;
        ByteAlphabet::instance().decode(text, bytes);
        text = std::move(bytes);
        is_bytes = true;
        break;
      }
      if (step.kind == DecodeStep::Kind::byte_fallback) {
        if (const int byte = byte_of_token(text); byte >= 0) {
          text.assign(1, static_cast<char>(byte));
          is_bytes = true;
        }
      } else if (!is_bytes) {
        text = decoded_one(step, std::move(text), is_first_);
      }
    }
    if (steps_->empty() && !is_first_) text.insert(0, " ");
    is_first_ = false;
    std::string out;
    if (!is_bytes) out = take_pending(true);  // no later byte completes it
    pending_ += text;
    return after_fuse(out + take_pending(!is_bytes), i + 1);
  }
  /// What is left at the end: a character that never became whole, as U+FFFD.
  std::string finish() {
    std::size_t i = 0;
    while (i < steps_->size() && (*steps_)[i].kind != DecodeStep::Kind::fuse &&
           (*steps_)[i].kind != DecodeStep::Kind::byte_level)
      ++i;
    return after_fuse(take_pending(true), i + 1);
  }

 private:
  /// Whole characters of what has come, U+FFFD for what is none, and all of it where it is `last`.
  std::string take_pending(bool last) {
    std::string out;
    std::string_view rest = pending_;
    while (!rest.empty()) {
      const Utf8Front front = utf8_front(rest);
      if (front.may_continue && !last) break;
      out += front.whole ? rest.substr(0, front.bytes) : kReplacementCharacter;
      rest.remove_prefix(front.bytes);
    }
    pending_ = std::string(rest);
    return out;
  }
  std::string after_fuse(std::string text, std::size_t from) {
    for (std::size_t i = from; i < steps_->size(); ++i) {
      const DecodeStep& step = (*steps_)[i];
      if (step.kind != DecodeStep::Kind::strip) {
        text = decoded_one(step, std::move(text), false);
        continue;
      }
      std::size_t& left = left_to_strip_[i];
      while (left > 0 && !text.empty()) {
        if (step.text.empty() || !text.starts_with(step.text)) {
          left = 0;
        } else {
          text.erase(0, step.text.size());
          --left;
        }
      }
    }
    return text;
  }

  const std::vector<DecodeStep>* steps_;
  std::vector<std::size_t> left_to_strip_;
  std::string pending_;
  bool is_first_ = true;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
