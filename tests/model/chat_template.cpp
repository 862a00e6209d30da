// Chat templates: what transformers makes of them (golden/make_chat_templates.py), and that none of
// them can do harm.
#include <eigenformer/model/chat_template.h>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

using Json = nlohmann::ordered_json;

const Json& golden() {
  static const Json all = [] {
    const ef::MappedFile file(EIGENFORMER_GOLDEN_DIR "/chat_templates.json");
    return Json::parse(text_of(file.bytes()));
  }();
  return all;
}
std::string rendered(const std::string& source, const Json& variables = Json::object()) {
  return ef::ChatTemplate(source, "f").render(Json::array(), {.variables = variables});
}
void refuses(const std::string& source, const std::string& why) {
  SCOPED_TRACE(source.substr(0, 200));
  expect_throws<ef::ModelFileError>([&] { rendered(source); }, {"f: chat template", why});
}

TEST(ChatTemplate, GivesTheTextOfTransformers) {
  int errors = 0;
  for (const Json& one : golden()["cases"]) {
    SCOPED_TRACE(one["name"].get<std::string>() + one["messages"].dump());
    const std::string& source = golden()["templates"][one["template"].get<std::size_t>()];
    ef::ChatOptions options{.variables = {{"bos_token", "<s>"}, {"eos_token", "</s>"}}};
    options.variables.update(one["variables"]);
    const auto render = [&] {
      return ef::ChatTemplate(source, "f").render(one["messages"], options);
    };
    if (one.contains("text")) {
      EXPECT_EQ(render(), one["text"].get<std::string>());
    } else {
      EXPECT_ANY_THROW(render());
      ++errors;
    }
  }
  EXPECT_LT(errors, 12);
}

TEST(ChatTemplate, ServesATokenizer) {
  const Folder folder;
  folder.write("tokenizer.json", R"({"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]},
    "added_tokens":[{"id":2,"content":"<s>","special":true},
                    {"id":3,"content":"</s>","special":true}]})");
  const std::vector<ef::ChatMessage> chat = {{"user", "ab"}, {"assistant", "b"}};
  expect_throws<std::invalid_argument>(
      [&] { ef::render_chat(ef::Tokenizer::from_folder(folder.path()), chat); },
      {"render_chat: the tokenizer has no chat template"});
  folder.write("tokenizer_config.json",
               R"({"bos_token":"<s>","eos_token":"</s>","chat_template":"{{ bos_token }})"
               R"({% for m in messages %}{{ m.content + eos_token }}{% endfor %})"
               R"({% if add_generation_prompt %}a{% endif %}{{ more }}"})");
  const ef::Tokenizer tokenizer = ef::Tokenizer::from_folder(folder.path());
  EXPECT_EQ(ef::render_chat(tokenizer, chat), "<s>ab</s>b</s>a");
  EXPECT_EQ(ef::render_chat(tokenizer, chat,
                            {.add_generation_prompt = false, .variables = {{"more", "bb"}}}),
            "<s>ab</s>b</s>bb");
  EXPECT_EQ(ef::encode_chat(tokenizer, chat), (std::vector<std::int32_t>{2, 0, 1, 3, 1, 3, 0}));
}

TEST(ChatTemplate, TellsTheDate) {
  const ef::ChatTemplate dated("{{ strftime_now('%d %b %Y, %H:%M:%S, %a, %j') }}");
  EXPECT_EQ(dated.render(Json::array(), {.now = 1795737599}), "26 Nov 2026, 23:59:59, Thu, 330");
  EXPECT_EQ(dated.render(Json::array(), {.now = 951782400}), "29 Feb 2000, 00:00:00, Tue, 060");
  refuses("{{ strftime_now('%Q') }}", "has a format of dates that is not supported");
  refuses("{{ strftime_now('%') }}", "has a format of dates that is not supported");
}

TEST(ChatTemplate, RefusesByNameAndLine) {
  refuses("\n\n{% include 'x' %}", "line 3: uses include, which is not supported");
  refuses("{{ 1\n  | shuffle }}", "line 2: uses the filter shuffle, which is not supported");
  refuses("{{ 1 is prime }}", "line 1: uses the test prime");
  refuses("{{ 'a'.encode() }}", "calls encode of a text, which is not supported");
  refuses("{{ nothing() }}", "calls nothing, which is undefined");
  refuses("{{ nothing.at.all }}", "asks something undefined for a member");
  refuses("{% if 1 %}", "has a block without an end");
  refuses("{% endif %}", "uses endif");
  refuses("{{ 1", "has a tag without an end");
  refuses("{{ ) }}", "needs a value here");
  refuses("{{ 1 2 }}", "needs \"}}\" here");
  refuses("{{ 'a }}", "has a string without an end");
  refuses("{# a", "has a comment without an end");
  refuses("{{ ? }}", "has a character that begins no word");
  refuses("{{ 1 + 'a' }}", "has values on the sides of +");
  refuses("{{ 1 // 0 }}", "divides by 0");
  refuses("{{ 1 / 0 }}", "divides by 0");
  refuses("{{ 4000000000 * 4000000000 }}", "counts with integers that are too large");
  refuses("{{ 12345678901234567890 }}", "has a number that is too long");
  refuses("{% for i in 5 %}{% endfor %}", "goes over what is no list");
  refuses("{% break %}", "leaves a loop outside of one");
  refuses("{% set a.b = 1 %}", "sets a member of what is no namespace");
  expect_throws<std::invalid_argument>([] { rendered("{{ raise_exception('no ' ~ 1) }}"); },
                                       {"chat template: no 1"});
  expect_throws<std::invalid_argument>([] { rendered("a", Json::array()); },
                                       {"variables are no object"});
}

TEST(ChatTemplate, BoundsDepthWorkAndMemory) {
  const auto many = [](const std::string& text, int count) {
    std::string all;
    for (int i = 0; i < count; ++i) all += text;
    return all;
  };
  for (const auto& [open, close] : {std::pair{"(", ")"},
                                    {"[", "]"},
                                    {"not ", ""},
                                    {"-", ""},
                                    {"{'a':", "}"},
                                    {"1 if 1 else ", ""},
                                    {"x(", ")"},
                                    {"x[", "]"}})
    refuses("{{ " + many(open, 50000) + "1" + many(close, 50000) + " }}", "nests too deep");
  for (const char* next : {"1 + ", "1 ~ ", "a.", "1 if 1 else ", "1 and "})
    refuses("{{ " + many(next, 100000) + "1 }}", "");
  refuses("{{ 1" + many("|abs", 100000) + " }}", "nests too deep");
  refuses(many("{% if 1 %}", 50000), "nests too deep");
  refuses("{% if 1 %}" + many("{% elif 1 %}", 50000), "nests too deep");
  refuses(std::string(2000000, 'a'), "has more than 1048576 bytes");
  const std::string loops = many("{% for i in range(1000) %}", 5) + "x" + many("{% endfor %}", 5);
  refuses(loops, "takes too much work");
  refuses("{{ range(1000000) }}", "has a range that is too large");
  refuses(
      "{% set ns = namespace(x='aaaa') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% "
      "endfor %}",
      "makes a text that is too long");
  refuses(
      "{% set ns = namespace(x=[1]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor "
      "%}",
      "makes a list that is too deep");
  refuses(
      "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% "
      "endfor %}{{ ns.x }}",
      "takes too much work");
  refuses(
      "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% "
      "endfor %}{{ ns.x == ns.x }}",
      "takes too much work");
  refuses("{% set ns = namespace() %}{% set ns.x = ns %}", "puts a namespace into another");
  refuses("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls macros too deep");
  refuses("{{ ('x' * 10000)|replace('x', 'y' * 10000) }}", "makes a text that is too long");
  refuses("{{ [1]|tojson(indent=1000000) }}", "indents by too much");
}

TEST(ChatTemplate, DamagedTemplatesAreRunOrRefused) {
  std::mt19937 random(9);
  const Json chat = golden()["cases"][1]["messages"];
  for (int round = 0; round < 4000; ++round) {
    const auto& sources = golden()["templates"];
    std::string text = sources[random() % sources.size()];
    if (text.empty()) continue;
    for (unsigned n = 1 + random() % 4; n > 0; --n) {
      const std::size_t at = random() % text.size();
      const std::size_t count = (std::min)(std::size_t{1 + random() % 20}, text.size() - at);
      if (random() % 2 == 0)
        text.insert(at, text, random() % text.size(), count);
      else if (text.size() > count)
        text.erase(at, count);
    }
    try {
      ef::ChatTemplate(text).render(chat);
    } catch (const ef::ModelFileError&) {
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace
