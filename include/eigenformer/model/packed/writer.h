/// \file
/// Writes packed weights and what goes along with them into a file (packed_file.h).
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "../../decoder/packed_parts.h"
#include "../written_file.h"
#include "head.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

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
    if (!text) return;
    array(text->data(), static_cast<Index>(text->size()));
    put(PagedChecksum::of(text->data(), text->size()));
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
          } else if constexpr (std::is_same_v<Table, EncodedEmbedding>) {
            put(kPackedBlocks);
            put(table.format);
            array(table.data, table.bytes());
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
    put(weight.half_scales() != nullptr);
    array(weight.data(), PanelAccess::values(weight).size());
    if (weight.half_scales() != nullptr)
      array(weight.half_scales(), PanelAccess::half_scales(weight).size());
    else
      array(weight.scales(), scales);
    if (weight.minimums() != nullptr) array(weight.minimums(), scales);
  }
  /// An array that may be empty.
  void sized(const float* data, Index count) {
    put(count > 0 ? kPackedCode<float> : 0);
    if (count > 0) array(data, count);
  }
};

/// Writes what `parts` lists, the last numbers those of weights of so many bytes. The file's old
/// contents stay what they were until the new ones are there.
inline void write_packed_parts(PackedWriter& parts, std::size_t weight_bytes,
                               const std::filesystem::path& path, std::string_view key) {
  parts.list.push_back(static_cast<std::int64_t>(weight_bytes));
  const std::string head = PackedHead{std::string(key), std::move(parts.list), parts.bytes}.bytes();
  write_whole(path, partial_ending(), [&](std::ofstream& stream) {
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
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
