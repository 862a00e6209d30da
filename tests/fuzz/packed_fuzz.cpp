// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh. The input is a list of changes to a
// good file, whose checksums are then made to agree: without that nothing would pass them.
#include <eigenformer/model/packed_model.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "../model/gguf_writer.h"
#include "../model/packed_models.h"

namespace {

using namespace eigenformer_test;

const Eigen::DefaultDevice kHere;

/// What the files of a whole model say besides its weights: a folder's.
struct FolderTexts {
  template <typename F>
  void each_text(F&& f) const {
    f("config.json", R"({"model_type": "llama", "vocab_size": 37, "hidden_size": 40,
      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
      "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": false})");
    f("tokenizer.json", R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
      "merges": ["a b"]}, "added_tokens": [{"id": 3, "content": "<s>", "special": true}]})");
    f("chat_template.jinja", "{{ bos_token }}");
  }
};
/// A GGUF file's.
struct GgufTexts {
  template <typename F>
  void each_text(F&& f) const {
    GgufWriter writer;
    writer.text("general.architecture", "llama");
    for (const auto& [name, value] : {std::pair{"block_count", 2},
                                      {"embedding_length", 40},
                                      {"attention.head_count", 4},
                                      {"attention.head_count_kv", 2},
                                      {"attention.key_length", 10},
                                      {"feed_forward_length", 48}})
      writer.integer(std::string("llama.") + name, static_cast<std::uint32_t>(value));
    writer.text("tokenizer.ggml.model", "gpt2");
    writer.text("tokenizer.ggml.pre", "gpt-2");
    writer.texts("tokenizer.ggml.tokens", {"a", "b", "ab"});
    writer.texts("tokenizer.ggml.merges", {"a b"});
    for (const auto& [name, rows] : {std::pair{"token_embd.weight", 37}, {"output.weight", 37}})
      writer.tensor(name, {static_cast<std::uint64_t>(rows), 0}, std::vector<float>());
    writer.tensor("rope_freqs.weight", {5}, std::vector<float>(5, 1.0f));
    f("model.gguf", writer.file());
  }
};

constexpr ef::WeightStorage kStorages[] = {
    ef::WeightFormat::int8, ef::WeightFormat::int4, {ef::WeightFormat::int8, 32}};
constexpr ef::StoredFormat kEmbeddings[] = {ef::StoredFormat::i8, ef::StoredFormat::bf16};

/// In each of these packed weights of each form, then whole models.
const std::vector<std::string>& good_files() {
  static const std::vector<std::string> files = [] {
    std::vector<std::string> made;
    const auto path = std::filesystem::temp_directory_path() /
                      ("packed_fuzz_" + std::to_string(std::random_device{}()));
    const std::vector<std::byte> bytes(2 * 37 * 40, std::byte{5});
    const auto keep = [&] {
      std::ifstream stream(path, std::ios::binary);
      made.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    };
    for (const ef::WeightStorage& storage : kStorages)
      for (const ef::DecoderForm& one : packed_forms()) {
        const auto model = packed_model<float>(kPackedConfig, storage, one);
        const auto format = kEmbeddings[made.size() % 2];
        if (storage.format == ef::WeightFormat::int4)
          model->set_embedding(ef::detail::encoded_embedding(format, bytes.data(), 37, 40),
                               nullptr);
        ef::write_packed_weights(*model, path, "key");
        keep();
      }
    const auto llama = packed_model<float>(kPackedConfig, ef::WeightFormat::int8, {});
    ef::detail::write_packed_model(kHere, *llama, FolderTexts(), path);
    keep();
    ef::detail::write_packed_model(kHere, *llama, GgufTexts(), path);
    keep();
    std::filesystem::remove(path);
    return made;
  }();
  return files;
}

template <typename X>
void touch(const ef::detail::PackedArray<X>& x) {
  volatile unsigned char sum = 0;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.size()) * sizeof(X); ++i)
    sum = static_cast<unsigned char>(sum + bytes[i]);
}

template <typename S>
void touch(const ef::PackedWeight<S>& weight) {
  touch(ef::detail::PanelAccess::values(weight));
  const auto& scales = ef::detail::PanelAccess::scales(weight);
  touch(scales);
  touch(ef::detail::PanelAccess::half_scales(weight));
  if (weight.minimums() != nullptr)
    touch(ef::detail::PackedArray<float>::view(weight.minimums(), scales.size(), nullptr));
}

/// Reads all that was found.
struct Touch {
  void vector(const ef::detail::PackedArray<float>& x, ef::Index) { touch(x); }
  void numbers(const std::vector<float>&, ef::Index) {}
  template <typename Matrix>
  void matrix(const Matrix& matrix, ef::Index, ef::Index) {
    std::visit([](const auto& shard) { touch(ef::detail::panels_of(shard)); }, matrix);
  }
  template <typename Matrix>
  void gated(const Matrix& pair, ef::Index out, ef::Index in) {
    matrix(pair, out, in);
  }
  template <typename Experts>
  void experts(const Experts& experts, ef::Index, ef::Index, ef::Index, bool fused) {
    std::visit(
        [&](const auto& stack) {
          for (std::size_t e = 0; e < stack.down.size(); ++e)
            for (const auto* weight :
                 {&stack.down[e], fused ? &stack.gate_up[e].pair() : &stack.up[e]})
              touch(*weight);
        },
        experts);
  }
  template <typename Embedding, typename Owner>
  void embedding(const Embedding& embedding, const Owner&, ef::Index, ef::Index) {
    std::visit(
        []<typename Table>(const Table& table) {
          if constexpr (std::is_same_v<Table, ef::EncodedEmbedding>) {
            std::vector<float> row(static_cast<std::size_t>(table.columns));
            for (ef::Index r = 0; r < table.rows; ++r) ef::detail::decode_row(table, r, row.data());
          }
          if constexpr (ef::rank_of<Table> == 2)
            touch(ef::detail::PackedArray<ef::scalar_of<Table>>::view(table.data(), table.size(),
                                                                      nullptr));
        },
        embedding);
  }
};

/// Sums of texts, whose numbers begin the list; then that of the head.
void mend_sums(std::string& file, bool whole_model) {
  std::uint64_t head = 0, key = 0;
  if (file.size() < 56) return;
  std::memcpy(&head, file.data() + 24, 8);
  std::memcpy(&key, file.data() + 32, 8);
  if (head < 64 || head > file.size() || key > head) return;
  const std::size_t data = (head + 4095) / 4096 * 4096, texts = ef::detail::kModelTexts.size();
  std::size_t at = 56 + (key + 7) / 8 * 8;
  for (std::size_t text = 0; whole_model && text < texts && at + 32 <= head; ++text) {
    std::int64_t numbers[3];
    std::memcpy(numbers, file.data() + at, sizeof(numbers));
    at += 8;
    if (numbers[0] != 1) continue;
    at += 24;
    const auto begin = static_cast<std::uint64_t>(numbers[1]),
               count = static_cast<std::uint64_t>(numbers[2]);
    if (data > file.size() || begin > file.size() - data || count > file.size() - data - begin)
      return;
    const auto sum = ef::detail::PagedChecksum::of(file.data() + data + begin, count);
    std::memcpy(file.data() + at - 8, &sum, 8);
  }
  const auto sum = ef::detail::PagedChecksum::of(file.data(), head - 8);
  std::memcpy(file.data() + head - 8, &sum, 8);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::size_t number = data[0] % good_files().size();
  const bool agrees = data[1] % 8 != 0;
  std::string file = good_files()[number];
  std::size_t at = 2;
  for (; at + 10 <= size; at += 10) {  // where, in units of a number, and what
    std::uint16_t place = 0;
    std::memcpy(&place, data + at, 2);
    const std::size_t begin = place * std::size_t{8};
    if (begin + 8 <= file.size()) std::memcpy(file.data() + begin, data + at + 2, 8);
  }
  if (at + 3 <= size) {
    std::uint32_t length = 0;
    std::memcpy(&length, data + at, 3);
    file.resize(std::min<std::size_t>(file.size(), length));
  }
  const std::size_t forms = packed_forms().size();
  const bool whole_model = number >= std::size(kStorages) * forms;
  if (agrees) mend_sums(file, whole_model);
  try {
    const auto page = std::make_shared<const Page>(file);
    Touch visit;
    if (whole_model) {
      const ef::detail::PackedModelFile model(page->bytes(), "f", page);
      model.read<float>(kHere, {}, [&](const auto&, const ef::Tokenizer& tokenizer, auto weights) {
        ef::detail::PackedParts::all(*weights, visit);
        return tokenizer.encode("ab <s>").size();
      });
      return 0;
    }
    const auto found = ef::detail::find_packed_weights<float>(
        kHere, page->bytes(), "f", page, "key", kPackedConfig, kStorages[number / forms],
        packed_forms()[number % forms]);
    if (found != nullptr) ef::detail::PackedParts::all(*found, visit);
  } catch (const ef::ModelFileError&) {
  } catch (const std::logic_error&) {  // read_packed_weights says it as a ModelFileError
  }
  return 0;
}
