// Paged KV cache: one decode step of 32 sequences of different lengths, and a fork with the copy
// its first write makes; a prompt whose prefix is known (attention over pages is among attention's
// rows). Limits: read the new rows, write them (fork: read and write a page); compare the tokens.
// Peer: a std::vector of Eigen tensors, one per sequence, written by slices.
#include <eigenformer/paged_kv_cache.h>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

constexpr Eigen::Index kBatch = 32, kHeads = 8, kHeadDim = 128, kLongest = 2048;

template <typename Storage>
struct Server {
  Server()
      : cache({.layers = 1,
               .kv_heads = kHeads,
               .head_dim = kHeadDim,
               .page_size = 16,
               .page_count = kBatch * kLongest / 16}) {
    token.setRandom();
    for (Eigen::Index i = 0; i < kBatch; ++i) {
      ef::Tensor<float, 3> prompt(1 + i * 31, kHeads, kHeadDim);
      prompt.setRandom();
      ids.push_back(cache.add_sequence());
      cache.append(ids.back(), 0, prompt, prompt);
    }
    for (int i = 0; i < 1087; ++i)
      step(Eigen::DefaultDevice{});  // touches every page for the first time
  }
  template <typename Device>
  void step(const Device& device) {
    if (cache.length(ids.back()) == kLongest)
      for (std::size_t i = 0; i < ids.size(); ++i)
        cache.truncate(ids[i], 1 + static_cast<Eigen::Index>(i) * 31);
    ef::update_kv_cache(device, cache, ids, token, token, 0);
  }
  ef::PagedKvCache<float, Storage> cache;
  std::vector<ef::SequenceId> ids;
  ef::Tensor<float, 4> token{kBatch, 1, kHeads, kHeadDim};
};

template <typename Storage>
bench::Row& append_case(bench::Suite& suite, const std::string& name) {
  const auto server = std::make_shared<Server<Storage>>();
  const double elements = 2.0 * static_cast<double>(server->token.size());
  auto& row =
      suite.row("paged append, 32 sequences, (8, 128), " + name,
                bench::Limit::copy_bytes(elements * sizeof(float), elements * sizeof(Storage)));
  row.ours([=](const auto& device) { server->step(device); });
  return row;
}

void append_cases(bench::Suite& suite) {
  auto& row = append_case<float>(suite, "float");
  struct Dense {
    std::vector<ef::Tensor<float, 3>> keys, values;
    Eigen::Index step = 0;
  };
  const auto dense = std::make_shared<Dense>();
  for (Eigen::Index i = 0; i < kBatch; ++i) {
    dense->keys.emplace_back(kLongest, kHeads, kHeadDim);
    dense->values.emplace_back(kLongest, kHeads, kHeadDim);
    dense->keys.back().setRandom();
    dense->values.back().setRandom();
  }
  const auto token = std::make_shared<ef::Tensor<float, 4>>(kBatch, 1, kHeads, kHeadDim);
  token->setRandom();
  row.peer("Eigen tensors of the full length, slices", [=](const auto& device) {
    const Eigen::array<Eigen::Index, 3> extents{1, kHeads, kHeadDim};
    dense->step = (dense->step + 1) % 1000;
    for (Eigen::Index i = 0; i < kBatch; ++i) {
      const Eigen::array<Eigen::Index, 3> at{1 + i * 31 + dense->step, 0, 0};
      dense->keys[static_cast<std::size_t>(i)].slice(at, extents).device(device) =
          token->chip(i, 0);
      dense->values[static_cast<std::size_t>(i)].slice(at, extents).device(device) =
          token->chip(i, 0);
    }
  });
  append_case<std::int8_t>(suite, "as INT8");
}

void fork_case(bench::Suite& suite) {
  const auto server = std::make_shared<Server<float>>();
  const auto token = std::make_shared<ef::Tensor<float, 3>>(1, kHeads, kHeadDim);
  token->setRandom();
  const double page = 2.0 * 16 * kHeads * kHeadDim * sizeof(float);
  auto& row =
      suite.row("fork 963 positions, append one, free", bench::Limit::copy_bytes(page, page));
  row.ours([=](const auto& device) {
    const ef::SequenceId child = server->cache.fork(server->ids.back());
    server->cache.append(device, child, 0, *token, *token);
    server->cache.free(child);
  });
  const auto parent = std::make_shared<ef::Tensor<float, 3>>(963, kHeads, kHeadDim);
  parent->setRandom();
  row.peer("Eigen concatenate", [=](const auto& device) {
    for (int i = 0; i < 2; ++i) {
      ef::Tensor<float, 3> child(964, kHeads, kHeadDim);
      child.device(device) = parent->concatenate(*token, 0);
    }
  });
}

void prefix_case(bench::Suite& suite) {
  constexpr Eigen::Index tokens = 4096;
  struct Known {
    ef::PagedKvCache<float> cache{
        {.layers = 1, .kv_heads = 1, .head_dim = 1, .page_size = 16, .page_count = 1024}};
    std::vector<std::int32_t> prompt = std::vector<std::int32_t>(tokens, 7);
  };
  const auto known = std::make_shared<Known>();
  ef::Tensor<float, 3> rows(tokens, 1, 1);
  rows.setZero();
  const ef::SequenceId id = known->cache.add_sequence();
  known->cache.append(id, 0, rows, rows);
  known->cache.keep_prefix(id, known->prompt);
  known->cache.free(id);
  auto& row = suite.row("share a known prefix of 4096 tokens, free",
                        bench::Limit::read_bytes(2 * 4.0 * tokens));
  row.ours([=](const auto&) {
    const ef::SequenceId own = known->cache.add_sequence();
    known->cache.share_prefix(own, known->prompt);
    known->cache.free(own);
  });
}

}  // namespace

EIGENFORMER_BENCHMARK(append_cases)
EIGENFORMER_BENCHMARK(fork_case)
EIGENFORMER_BENCHMARK(prefix_case)
