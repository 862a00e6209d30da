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

}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
