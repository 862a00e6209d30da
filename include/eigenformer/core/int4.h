/// \file
/// `ef::int4`: how weights of four bits are stored.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// Two weights of four bits in a byte. It names the storage (`ef::PackedWeight<ef::int4>`) and is
/// no number: outside packed weights four-bit values are std::int8_t, one in a byte
/// (quantization.h).
enum class int4 : std::uint8_t {};

/// How the scale of a group, and its minimum where it has one, are found (quantization.h).
enum class Int4Fit {
  extremes,      ///< so that the largest numbers of the group just fit
  least_squares  ///< so that the squared errors of the group sum to the least that a search finds
};

}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
