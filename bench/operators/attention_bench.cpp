// Attention: prefill is bound by multiply-adds, decode by the bytes of keys and values. 32 heads, 8
// KV heads, head 128. Peer: what an Eigen user writes by hand, a matrix product, a softmax and a
// product for each head.
#include <eigenformer/attention.h>

#include <random>

#include "report/harness.h"

namespace ef = eigenformer;
using ef::Index;

namespace {

constexpr Index kHeads = 32, kKvHeads = 8, kDim = 128;

template <typename T>
std::shared_ptr<ef::Tensor<T, 4>> random_rows(Index batch, Index rows, Index heads, unsigned seed) {
  auto x = std::make_shared<ef::Tensor<T, 4>>(batch, rows, heads, kDim);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (Index i = 0; i < x->size(); ++i) x->data()[i] = static_cast<T>(normal(generator));
  return x;
}

template <typename T>
struct Inputs {
  std::shared_ptr<ef::Tensor<T, 4>> q, k, v, out;
  std::shared_ptr<std::vector<Index>> lengths;
  Inputs(Index batch, Index queries, Index keys, std::vector<Index> key_lengths)
      : q(random_rows<T>(batch, queries, kHeads, 1)),
        k(random_rows<T>(batch, keys, kKvHeads, 2)),
        v(random_rows<T>(batch, keys, kKvHeads, 3)),
        out(std::make_shared<ef::Tensor<T, 4>>(batch, queries, kHeads, kDim)),
        lengths(std::make_shared<std::vector<Index>>(std::move(key_lengths))) {}
};

/// softmax(Q K^T / sqrt(d)) V for one head of one sequence, causal at the end, with Eigen's
/// matrices.
void by_hand(const Inputs<float>& x, Index b, Index h, bool causal) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Rows = Eigen::Map<Matrix, 0, Eigen::OuterStride<>>;
  const Index length = (*x.lengths)[static_cast<std::size_t>(b)],
              queries = std::min(x.q->dimension(1), length), kv = h / (kHeads / kKvHeads);
  Rows q(&(*x.q)(b, 0, h, 0), queries, kDim, Eigen::OuterStride<>(kHeads * kDim)),
      out(&(*x.out)(b, 0, h, 0), queries, kDim, Eigen::OuterStride<>(kHeads * kDim));
  Rows k(&(*x.k)(b, 0, kv, 0), length, kDim, Eigen::OuterStride<>(kKvHeads * kDim)),
      v(&(*x.v)(b, 0, kv, 0), length, kDim, Eigen::OuterStride<>(kKvHeads * kDim));
  Matrix scores = q * k.transpose() * (1.0f / std::sqrt(static_cast<float>(kDim)));
  for (Index i = 0; i < queries; ++i) {
    const Index seen = causal ? length - queries + i + 1 : length;
    auto row = scores.row(i);
    const float maximum = row.head(seen).maxCoeff();
    row.head(seen) = (row.head(seen).array() - maximum).exp();
    row.tail(length - seen).setZero();
    row /= row.head(seen).sum();
  }
  out.noalias() = scores * v;
}

struct ByHand {
  Inputs<float> x;
  bool causal;
  template <typename D>
  void operator()(const D& device) const {
    ef::cpu::parallel_for(device, x.q->dimension(0) * kHeads, ef::cpu::kWorthAThread,
                          [&](Index begin, Index end, int) {
                            for (Index t = begin; t < end; ++t)
                              by_hand(x, t / kHeads, t % kHeads, causal);
                          });
  }
};

double flops(double pairs) { return 4.0 * kHeads * kDim * pairs; }

template <typename T>
void forward_row(bench::Suite& suite, const std::string& name, const Inputs<T>& x, double pairs,
                 double key_bytes, const ef::AttentionOptions& options) {
  auto& row = suite.row("attention " + name, bench::Limit::product(flops(pairs), key_bytes));
  row.ours([=](const auto& device) {
    ef::batched_attention_with_padding_into(device, *x.out, *x.q, *x.k, *x.v, *x.lengths, options);
  });
  if constexpr (std::is_same_v<T, float>) row.peer("Eigen by hand", ByHand{x, options.causal});
}

void prefill_cases(bench::Suite& suite) {
  for (const Index n : {512, 2048}) {
    const double pairs = static_cast<double>(n) * static_cast<double>(n + 1) / 2;
    forward_row(suite, "causal prefill " + std::to_string(n) + " float",
                Inputs<float>(1, n, n, {n}), pairs, 0, {.causal = true});
  }
  forward_row(suite, "causal prefill 512 bfloat16", Inputs<ef::bfloat16>(1, 512, 512, {512}),
              512.0 * 513 / 2, 0, {.causal = true});
}

void decode_cases(bench::Suite& suite) {
  const double elements = 2.0 * 4096 * kKvHeads * kDim;
  forward_row(suite, "decode 4096 keys float", Inputs<float>(1, 1, 4096, {4096}), 4096,
              4 * elements, {.causal = true});
  forward_row(suite, "decode 4096 keys bfloat16", Inputs<ef::bfloat16>(1, 1, 4096, {4096}), 4096,
              2 * elements, {.causal = true});
}

void padded_cases(bench::Suite& suite) {
  std::vector<Index> lengths;  // 31% of 16 x 512
  double pairs = 0;
  for (Index b = 0; b < 16; ++b) {
    lengths.push_back(b % 4 == 0 ? 384 : 16 + 16 * b);
    pairs += static_cast<double>(lengths.back()) * static_cast<double>(lengths.back());
  }
  forward_row(suite, "padded 16 x 512 float", Inputs<float>(16, 512, 512, lengths), pairs, 0, {});
}

void backward_cases(bench::Suite& suite) {
  const Index n = 512;
  Inputs<float> x(1, n, n, {n});
  auto lse = std::make_shared<ef::Tensor<float, 3>>(1, kHeads, n);
  auto grad_out = random_rows<float>(1, n, kHeads, 4);
  ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, *x.out, *x.q, *x.k, *x.v,
                                          *x.lengths, {.causal = true, .log_sum_exp = *lse});
  auto gq = random_rows<float>(1, n, kHeads, 5), gk = random_rows<float>(1, n, kKvHeads, 6),
       gv = random_rows<float>(1, n, kKvHeads, 7);
  auto& row = suite.row("attention backward, causal 512 float",
                        bench::Limit::product(2.5 * flops(n * (n + 1) / 2.0), 0));
  row.ours([=](const auto& device) {
    ef::attention_backward_into(device, *gq, *gk, *gv, *grad_out, *x.q, *x.k, *x.v, *x.out, *lse,
                                *x.lengths, {.causal = true});
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(prefill_cases)
EIGENFORMER_BENCHMARK(decode_cases)
EIGENFORMER_BENCHMARK(padded_cases)
EIGENFORMER_BENCHMARK(backward_cases)
