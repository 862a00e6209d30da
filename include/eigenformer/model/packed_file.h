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

#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "mapped_file.h"
#include "packed/finder.h"
#include "packed/writer.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

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
