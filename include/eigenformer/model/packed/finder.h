/// \file
/// Finds packed weights and what goes along with them in a file that is mapped (packed_file.h).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../../decoder/packed_parts.h"
#include "../stored_embedding.h"
#include "head.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

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
    if (next() != PagedChecksum::of(found.data(), static_cast<std::size_t>(found.size())))
      fail_model(name_, "", PackedHead::kDamaged);
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
    if (scalar == kPackedBlocks) {
      const std::int64_t format = next();
      demand(format >= 0 && format < kStoredFormats);
      const auto as = static_cast<StoredFormat>(format);
      const std::array<std::int64_t, 2> shape{rows, columns};
      const std::int64_t size = stored_bytes(as, shape);
      demand(size >= 0);
      embedding = encoded_embedding(as, array<std::byte>(size).data(), rows, columns);
      owner = owner_;
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
    constexpr bool is_int4 = std::is_same_v<X, int4>;
    const bool minimums = flag(false, is_int4), quantizes_activations = flag(true, is_int4),
               halves = flag(false, std::is_same_v<X, std::int8_t> && group > 0);
    const problem::PanelsOf<X> shape{out, in, group, matrices, minimums, quantizes_activations};
    const problem::PanelSizes sizes = run(device_, shape);
    auto values = array<X>(sizes.elements);
    auto half_scales = halves ? array<half>(sizes.scales) : PackedArray<half>();
    auto scales = halves ? PackedArray<float>() : array<float>(sizes.scales);
    return PanelAccess::weight(shape, sizes.layout, std::move(values), std::move(scales),
                               std::move(half_scales),
                               minimums ? array<float>(sizes.scales) : PackedArray<float>());
  }
  template <typename X>
  Index group_of(std::int64_t group) const {
    demand((group == 0 && !std::is_same_v<X, int4>) ||
           (problem::is_quantized_weight<X> && (group == 32 || group == 64 || group == 128)));
    return group;
  }

  /// What most weights are, and some may not be.
  bool flag(bool usual, bool may_differ) {
    const std::int64_t found = next();
    demand(found == std::int64_t{usual} || (may_differ && found == std::int64_t{!usual}));
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

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
