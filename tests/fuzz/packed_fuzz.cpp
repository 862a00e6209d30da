// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh. The input is a list of changes to a
// good file, whose checksum is then made to agree: without that nothing would pass it.
#include <eigenformer/model/packed_file.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "../model/packed_models.h"

namespace {

using namespace eigenformer_test;

const Eigen::DefaultDevice kHere;

const std::string& good_file(std::size_t form) {
  static const std::vector<std::string> files = [] {
    std::vector<std::string> made;
    const auto path = std::filesystem::temp_directory_path() /
                      ("packed_fuzz_" + std::to_string(std::random_device{}()));
    for (const ef::DecoderForm& one : packed_forms()) {
      ef::write_packed_weights(*packed_model<float>(kPackedConfig, ef::WeightFormat::int8, one),
                               path, "key");
      std::ifstream stream(path, std::ios::binary);
      made.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    }
    std::filesystem::remove(path);
    return made;
  }();
  return files[form];
}

template <typename X>
void touch(const ef::detail::PackedArray<X>& x) {
  volatile unsigned char sum = 0;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.size()) * sizeof(X); ++i)
    sum = static_cast<unsigned char>(sum + bytes[i]);
}

/// Reads all that was found.
struct Touch {
  void vector(const ef::detail::PackedArray<float>& x, ef::Index) { touch(x); }
  void numbers(const std::vector<float>&, ef::Index) {}
  template <typename Matrix>
  void matrix(const Matrix& matrix, ef::Index, ef::Index) {
    std::visit(
        [](const auto& shard) {
          touch(ef::detail::PanelAccess::values(ef::detail::panels_of(shard)));
          touch(ef::detail::PanelAccess::scales(ef::detail::panels_of(shard)));
        },
        matrix);
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
                 {&stack.down[e], fused ? &stack.gate_up[e].pair() : &stack.up[e]}) {
              touch(ef::detail::PanelAccess::values(*weight));
              touch(ef::detail::PanelAccess::scales(*weight));
            }
        },
        experts);
  }
  template <typename Embedding, typename Owner>
  void embedding(const Embedding& embedding, const Owner&, ef::Index, ef::Index) {
    std::visit(
        []<typename Table>(const Table& table) {
          if constexpr (ef::rank_of<Table> == 2)
            touch(ef::detail::PackedArray<ef::scalar_of<Table>>::view(table.data(), table.size(),
                                                                      nullptr));
        },
        embedding);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::size_t form = data[0] % packed_forms().size();
  const bool agrees = data[1] % 8 != 0;
  std::string file = good_file(form);
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
  std::uint64_t head = 0;
  if (file.size() >= 56) std::memcpy(&head, file.data() + 24, 8);
  if (agrees && head >= 8 && head <= file.size()) {
    const auto sum = ef::detail::PagedChecksum::of(file.data(), head - 8);
    std::memcpy(file.data() + head - 8, &sum, 8);
  }
  try {
    const auto page = std::make_shared<const Page>(file);
    const auto found = ef::detail::find_packed_weights<float>(
        kHere, page->bytes(), "f", page, "key", kPackedConfig, ef::WeightFormat::int8,
        packed_forms()[form]);
    Touch visit;
    if (found != nullptr) ef::detail::PackedParts::all(*found, visit);
  } catch (const ef::ModelFileError&) {
  } catch (const std::logic_error&) {  // read_packed_weights says it as a ModelFileError
  }
  return 0;
}
