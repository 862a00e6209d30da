// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh. The input is a list of changes to a
// good model, of experts or of blocks, which is then loaded: what is accepted must serve.
#include <eigenformer/decoder.h>
#include <eigenformer/model/model_source.h>

#include <cstring>

#include "../model/expert_files.h"
#include "../model/packed_models.h"
#include "odd_values.h"

namespace {

using namespace eigenformer_test;

const Eigen::DefaultDevice kHere;

/// A GGUF file, or with a configuration a safetensors file.
struct Model {
  std::string file;
  nlohmann::json config = {};
};

/// Blocks of any bits with scales of a size that models have.
std::string blocks_of(std::uint32_t type, std::uint64_t elements) {
  const auto format = ef::detail::gguf_format(type);
  const ef::StoredLayout layout = ef::layout_of(*format);
  std::minstd_rand random(type + 1);
  std::string bytes(elements / static_cast<std::uint64_t>(layout.block_elements) *
                        static_cast<std::uint64_t>(layout.block_bytes),
                    0);
  for (char& byte : bytes) byte = static_cast<char>(random() >> 8);
  const ef::half scale(1.0f / 256);
  for (std::size_t at = 0; at < bytes.size(); at += static_cast<std::size_t>(layout.block_bytes)) {
    char* const block = bytes.data() + at;
    if (*format == ef::StoredFormat::mxfp4) {
      block[0] = 120;
      continue;
    }
    std::memcpy(block + (*format == ef::StoredFormat::q6_k ? 208 : 0), &scale, 2);
    if (*format == ef::StoredFormat::q4_1 || *format == ef::StoredFormat::q4_k ||
        *format == ef::StoredFormat::q5_1 || *format == ef::StoredFormat::q5_k)
      std::memcpy(block + 2, &scale, 2);
  }
  return bytes;
}

/// A llama of 32 features and 256 hidden ones, its matrices in blocks of every kind.
std::string llama_of_blocks(bool experts) {
  constexpr std::uint64_t d = 32, hidden = 256, count = 3;
  constexpr std::uint32_t q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q4_k = 12, mxfp4 = 39;
  GgufWriter writer;
  writer.text("general.architecture", "llama");
  for (const auto& [key, value] : {std::pair<const char*, std::uint32_t>{"block_count", 1},
                                   {"context_length", 64},
                                   {"embedding_length", d},
                                   {"feed_forward_length", hidden},
                                   {"attention.head_count", 4},
                                   {"attention.head_count_kv", 2}})
    writer.integer(std::string("llama.") + key, value);
  if (experts) {
    writer.integer("llama.expert_count", count);
    writer.integer("llama.expert_used_count", 2);
  }
  writer.value("llama.attention.layer_norm_rms_epsilon", {"float32", 1e-6});
  write_vocabulary(writer);
  for (const char* const norm : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
    writer.tensor(std::string(norm) + ".weight", {d}, std::vector<float>(d, 1));
  const auto put = [&](const std::string& name, std::vector<std::uint64_t> shape,
                       std::uint32_t type) {
    std::uint64_t elements = 1;
    for (const std::uint64_t size : shape) elements *= size;
    writer.tensor(name + ".weight", shape, type, blocks_of(type, elements));
  };
  put("output", {d, d}, q5_1);
  put("token_embd", {d, d}, q5_0);
  put("blk.0.attn_q", {d, d}, q4_0);
  put("blk.0.attn_k", {d / 2, d}, q4_1);
  put("blk.0.attn_v", {d / 2, d}, q4_0);
  put("blk.0.attn_output", {d, d}, q8_0);
  if (experts) {
    writer.tensor("blk.0.ffn_gate_inp.weight", {count, d}, std::vector<float>(count * d, .1f));
    put("blk.0.ffn_gate_exps", {count, hidden, d}, q4_0);
    put("blk.0.ffn_up_exps", {count, hidden, d}, q4_1);
    put("blk.0.ffn_down_exps", {count, d, hidden}, q4_k);
  } else {
    put("blk.0.ffn_gate", {hidden, d}, mxfp4);
    put("blk.0.ffn_up", {hidden, d}, q4_0);
    put("blk.0.ffn_down", {d, hidden}, q4_k);
  }
  return writer.file();
}

std::string safetensors_of(const FileTensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", ef::layout_of(tensor.format).name},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  const std::string text = header.dump();
  const std::uint64_t size = text.size();
  return std::string(reinterpret_cast<const char*>(&size), 8) + text + data;
}

const std::vector<Model>& good_models() {
  static const std::vector<Model> all = [] {
    std::vector<Model> made{{llama_of_blocks(false)}, {llama_of_blocks(true)}};
    const auto models = golden_file("models.json"), files = golden_file("gguf_models.json");
    for (const char* const name : {"mixtral", "qwen3_moe", "gpt_oss"})
      made.push_back({gguf_of(files.at(name), models.at(files.at(name).at("model")))});
    for (const char* const name : {"mixtral", "qwen2_moe", "qwen3_moe", "gpt2"}) {
      FileTensors tensors;
      for (const auto& tensor : models.at(name).at("tensors")) {
        const auto shape = tensor[1].get<std::vector<std::int64_t>>();
        const auto own = tensor[0].get<std::string>();
        tensors[own] = FileTensor::of<ef::bfloat16>(shape, golden_values(own, shape));
      }
      made.push_back({safetensors_of(tensors), models.at(name).at("config")});
    }
    for (const bool mxfp4 : {false, true}) {
      auto config = models.at("gpt_oss").at("config");
      config["hidden_size"] = config["intermediate_size"] = 32;
      made.push_back({safetensors_of(gpt_oss_tensors(models.at("gpt_oss"), mxfp4)), config});
    }
    return made;
  }();
  return all;
}

void serve(const ef::ModelConfig& config, const ef::StoredTensors& tensors,
           const ef::WeightStorage& storage) {
  const auto weights = ef::detail::load_weights<float>(kHere, config, tensors, nullptr, storage, {},
                                                       std::span<const ef::MappedFile>());
  ef::Decoder<float> decoder(weights, kHere);
  ef::KvCache<float> cache;
  ef::Tensor<std::int32_t, 2> ids(1, 3);
  ids.setValues({{0, 1, 0}});
  decoder.prefill(ids, cache);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  constexpr ef::WeightStorage storages[] = {ef::WeightFormat::as_stored, ef::WeightFormat::int8,
                                            ef::WeightFormat::int4, ef::WeightFormat::activation};
  Model model = good_models()[data[0] % good_models().size()];
  const ef::WeightStorage& storage = storages[data[1] % 4];
  for (std::size_t at = 2; at + 10 <= size; at += 10) {
    std::uint16_t place = 0;
    std::memcpy(&place, data + at, 2);
    if (!model.config.is_null() && place % 4 == 0) {
      auto key = model.config.begin();
      std::advance(key, place / 4 % model.config.size());
      *key = odd_value(data[at + 2]);
    } else if (place * std::size_t{2} + 8 <= model.file.size()) {
      std::memcpy(model.file.data() + place * std::size_t{2}, data + at + 2, 1 + data[at + 9] % 8);
    }
  }
  const Page page(model.file);
  try {
    if (model.config.is_null()) {
      auto contents = ef::detail::parse_gguf(page.bytes(), "f");
      const ef::StoredTensors tensors("f", std::move(contents.tensors));
      serve(ef::detail::GgufFamilyReader(contents.metadata, tensors, {}).read(), tensors, storage);
    } else {
      const ef::StoredTensors tensors("f",
                                      ef::detail::parse_safetensors(page.bytes(), "f").tensors);
      serve(ef::parse_model_config(model.config.dump(), "f"), tensors, storage);
    }
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
