/// \file
/// Numbers that an option or an argument refers to: `Values<T>` for one type of element,
/// `LengthSpan` for lengths and offsets of any integer type. Both are made implicitly. They view
/// what has a life of its own (a container with a name, a std::span) and own what has none (a
/// braced list, a container that is a temporary), so that options kept in a variable stay whole:
///
///   ef::AttentionOptions options{.causal = true, .alibi_slopes = ef::alibi_slopes(8)};   // owned
///   std::vector<float> sinks = ...;
///   options.sinks = sinks;   // viewed: `sinks` must live as long as `options` is used
///
/// Up to eight elements are held inside; more of a braced list allocate.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <initializer_list>
#include <limits>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "eigen.h"
#include "tensor.h"
#include "workspace.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename R>
concept ContiguousRange = std::ranges::contiguous_range<std::remove_reference_t<R>> &&
                          std::ranges::sized_range<std::remove_reference_t<R>>;

template <typename R>
using element_of = std::remove_cv_t<std::ranges::range_value_t<std::remove_reference_t<R>>>;

/// What lives on after the expression that names it: lvalues, and views of memory elsewhere.
template <typename R>
inline constexpr bool has_life_of_its_own =
    std::is_lvalue_reference_v<R> || std::ranges::borrowed_range<std::remove_reference_t<R>>;

template <typename T>
concept LengthScalar = std::integral<T> && !std::same_as<T, bool>;

}  // namespace detail

/// Elements of type T, viewed or owned.
template <typename T>
class Values {
 public:
  Values() = default;
  Values(std::initializer_list<T> list) : Values(copy(list.begin(), list.size())) {}
  template <detail::ContiguousRange R>
    requires(!std::same_as<std::remove_cvref_t<R>, Values> &&
             std::same_as<detail::element_of<R>, T>)
  Values(R&& range) {
    if constexpr (detail::has_life_of_its_own<R>) {
      view_ = {std::ranges::data(range), static_cast<std::size_t>(std::ranges::size(range))};
    } else if constexpr (std::same_as<R, std::vector<T>>) {
      many_ = std::move(range);
      storage_ = Storage::many;
    } else {
      *this = copy(std::ranges::data(range), static_cast<std::size_t>(std::ranges::size(range)));
    }
  }
  /// A view of `count` elements.
  Values(const T* first, std::size_t count) : view_(first, count) {}
  /// A tensor of rank 1, an owning one only if it has a name.
  template <typename X>
    requires(rank_of<X> == 1 && std::same_as<scalar_of<X>, T>)
  Values(X&& tensor) {
    const auto count = static_cast<std::size_t>(tensor.dimension(0));
    if constexpr (std::is_lvalue_reference_v<X> || !detail::owns_its_elements<X>)
      view_ = {tensor.data(), count};
    else
      *this = copy(tensor.data(), count);
  }

  /// Owns `count` elements, element(i) each.
  template <typename Element>
  static Values owned(std::size_t count, Element&& element) {
    Values values;
    values.storage_ = count <= kFew ? Storage::few : Storage::many;
    values.few_size_ = count;
    if (count > kFew) values.many_.resize(count);
    T* const to = count <= kFew ? values.few_.data() : values.many_.data();
    for (std::size_t i = 0; i < count; ++i) to[i] = element(i);
    return values;
  }

  const T* data() const {
    if (storage_ == Storage::few) return few_.data();
    return storage_ == Storage::many ? many_.data() : view_.data();
  }
  std::size_t size() const {
    if (storage_ == Storage::few) return few_size_;
    return storage_ == Storage::many ? many_.size() : view_.size();
  }
  bool empty() const { return size() == 0; }
  const T& operator[](std::size_t i) const { return data()[i]; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size(); }
  operator std::span<const T>() const { return {data(), size()}; }

 private:
  enum class Storage : unsigned char { view, few, many };
  static constexpr std::size_t kFew = 8;

  static Values copy(const T* first, std::size_t count) {
    return owned(count, [first](std::size_t i) { return first[i]; });
  }

  std::span<const T> view_;
  std::vector<T> many_;
  std::array<T, kFew> few_{};
  std::size_t few_size_ = 0;
  Storage storage_ = Storage::view;
};

class LengthSpan;
namespace detail {
inline const Index* indices(const LengthSpan& span, Workspace::Frame& frame);
}  // namespace detail

/// Lengths or offsets of sequences: any contiguous range of integers (std::vector, std::array,
/// std::span, arrays, an ef::Tensor of rank 1) or a braced list. Host memory. What does not fit an
/// Index reads as the nearest one that does.
class LengthSpan {
 public:
  LengthSpan() = default;
  template <detail::LengthScalar T>
  LengthSpan(std::initializer_list<T> list) {
    own(list.begin(), list.size());
  }
  LengthSpan(std::initializer_list<Index> list) { own(list.begin(), list.size()); }
  template <detail::ContiguousRange R>
    requires(!std::same_as<std::remove_cvref_t<R>, LengthSpan>)
  LengthSpan(R&& range) {
    static_assert(detail::LengthScalar<detail::element_of<R>>,
                  "eigenformer: this argument holds lengths or offsets, which are integers");
    set<detail::has_life_of_its_own<R>>(std::ranges::data(range),
                                        static_cast<std::size_t>(std::ranges::size(range)));
  }
  template <typename X>
    requires(rank_of<X> == 1 && detail::LengthScalar<scalar_of<X>>)
  LengthSpan(X&& tensor) {
    constexpr bool lives = std::is_lvalue_reference_v<X> || !detail::owns_its_elements<X>;
    set<lives>(tensor.data(), static_cast<std::size_t>(tensor.dimension(0)));
  }
  /// Whatever else converts to a span of Index or int.
  template <typename X>
    requires(!detail::ContiguousRange<X> && rank_of<X> != 1 &&
             std::convertible_to<X, std::span<const Index>>)
  LengthSpan(X&& x) {
    const std::span<const Index> span(std::forward<X>(x));
    set<std::is_lvalue_reference_v<X>>(span.data(), span.size());
  }
  template <typename X>
    requires(!detail::ContiguousRange<X> && rank_of<X> != 1 &&
             !std::convertible_to<X, std::span<const Index>> &&
             std::convertible_to<X, std::span<const int>>)
  LengthSpan(X&& x) {
    const std::span<const int> span(std::forward<X>(x));
    set<std::is_lvalue_reference_v<X>>(span.data(), span.size());
  }

  Index size() const { return read_ != nullptr ? size_ : static_cast<Index>(indices_.size()); }
  bool empty() const { return size() == 0; }
  Index operator[](Index i) const {
    return read_ != nullptr ? read_(others_, i) : indices_[static_cast<std::size_t>(i)];
  }

 private:
  template <typename T>
  static Index to_index(T value) {
    const auto number = +value;  // in_range takes no character types
    if (std::in_range<Index>(number)) return static_cast<Index>(number);
    using limits = std::numeric_limits<Index>;
    return std::cmp_less(number, 0) ? (limits::min)() : (limits::max)();
  }
  template <typename T>
  void own(const T* first, std::size_t count) {
    indices_ = Values<Index>::owned(count, [first](std::size_t i) { return to_index(first[i]); });
  }
  template <bool Lives, typename T>
  void set(const T* first, std::size_t count) {
    if constexpr (!Lives) {
      own(first, count);
    } else if constexpr (std::same_as<T, Index>) {
      indices_ = std::span<const Index>(first, count);
    } else {
      others_ = first;
      size_ = static_cast<Index>(count);
      read_ = [](const void* values, Index i) {
        return to_index(static_cast<const T*>(values)[i]);
      };
    }
  }

  friend const Index* detail::indices(const LengthSpan&, Workspace::Frame&);

  Values<Index> indices_;         // where the elements are Index, or owned
  const void* others_ = nullptr;  // else a view of integers of another type
  Index size_ = 0;                // of others_
  Index (*read_)(const void*, Index) = nullptr;
};

/// The elements as a problem takes them: where they lie if they are Index, else a copy in the
/// frame. They end with the span or the frame, whichever ends first.
inline const Index* detail::indices(const LengthSpan& span, Workspace::Frame& frame) {
  if (span.read_ == nullptr) return span.indices_.data();
  Index* const copy = frame.take<Index>(span.size_);
  for (Index i = 0; i < span.size_; ++i) copy[i] = span[i];
  return copy;
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
