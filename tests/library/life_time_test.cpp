// Operators called before main, from destructors of static objects after it, from those of
// thread-local objects, and on threads that outlive main. Not a GoogleTest program: what counts
// happens after main. Exits with 0 where every result was right.
#include <eigenformer/eigenformer.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace ef = eigenformer;

namespace {

// Needs scratch of the thread: a product over several tiles, attention, sampling.
bool operators_work() {
  ef::Tensor<float, 2> x(40, 300), w(300, 300);
  x.setConstant(0.5f);
  w.setConstant(1.0f);
  const auto y = ef::linear(x, w);
  ef::Tensor<float, 4> q(1, 70, 2, 16);
  q.setConstant(1.0f);
  const auto attended = ef::batched_attention_with_padding(q, q, q, {70}, {.causal = true});
  const auto ids = ef::top_k_sample(y, 5, 1.0, ef::Philox{1});
  return y(39, 299) == 150.0f && attended(0, 69, 1, 15) == 1.0f && ids(0) >= 0;
}

std::atomic<int> at_thread_end{0};

struct Engine {
  const char* name;
  explicit Engine(const char* its_name) : name(its_name) { say(operators_work(), "constructor"); }
  ~Engine() { say(operators_work() && operators_work(), "destructor"); }
  void say(bool ok, const char* where) const {
    if (ok) return;
    std::printf("wrong results in the %s of %s\n", where, name);
    std::fflush(stdout);
    std::_Exit(1);
  }
};

struct CountsAtThreadEnd {
  ~CountsAtThreadEnd() { at_thread_end += operators_work(); }
};

Engine global("a global");

Engine& local_static() {
  static Engine engine("a static local");
  return engine;
}

}  // namespace

int main() {
  local_static();
  thread_local Engine of_main("a thread-local object of main");
  of_main.say(operators_work(), "body");
  std::thread([] {
    // Made before the thread's scratch, so destroyed after it.
    thread_local CountsAtThreadEnd last;
    (void)&last;
    operators_work();
  }).join();
  std::thread([] {
    operators_work();
    thread_local CountsAtThreadEnd first;
    (void)&first;
  }).join();
  if (at_thread_end != 2) {
    std::printf("operators failed in destructors of %d of 2 threads\n", 2 - at_thread_end.load());
    return 1;
  }
  std::thread([] {
    for (;;) operators_work();
  }).detach();
  return 0;
}
