// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/gguf_families.h>

#include "model_files.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  try {
    const auto contents = ef::detail::parse_gguf(std::as_bytes(std::span(data, size)), "f");
    eigenformer_test::read_all(contents.tensors);
    for (const auto& [key, value] : contents.metadata.map()) {
      try {
        contents.metadata.elements(key);
        contents.metadata.texts(key);
        contents.metadata.numbers(key);
      } catch (const ef::ModelFileError&) {
      }
    }
    const ef::StoredTensors tensors("f", contents.tensors);
    ef::detail::GgufFamilyReader(contents.metadata, tensors, {}).read();
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
