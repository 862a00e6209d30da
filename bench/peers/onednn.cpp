#include "onednn.h"

#include <dlfcn.h>

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

namespace bench::onednn {
namespace {

using dnnl::memory;
using Tag = memory::format_tag;
using Type = memory::data_type;

/// Sets the size of the OpenMP pool that oneDNN runs on. Looked up at run time: oneDNN may have
/// been built for another OpenMP library than this compiler's, or for none.
void set_threads(int threads) {
  using SetThreads = void (*)(int);
  static const SetThreads set =
      reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set != nullptr) set(threads);
}

/// q = round(v / scale), scale = max|v| / 127; returns the scale.
float quantize(const float* values, std::int64_t count, std::int8_t* q) {
  float largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i]));
  const float scale = largest > 0 ? largest / 127.0f : 1.0f;
  for (std::int64_t i = 0; i < count; ++i)
    q[i] = static_cast<std::int8_t>(std::nearbyint(values[i] / scale));
  return scale;
}

class Matmul {
 public:
  Matmul(Product product, std::shared_ptr<float> y)
      : product_(std::move(product)), y_(std::move(y)) {}

  void run(int threads) {
    set_threads(threads);
    if (threads != threads_) build(threads);
    arguments_[DNNL_ARG_WEIGHTS] = weights_[turn_];
    turn_ = (turn_ + 1) % weights_.size();
    primitive_.execute(stream_, arguments_);
    stream_.wait();
  }

 private:
  Type type() const {
    return product_.type == WeightType::float32    ? Type::f32
           : product_.type == WeightType::bfloat16 ? Type::bf16
                                                   : Type::s8;
  }

  /// The primitive fixes its number of threads, and may choose another layout of the weights for
  /// it.
  void build(int threads) {
    const memory::desc x_desc({product_.tokens, product_.in}, type(), Tag::ab);
    const memory::desc w_desc({product_.in, product_.out}, type(), Tag::any);
    const memory::desc y_desc({product_.tokens, product_.out}, Type::f32, Tag::ab);
    std::vector<std::int8_t> x8, w8;
    float x_scale = 1;
    std::vector<float> w_scales(static_cast<std::size_t>(product_.out), 1.0f);
    if (product_.type == WeightType::int8) {
      x8.resize(static_cast<std::size_t>(product_.tokens * product_.in));
      w8.resize(static_cast<std::size_t>(product_.out * product_.in));
      x_scale = quantize(product_.x.get(), product_.tokens * product_.in, x8.data());
      for (std::int64_t o = 0; o < product_.out; ++o)
        w_scales[static_cast<std::size_t>(o)] =
            quantize(product_.w.get() + o * product_.in, product_.in, w8.data() + o * product_.in);
    }
    arguments_.clear();
    const auto descriptor = describe(x_desc, w_desc, y_desc, x_scale, w_scales);
    primitive_ = dnnl::matmul(descriptor);
    // (out, in) row-major is what oneDNN calls (in, out) in order "ba".
    arguments_[DNNL_ARG_SRC] = converted(product_.x.get(), x8, {product_.tokens, product_.in},
                                         Tag::ab, descriptor.src_desc());
    weights_.clear();
    for (int copy = 0; copy < product_.copies; ++copy)
      weights_.push_back(converted(product_.w.get(), w8, {product_.in, product_.out}, Tag::ba,
                                   descriptor.weights_desc()));
    turn_ = 0;
    arguments_[DNNL_ARG_DST] = memory(descriptor.dst_desc(), engine_, y_.get());
    threads_ = threads;
  }

#if DNNL_VERSION_MAJOR >= 3
  dnnl::matmul::primitive_desc describe(const memory::desc& x, const memory::desc& w,
                                        const memory::desc& y, float x_scale,
                                        const std::vector<float>& w_scales) {
    dnnl::primitive_attr attributes;
    if (product_.type == WeightType::int8) {
      attributes.set_scales_mask(DNNL_ARG_SRC, 0);
      attributes.set_scales_mask(DNNL_ARG_WEIGHTS, 1 << 1);  // one for each output
      arguments_[DNNL_ARG_ATTR_SCALES | DNNL_ARG_SRC] = vector_memory({x_scale});
      arguments_[DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS] = vector_memory(w_scales);
    }
    return {engine_, x, w, y, attributes};
  }

  memory vector_memory(const std::vector<float>& values) {
    memory result(memory::desc({static_cast<memory::dim>(values.size())}, Type::f32, Tag::a),
                  engine_);
    std::copy(values.begin(), values.end(), static_cast<float*>(result.get_data_handle()));
    return result;
  }
#else
  dnnl::matmul::primitive_desc describe(const memory::desc& x, const memory::desc& w,
                                        const memory::desc& y, float x_scale,
                                        std::vector<float> w_scales) {
    dnnl::primitive_attr attributes;
    if (product_.type == WeightType::int8) {
      for (float& scale : w_scales) scale *= x_scale;
      attributes.set_output_scales(1 << 1, w_scales);  // one for each output
    }
    return {dnnl::matmul::desc(x, w, y), attributes, engine_};
  }
#endif

  /// The values, or their quantized form where there is one, in the type and layout of `target`.
  memory converted(const float* values, std::vector<std::int8_t>& quantized,
                   const memory::dims& sizes, Tag order, const memory::desc& target) {
    const bool is_quantized = !quantized.empty();
    void* data = is_quantized ? static_cast<void*>(quantized.data()) : const_cast<float*>(values);
    memory source(memory::desc(sizes, is_quantized ? Type::s8 : Type::f32, order), engine_, data);
    memory result(target, engine_);
    dnnl::reorder(source, result).execute(stream_, source, result);
    stream_.wait();
    return result;
  }

  Product product_;
  std::shared_ptr<float> y_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul primitive_;
  std::unordered_map<int, memory> arguments_;
  std::vector<memory> weights_;  // copies of one
  std::size_t turn_ = 0;
  int threads_ = 0;
};

}  // namespace

std::string version() {
  const dnnl_version_t* v = dnnl_version();
  return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
         std::to_string(v->patch);
}

std::function<void(int)> matmul(const Product& product, std::shared_ptr<float> y) {
  auto call = std::make_shared<Matmul>(product, std::move(y));
  return [call](int threads) { call->run(threads); };
}

}  // namespace bench::onednn
