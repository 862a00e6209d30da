// Attention: prefill is bound by multiply-adds, decode by the bytes of keys and values. 32 heads, 8
// KV heads, head 128 unless the name says otherwise. Peers: what an Eigen user writes by hand, a
// matrix product, a softmax and a product for each head; and where a call should cost no more than
// its parts, the parts.
#include <eigenformer/attention.h>
#include <eigenformer/kv_cache.h>
#include <eigenformer/paged_kv_cache.h>

#include <optional>
#include <random>

#include "report/harness.h"

namespace ef = eigenformer;
using ef::Index;

namespace {

constexpr Index kHeads = 32, kKvHeads = 8, kDim = 128;
constexpr std::size_t kPeriod = 65521;  // of random numbers: gigabytes of them take too long

template <typename T, int Rank>
ef::Tensor<T, Rank> random_tensor(const Eigen::array<Index, Rank>& sizes, unsigned seed) {
  ef::Tensor<T, Rank> x(sizes);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> numbers(kPeriod);
  for (T& number : numbers) number = static_cast<T>(normal(generator));
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = numbers[static_cast<std::size_t>(i) % kPeriod];
  return x;
}

/// What `make` makes, once somebody asks for it: rows that a filter leaves out cost no memory.
template <typename F>
auto lazily(F make) {
  const auto made = std::make_shared<std::optional<decltype(make())>>();
  return [=]() -> auto& {
    if (!*made) made->emplace(make());
    return **made;
  };
}

template <typename T>
struct Inputs {
  ef::Tensor<T, 4> q, k, v, out;
  std::vector<Index> lengths;
  Inputs(Index batch, Index queries, Index keys, Index dim, std::vector<Index> key_lengths)
      : q(random_tensor<T, 4>({batch, queries, kHeads, dim}, 1)),
        k(random_tensor<T, 4>({batch, keys, kKvHeads, dim}, 2)),
        v(random_tensor<T, 4>({batch, keys, kKvHeads, dim}, 3)),
        out(batch, queries, kHeads, dim),
        lengths(std::move(key_lengths)) {}
};

/// softmax(Q K^T / sqrt(d)) V for one head of one sequence, causal at the end, with Eigen's
/// matrices.
void by_hand(Inputs<float>& x, Index b, Index h, bool causal) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Rows = Eigen::Map<Matrix, 0, Eigen::OuterStride<>>;
  const Index length = x.lengths[static_cast<std::size_t>(b)], dim = x.q.dimension(3),
              queries = std::min(x.q.dimension(1), length), kv = h / (kHeads / kKvHeads);
  Rows q(&x.q(b, 0, h, 0), queries, dim, Eigen::OuterStride<>(kHeads * dim)),
      out(&x.out(b, 0, h, 0), queries, dim, Eigen::OuterStride<>(kHeads * dim));
  Rows k(&x.k(b, 0, kv, 0), length, dim, Eigen::OuterStride<>(kKvHeads * dim)),
      v(&x.v(b, 0, kv, 0), length, dim, Eigen::OuterStride<>(kKvHeads * dim));
  Matrix scores = q * k.transpose() * (1.0f / std::sqrt(static_cast<float>(dim)));
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

double flops(double pairs, Index dim = kDim) {
  return 4.0 * kHeads * static_cast<double>(dim) * pairs;
}
double causal_pairs(Index n) { return static_cast<double>(n) * static_cast<double>(n + 1) / 2; }

template <typename T, typename Lazy>
bench::Row& forward_row(bench::Suite& suite, const std::string& name, const Lazy& inputs,
                        bench::Limit limit, bool causal, bool with_hand = true) {
  auto& row = suite.row("attention " + name, limit);
  row.ours([=](const auto& device) {
    Inputs<T>& x = inputs();
    ef::batched_attention_with_padding_into(device, x.out, x.q, x.k, x.v, x.lengths,
                                            {.causal = causal});
  });
  if constexpr (std::is_same_v<T, float>) {
    if (with_hand)
      row.peer("Eigen by hand", [=](const auto& device) {
        Inputs<T>& x = inputs();
        ef::cpu::parallel_for(device, x.q.dimension(0) * kHeads, ef::cpu::kWorthAThread,
                              [&](Index begin, Index end, int) {
                                for (Index t = begin; t < end; ++t)
                                  by_hand(x, t / kHeads, t % kHeads, causal);
                              });
      });
  }
  return row;
}

template <typename T>
constexpr bench::Peak kPeak =
    std::is_same_v<T, ef::bfloat16> ? bench::Peak::bfloat16 : bench::Peak::float_fma;

template <typename T>
void prefill_row(bench::Suite& suite, Index n, Index dim, const std::string& type) {
  forward_row<T>(
      suite, "causal prefill " + std::to_string(n) + (dim == kDim ? " " : ", heads of 64, ") + type,
      lazily([=] { return Inputs<T>(1, n, n, dim, {n}); }),
      bench::Limit::product(flops(causal_pairs(n), dim), 0, kPeak<T>), true, n <= 2048);
}

void prefill_cases(bench::Suite& suite) {
  for (const Index dim : {kDim, Index(64)})
    for (const Index n : {512, 2048, 8192}) {
      prefill_row<float>(suite, n, dim, "float");
      prefill_row<ef::bfloat16>(suite, n, dim, "bfloat16");
    }
}

// ---- decode: one query row for each sequence ----------------------------------------------------

std::string decode_name(Index batch, Index keys) {
  return "decode " + std::to_string(keys) + " keys" +
         (batch == 1 ? "" : ", " + std::to_string(batch) + " sequences") + ", ";
}

/// Reads elements and, of INT8, a scale for each row of a head.
bench::Limit decode_limit(Index batch, Index keys, std::size_t element, std::size_t scale = 0) {
  const double rows = 2.0 * static_cast<double>(batch * keys * kKvHeads);
  return bench::Limit::product(
      flops(static_cast<double>(batch * keys)),
      rows * (kDim * static_cast<double>(element) + static_cast<double>(scale)));
}

template <typename T>
auto dense_decode(bench::Suite& suite, Index batch, Index keys, const std::string& type) {
  const auto inputs = lazily([=] {
    const std::vector<Index> lengths(static_cast<std::size_t>(batch), keys);
    return Inputs<T>(batch, 1, keys, kDim, lengths);
  });
  return forward_row<T>(suite, decode_name(batch, keys) + type, inputs,
                        decode_limit(batch, keys, sizeof(T)), true)
      .calls.front();
}

template <typename Cache>
struct Decode {
  Cache cache;
  ef::Tensor<float, 4> q, out;
};

template <typename Make>
bench::Row& cached_decode(bench::Suite& suite, Index batch, Index keys, const std::string& name,
                          std::size_t element, std::size_t scale, const Make& cache) {
  const auto inputs = lazily([=] {
    return Decode<decltype(cache())>{cache(), random_tensor<float, 4>({batch, 1, kHeads, kDim}, 1),
                                     ef::Tensor<float, 4>(batch, 1, kHeads, kDim)};
  });
  auto& row = suite.row("attention " + decode_name(batch, keys) + name,
                        decode_limit(batch, keys, element, scale));
  return row.ours([=](const auto& device) {
    auto& x = inputs();
    ef::attention_with_kv_cache_into(device, x.out, x.q, x.cache, 0, {.causal = true});
  });
}

template <typename Storage>
ef::PagedKvCache<float, Storage> paged(const std::vector<Index>& lengths) {
  Index pages = 0;
  for (const Index length : lengths) pages += (length + 15) / 16;
  ef::PagedKvCache<float, Storage> cache(
      {.layers = 1, .kv_heads = kKvHeads, .head_dim = kDim, .page_size = 16, .page_count = pages});
  std::vector<ef::SequenceId> ids;
  for (std::size_t i = 0; i < lengths.size(); ++i) ids.push_back(cache.add_sequence());
  constexpr Index kStep = 16;  // page by page in turns, so that a sequence's pages lie apart
  const auto rows = random_tensor<float, 3>({kStep, kKvHeads, kDim}, 2);
  for (bool more = true; more;) {
    more = false;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const Index n = std::min(kStep, lengths[i] - cache.length(ids[i]));
      if (n <= 0) continue;
      const ef::TensorView<const float, 3> some(rows.data(), n, kKvHeads, kDim);
      cache.append(ids[i], 0, some, some);
      more = true;
    }
  }
  return cache;
}

// The cases of 16 sequences end where keys and values are 512 MiB of floats.
void decode_cases(bench::Suite& suite) {
  for (const auto& [batch, keys] :
       {std::pair<Index, Index>{1, 512}, {1, 4096}, {1, 65536}, {16, 512}, {16, 4096}}) {
    auto dense = dense_decode<float>(suite, batch, keys, "float");
    dense_decode<ef::bfloat16>(suite, batch, keys, "bfloat16");
    cached_decode(suite, batch, keys, "INT8", 1, sizeof(float), [b = batch, n = keys] {
      ef::KvCache<float, std::int8_t> cache;
      cache.reserve(n);
      const auto rows = random_tensor<float, 4>({b, 512, kKvHeads, kDim}, 2);
      while (cache.length(0) < n) ef::update_kv_cache(cache, rows, rows, 0);
      return cache;
    });
    dense.name = "the same without pages";
    const std::vector<Index> lengths(static_cast<std::size_t>(batch), keys);
    cached_decode(suite, batch, keys, "float, pages of 16", sizeof(float), 0, [=] {
      return paged<float>(lengths);
    }).calls.push_back(dense);
    cached_decode(suite, batch, keys, "INT8, pages of 16", 1, sizeof(float),
                  [=] { return paged<std::int8_t>(lengths); });
  }
}

// ---- batches of different lengths ---------------------------------------------------------------

void padded_cases(bench::Suite& suite) {
  std::vector<Index> lengths;  // 1 to 512: half of 16 x 512 is padding
  double pairs = 0;
  for (Index b = 0; b < 16; ++b) {
    lengths.push_back(1 + 511 * b / 15);
    pairs += static_cast<double>(lengths.back()) * static_cast<double>(lengths.back());
  }
  const auto inputs = lazily([=] { return Inputs<float>(16, 512, 512, kDim, lengths); });
  forward_row<float>(suite, "padded 16 x 512 float", inputs, bench::Limit::product(flops(pairs), 0),
                     false)
      .peer("its sequences alone", [=](const auto& device) {
        Inputs<float>& x = inputs();
        for (Index b = 0; b < 16; ++b) {
          const Index n = lengths[static_cast<std::size_t>(b)];
          const auto rows = [&](const ef::Tensor<float, 4>& of) {
            return ef::TensorView<const float, 4>(&of(b, 0, 0, 0), 1, n, of.dimension(2), kDim);
          };
          ef::TensorView<float, 4> out(&x.out(b, 0, 0, 0), 1, n, kHeads, kDim);
          ef::batched_attention_with_padding_into(device, out, rows(x.q), rows(x.k), rows(x.v),
                                                  std::array{n});
        }
      });
}

/// A step of a server: the last 512 tokens of a prompt, and one token each of 63 others.
struct RaggedStep {
  static constexpr Index kChunk = 512, kOthers = 63;
  ef::PagedKvCache<float> cache = paged<float>(lengths());
  ef::Tensor<float, 3> q = random_tensor<float, 3>({kChunk + kOthers, kHeads, kDim}, 1), out = q;

  static std::vector<Index> lengths() {
    std::vector<Index> result{1024};
    for (Index i = 0; i < kOthers; ++i) result.push_back(64 + 31 * i);
    return result;
  }
  /// Sequences [first, first + count), whose rows begin at `row`.
  template <typename D>
  void run(const D& device, Index first, Index count, Index row) {
    const std::span<const ef::SequenceId> ids = cache.sequences();
    std::vector<Index> offsets{0};
    for (Index i = first; i < first + count; ++i)
      offsets.push_back(offsets.back() + (i == 0 ? kChunk : 1));
    const ef::TensorView<const float, 3> queries(&q(row, 0, 0), offsets.back(), kHeads, kDim);
    ef::TensorView<float, 3> result(&out(row, 0, 0), offsets.back(), kHeads, kDim);
    ef::attention_with_kv_source_into(device, result, queries,
                                      cache.source(0, ids.subspan(static_cast<std::size_t>(first),
                                                                  static_cast<std::size_t>(count))),
                                      offsets, {.causal = true});
  }
};

void ragged_cases(bench::Suite& suite) {
  double pairs = 0, bytes = 0;
  for (const Index length : RaggedStep::lengths()) {
    const Index n = bytes == 0 ? RaggedStep::kChunk : 1;
    pairs += static_cast<double>(n) * static_cast<double>(length - n) + causal_pairs(n);
    bytes += 2.0 * kKvHeads * kDim * sizeof(float) * static_cast<double>(length);
  }
  const auto step = lazily([] { return RaggedStep(); });
  suite
      .row("attention paged step, a chunk of 512 and 63 tokens, float",
           bench::Limit::product(flops(pairs), bytes))
      .ours([=](const auto& device) { step().run(device, 0, 1 + RaggedStep::kOthers, 0); })
      .peer("its parts, the chunk and the tokens", [=](const auto& device) {
        step().run(device, 0, 1, 0);
        step().run(device, 1, RaggedStep::kOthers, RaggedStep::kChunk);
      });
}

// ---- what hides keys and moves scores -----------------------------------------------------------

constexpr Index kMasked = 2048;  // tokens

/// A row of kMasked tokens with options(side), where `side` is what make() makes.
template <typename Make, typename Options, typename Function = ef::problem::NoScoreFunction>
void masked_row(bench::Suite& suite, const std::string& name, double pairs, double bytes,
                const Make& make, const Options& options, const Function& function = {}) {
  struct Case {
    Inputs<float> x;
    decltype(make()) side;
  };
  const auto inputs = lazily([=] {
    return Case{Inputs<float>(1, kMasked, kMasked, kDim, {kMasked}), make()};
  });
  const auto run = [=](const auto& device, const auto& rule, const auto& score) {
    Inputs<float>& x = inputs().x;
    ef::batched_attention_with_padding_into(device, x.out, x.q, x.k, x.v, x.lengths, rule,
                                            ef::thread_workspace(), score);
  };
  suite
      .row("attention prefill " + std::to_string(kMasked) + " float, " + name,
           bench::Limit::product(flops(pairs), bytes))
      .ours([=](const auto& device) { run(device, options(inputs().side), function); })
      .peer("causal alone", [=](const auto& device) {
        run(device, ef::AttentionOptions{.causal = true}, ef::problem::NoScoreFunction{});
      });
}

void masked_cases(bench::Suite& suite) {
  constexpr Index n = kMasked, window = 256;
  const double causal = causal_pairs(n), all = static_cast<double>(n) * static_cast<double>(n);
  const auto is_seen = [](Index i, Index j) { return (i + j) % 13 != 0; };
  const auto table = [=](auto type, auto element) {
    ef::Tensor<decltype(type), 2> values(n, n);
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j) values(i, j) = element(i, j);
    return values;
  };
  masked_row(
      suite, "causal and a mask", causal, all, [=] { return table(bool{}, is_seen); },
      [](const auto& mask) { return ef::AttentionOptions{.causal = true, .mask = mask}; });
  masked_row(
      suite, "causal and a mask of bits", causal, all / 8,
      [=] {
        ef::Tensor<std::uint64_t, 2> bits(n, n / 64);
        for (Index i = 0; i < bits.size(); ++i)
          bits.data()[i] = ~(std::uint64_t{0x8004002001000800} >> i % 13);
        return bits;
      },
      [](const auto& bits) {
        return ef::AttentionOptions{
            .causal = true, .bit_mask = bits, .bit_mask_first_keys = std::array<Index, 1>{0}};
      });
  masked_row(
      suite, "causal and a bias", causal, 4 * all,
      [=] {
        return table(float{}, [](Index i, Index j) { return -0.01f * static_cast<float>(i - j); });
      },
      [](const auto& bias) { return ef::AttentionOptions{.causal = true, .bias = bias}; });
  masked_row(
      suite, "a window of " + std::to_string(window) + " to both sides",
      static_cast<double>(n) * (2 * window + 1) - static_cast<double>(window) * (window + 1), 0,
      [] { return 0; },
      [](int) { return ef::AttentionOptions{.window_left = window, .window_right = window}; });
  masked_row(
      suite, "causal and a function of scores", causal, 0, [] { return 0; },
      [](int) { return ef::AttentionOptions{.causal = true}; },
      [](auto score, const ef::ScorePosition& at) {
        return score - decltype(score)(0.01) * static_cast<decltype(score)>(at.query - at.key);
      });
}

void scores_cases(bench::Suite& suite) {
  constexpr Index rows = 64, keys = 1024;
  struct Case {
    Inputs<float> x{1, rows, keys, kDim, {keys}};
    ef::Tensor<float, 4> scores{1, kHeads, rows, keys};
  };
  const auto inputs = lazily([] { return Case(); });
  constexpr double scores = static_cast<double>(kHeads * rows * keys);
  suite
      .row("attention scores of 64 rows, 1024 keys, float",
           bench::Limit{0, 4 * scores, 2 * kDim * scores, bench::Peak::float_fma})
      .ours([=](const auto& device) {
        Case& c = inputs();
        ef::attention_scores_into(device, c.scores, c.x.q, c.x.k, c.x.lengths,
                                  ef::AttentionScoreStage::probabilities);
      });
}

void merge_cases(bench::Suite& suite) {
  constexpr Index rows = 2048;
  struct Case {
    ef::Tensor<float, 4> first = random_tensor<float, 4>({1, rows, kHeads, kDim}, 1),
                         second = random_tensor<float, 4>({1, rows, kHeads, kDim}, 2), out = first;
    ef::Tensor<float, 3> first_lse = random_tensor<float, 3>({1, kHeads, rows}, 3),
                         second_lse = random_tensor<float, 3>({1, kHeads, rows}, 4),
                         lse = first_lse;
  };
  const auto inputs = lazily([] { return Case(); });
  constexpr double bytes = 4.0 * rows * kHeads * (kDim + 1);
  suite
      .row("attention merge of 2 states, 2048 rows, float",
           bench::Limit::copy_bytes(2 * bytes, bytes))
      .ours([=](const auto& device) {
        Case& c = inputs();
        ef::merge_attention_states_into(device, c.out, c.lse, c.first, c.first_lse, c.second,
                                        c.second_lse);
      });
}

// ---- gradients ----------------------------------------------------------------------------------

template <typename T>
struct Backward {
  Inputs<T> x;
  ef::Tensor<float, 3> lse;
  ef::Tensor<T, 4> grad_out, gq, gk, gv;
  explicit Backward(Index n)
      : x(1, n, n, kDim, {n}),
        lse(1, kHeads, n),
        grad_out(random_tensor<T, 4>({1, n, kHeads, kDim}, 4)),
        gq(1, n, kHeads, kDim),
        gk(1, n, kKvHeads, kDim),
        gv(1, n, kKvHeads, kDim) {
    ef::batched_attention_with_padding_into(Eigen::DefaultDevice{}, x.out, x.q, x.k, x.v, x.lengths,
                                            {.causal = true, .log_sum_exp = lse});
  }
};

template <typename T>
void backward_row(bench::Suite& suite, Index n, const std::string& type) {
  const auto inputs = lazily([=] { return Backward<T>(n); });
  suite
      .row("attention backward, causal " + std::to_string(n) + " " + type,
           bench::Limit::product(2.5 * flops(causal_pairs(n)), 0, kPeak<T>))
      .ours([=](const auto& device) {
        Backward<T>& b = inputs();
        Inputs<T>& x = b.x;
        ef::attention_backward_into(device, b.gq, b.gk, b.gv, b.grad_out, x.q, x.k, x.v, x.out,
                                    b.lse, x.lengths, {.causal = true});
      });
}

void backward_cases(bench::Suite& suite) {
  for (const Index n : {512, 2048}) {
    backward_row<float>(suite, n, "float");
    backward_row<ef::bfloat16>(suite, n, "bfloat16");
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(prefill_cases)
EIGENFORMER_BENCHMARK(decode_cases)
EIGENFORMER_BENCHMARK(padded_cases)
EIGENFORMER_BENCHMARK(ragged_cases)
EIGENFORMER_BENCHMARK(masked_cases)
EIGENFORMER_BENCHMARK(scores_cases)
EIGENFORMER_BENCHMARK(merge_cases)
EIGENFORMER_BENCHMARK(backward_cases)
