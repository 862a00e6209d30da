// A case of attention on GPUs, emulated or not, against the double reference.
#pragma once

#include "attention_case.h"
#include "device.h"

namespace eigenformer_test {

template <typename A, typename B>
void expect_log_sums(const A& actual, const B& expected, double bound, const std::string& name) {
  for (Index i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(actual.data()[i]), e = expected.data()[i];
    if (std::isinf(e))
      EXPECT_EQ(a, e) << name << ", log_sum_exp " << i;
    else
      EXPECT_LT(std::abs(a - e), bound * (1 + std::abs(e))) << name << ", log_sum_exp " << i;
  }
}

/// Options as they are: their views are of host memory, or there are none.
inline constexpr auto kAsTheyAre = [](const auto&, ef::AttentionOptions&) { return 0; };

/// keep(bench, options) puts what the options view into memory of the device, and returns what
/// holds it.
template <typename T, typename Keep = decltype(kAsTheyAre)>
void check_forward(const AttentionCase<T>& c, const NamedOptions& named, bool tell_lengths = false,
                   const Keep& keep = kAsTheyAre) {
  using C = ef::compute_type<T>;
  const AttentionShape& s = c.shape;
  const auto expected = c.reference(named.options);
  for_each_gpu([&](const auto& bench) {
    auto q = on_device(bench, c.q);
    auto k = on_device(bench, c.k);
    auto v = on_device(bench, c.v);
    auto out = on_device(bench, poisoned_tensor<T, 4>({s.batch, s.queries, s.heads, s.value_dim}));
    auto lse = on_device(bench, poisoned_tensor<C, 3>({s.batch, s.heads, s.queries}));
    auto options = named.options;
    auto lse_view = lse.view();
    options.log_sum_exp = lse_view;
    [[maybe_unused]] const auto kept = keep(bench, options);
    if (tell_lengths) options.query_lengths = c.query_lengths;
    ef::batched_attention_with_padding_into(bench.device, out.view(), q.cview(), k.cview(),
                                            v.cview(), c.key_lengths, options);
    EXPECT_LT(relative_error(out.host(), expected.output), tolerance<T>()) << named.name;
    expect_log_sums(lse.host(), expected.log_sum_exp, std::max(1e-5, tolerance<T>() / 100),
                    named.name);
  });
}

inline constexpr float kHidden = -std::numeric_limits<float>::infinity();  // in a bias

inline bool hidden(Index b, Index h, Index i, Index j) {
  return j % 11 == 5 || i == 1 || (b * 3 + h * 5 + i * 7 + j * 2) % 6 == 0;
}

/// What is hidden in a bias, a mask and in bits (for all heads, as of head 0, from these keys on),
/// in host memory: (batch, heads, rows, keys). Row 1 sees no key; nobody sees the keys 5, 16, ...
struct Masks {
  ef::Tensor<float, 4> bias;
  ef::Tensor<std::uint8_t, 4> mask;
  ef::Tensor<std::uint64_t, 3> bits;
  std::vector<Index> first_keys;

  Masks(const AttentionShape& s, Index heads, std::vector<Index> first)
      : bias(random_tensor<float, 4>({s.batch, heads, s.queries, s.keys}, 9)),
        mask(s.batch, heads, s.queries, s.keys),
        bits(s.batch, s.queries, s.keys / 64 + 1),
        first_keys(std::move(first)) {
    bits.setZero();
    for (Index b = 0; b < s.batch; ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index i = 0; i < s.queries; ++i)
          for (Index j = 0; j < s.keys; ++j) {
            const bool hides = hidden(b, h, i, j);
            mask(b, h, i, j) = hides ? 0 : static_cast<std::uint8_t>(1 + j);
            if (hides) bias(b, h, i, j) = kHidden;
            const Index bit = j - first_keys[static_cast<std::size_t>(b)];
            if (h == 0 && bit >= 0 && !hides) bits(b, i, bit / 64) |= std::uint64_t{1} << bit % 64;
          }
  }
};

/// The same in the device's memory: what the host's options view.
template <typename B>
struct DeviceMasks {
  DeviceTensor<B, float, 4> bias;
  DeviceTensor<B, std::uint8_t, 4> mask;
  DeviceTensor<B, std::uint64_t, 3> bits;

  DeviceMasks(const B& bench, const Masks& m, ef::AttentionOptions& options)
      : bias(bench, m.bias), mask(bench, m.mask), bits(bench, m.bits) {
    const auto moved = [](auto& view, const auto& from, const auto& to) {
      if (view.present())
        view = {to.view().data() + (view.data() - from.data()),
                view.sizes(),
                {view.stride(0), view.stride(1), view.stride(2), view.stride(3)}};
    };
    moved(options.bias, m.bias, bias);
    moved(options.mask, m.mask, mask);
    if (options.bit_mask.present()) options.bit_mask = bits.cview();
  }
};

/// Keys that nobody sees hold NaN and infinity.
template <typename T>
void poison_hidden(AttentionCase<T>& c) {
  for (Index b = 0; b < c.shape.batch; ++b)
    for (Index j = 5; j < c.shape.keys; j += 11)
      for (Index h = 0; h < c.shape.kv_heads; ++h) {
        c.k(b, j, h, 0) = std::numeric_limits<T>::quiet_NaN();
        c.v(b, j, h, c.shape.value_dim - 1) = std::numeric_limits<T>::infinity();
      }
}
template <typename T>
AttentionCase<T> poisoned_case(const AttentionShape& shape, std::vector<Index> lengths,
                               std::vector<Index> queries = {}) {
  AttentionCase<T> c(shape, std::move(lengths), 1, std::move(queries));
  poison_hidden(c);
  return c;
}

}  // namespace eigenformer_test
