// The main job: a text is learned, the weights are quantized, 16 requests are served. Everything
// runs through the public operators.
#include <eigenformer/eigenformer.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "demo/checkpoint.h"
#include "demo/options.h"
#include "demo/progress.h"
#include "demo/serve.h"
#include "demo/text.h"
#include "demo/train.h"

namespace {

namespace ef = eigenformer;
using demo::Index;

ef::DecoderConfig decoder_config() {
  return {.vocabulary = 256,
          .features = 192,
          .layers = 2,
          .heads = 6,
          .kv_heads = 3,
          .head_dim = 32,
          .hidden = 512};
}

// Windows are longer than prompt and continuation together (264), so that every position served was
// trained.
demo::TrainingPlan training_plan(bool quick) {
  return quick ? demo::TrainingPlan{.tokens = 480'000} : demo::TrainingPlan{};
}

/// What limits the training: its largest operator, and other work on the machine.
void print_limits(const demo::TrainingResult& training, const ef::OperatorProfile& profile,
                  int threads) {
  const ef::OperatorProfile::Entry* largest = nullptr;
  for (const auto& entry : profile.entries())
    if (largest == nullptr || entry.seconds > largest->seconds) largest = &entry;
  std::printf("training took %.0f s for %.2f million tokens on %d threads", training.seconds,
              static_cast<double>(training.tokens) / 1e6, threads);
  if (largest != nullptr)
    std::printf("; %.0f%% of it is %s", 100 * largest->seconds / profile.total_seconds(),
                std::string(largest->name).c_str());
  double load = 0;
  const double cores = static_cast<double>(std::thread::hardware_concurrency());
  if (getloadavg(&load, 1) == 1 && load > cores + 0.5)
    std::printf("; %.1f threads of all programs share %.0f cores, so a quiet machine takes less",
                load, cores);
  std::printf("\n");
}

void print_profile(const char* title, const ef::OperatorProfile& profile) {
  std::printf("%s\n", title);
  for (const auto& entry : profile.entries())
    if (entry.calls > 0)
      std::printf("  %-14s %8.3f s  %5.1f%%  %8ld calls\n", std::string(entry.name).c_str(),
                  entry.seconds, 100 * entry.seconds / profile.total_seconds(), entry.calls);
}

// Characters of each prompt's continuation that equal the text, position by position.
std::vector<Index> recalled(const std::string& text,
                            const std::map<std::string, std::string>& generated) {
  std::vector<Index> equal;
  for (Index p = 0; p < demo::kPrompts; ++p) {
    const std::string& got = generated.at("recall-" + std::to_string(p));
    const Index start = demo::prompt_start(text, p) + demo::kPromptLength;
    equal.push_back(0);
    for (Index i = 0; i < demo::kContinuation; ++i)
      equal.back() +=
          got[static_cast<std::size_t>(i)] == text[static_cast<std::size_t>(start + i)] ? 1 : 0;
  }
  return equal;
}

int run(const demo::Options& options) {
  const auto start = demo::Clock::now();
  const std::string text = demo::read_text(options.text);
  std::printf("text: %s, %zu bytes\n", options.text.c_str(), text.size());

  Eigen::ThreadPool pool(options.threads);
  const Eigen::ThreadPoolDevice device(&pool, options.threads);
  ef::OperatorProfile training_profile, serving_profile;
  std::shared_ptr<ef::DecoderWeights> weights;
  demo::TrainingResult training;
  if (!options.load.empty()) {
    weights = demo::load(options.load);
    std::printf("loaded %s\n", demo::weights_file(options.load).c_str());
  } else {
    weights = std::make_shared<ef::DecoderWeights>(decoder_config(), /*seed=*/1);
    std::printf(
        "decoder: %td layers, %td features, %td heads, %.2f million parameters, %s kernels, %d "
        "threads\n",
        weights->config().layers, weights->config().features, weights->config().heads,
        static_cast<double>(weights->parameter_count()) / 1e6, ef::isa::best::name,
        options.threads);
    ef::Decoder<float, Eigen::ThreadPoolDevice> model(weights, device);
    model.set_profile(&training_profile);
    training = demo::train(model, device, text, training_plan(options.quick));
    print_limits(training, training_profile, options.threads);
  }
  if (!options.save.empty()) demo::save(*weights, demo::TrainingPlan{}.length, options.save);

  {
    ef::Decoder<float, Eigen::ThreadPoolDevice> model(weights, device);
    const Index windows = options.quick ? 2 : 4;
    model.pack();
    const double before = demo::evaluate(model, text, 256, windows);
    const std::size_t float_bytes = model.weight_bytes();
    model.quantize();
    const double after = demo::evaluate(model, text, 256, windows);
    std::printf("\nINT8: %.2f MB -> %.2f MB of weights, loss %.4f -> %.4f nats a byte\n",
                static_cast<double>(float_bytes) / 1e6,
                static_cast<double>(model.weight_bytes()) / 1e6, before, after);
  }

  const std::vector<demo::Request> requests = demo::make_requests(text);
  std::printf("\nserving %zu requests, at most 8 at once, on %d ranks:\n", requests.size(),
              options.threads);
  demo::ServingResult served;
  ef::ThreadCommunicator::run(options.threads, [&](auto& communicator) {
    const Eigen::DefaultDevice own;
    using Communicator = std::remove_reference_t<decltype(communicator)>;
    ef::Decoder<float, Eigen::DefaultDevice, Communicator> model(weights, own, communicator);
    const bool first = communicator.rank() == 0;
    if (first) model.set_profile(&serving_profile);
    model.quantize();
    demo::Server server(model, requests, /*max_batch=*/8, first,
                        first ? &serving_profile : nullptr);
    demo::ServingResult result = server.run();
    if (first) served = std::move(result);
  });

  const std::vector<Index> equal = recalled(text, served.generated);
  const Index sum = std::accumulate(equal.begin(), equal.end(), Index{0}),
              total = demo::kPrompts * demo::kContinuation;
  std::printf("\n");
  if (training.tokens > 0)
    print_profile("training, share of the time by operator:", training_profile);
  print_profile("serving, share of the time by operator (rank 0):", serving_profile);
  std::printf("\nsummary\n");
  if (training.tokens > 0) std::printf("  training   %10.0f tokens/s\n", training.rate());
  std::printf("  prefill    %10.0f tokens/s\n",
              static_cast<double>(served.prefill_tokens) / served.prefill_seconds);
  std::printf("  decode     %10.0f tokens/s (%td steps)\n",
              static_cast<double>(served.decode_tokens) / served.decode_seconds, served.steps);
  std::printf("  recalled   %td of %td characters (%.1f%%) of the text after %td prompts:", sum,
              total, 100.0 * static_cast<double>(sum) / static_cast<double>(total), demo::kPrompts);
  for (Index count : equal) std::printf(" %td", count);
  std::printf("\n");
  std::printf("  wall time  %10.1f s\n", demo::seconds_since(start));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const demo::Options options = demo::parse_options(argc, argv, EIGENFORMER_DEFAULT_TEXT);
  try {
    return run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "end_to_end: %s\n", error.what());
    return 1;
  }
}
