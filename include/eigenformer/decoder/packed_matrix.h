/// \file
/// A matrix of a decoder in the format that it alone has: one decoder may hold bfloat16, half, INT8
/// and INT4 matrices side by side, as files do. packed_weights.h is the manual.
#pragma once

#include <cstdint>
#include <type_traits>
#include <variant>
#include <vector>

#include "../expert_feed_forward.h"
#include "../tensor_parallel.h"
#include "../tensor_parallel/fused.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"  // of a scoped enumerator: it shadows nothing (g++ 12)
#endif
/// The numbers that a linear layer is stored in. Beside activations of float each of them is;
/// beside bfloat16, half or double floating weights are always in the scalar of the activations.
enum class WeightFormat {
  activation,  ///< in the scalar of the activations
  bfloat16,    ///< rounded to nearest even where they are not
  half,
  int8,       ///< quantized; not with double
  int4,       ///< by groups, above minimums; the head in INT8; not with double
  as_stored,  ///< in the scalar of the view that is packed
};
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

/// What else INT4 may be. As stored, minimums are there where the values have them.
struct Int4Storage {
  bool zero_points = true;  ///< minimums beside scales: 6 bits for a weight by 32, and not 5
  bool quantize_activations = true;  ///< W4A8; false: W4A16, slower, activations stay what they are
};

/// A format, with the inputs that share a scale of INT8 or INT4: 32, 64 or 128, or 0 for one scale
/// per output channel, with INT4 for 32.
///
///   ef::PackedDecoderWeights<float> weights(config, ef::WeightFormat::bfloat16);
///   ef::PackedDecoderWeights<float> weights(config, {ef::WeightFormat::int8, 64});
///   ef::PackedDecoderWeights<float> weights(
///       config, {ef::WeightFormat::int4, 64, {.zero_points = false}});
struct WeightStorage {
  WeightFormat format;
  Index group_size;
  Int4Storage four_bits;

  constexpr WeightStorage(WeightFormat weight_format = WeightFormat::activation, Index group = 0,
                          Int4Storage int4_storage = {})
      : format(weight_format), group_size(group), four_bits(int4_storage) {}
};

namespace detail {

/// The shards that a decoder with activations of T has products for, and those `More` besides.
/// Quantized products accumulate into float, so that double, which serves as a reference, has none.
template <template <typename> class Shard, typename T, typename... More>
struct AnyShard {
  using type = std::variant<Shard<T>, Shard<std::int8_t>, Shard<More>...>;
};
template <template <typename> class Shard, typename... More>
struct AnyShard<Shard, float, More...> {
  using type =
      std::variant<Shard<float>, Shard<bfloat16>, Shard<half>, Shard<std::int8_t>, Shard<More>...>;
};
template <template <typename> class Shard, typename... More>
struct AnyShard<Shard, double, More...> {
  using type = std::variant<Shard<double>>;
};

template <typename Variant, typename Alternative>
inline constexpr bool has_alternative = false;
template <typename... S, typename Alternative>
inline constexpr bool has_alternative<std::variant<S...>, Alternative> =
    (std::is_same_v<S, Alternative> || ...);

}  // namespace detail

/// One rank's rows of a matrix, of one format of those that activations of T have products for; it
/// has no outputs where none was packed.
template <FloatingScalar T>
using PackedMatrix = typename detail::AnyShard<PackedColumnShard, T, int4>::type;
/// Of gate and up, in one format.
template <FloatingScalar T>
using PackedGatedMatrix = typename detail::AnyShard<PackedGatedColumnShard, T, int4>::type;
/// The head, whose rows may be the embedding as well: it has no four bits, which would cost a
/// token's numbers more than they save (llama.cpp's files keep 6 or 8 for it).
template <FloatingScalar T>
using PackedHeadMatrix = typename detail::AnyShard<PackedColumnShard, T>::type;

/// The matrices of a layer's experts, one of each kind for each, whole on every rank.
template <typename S>
struct PackedExpertStack {
  std::vector<PackedGatedWeight<S>> gate_up;  ///< one product, or none
  std::vector<PackedWeight<S>> up;            ///< gate and up, one below the other, or none
  std::vector<PackedWeight<S>> down;
};
/// In one format.
template <FloatingScalar T>
using PackedExperts = typename detail::AnyShard<PackedExpertStack, T, int4>::type;

namespace detail {

template <typename T, typename S>
inline constexpr bool stores = has_alternative<PackedMatrix<T>, PackedColumnShard<S>>;

constexpr bool is_quantized(WeightFormat format) {
  return format == WeightFormat::int8 || format == WeightFormat::int4;
}

/// Throws std::invalid_argument for what activations of T have no weights of.
template <typename T>
void require_storage(const WeightStorage& storage, std::string_view name) {
  const bool quantized = is_quantized(storage.format);
  require_that(!quantized || stores<T, std::int8_t>, name,
               storage.format == WeightFormat::int4 ? "int4" : "int8",
               " weights do not serve activations of double");
  require_that(storage.group_size == 0 || quantized, name, "group_size is ", storage.group_size,
               ", but only int8 and int4 weights have groups");
  if (storage.group_size != 0) require_group_size(storage.group_size, name);
}

/// f(std::type_identity<S>), S the scalar that holds a matrix of W beside activations of T.
template <typename T, typename W, typename F>
void with_stored_scalar(WeightFormat format, F&& f) {
  const auto store_as = [&]<typename S>(std::type_identity<S>) {
    f(std::type_identity<std::conditional_t<stores<T, S>, S, T>>{});
  };
  switch (format) {
    case WeightFormat::activation:
      return store_as(std::type_identity<T>{});
    case WeightFormat::bfloat16:
      return store_as(std::type_identity<bfloat16>{});
    case WeightFormat::half:
      return store_as(std::type_identity<half>{});
    case WeightFormat::int8:
      return store_as(std::type_identity<std::int8_t>{});
    case WeightFormat::int4:
      return store_as(std::type_identity<int4>{});
    case WeightFormat::as_stored:
      return store_as(std::type_identity<W>{});
  }
}

/// The format of the head, which has no four bits.
inline WeightStorage without_int4(const WeightStorage& storage) {
  return storage.format == WeightFormat::int4
             ? WeightStorage(WeightFormat::int8, storage.group_size)
             : storage;
}

template <typename S>
PackingOptions<S> packing_options(const WeightStorage& storage) {
  if constexpr (std::is_same_v<S, int4>)
    return {.group_size = storage.group_size == 0 ? Index{32} : storage.group_size,
            .zero_points = storage.four_bits.zero_points,
            .quantize_activations = storage.four_bits.quantize_activations,
            .fit = Int4Fit::least_squares};
  else
    return {.group_size = std::is_same_v<S, std::int8_t> ? storage.group_size : 0,
            .half_scales = true};
}

template <typename S>
Index stored_bytes(const PackedWeight<S>& weight) {
  const Index group = weight.group_size(), columns = weight.columns();
  const Index scales = !problem::is_quantized_weight<S> ? 0
                       : group == 0                     ? 1
                                                        : (columns + group - 1) / group,
              factors = weight.minimums() == nullptr ? scales : 2 * scales,
              factor_bytes = weight.half_scales() == nullptr ? Index{sizeof(float)} : Index{2},
              bytes = std::is_same_v<S, int4> ? (columns + 1) / 2 : columns * Index{sizeof(S)};
  return weight.rows() * (bytes + factors * factor_bytes);
}
template <typename S>
Index stored_bytes(const PackedGatedWeight<S>& weight) {
  return stored_bytes(weight.pair());
}

/// Outputs of all ranks; 0 where nothing was packed.
template <typename... Shard>
Index out_features(const std::variant<Shard...>& matrix) {
  return std::visit([](const auto& shard) { return shard.out_features; }, matrix);
}
/// Bytes of this rank's numbers and scales, without padding.
template <typename... Shard>
Index stored_bytes(const std::variant<Shard...>& matrix) {
  return std::visit([](const auto& shard) { return stored_bytes(shard.weight); }, matrix);
}
/// Cycles for one token, rough: a weight is read from a cache and multiplied, INT8 and INT4 three
/// times as fast.
template <typename... Shard>
double cycles_per_token(const std::variant<Shard...>& matrix) {
  return std::visit(
      []<template <typename> class One, typename S>(const One<S>& shard) {
        const double matrices = requires { shard.weight.pair(); } ? 2 : 1;
        return (problem::is_quantized_weight<S> ? 0.15 : 0.5) * matrices *
               static_cast<double>(shard.out_features) * static_cast<double>(shard.in_features);
      },
      matrix);
}

template <typename S>
Index stored_bytes(const PackedExpertStack<S>& stack) {
  Index bytes = 0;
  for (const auto& weight : stack.gate_up) bytes += stored_bytes(weight);
  for (const auto& weight : stack.up) bytes += stored_bytes(weight);
  for (const auto& weight : stack.down) bytes += stored_bytes(weight);
  return bytes;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
