#include "matmul.h"

#if defined(EIGENFORMER_BENCH_ONEDNN)
#include "onednn.h"
#endif
#if defined(EIGENFORMER_BENCH_OPENBLAS)
#include "openblas.h"
#endif

namespace bench {
namespace {

using OwnThreads = std::function<void(int)>;

/// The result and the call are made when the peer is first used: rows that are filtered out cost
/// nothing.
[[maybe_unused]] void add_peer(Row& row, const Product& product, const std::string& name,
                               const std::string& family,
                               OwnThreads (*matmul)(const Product&, std::shared_ptr<float>)) {
  struct State {
    std::shared_ptr<float> y;
    OwnThreads call;
  };
  auto state = std::make_shared<State>();
  const auto run = [state, product, matmul](int threads) {
    if (!state->call) {
      state->y =
          std::shared_ptr<float>(new float[static_cast<std::size_t>(product.tokens * product.out)],
                                 std::default_delete<float[]>());
      state->call = matmul(product, state->y);
    }
    state->call(threads);
  };
  row.peer_with_own_threads(name, family, run, [run, state, product] {
    run(1);
    return mismatch_of(product, state->y.get());
  });
}

}  // namespace

std::vector<std::string> peer_versions() {
  std::vector<std::string> versions;
#if defined(EIGENFORMER_BENCH_ONEDNN)
  versions.push_back(onednn::version());
#endif
#if defined(EIGENFORMER_BENCH_OPENBLAS)
  versions.push_back(openblas::version());
#endif
  return versions;
}

void add_matmul_peers([[maybe_unused]] Row& row, [[maybe_unused]] const Product& product) {
#if defined(EIGENFORMER_BENCH_ONEDNN)
  add_peer(row, product, "oneDNN", "oneDNN", onednn::matmul);
#endif
#if defined(EIGENFORMER_BENCH_OPENBLAS)
  if (product.type == WeightType::float32)
    add_peer(row, product, "OpenBLAS", "OpenBLAS", openblas::matmul);
#endif
}

}  // namespace bench
