/// \file
/// The steps around the model of a tokenizer.json: normalizers, pre-tokenizers, post-processors and
/// decoders, each a "type" with members of its own, or a Sequence of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "decoder.h"
#include "json_value.h"
#include "pieces.h"
#include "regex.h"
#include "unicode.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Calls read(part) for each part of a Sequence; false: it is none.
template <typename Read>
bool each_of_sequence(const JsonValue& step, const char* parts, Read&& read) {
  if (step.type() != "Sequence") return false;
  const JsonValue list = step[parts];
  for (std::size_t i = 0; i < list.size(); ++i) read(list.at(i));
  return true;
}
[[noreturn]] inline void refuse_type(const JsonValue& step) {
  step.refuse("is of type " + printable(step.type()) + ", which is not supported");
}

/// {"String": ...} or {"Regex": ...}
inline Regex read_pattern(const JsonValue& pattern) {
  if (pattern.has("Regex")) return Regex(pattern["Regex"].text(), pattern.file());
  const std::string& text = pattern["String"].text();
  if (text.empty()) pattern["String"].refuse("is empty");
  return Regex(quoted_pattern(text), pattern.file(), true);
}

inline void read_normalizer(const JsonValue& step, std::vector<Normalizer>& to) {
  if (each_of_sequence(step, "normalizers",
                       [&](const JsonValue& part) { read_normalizer(part, to); }))
    return;
  const std::string& type = step.type();
  const auto replace = [&](std::string_view pattern, std::string content) {
    to.push_back([regex = Regex(pattern, step.file()), content](std::string text) {
      return regex.replace(text, content);
    });
  };
  constexpr std::string_view kForms[] = {"NFD", "NFC", "NFKD", "NFKC"};
  if (const auto at = std::ranges::find(kForms, type); at != std::end(kForms)) {
    const auto form = static_cast<NormalForm>(at - std::begin(kForms));
    to.push_back([form](std::string text) { return normalized(text, form); });
  } else if (type == "Nmt") {  // as SentencePiece cleans text for translation
    replace(R"([\x01-\x08\x0B\x0E-\x1F\x7F\x{8F}\x{9F}])", "");
    replace(R"([\t\n\f\r\x{1680}\x{200B}-\x{200F}\x{2028}\x{2029}\x{2581}\x{FEFF}\x{FFFD}])", " ");
  } else if (type == "StripAccents") {
    replace(R"(\p{M})", "");
  } else if (type == "Lowercase") {
    to.push_back([](std::string text) { return lowercase(text); });
  } else if (type == "Prepend") {
    to.push_back([front = step["prepend"].text()](std::string text) {
      return text.empty() ? text : front + text;
    });
  } else if (type == "Replace") {
    to.push_back([pattern = read_pattern(step["pattern"]), content = step["content"].text()](
                     std::string text) { return pattern.replace(text, content); });
  } else if (type == "Strip") {
    std::string pattern = step.flag("strip_left", true) ? R"(\A\s+)" : "";
    if (step.flag("strip_right", true)) pattern += pattern.empty() ? R"(\s++\z)" : R"(|\s++\z)";
    if (!pattern.empty()) replace(pattern, "");
  } else if (type == "ByteLevel") {
    to.push_back([](std::string text) { return ByteAlphabet::instance().encode(text); });
  } else {
    refuse_type(step);
  }
}

inline SplitBehavior read_behavior(const JsonValue& step) {
  const auto behavior = split_behavior(step["behavior"].text());
  if (!behavior) step["behavior"].refuse("is not known");
  return *behavior;
}

inline Splitter read_metaspace(const JsonValue& step) {
  const std::string scheme = step.text("prepend_scheme", "always");
  PrependScheme prepend = scheme == "always"  ? PrependScheme::always
                          : scheme == "first" ? PrependScheme::first
                                              : PrependScheme::never;
  if (prepend == PrependScheme::never && scheme != "never")
    step["prepend_scheme"].refuse("is not always, first or never");
  if (!step.flag("add_prefix_space", true)) prepend = PrependScheme::never;
  const std::string& mark = step["replacement"].text();
  if (mark.empty() || character_bytes(mark) != mark.size())
    step["replacement"].refuse("is not one character");
  return metaspace_splitter(mark, prepend, step.flag("split", true), step.file());
}

inline void read_splitter(const JsonValue& step, std::vector<Splitter>& to) {
  if (each_of_sequence(step, "pretokenizers",
                       [&](const JsonValue& part) { read_splitter(part, to); }))
    return;
  constexpr std::string_view kPunctuation = R"([!-/:-@\[-`{-~\p{P}])";
  const std::string& type = step.type();
  const auto add = [&](std::string_view pattern, SplitBehavior behavior) {
    to.push_back(splitter(Regex(pattern, step.file()), behavior));
  };
  if (type == "ByteLevel") {
    if (step.flag("add_prefix_space", true)) to.push_back(space_prepender());
    if (step.flag("use_regex", true)) add(kGpt2Pattern, SplitBehavior::isolated);
    to.push_back(to_byte_alphabet());
  } else if (type == "Split") {
    to.push_back(
        splitter(read_pattern(step["pattern"]), read_behavior(step), step.flag("invert", false)));
  } else if (type == "Digits") {
    add(R"(\p{N})", step.flag("individual_digits", false) ? SplitBehavior::isolated
                                                          : SplitBehavior::contiguous);
  } else if (type == "Metaspace") {
    to.push_back(read_metaspace(step));
  } else if (type == "Whitespace") {
    const std::string word(kUnicodeWord), space(kWhiteSpace);
    to.push_back(splitter(Regex("[" + word + "]+|[^" + word + space + "]+", step.file(), true),
                          SplitBehavior::removed, true));
  } else if (type == "WhitespaceSplit") {
    add(R"(\s)", SplitBehavior::removed);
  } else if (type == "Punctuation") {
    add(kPunctuation, step.has("behavior") ? read_behavior(step) : SplitBehavior::isolated);
  } else if (type == "BertPreTokenizer") {
    add(R"(\s)", SplitBehavior::removed);
    add(kPunctuation, SplitBehavior::isolated);
  } else {
    refuse_type(step);
  }
}

/// Ids that a special token of a template stands for.
inline void read_special(const JsonValue& name, const JsonValue& specials,
                         const Vocabulary& vocabulary, std::vector<std::int32_t>& to) {
  const JsonValue ids = specials[name.text().c_str()]["ids"];
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = ids.at(i).integer();
    if (!vocabulary.has(id)) ids.at(i).refuse("is the id of no token");
    to.push_back(static_cast<std::int32_t>(id));
  }
}

/// Ids to put before and after a text. Those of a later step of a Sequence stand outside.
inline void read_post_processor(const JsonValue& step, const Vocabulary& vocabulary,
                                std::vector<std::int32_t>& before,
                                std::vector<std::int32_t>& after) {
  if (each_of_sequence(step, "processors", [&](const JsonValue& part) {
        read_post_processor(part, vocabulary, before, after);
      }))
    return;
  const std::string& type = step.type();
  std::vector<std::int32_t> front;
  if (type == "TemplateProcessing") {
    const JsonValue single = step["single"];
    bool past_text = false;
    for (std::size_t i = 0; i < single.size(); ++i) {
      const JsonValue part = single.at(i);
      if (part.has("SpecialToken")) {
        read_special(part["SpecialToken"]["id"], step["special_tokens"], vocabulary,
                     past_text ? after : front);
      } else {
        if (past_text || part["Sequence"]["id"].text() != "A")
          part.refuse("is not the one place of the text");
        past_text = true;
      }
    }
    if (!past_text) single.refuse("has no place for the text");
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    for (const char* name : {"cls", "sep"}) {
      const JsonValue token = step[name];
      if (token.size() != 2 || !vocabulary.has(token.at(1).integer()))
        token.refuse("is not a token and its id");
      (name[0] == 'c' ? front : after).push_back(static_cast<std::int32_t>(token.at(1).integer()));
    }
  } else if (type != "ByteLevel") {
    refuse_type(step);
  }
  before.insert(before.begin(), front.begin(), front.end());
}

inline std::size_t read_count(const JsonValue& count) {
  constexpr std::int64_t kMost = 1 << 16;
  if (count.integer() < 0 || count.integer() > kMost)
    count.refuse("is not in [0, " + std::to_string(kMost) + "]");
  return static_cast<std::size_t>(count.integer());
}

inline void read_decoder(const JsonValue& step, std::vector<DecodeStep>& to) {
  if (each_of_sequence(step, "decoders", [&](const JsonValue& part) { read_decoder(part, to); }))
    return;
  using Kind = DecodeStep::Kind;
  const std::string& type = step.type();
  if (type == "ByteLevel") {
    to.push_back({.kind = Kind::byte_level});
  } else if (type == "ByteFallback") {
    to.push_back({.kind = Kind::byte_fallback});
  } else if (type == "Fuse") {
    to.push_back({.kind = Kind::fuse});
  } else if (type == "Metaspace") {
    read_metaspace(step);  // its checks
    const bool never =
        step.text("prepend_scheme", "always") == "never" || !step.flag("add_prefix_space", true);
    to.push_back({.kind = Kind::metaspace,
                  .text = step["replacement"].text(),
                  .start = never ? std::size_t{0} : std::size_t{1}});
  } else if (type == "Replace") {
    to.push_back({.kind = Kind::replace,
                  .content = step["content"].text(),
                  .pattern = read_pattern(step["pattern"])});
  } else if (type == "Strip") {
    to.push_back({.kind = Kind::strip,
                  .text = step["content"].text(),
                  .start = read_count(step["start"]),
                  .stop = read_count(step["stop"])});
  } else {
    refuse_type(step);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
