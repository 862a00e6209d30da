/// \file
/// One sequence of a PagedKvCache as a stream of bytes:
///
///   "EFKVSEQ1" | order version storage layers gone_begin gone_end |
///   for each layer: kv_heads head_dim value_dim length checksum_of_key_scales_by_channel (0: none) | checksum of all that
///   for each layer, for each position that is not gone: key rows (kv_heads, head_dim) | value rows | INT8 only: key scales (kv_heads) | value scales
///   checksum of the rows
///
/// Numbers are 64 bits, in the byte order of the machine that wrote them, which `order` shows. Rows
/// are as the cache stores them; pages leave no trace.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <ostream>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "paged_layers.h"
#include "paged_sequences.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class PagedWriter {
 public:
  explicit PagedWriter(std::ostream& to) : to_(to) {}
  void write(const void* data, std::size_t bytes) {
    sum_.add(data, bytes);
    to_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  }
  void write(const std::vector<std::int64_t>& numbers) {
    write(numbers.data(), numbers.size() * sizeof(std::int64_t));
  }
  void finish_part() {
    const std::int64_t sum = sum_.value();
    write(&sum, sizeof(sum));
    sum_ = {};
  }

 private:
  std::ostream& to_;
  PagedChecksum sum_;
};

class PagedReader {
 public:
  PagedReader(std::istream& from, const char* operation) : from_(from), operation_(operation) {}
  void read(void* data, std::size_t bytes) {
    from_.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes));
    require_that(std::cmp_equal(from_.gcount(), bytes), operation_, "load: the stream ends early");
    sum_.add(data, bytes);
  }
  std::vector<std::int64_t> numbers(std::size_t count) {
    std::vector<std::int64_t> result(count);
    read(result.data(), count * sizeof(std::int64_t));
    return result;
  }
  void finish_part(const char* what) {
    const std::int64_t sum = sum_.value();
    std::int64_t stored = 0;
    read(&stored, sizeof(stored));
    require_that(stored == sum, operation_, "load: the checksum of the ", what, " is wrong");
    sum_ = {};
  }

 private:
  std::istream& from_;
  const char* operation_;
  PagedChecksum sum_;
};

/// What stands before the rows.
struct PagedFile {
  static constexpr std::array<char, 8> kMagic{'E', 'F', 'K', 'V', 'S', 'E', 'Q', '1'};
  static constexpr std::int64_t kOrder = 0x0102030405060708, kVersion = 1;

  problem::KeyRange gone;
  std::vector<KvLayerShape> shapes;
  std::vector<Index> lengths;
  std::vector<std::int64_t> key_scales;
};

template <typename Storage>
constexpr std::int64_t kStorageCode = std::is_same_v<Storage, float>             ? 1
                                      : std::is_same_v<Storage, double>          ? 2
                                      : std::is_same_v<Storage, Eigen::bfloat16> ? 3
                                      : std::is_same_v<Storage, Eigen::half>     ? 4
                                                                                 : 5;

template <typename Storage>
void write_head(PagedWriter& to, const PagedFile& file) {
  to.write(PagedFile::kMagic.data(), PagedFile::kMagic.size());
  to.write({PagedFile::kOrder, PagedFile::kVersion, kStorageCode<Storage>,
            static_cast<std::int64_t>(file.shapes.size()), file.gone.begin, file.gone.end});
  for (std::size_t l = 0; l < file.shapes.size(); ++l)
    to.write({file.shapes[l].kv_heads, file.shapes[l].head_dim, file.shapes[l].value_dim,
              file.lengths[l], file.key_scales[l]});
  to.finish_part();
}

/// Throws std::invalid_argument for what is no file of a cache of `layers` layers and `most`
/// positions. Allocates by `layers`, not by what the file says.
template <typename Storage>
PagedFile read_head(PagedReader& from, Index layers, Index most, const char* operation) {
  std::array<char, 8> magic{};
  from.read(magic.data(), magic.size());
  require_that(magic == PagedFile::kMagic, operation, "load: the stream holds no sequence");
  const auto head = from.numbers(6);
  require_that(head[0] == PagedFile::kOrder, operation, "load: another byte order");
  require_that(head[1] == PagedFile::kVersion, operation, "load: version ", head[1],
               ", this library reads ", PagedFile::kVersion);
  require_that(head[2] == kStorageCode<Storage>, operation, "load: rows of storage ", head[2],
               ", the cache has ", kStorageCode<Storage>,
               " (float, double, bfloat16, half, INT8: 1 to 5)");
  require_that(head[3] == layers, operation, "load: ", head[3], " layers, the cache has ", layers);
  PagedFile file{{head[4], head[5]}, {}, {}, {}};
  for (Index l = 0; l < layers; ++l) {
    const auto layer = from.numbers(5);
    file.shapes.push_back({layer[0], layer[1], layer[2]});
    file.lengths.push_back(layer[3]);
    file.key_scales.push_back(layer[4]);
  }
  from.finish_part("head");
  const auto [shortest, longest] = std::minmax_element(file.lengths.begin(), file.lengths.end());
  require_that(*shortest >= 0 && file.gone.begin >= 0 && file.gone.begin <= file.gone.end &&
                   file.gone.end <= *shortest,
               operation, "load: lengths contradict each other");
  require_capacity(*longest <= most, operation, "load: ", *longest, " positions, the pool has ",
                   most);
  return file;
}

/// Rows of a layer, page by page, through memory of the host, for the pool may lie elsewhere.
template <typename Storage>
class SavedRows {
 public:
  SavedRows(const PagedLayer& layer, const PagePool& pool, const std::int32_t* table)
      : layer_(layer), pool_(pool), table_(table), image_(layer.layout.bytes) {}

  void save(PagedWriter& to, Index length, problem::KeyRange gone) {
    for_each_page(length, gone, [&](std::byte* page, Index begin, Index end, Index first) {
      pool_.memory().copy_out(image_.data(), page, image_.size());
      for_each_part(begin, end, first, gone,
                    [&](auto* part, std::size_t count) { to.write(part, count * sizeof(*part)); });
    });
  }
  /// by_channel: whether keys have scales of channels, and rows of them 1.
  void load(PagedReader& from, Index length, problem::KeyRange gone, bool by_channel) {
    for_each_page(length, gone, [&](std::byte* page, Index begin, Index end, Index first) {
      for_each_part(begin, end, first, gone, [&](auto* part, std::size_t count) {
        from.read(part, count * sizeof(*part));
        if constexpr (std::is_same_v<Storage, std::int8_t>) require_quantized({part, count});
      });
      if constexpr (std::is_same_v<Storage, std::int8_t>)
        for (Index j = begin; by_channel && j < end; ++j)
          if (j < gone.begin || j >= gone.end) require_scales_of_one(j - first);
      pool_.memory().copy_in(page, image_.data(), image_.size());
    });
  }

 private:
  /// visit(memory of the layer's part, positions [begin, end), position of slot 0)
  template <typename Visit>
  void for_each_page(Index length, problem::KeyRange gone, Visit&& visit) {
    const Index size = layer_.layout.page_size;
    for (Index first = 0; first < length; first += size) {
      const Index end = (std::min)(first + size, length);
      if (first >= gone.begin && end <= gone.end) continue;
      visit(pool_.page(table_[first / size]) + layer_.offset, first, end, first);
    }
  }
  template <typename Visit>
  void for_each_part(Index begin, Index end, Index first, problem::KeyRange gone, Visit&& visit) {
    const KvPageLayout& l = layer_.layout;
    for (Index j = begin; j < end; ++j) {
      if (j >= gone.begin && j < gone.end) continue;
      const auto rows = [&]<typename T>(T*, std::size_t offset, Index width) {
        for (Index h = 0; h < l.kv_heads; ++h)
          visit(
              reinterpret_cast<T*>(image_.data() + offset) + (h * l.page_size + j - first) * width,
              static_cast<std::size_t>(width));
      };
      constexpr Storage* stored = nullptr;
      rows(stored, 0, l.head_dim);
      rows(stored, l.value_offset, l.value_dim);
      if constexpr (std::is_same_v<Storage, std::int8_t>) {
        constexpr float* scale = nullptr;
        rows(scale, l.key_scale_offset, 1);
        rows(scale, l.value_scale_offset, 1);
      }
    }
  }
  /// What quantization never makes: products of -128 would not be the same on every machine.
  static void require_quantized(std::span<const std::int8_t> row) {
    require_that(std::find(row.begin(), row.end(), std::int8_t{-128}) == row.end(),
                 PagedSequences::kName, "load: a row of INT8 holds -128");
  }
  static void require_quantized(std::span<const float> scales) {
    for (const float scale : scales)  // NaN: a row that a GPU could not quantize
      require_that(!(scale < 0) && !std::isinf(scale), PagedSequences::kName,
                   "load: a row has the scale ", scale);
  }
  void require_scales_of_one(Index slot) const {
    const auto* const scales =
        reinterpret_cast<const float*>(image_.data() + layer_.layout.key_scale_offset);
    for (Index h = 0; h < layer_.layout.kv_heads; ++h) {
      const float scale = scales[h * layer_.layout.page_size + slot];
      require_that(scale == 1 || std::isnan(scale), PagedSequences::kName,
                   "load: a row of keys by channel has the scale ", scale);
    }
  }

  const PagedLayer& layer_;
  const PagePool& pool_;
  const std::int32_t* table_;
  std::vector<std::byte> image_;  // of the layer's part of a page
};

/// Writes sequence number `at`; the stream says whether it failed.
template <typename Storage>
void save_sequence(std::ostream& stream, const std::vector<PagedLayer>& layers,
                   const KeyChannelScales& key_scales, const PagedSequences& sequences,
                   std::size_t at) {
  const KvSequences& list = sequences.list();
  PagedFile file{list.gone[at], {}, {}, {}};
  for (std::size_t l = 0; l < layers.size(); ++l) {
    file.shapes.push_back(layers[l].shape());
    file.lengths.push_back(list.lengths[l][at]);
    file.key_scales.push_back(key_scales.checksum(l));
  }
  PagedWriter to(stream);
  write_head<Storage>(to, file);
  for (std::size_t l = 0; l < layers.size(); ++l)
    SavedRows<Storage>(layers[l], sequences.pool(), list.tables[at])
        .save(to, file.lengths[l], file.gone);
  to.finish_part();
}

/// Makes one; where it throws, there is none, and layers are as they were.
template <typename Storage>
SequenceId load_sequence(std::istream& stream, const PagedKvConfig& config,
                         std::vector<PagedLayer>& layers, const KeyChannelScales& key_scales,
                         PagedSequences& sequences) {
  constexpr auto name = PagedSequences::kName;
  PagedReader from(stream, name);
  const auto file = read_head<Storage>(from, config.layers, sequences.total_slots(), name);
  std::vector<PagedLayer> fitted = layers;
  for (std::size_t l = 0; l < fitted.size(); ++l) {
    if (file.lengths[l] == 0) continue;
    fitted[l] = fitted_layer<Storage>(config, layers, l, file.shapes[l], file.lengths[l], name);
    require_that(file.key_scales[l] == key_scales.checksum(l), name, "load: layer ", l,
                 " has other key scales by channel");
  }
  const SequenceId id = sequences.add(file.lengths, file.gone);
  attempt_or_undo(
      [&] {
        for (std::size_t l = 0; l < fitted.size(); ++l)
          SavedRows<Storage>(fitted[l], sequences.pool(), sequences.list().tables.back())
              .load(from, file.lengths[l], file.gone, file.key_scales[l] != 0);
        from.finish_part("rows");
      },
      [&] { sequences.free(id); });
  layers = std::move(fitted);
  return id;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
