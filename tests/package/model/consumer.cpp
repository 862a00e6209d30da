// A user of the component `model`: writes a file and reads it.
#include <eigenformer/model/dequantize.h>
#include <eigenformer/model/gguf.h>
#include <eigenformer/model/safetensors.h>

#include <cstdio>
#include <filesystem>
#include <vector>

namespace ef = eigenformer;

int main() {
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  const std::vector<ef::StoredTensor> tensors{
      {"weight", ef::StoredFormat::f32, {2, 3}, std::as_bytes(std::span(values))}};
  const auto path = std::filesystem::temp_directory_path() / "eigenformer_consumer.safetensors";
  ef::write_safetensors(path, tensors);
  const ef::Safetensors file(path);
  std::vector<float> row(3);
  ef::dequantize_rows(file.tensors().at("weight"), 1, row);
  try {
    ef::Gguf gguf(path);
  } catch (const ef::ModelFileError& error) {
    std::puts(error.what());
    return row == std::vector<float>{4, 5, 6} ? 0 : 1;
  }
  return 1;
}
