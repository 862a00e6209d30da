/// \file
/// How sampling takes parameters and random numbers of many rows. What one row's parameters are is
/// in problem/sampling_params.h; `sampling.h` is the manual.
#pragma once

#include <span>
#include <type_traits>
#include <vector>

#include "../problem/sampling_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Parameters one a row, made implicitly from a std::span, vector or array of SamplingParams: of
/// one with a name a view, of a temporary a copy. (A span would itself accept `{}` where the
/// parameters of all rows are meant.)
class RowSamplingParams {
 public:
  template <detail::ContiguousRange Range>
    requires std::is_convertible_v<Range&, std::span<const SamplingParams>>
  RowSamplingParams(Range&& rows) {
    const std::span<const SamplingParams> given(rows);
    if constexpr (detail::has_life_of_its_own<Range>)
      view_ = given;
    else
      owned_.assign(given.begin(), given.end());
  }
  const SamplingParams* data() const { return owned_.empty() ? view_.data() : owned_.data(); }
  Index size() const { return static_cast<Index>(owned_.empty() ? view_.size() : owned_.size()); }

 private:
  std::span<const SamplingParams> view_;
  std::vector<SamplingParams> owned_;
};

/// The random numbers of a call: one generator for all rows (row r draws at row r of its counter),
/// or one generator a row (each row draws at row 0 of its own, so that a request's draws follow it
/// from batch to batch). Made implicitly from a Philox, a span, vector or array of them; it refers
/// to them (and owns a Philox that is a temporary), and the call advances each by one.
class Generators {
 public:
  Generators(Philox& shared) : data_(&shared), size_(1), per_row_(false) {}
  Generators(Philox&& shared) : owned_(shared), data_(nullptr), size_(1), per_row_(false) {}
  Generators(std::span<Philox> one_a_row)
      : data_(one_a_row.data()), size_(static_cast<Index>(one_a_row.size())), per_row_(true) {}
  template <typename Range>
    requires(std::is_convertible_v<Range&, std::span<Philox>> &&
             !std::is_same_v<std::remove_cvref_t<Range>, Generators> &&
             !std::is_same_v<std::remove_cvref_t<Range>, std::span<Philox>>)
  Generators(Range& one_a_row) : Generators(std::span<Philox>(one_a_row)) {}

  const Philox* data() const { return data_ != nullptr || per_row_ ? data_ : &owned_; }
  Index size() const { return size_; }
  bool per_row() const { return per_row_; }
  void advance() {
    Philox* const first = data_ != nullptr || per_row_ ? data_ : &owned_;
    for (Index i = 0; i < size_; ++i) first[i].advance();
  }

 private:
  Philox owned_;
  Philox* data_;
  Index size_;
  bool per_row_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
