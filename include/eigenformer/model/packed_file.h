/// \file
/// Packed weights of a decoder as a file that is mapped and used where it lies: a program that
/// starts again packs nothing, and reads of the data what it uses.
///
///   ef::write_packed_weights(weights, "model.packed", key);
///   auto weights =
///       ef::read_packed_weights<float>(device, "model.packed", key, config, storage, form);
///
/// LoadOptions::cache of model.h does both; a file of a whole model (packed_model.h) has texts
/// before the weights. The file:
///
///   "EFPACKED" | order version head_bytes key_bytes numbers data_bytes | key | numbers
///   | checksum of all that | zeros up to a page | data
///
/// Numbers are 64 bits, in the byte order of the machine that wrote them, which `order` shows.
/// Those behind the key say for each part of the weights, in the order of decoder/packed_parts.h,
/// what it is; of an array, where it begins in the data and its elements. Large arrays begin at a
/// page, all at 64 bytes.
///
/// What lies in the data is packed for one ISA: the key, which is any text, says for which, and of
/// what; a file with another key is not that file. Nothing of the head is believed: sizes are those
/// that the configuration and the ISA say, or the file is refused. The data is not looked at: who
/// may write the file decides what the model says, and no more.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../decoder/packed_parts.h"
#include "../kv/paged_layers.h"
#include "mapped_file.h"
#include "written_file.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What stands before the data.
struct PackedHead {
  static constexpr std::string_view kMagic = "EFPACKED";
  static constexpr std::int64_t kOrder = 0x0102030405060708, kVersion = 2;
  static constexpr std::size_t kFixed = 7 * 8;  // magic, order, version and the four sizes
  static constexpr std::uint64_t kPage = 4096;

  std::string key;
  std::vector<std::int64_t> numbers;
  std::uint64_t data_bytes = 0;

  static std::uint64_t rounded(std::uint64_t bytes, std::uint64_t to) {
    return (bytes + to - 1) / to * to;
  }

  std::string bytes() const {
    std::string padded = key;
    padded.resize(rounded(key.size(), 8), '\0');
    const std::size_t size = kFixed + padded.size() + 8 * numbers.size() + 8;
    std::string text(kMagic);
    const auto put = [&text](std::int64_t number) {
      text.append(reinterpret_cast<const char*>(&number), sizeof(number));
    };
    put(kOrder), put(kVersion), put(static_cast<std::int64_t>(size));
    put(static_cast<std::int64_t>(key.size())), put(static_cast<std::int64_t>(numbers.size()));
    put(static_cast<std::int64_t>(data_bytes));
    text += padded;
    for (const std::int64_t number : numbers) put(number);
    put(PagedChecksum::of(text.data(), text.size()));
    text.resize(rounded(size, kPage), '\0');
    return text;
  }
};

/// The head of a file and its data. Throws ModelFileError for a file that is none of these, or is
/// damaged. A file of another version has an empty key and no data.
struct PackedContents {
  PackedHead head;
  std::span<const std::byte> data;

  PackedContents(std::span<const std::byte> file, const std::string& name) {
    const auto number = [&](std::size_t at) {
      std::int64_t value = 0;
      std::memcpy(&value, file.data() + at, sizeof(value));
      return value;
    };
    const auto demand = [&](bool ok, const char* reason) {
      if (!ok) fail_model(name, "", reason);
    };
    demand(file.size() >= PackedHead::kFixed &&
               std::memcmp(file.data(), PackedHead::kMagic.data(), 8) == 0,
           "is no file of packed weights");
    if (number(8) != PackedHead::kOrder || number(16) != PackedHead::kVersion) return;
    const auto size = [&](std::size_t at) { return static_cast<std::uint64_t>(number(at)); };
    const std::uint64_t head_bytes = size(24), key_bytes = size(32), count = size(40);
    constexpr auto damaged = "is damaged: delete it to have it made again";
    demand(head_bytes <= file.size() && key_bytes <= head_bytes && count <= head_bytes / 8 &&
               PackedHead::kFixed + PackedHead::rounded(key_bytes, 8) + 8 * count + 8 == head_bytes,
           damaged);
    demand(PagedChecksum::of(file.data(), head_bytes - 8) == number(head_bytes - 8), damaged);
    const std::uint64_t begin = PackedHead::rounded(head_bytes, PackedHead::kPage);
    head.data_bytes = size(48);
    demand(begin <= file.size() && head.data_bytes == file.size() - begin, damaged);
    head.key.assign(reinterpret_cast<const char*>(file.data()) + PackedHead::kFixed, key_bytes);
    head.numbers.resize(count);
    if (count > 0)
      std::memcpy(head.numbers.data(),
                  file.data() + PackedHead::kFixed + PackedHead::rounded(key_bytes, 8), 8 * count);
    data = file.subspan(begin);
  }
};

/// The scalar of a matrix or of an embedding, in files.
template <typename S>
inline constexpr std::int64_t kPackedCode = 0;
template <>
inline constexpr std::int64_t kPackedCode<float> = 1;
template <>
inline constexpr std::int64_t kPackedCode<double> = 2;
template <>
inline constexpr std::int64_t kPackedCode<bfloat16> = 3;
template <>
inline constexpr std::int64_t kPackedCode<half> = 4;
template <>
inline constexpr std::int64_t kPackedCode<std::int8_t> = 5;
template <>
inline constexpr std::int64_t kPackedCode<int4> = 6;

/// In its place, of an embedding that is the head.
inline constexpr std::int64_t kPackedHead = -1;
/// Before a text.
inline constexpr std::int64_t kPackedText = 1;

/// Panels of a shard's weight, or of the pair of a gated one.
template <typename S>
const PackedWeight<S>& panels_of(const PackedColumnShard<S>& shard) {
  return shard.weight;
}
template <typename S>
const PackedWeight<S>& panels_of(const PackedGatedColumnShard<S>& shard) {
  return shard.weight.pair();
}

/// Lists what is to be written.
class PackedWriter {
 public:
  struct Piece {
    std::uint64_t begin;
    std::span<const std::byte> bytes;
  };

  /// A text that lives until it is written, or none.
  void text(std::optional<std::string_view> text) {
    put(text ? kPackedText : 0);
    if (text) array(text->data(), static_cast<Index>(text->size()));
  }
  void vector(const PackedArray<float>& x, Index) { sized(x.data(), x.size()); }
  void numbers(const std::vector<float>& x, Index) {
    sized(x.data(), static_cast<Index>(x.size()));
  }
  template <typename... Shard>
  void matrix(const std::variant<Shard...>& matrix, Index, Index) {
    std::visit(
        [&]<template <typename> class One, typename S>(const One<S>& shard) {
          put(shard.out_features > 0 ? kPackedCode<S> : 0);
          if (shard.out_features == 0) return;
          require_that(shard.world_size == 1, kName, "the weights are those of one rank of ",
                       shard.world_size, ", expected all");
          weight(panels_of(shard));
        },
        matrix);
  }
  template <typename... Stack>
  void experts(const std::variant<Stack...>& experts, Index, Index, Index, bool fused) {
    std::visit(
        [&]<typename S>(const PackedExpertStack<S>& stack) {
          put(stack.down.empty() ? 0 : kPackedCode<S>);
          for (std::size_t e = 0; e < stack.down.size(); ++e) {
            weight(fused ? stack.gate_up[e].pair() : stack.up[e]);
            weight(stack.down[e]);
          }
        },
        experts);
  }
  template <typename Matrix>
  void gated(const Matrix& pair, Index out, Index in) {
    matrix(pair, out, in);
  }
  template <typename Embedding, typename Owner>
  void embedding(const Embedding& embedding, const Owner&, Index, Index) {
    std::visit(
        [&]<typename Table>(const Table& table) {
          if constexpr (rank_of<Table> == 2) {
            put(kPackedCode<scalar_of<Table>>);
            array(table.data(), table.size());
          } else if constexpr (std::is_same_v<Table, TiedEmbedding>) {
            put(kPackedHead);
          } else if constexpr (std::is_same_v<Table, QuantizedEmbedding>) {
            put(kPackedCode<std::int8_t>);
            array(table.values.data(), table.values.size());
            array(table.scales.data(), table.scales.size());
          }
        },
        embedding);
  }

  std::vector<std::int64_t> list;
  std::vector<Piece> pieces;
  std::uint64_t bytes = 0;

 private:
  static constexpr auto kName = "write_packed_weights";
  void put(Index number) { list.push_back(number); }
  template <typename X>
  void array(const X* data, Index count) {
    const std::span<const X> elements(data, static_cast<std::size_t>(count));
    const std::uint64_t begin = PackedHead::rounded(
        bytes, elements.size_bytes() >= PackedHead::kPage ? PackedHead::kPage : 64);
    put(static_cast<Index>(begin));
    put(count);
    pieces.push_back({begin, std::as_bytes(elements)});
    bytes = begin + elements.size_bytes();
  }
  template <typename S>
  void weight(const PackedWeight<S>& weight) {
    const Index scales = PanelAccess::scales(weight).size();
    put(weight.group_size());
    put(weight.minimums() != nullptr);
    put(weight.quantizes_activations());
    array(weight.data(), PanelAccess::values(weight).size());
    array(weight.scales(), scales);
    if (weight.minimums() != nullptr) array(weight.minimums(), scales);
  }
  /// An array that may be empty.
  void sized(const float* data, Index count) {
    put(count > 0 ? kPackedCode<float> : 0);
    if (count > 0) array(data, count);
  }
};

/// Finds parts in a file: views of it.
template <typename D>
class PackedFinder {
 public:
  PackedFinder(const D& device, const PackedContents& contents, std::string name,
               std::shared_ptr<const void> owner)
      : device_(device),
        numbers_(contents.head.numbers),
        data_(contents.data),
        name_(std::move(name)),
        owner_(std::move(owner)) {}

  std::optional<std::string_view> text() {
    if (!code(kPackedText)) return std::nullopt;
    demand(at_ + 1 < numbers_.size());
    const auto found = array<char>(numbers_[at_ + 1]);  // as long as it says
    return std::string_view(found.data(), static_cast<std::size_t>(found.size()));
  }
  void vector(PackedArray<float>& x, Index size) {
    if (code(kPackedCode<float>)) x = array<float>(size);
  }
  void numbers(std::vector<float>& x, Index size) {
    if (!code(kPackedCode<float>)) return;
    const auto found = array<float>(size);
    x.assign(found.data(), found.data() + found.size());
  }
  template <typename Matrix>
  void matrix(Matrix& matrix, Index out, Index in) {
    find(
        matrix, out, in, [](auto& shard, auto weight) { shard.weight = std::move(weight); }, 1);
  }
  template <typename Matrix>
  void gated(Matrix& matrix, Index out, Index in) {
    find(
        matrix, out, in,
        []<typename S>(auto& shard, PackedWeight<S> weight) {
          PairAccess<S>::pair(shard.weight) = std::move(weight);
        },
        2);
  }
  template <template <typename> class Stack, typename... S>
  void experts(std::variant<Stack<S>...>& experts, Index count, Index hidden, Index in,
               bool fused) {
    const std::int64_t scalar = next();
    if (scalar == 0) return;
    const auto as = [&]<typename X>(std::type_identity<X>) {
      if (scalar != kPackedCode<X>) return false;
      Stack<X> stack;
      for (Index e = 0; e < count; ++e) {
        if (fused)
          PairAccess<X>::pair(stack.gate_up.emplace_back()) = weight<X>(hidden, in, 2);
        else
          stack.up.push_back(weight<X>(2 * hidden, in, 1));
        stack.down.push_back(weight<X>(in, hidden, 1));
      }
      experts = std::move(stack);
      return true;
    };
    demand((as(std::type_identity<S>{}) || ...));
  }
  template <typename Embedding>
  void embedding(Embedding& embedding, std::shared_ptr<const void>& owner, Index rows,
                 Index columns) {
    const std::int64_t scalar = next();
    if (scalar == kPackedHead) {
      embedding.template emplace<TiedEmbedding>();
      return;
    }
    const auto table = [&]<typename S>(std::type_identity<S>) {
      if (scalar != kPackedCode<S>) return false;
      using Table = TensorView<const S, 2>;
      embedding.template emplace<Table>(Table(array<S>(rows * columns).data(), rows, columns));
      return true;
    };
    if (scalar == kPackedCode<std::int8_t>) {
      const auto values = array<std::int8_t>(rows * columns);
      const auto scales = array<float>(rows);
      embedding.template emplace<QuantizedEmbedding>(
          QuantizedEmbedding{{values.data(), rows, columns}, {scales.data(), rows}});
    } else {
      demand(table(std::type_identity<float>{}) || table(std::type_identity<double>{}) ||
             table(std::type_identity<bfloat16>{}) || table(std::type_identity<half>{}));
    }
    owner = owner_;
  }
  /// `bytes`: of what was found, as the weights count them.
  void finish(std::size_t bytes) {
    demand(std::cmp_equal(next(), bytes) && at_ == numbers_.size());
  }

 private:
  void demand(bool ok) const {
    if (!ok) fail_model(name_, "", "does not hold the weights that its key names");
  }
  std::int64_t next() {
    demand(at_ < numbers_.size());
    return numbers_[at_++];
  }
  /// Whether the next part is there, of this scalar then.
  bool code(std::int64_t scalar) {
    const std::int64_t found = next();
    demand(found == 0 || found == scalar);
    return found != 0;
  }
  template <typename X>
  PackedArray<X> array(Index count) {
    const std::int64_t begin = next();
    demand(next() == count && count >= 0 && begin >= 0 && begin % 64 == 0 &&
           std::cmp_less_equal(begin, data_.size()) &&
           static_cast<std::uint64_t>(count) <=
               (data_.size() - static_cast<std::uint64_t>(begin)) / sizeof(X));
    const std::byte* const from = data_.data() + begin;
    return PackedArray<X>::view(reinterpret_cast<const X*>(from), count, owner_);
  }

  template <template <typename> class... One, typename... S, typename Set>
  void find(std::variant<One<S>...>& matrix, Index out, Index in, Set&& set, int matrices) {
    const std::int64_t scalar = next();
    if (scalar == 0) return;
    const auto as = [&]<template <typename> class Shard, typename X>(std::type_identity<Shard<X>>) {
      if (scalar != kPackedCode<X>) return false;
      Shard<X> shard{{}, out, in, 0, 1};
      set(shard, weight<X>(out, in, matrices));
      matrix = std::move(shard);
      return true;
    };
    demand((as(std::type_identity<One<S>>{}) || ...));
  }
  template <typename X>
  PackedWeight<X> weight(Index out, Index in, int matrices) {
    const Index group = group_of<X>(next());
    const bool minimums = flag<X>(false), quantizes_activations = flag<X>(true);
    const problem::PanelsOf<X> shape{out, in, group, matrices, minimums, quantizes_activations};
    const problem::PanelSizes sizes = run(device_, shape);
    auto values = array<X>(sizes.elements);
    auto scales = array<float>(sizes.scales);
    return PanelAccess::weight(shape, sizes.layout, std::move(values), std::move(scales),
                               minimums ? array<float>(sizes.scales) : PackedArray<float>());
  }
  template <typename X>
  Index group_of(std::int64_t group) const {
    demand((group == 0 && !std::is_same_v<X, int4>) ||
           (problem::is_quantized_weight<X> && (group == 32 || group == 64 || group == 128)));
    return group;
  }

  /// What int4 may have and other scalars have not.
  template <typename X>
  bool flag(bool other) {
    const std::int64_t found = next();
    demand(found == std::int64_t{other} || (std::is_same_v<X, int4> && found == !other));
    return found != 0;
  }

  const D& device_;
  std::span<const std::int64_t> numbers_;
  std::span<const std::byte> data_;
  std::string name_;
  std::shared_ptr<const void> owner_;
  std::size_t at_ = 0;
};

/// The weights that come next, and last.
template <typename T, typename D>
std::shared_ptr<const PackedDecoderWeights<T>> take_packed_weights(PackedFinder<D>& finder,
                                                                   const DecoderConfig& config,
                                                                   const WeightStorage& storage,
                                                                   const DecoderForm& form) {
  auto weights = std::make_shared<PackedDecoderWeights<T>>(config, storage, form);
  PackedParts::all(*weights, finder);
  finder.finish(weights->bytes());
  weights->require_complete();
  return weights;
}

/// Weights in `file`, which `owner` keeps; none where its key is another.
template <typename T, typename D>
std::shared_ptr<const PackedDecoderWeights<T>> find_packed_weights(
    const D& device, std::span<const std::byte> file, const std::string& name,
    std::shared_ptr<const void> owner, std::string_view key, const DecoderConfig& config,
    const WeightStorage& storage, const DecoderForm& form) {
  static_assert(CpuDevice<D>, "eigenformer: files of packed weights are for CPU devices");
  const PackedContents contents(file, name);
  if (contents.head.key != key) return nullptr;
  PackedFinder<D> finder(device, contents, name, std::move(owner));
  return take_packed_weights<T>(finder, config, storage, form);
}

/// Writes what `parts` lists, the last numbers those of weights of so many bytes. The file's old
/// contents stay what they were until the new ones are there.
inline void write_packed_parts(PackedWriter& parts, std::size_t weight_bytes,
                               const std::filesystem::path& path, std::string_view key) {
  parts.list.push_back(static_cast<std::int64_t>(weight_bytes));
  const std::string head = PackedHead{std::string(key), std::move(parts.list), parts.bytes}.bytes();
  // Programs that start together may all write it: each to a file of its own.
  const std::string ending = "." + std::to_string(std::random_device{}()) + ".partial";
  write_whole(path, ending, [&](std::ofstream& stream) {
    stream.write(head.data(), static_cast<std::streamsize>(head.size()));
    const std::array<char, PackedHead::kPage> zeros{};
    std::uint64_t at = 0;
    for (const auto& piece : parts.pieces) {
      stream.write(zeros.data(), static_cast<std::streamsize>(piece.begin - at));
      stream.write(reinterpret_cast<const char*>(piece.bytes.data()),
                   static_cast<std::streamsize>(piece.bytes.size()));
      at = piece.begin + piece.bytes.size();
    }
  });
}

}  // namespace detail

/// The weights of a file, mapped: its bytes are read as they are needed, and stay the file's.
/// Nothing where it has another key (made of another model, for another ISA or by another version).
/// Throws ModelFileError for a file that is not there, is none of packed weights, is damaged, or
/// holds others than the configuration says.
template <FloatingScalar T, Device D>
std::shared_ptr<const PackedDecoderWeights<T>> read_packed_weights(
    const D& device, const std::filesystem::path& path, std::string_view key,
    const DecoderConfig& config, const WeightStorage& storage = {}, const DecoderForm& form = {}) {
  const auto file = std::make_shared<const MappedFile>(path);
  try {
    auto weights = detail::find_packed_weights<T>(device, file->bytes(), file->name(), file, key,
                                                  config, storage, form);
    if (weights != nullptr) file->advise(file->bytes(), FileAdvice::soon);
    return weights;
  } catch (const std::logic_error& error) {  // sizes that overflow, or a part that is missing
    detail::fail_model(file->name(), "", error.what());
  }
}

/// Keeps weights that lie in the memory of the host in a file of that name, whose old contents stay
/// what they were until the new ones are there. Throws ModelFileError where it cannot be written,
/// std::invalid_argument for weights of one rank of a group.
template <typename T>
void write_packed_weights(const PackedDecoderWeights<T>& weights, const std::filesystem::path& path,
                          std::string_view key) {
  detail::PackedWriter parts;
  detail::PackedParts::all(weights, parts);
  detail::write_packed_parts(parts, weights.bytes(), path, key);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
