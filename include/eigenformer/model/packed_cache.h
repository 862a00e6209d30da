/// \file
/// What a model's packed weights are kept under: which files they come from, and what they are
/// packed for.
#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <type_traits>
#include <vector>

#include "../core/version.h"
#include "config.h"
#include "packed_file.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A file by its name, size, time of change and first bytes, which are the header of a model's.
inline std::string file_key(const std::filesystem::path& path) {
  std::error_code problem;
  const auto size = std::filesystem::file_size(path, problem);
  if (problem) fail_model(path.string(), "", "cannot be read: " + problem.message());
  const auto changed = std::filesystem::last_write_time(path, problem).time_since_epoch().count();
  std::vector<char> first(std::size_t{1} << 16);
  std::ifstream stream(path, std::ios::binary);
  stream.read(first.data(), static_cast<std::streamsize>(first.size()));
  const auto sum = PagedChecksum::of(first.data(), static_cast<std::size_t>(stream.gcount()));
  return path.filename().string() + " " + std::to_string(size) + " " + std::to_string(changed) +
         " " + std::to_string(sum) + "\n";
}

/// Of a folder, the files that a decoder comes from.
inline std::string source_key(const std::filesystem::path& path) {
  std::error_code problem;
  if (!std::filesystem::is_directory(path, problem)) return file_key(path);
  std::vector<std::filesystem::path> files{path / "config.json"};
  const auto index = path / "model.safetensors.index.json";
  if (std::filesystem::exists(index, problem)) files.push_back(index);
  for (const auto& entry : std::filesystem::directory_iterator(path, problem))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::string key;
  for (const auto& file : files) key += file_key(file);
  return key;
}

/// In the order of WeightFormat.
inline constexpr const char* kWeightFormatNames[] = {"activation", "bfloat16", "half",
                                                     "int8",       "int4",     "as_stored"};

/// What packing makes of a small matrix, in every format beside activations of T, as one number:
/// that of kernels which pack or quantize in another way differs, and what they packed is not taken
/// for the same. Costs 2 ms once, for activations of float on a core of Zen 5 (AVX-512, g++ -O3).
template <typename T, typename D>
std::int64_t packing_sum(const D& device) {
  constexpr Index kSize = 192;  // whole panels and groups of every ISA: no padding, whatever it is
  static const std::int64_t value = [&] {
    Tensor<float, 2> matrix(kSize, kSize);
    for (Index i = 0; i < matrix.size(); ++i)
      matrix.data()[i] = static_cast<float>((i * 37 + i / 11) % 101 - 30) / 64;
    PagedChecksum sum;
    Tensor<float, 2> up = matrix;
    up.data()[0] = 1;
    const auto add_panels = [&]<typename S>(const PackedWeight<S>& packed) {
      const auto scales = static_cast<std::size_t>(PanelAccess::scales(packed).size());
      sum.add(packed.data(),
              static_cast<std::size_t>(PanelAccess::values(packed).size()) * sizeof(S));
      sum.add(packed.scales(), scales * sizeof(float));
      if (packed.minimums() != nullptr) sum.add(packed.minimums(), scales * sizeof(float));
    };
    const auto add = [&]<typename S>(std::type_identity<S>, const WeightStorage& storage) {
      const auto options = packing_options<S>(storage);
      add_panels(pack_weight<S>(device, matrix, options));
      add_panels(pack_gated_weight<S>(device, matrix, up, options).pair());
    };
    const auto add_all = [&]<typename... S>(
                             std::type_identity<std::variant<PackedColumnShard<S>...>>) {
      (add(std::type_identity<S>{}, {}), ...);
      if constexpr (stores<T, std::int8_t>)
        add(std::type_identity<std::int8_t>{}, {WeightFormat::int8, 32});
      if constexpr (stores<T, int4>) {
        add(std::type_identity<int4>{}, {WeightFormat::int4, 32, {.zero_points = false}});
        add(std::type_identity<int4>{}, {WeightFormat::int4, 32, {.quantize_activations = false}});
      }
    };
    add_all(std::type_identity<PackedMatrix<T>>{});
    return sum.value();
  }();
  return value;
}

/// What weights are packed for, and as what.
template <typename T, typename D>
std::string packing_form(const D& device, const WeightStorage& storage) {
  const auto number = [](auto value) { return std::to_string(value); };
  return "activations " + number(kPackedCode<T>) + "\nweights " +
         kWeightFormatNames[static_cast<std::size_t>(storage.format)] + " " +
         number(storage.group_size) + "\nint4 " + number(int{storage.four_bits.zero_points}) + " " +
         number(int{storage.four_bits.quantize_activations}) + "\nisa " +
         std::string(run(device, problem::PanelsOf<T>{1, 1, 0, 1}).layout.isa) + "\n";
}
/// And how.
template <typename T, typename D>
std::string packing_key(const D& device, const WeightStorage& storage) {
  const auto number = [](auto value) { return std::to_string(value); };
  return "eigenformer " + number(EIGENFORMER_VERSION_MAJOR) + "." +
         number(EIGENFORMER_VERSION_MINOR) + "." + number(EIGENFORMER_VERSION_PATCH) +
         "\npacking " + number(packing_sum<T>(device)) + "\n" + packing_form<T>(device, storage);
}

/// `cache`, or where that is a folder a file in it for this model in this form: that of an older
/// version is replaced.
inline std::filesystem::path cache_file(const std::filesystem::path& cache,
                                        const std::filesystem::path& source,
                                        const std::string& form) {
  std::error_code problem;
  if (!std::filesystem::is_directory(cache, problem)) return cache;
  const auto whole = std::filesystem::weakly_canonical(source, problem);
  const std::string text = form + whole.string();
  const auto sum = static_cast<std::uint64_t>(PagedChecksum::of(text.data(), text.size()));
  return cache / (whole.stem().string() + "-" + std::to_string(sum) + ".packed");
}

/// The weights kept in `cache`, or those that make() gives, which are kept there then; warn(text)
/// where they cannot be.
template <typename T, typename D, typename Make, typename Warn>
std::shared_ptr<const PackedDecoderWeights<T>> kept_weights(
    const D& device, const std::filesystem::path& source, const std::filesystem::path& cache,
    const ModelConfig& config, const WeightStorage& storage, Make&& make, Warn&& warn) {
  if (cache.empty()) return make();
  if constexpr (CpuDevice<D>) {
    const std::string key = packing_key<T>(device, storage) + source_key(source);
    const auto file = cache_file(cache, source, packing_form<T>(device, storage));
    std::error_code problem;
    if (std::filesystem::exists(file, problem))
      if (auto found =
              read_packed_weights<T>(device, file, key, config.shape, storage, config.form))
        return found;
    auto made = make();
    attempt([&] { write_packed_weights(*made, file, key); }, [&](const char* what) { warn(what); });
    return made;
  } else {
    fail<std::invalid_argument>("load_model: cache is for devices of the CPU");
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
