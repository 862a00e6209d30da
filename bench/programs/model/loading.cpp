#include "loading.h"

#include <random>

#include "../demo/progress.h"
#include "machine.h"
#include "program.h"

namespace programs {
namespace {

template <typename T>
class ModelOf final : public LoadedModel {
 public:
  ModelOf(const ModelOptions& options, const ef::LoadOptions& how)
      : machine_(std::make_unique<Machine>(options.threads)),
        model_(ef::load_model<T>(machine_->device, options.path, how)),
        generator_(model_) {}

  const ef::ModelConfig& config() const override { return model_.config(); }
  const ef::Tokenizer& tokenizer() const override { return model_.tokenizer(); }
  ef::Tensor<float, 2> logits(std::span<const std::int32_t> ids) override {
    return model_.logits(ids);
  }
  std::vector<std::int32_t> generate(std::span<const std::int32_t> ids,
                                     const ef::GenerateOptions& options) override {
    return generator_.generate(ids, options);
  }
  ef::Index reused() const override { return generator_.reused(); }
  std::size_t step_bytes() const override { return model_.step_bytes(); }
  TokenWork work_of_token() const override {
    const ef::DecoderConfig& shape = model_.config().shape;
    const auto heads = static_cast<double>((2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim),
               matrices = model_.config().form.gated ? 3.0 : 2.0,
               features = static_cast<double>(shape.features);
    return {static_cast<double>(shape.layers) * features *
                (heads + matrices * static_cast<double>(shape.hidden)),
            features * static_cast<double>(shape.vocabulary)};
  }
  double seconds_of_steps(ef::Index sequences, ef::Index tokens, ef::Index steps) override {
    constexpr ef::Index page = 16;
    auto cache = model_.make_cache((tokens * steps + page - 1) / page * page * sequences, page);
    std::vector<ef::SequenceId> rows;
    std::vector<ef::Index> offsets{0}, last;
    for (ef::Index s = 0; s < sequences; ++s) {
      rows.push_back(cache.add_sequence());
      offsets.push_back(offsets.back() + tokens);
      last.push_back(offsets.back() - 1);
    }
    std::vector<std::int32_t> ids(static_cast<std::size_t>(sequences * tokens));
    std::minstd_rand random;
    ef::Tensor<float, 2> logits;
    const auto start = demo::Clock::now();
    for (ef::Index step = 0; step < steps; ++step) {
      for (std::int32_t& id : ids)
        id = static_cast<std::int32_t>(static_cast<ef::Index>(random()) %
                                       model_.config().shape.vocabulary);
      model_.decoder().step_into(logits, {ids, offsets, last}, cache, rows);
    }
    return demo::seconds_since(start);
  }
  std::size_t weight_bytes() const { return model_.weight_bytes(); }
  const Machine& machine() const { return *machine_; }

 private:
  using Device = decltype(Machine::device);
  std::unique_ptr<Machine> machine_;  // the model works on it until it is gone
  ef::Model<T, Device> model_;
  ef::TextGenerator<T, Device> generator_;
};

ef::WeightStorage weights_of(const ModelOptions& options) {
  if (options.int8) return {ef::WeightFormat::int8, options.group};
  const ef::Int4Storage four_bits{!options.symmetric, !options.w4a16};
  if (options.int4) return {ef::WeightFormat::int4, options.group, four_bits};
  if (options.half) return ef::WeightFormat::half;
  if (options.as_stored) return {ef::WeightFormat::as_stored, 0, four_bits};
  return ef::WeightFormat::activation;
}

ef::LoadOptions how_to_load(const ModelOptions& options, std::FILE* log) {
  const auto start = demo::Clock::now();
  const bool terminal = ::isatty(fileno(log)) != 0;
  ef::LoadOptions how;
  how.weights = weights_of(options);
  how.length = options.length;
  how.cache = options.cache;
  how.warning = [log](const std::string& text) { std::fprintf(log, "%s\n", text.c_str()); };
  how.progress = [=](std::uint64_t done, std::uint64_t total) {
    if (stopped != 0) throw std::runtime_error("stopped, nothing was written");
    if (!terminal || done == 0 || total == 0) return;
    const double seconds = demo::seconds_since(start),
                 fraction = static_cast<double>(done) / static_cast<double>(total);
    std::fprintf(log, "\rloading %3.0f%%  %.2f of %.2f GB  %.0f s left \033[K%s", 100 * fraction,
                 static_cast<double>(done) / 1e9, static_cast<double>(total) / 1e9,
                 seconds * (1 - fraction) / fraction, done == total ? "\n" : "");
    std::fflush(log);
  };
  return how;
}

template <typename T>
std::unique_ptr<LoadedModel> load_as(const ModelOptions& options, std::FILE* log) {
  const auto start = demo::Clock::now();
  auto model = std::make_unique<ModelOf<T>>(options, how_to_load(options, log));
  const auto& shape = model->config().shape;
  std::fprintf(log,
               "%s: %td layers, %td features, %td tokens of vocabulary; %.1f MB of weights, loaded "
               "in %.2f s; %s\n",
               model->config().family.c_str(), shape.layers, shape.features, shape.vocabulary,
               static_cast<double>(model->weight_bytes()) / 1e6, demo::seconds_since(start),
               model->machine().text().c_str());
  return model;
}

}  // namespace

std::unique_ptr<LoadedModel> load(const ModelOptions& options, std::FILE* log) {
  return options.bf16 || ef::is_packed_model<Eigen::bfloat16>(options.path)
             ? load_as<Eigen::bfloat16>(options, log)
             : load_as<float>(options, log);
}

void require_sampling(const ef::SamplingParams& params) {
  ef::Tensor<float, 2> logits(1, 1);
  logits.setZero();
  std::int32_t token = 0;
  ef::SampleStatus status{};
  ef::Philox random(0);
  const std::span<ef::SampleStatus> statuses(&status, 1);
  ef::sample_into(Eigen::DefaultDevice{}, ef::TensorView<std::int32_t, 1>(&token, 1), logits,
                  params, random, statuses);
}

#if !defined(__CUDACC__)
void pack(const ModelOptions& options, const std::string& packed, std::FILE* log) {
  const Machine machine(options.threads);
  const ef::LoadOptions how = how_to_load(options, log);
  if (options.bf16)
    ef::pack_model<Eigen::bfloat16>(machine.device, options.path, packed, how);
  else
    ef::pack_model<float>(machine.device, options.path, packed, how);
}
#endif

}  // namespace programs
