#include "openblas.h"

#include <cblas.h>

#include <sstream>
#include <vector>

namespace bench::openblas {

std::string version() {
  // "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH NO_AFFINITY SkylakeX MAX_THREADS=64"
  std::istringstream words(openblas_get_config());
  std::string name, number;
  words >> name >> number;
  return name + " " + number + " (" + openblas_get_corename() + ")";
}

std::function<void(int)> matmul(const Product& product, std::shared_ptr<float> y) {
  const std::size_t size = static_cast<std::size_t>(product.in * product.out);
  auto copies = std::make_shared<std::vector<std::vector<float>>>();  // beside the original
  for (int copy = 1; copy < product.copies; ++copy)
    copies->emplace_back(product.w.get(), product.w.get() + size);
  return [product, y, copies, turn = std::size_t{0}](int threads) mutable {
    const float* w = turn == 0 ? product.w.get() : (*copies)[turn - 1].data();
    turn = (turn + 1) % (copies->size() + 1);
    openblas_set_num_threads(threads);
    const auto tokens = static_cast<blasint>(product.tokens), in = static_cast<blasint>(product.in),
               out = static_cast<blasint>(product.out);
    if (tokens == 1)
      cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1.0f, w, in, product.x.get(), 1, 0.0f,
                  y.get(), 1);
    else
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, tokens, out, in, 1.0f, product.x.get(),
                  in, w, in, 0.0f, y.get(), out);
  };
}

}  // namespace bench::openblas
