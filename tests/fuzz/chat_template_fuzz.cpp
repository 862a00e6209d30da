// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/chat_template.h>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  const nlohmann::ordered_json chat = {{{"role", "user"}, {"content", " a\n\"b\" "}},
                                       {{"role", "assistant"},
                                        {"content", {{{"type", "text"}, {"text", "c"}}}},
                                        {"n", {1, 2.5, nullptr}}}};
  try {
    // Fuzzers find bytes that are no UTF-8; readers of files do not let them through.
    const std::string source = ef::detail::whole_utf8({reinterpret_cast<const char*>(data), size});
    ef::ChatTemplate(source).render(chat, {.now = 0});
  } catch (const ef::ModelFileError&) {
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
