/// \file
/// Fibers: functions with stacks of their own that take turns on one thread. A switch saves what
/// the calling convention says a callee must keep, and nothing else: some 10 ns on x86-64 and
/// AArch64, where it is written by hand. Elsewhere it is swapcontext, which asks the kernel for the
/// signal mask each time. Address and thread sanitizer are told of every switch.
/// bench/programs/emulated_block.cpp measures.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__ELF__) && defined(__x86_64__) && !defined(__ILP32__)
#define EIGENFORMER_TEST_SWITCH_X86_64 1
#elif defined(__ELF__) && defined(__aarch64__)
#define EIGENFORMER_TEST_SWITCH_AARCH64 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EIGENFORMER_TEST_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define EIGENFORMER_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EIGENFORMER_TEST_ASAN 1
#elif __has_feature(thread_sanitizer)
#define EIGENFORMER_TEST_TSAN 1
#endif
#endif
#if defined(EIGENFORMER_TEST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EIGENFORMER_TEST_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// Keeps where this stack stands in *saved and goes on with the other one. Weak: every file that
// includes this has it, and one of them is linked.
#if defined(EIGENFORMER_TEST_SWITCH_X86_64)
#define EIGENFORMER_TEST_SWITCH 1
asm(R"(
  .pushsection .text
  .weak eigenformer_test_switch
  .type eigenformer_test_switch, @function
eigenformer_test_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size eigenformer_test_switch, .-eigenformer_test_switch
  .popsection
)");
#elif defined(EIGENFORMER_TEST_SWITCH_AARCH64)
#define EIGENFORMER_TEST_SWITCH 1
asm(R"(
  .pushsection .text
  .weak eigenformer_test_switch
  .type eigenformer_test_switch, %function
eigenformer_test_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size eigenformer_test_switch, .-eigenformer_test_switch
  .popsection
)");
#endif
#if defined(EIGENFORMER_TEST_SWITCH)
extern "C" void eigenformer_test_switch(void** saved, void* other);
#endif

namespace eigenformer_test::emulated {

/// One of them. Each resume() runs run() up to its next suspend(); when run() has returned it is
/// called anew by the resume() that follows, on the same stack. run() lets no exception out.
class Fiber {
 public:
  Fiber() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size_ = (kStack + page - 1) / page * page;
    void* const memory = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<std::byte*>(memory);
    mprotect(memory_, page, PROT_NONE);  // an overflow stops the program instead of spoiling it
    stack_ = memory_ + page;
#if defined(EIGENFORMER_TEST_TSAN)
    tsan_ = __tsan_create_fiber(0);
#endif
    prepare();
  }
  virtual ~Fiber() {
#if defined(EIGENFORMER_TEST_ASAN)
    __asan_unpoison_memory_region(stack_, size_);  // where frames were left, not returned from
#endif
#if defined(EIGENFORMER_TEST_TSAN)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(memory_, static_cast<std::size_t>(stack_ - memory_) + size_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume() {
    starting = this;
#if defined(EIGENFORMER_TEST_TSAN)
    tsan_resumer_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 0);
#endif
#if defined(EIGENFORMER_TEST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, size_);
#endif
    switch_to_fiber();
#if defined(EIGENFORMER_TEST_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

 protected:
  virtual void run() = 0;

  /// Called on the fiber: back to whoever resumed it.
  void suspend() {
#if defined(EIGENFORMER_TEST_TSAN)
    __tsan_switch_to_fiber(tsan_resumer_, 0);
#endif
#if defined(EIGENFORMER_TEST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, resumer_stack_, resumer_size_);
#endif
    switch_to_resumer();
#if defined(EIGENFORMER_TEST_ASAN)
    __sanitizer_finish_switch_fiber(fake, &resumer_stack_, &resumer_size_);
#endif
  }

 private:
#if defined(EIGENFORMER_TEST_ASAN) || defined(EIGENFORMER_TEST_TSAN)
  static constexpr std::size_t kStack = 256 << 10;
#else
  static constexpr std::size_t kStack = 64 << 10;
#endif

  static void enter() {
    Fiber* const self = starting;
#if defined(EIGENFORMER_TEST_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self->resumer_stack_, &self->resumer_size_);
#endif
    for (;;) {
      self->run();
      self->suspend();
    }
  }

#if defined(EIGENFORMER_TEST_SWITCH)
  // The switches are part of whoever calls them: the thread sanitizer counts calls and returns.
  void prepare() {
    // What the switch takes from the stack: zeros for the registers, then where to go on.
    auto* top = reinterpret_cast<void**>(stack_ + size_);
#if defined(EIGENFORMER_TEST_SWITCH_X86_64)
    top -= 2;  // the function finds the stack as a call would leave it: 8 beside a multiple of 16
    top[0] = reinterpret_cast<void*>(&enter);
    own_ = top - 6;
#else
    own_ = top - 20;
    static_cast<void**>(own_)[11] = reinterpret_cast<void*>(&enter);
#endif
  }
  [[gnu::always_inline]] void switch_to_fiber() { eigenformer_test_switch(&resumer_, own_); }
  [[gnu::always_inline]] void switch_to_resumer() { eigenformer_test_switch(&own_, resumer_); }
  void* own_ = nullptr;
  void* resumer_ = nullptr;
#else
  void prepare() {
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = size_;
    own_.uc_link = nullptr;
    makecontext(&own_, &enter, 0);
  }
  [[gnu::always_inline]] void switch_to_fiber() { swapcontext(&resumer_, &own_); }
  [[gnu::always_inline]] void switch_to_resumer() { swapcontext(&own_, &resumer_); }
  ucontext_t own_, resumer_;
#endif

  static inline thread_local Fiber* starting = nullptr;
  std::byte* memory_ = nullptr;  // a page that nobody may touch, and the stack
  std::byte* stack_ = nullptr;
  std::size_t size_ = 0;
#if defined(EIGENFORMER_TEST_ASAN)
  const void* resumer_stack_ = nullptr;
  std::size_t resumer_size_ = 0;
#endif
#if defined(EIGENFORMER_TEST_TSAN)
  void* tsan_ = nullptr;
  void* tsan_resumer_ = nullptr;
#endif
};

}  // namespace eigenformer_test::emulated
