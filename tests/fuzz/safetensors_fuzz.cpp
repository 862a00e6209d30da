// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/safetensors.h>

#include "model_files.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  const auto text = eigenformer_test::text_of(data, size);
  try {
    const auto contents = ef::detail::parse_safetensors(std::as_bytes(std::span(data, size)), "f");
    eigenformer_test::read_all(contents.tensors);
  } catch (const ef::ModelFileError&) {
  }
  try {
    ef::detail::parse_safetensors_index(text, "f");
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
