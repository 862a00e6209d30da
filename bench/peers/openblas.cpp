#include "openblas.h"

#include <cblas.h>

#include <sstream>

namespace bench::openblas {

std::string version() {
  // "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH NO_AFFINITY SkylakeX MAX_THREADS=64"
  std::istringstream words(openblas_get_config());
  std::string name, number;
  words >> name >> number;
  return name + " " + number + " (" + openblas_get_corename() + ")";
}

std::function<void(int)> matmul(const Product& product, std::shared_ptr<float> y) {
  return [product, y](int threads) {
    openblas_set_num_threads(threads);
    const auto tokens = static_cast<blasint>(product.tokens), in = static_cast<blasint>(product.in),
               out = static_cast<blasint>(product.out);
    if (tokens == 1)
      cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1.0f, product.w.get(), in, product.x.get(), 1, 0.0f, y.get(), 1);
    else
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, tokens, out, in, 1.0f, product.x.get(), in, product.w.get(), in, 0.0f,
                  y.get(), out);
  };
}

}  // namespace bench::openblas
