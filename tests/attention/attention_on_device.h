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
void check(const AttentionCase<T>& c, const NamedOptions& named, bool tell_lengths = false,
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

}  // namespace eigenformer_test
