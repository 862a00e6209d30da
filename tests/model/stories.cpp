// A trained Llama in both forms: the two readers see the same weights.
#include <eigenformer/model/dequantize.h>
#include <eigenformer/model/gguf.h>
#include <eigenformer/model/safetensors.h>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

std::vector<float> values_of(const ef::StoredTensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.rows() * tensor.columns()));
  ef::dequantize_rows(tensor, 0, values);
  return values;
}

/// GGUF has the two halves of a rotated head interleaved: row 2 i + h is row i of half h.
std::vector<float> interleaved(const std::vector<float>& rows, std::size_t columns,
                               std::size_t head_dim) {
  std::vector<float> result(rows.size());
  for (std::size_t row = 0; row < rows.size() / columns; ++row) {
    const std::size_t head = row / head_dim, i = row % head_dim;
    const std::size_t from = head * head_dim + i % 2 * (head_dim / 2) + i / 2;
    std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(from * columns), columns,
                result.begin() + static_cast<std::ptrdiff_t>(row * columns));
  }
  return result;
}

TEST(Stories, BothFormsHoldTheSameWeights) {
  const auto folder = shared_model("stories260K");
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "there is no " << folder;
  const ef::Safetensors safetensors(folder);
  const ef::Gguf gguf(folder / "model.gguf");
  const auto& metadata = gguf.metadata();
  EXPECT_EQ(metadata.text("general.architecture"), "llama");
  EXPECT_EQ(metadata.texts("tokenizer.ggml.tokens").size(), 512u);
  EXPECT_EQ(metadata.texts("tokenizer.ggml.tokens")[1], "<s>");
  EXPECT_EQ(metadata.numbers("tokenizer.ggml.scores").size(), 512u);
  const auto layers = metadata.integer("llama.block_count");
  const auto head_dim = static_cast<std::size_t>(metadata.integer("llama.rope.dimension_count"));

  std::vector<std::pair<std::string, std::string>> names{
      {"token_embd.weight", "model.embed_tokens.weight"},
      {"output_norm.weight", "model.norm.weight"}};
  for (std::int64_t layer = 0; layer < layers; ++layer)
    for (const auto& [here, there] :
         {std::pair{"attn_norm", "input_layernorm"}, std::pair{"attn_q", "self_attn.q_proj"},
          std::pair{"attn_k", "self_attn.k_proj"}, std::pair{"attn_v", "self_attn.v_proj"},
          std::pair{"attn_output", "self_attn.o_proj"},
          std::pair{"ffn_norm", "post_attention_layernorm"}, std::pair{"ffn_gate", "mlp.gate_proj"},
          std::pair{"ffn_up", "mlp.up_proj"}, std::pair{"ffn_down", "mlp.down_proj"}})
      names.push_back({"blk." + std::to_string(layer) + "." + here + ".weight",
                       "model.layers." + std::to_string(layer) + "." + there + ".weight"});
  EXPECT_EQ(names.size(), gguf.tensors().map().size());
  EXPECT_EQ(names.size(), safetensors.tensors().map().size());
  for (const auto& [here, there] : names) {
    const auto& tensor = safetensors.tensors().at(there);
    auto expected = values_of(tensor);
    if (here.ends_with("attn_q.weight") || here.ends_with("attn_k.weight"))
      expected = interleaved(expected, static_cast<std::size_t>(tensor.columns()), head_dim);
    EXPECT_TRUE(values_of(gguf.tensors().at(here, tensor.shape)) == expected) << here;
  }
}

}  // namespace
