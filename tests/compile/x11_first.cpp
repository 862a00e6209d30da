// expect-success
// The macros of X11, Apple and Qt as their headers define them, before everything: eigenformer puts
// those aside that Eigen would stumble over.
#include <algorithm>
#include <atomic>
#include <complex>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ranges>
#include <span>
#include <thread>
#include <unordered_map>
#include <variant>
#define Success 0
#define None 0L
#define Status int
#define Bool int
#define True 1
#define False 0
#define Always 2
#define Complex 0
#define check(assertion)
#define verify(assertion)
#define require(assertion, label)
#define slots
#define signals public
#define emit
#define foreach(variable, container) for (variable : container)
#define small char
#define near
#define far
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#include <eigenformer/eigenformer.h>
#if !defined(Success) || !defined(check) || !defined(emit) || !defined(min)
#error "a macro of the user's is gone"
#endif
int main() {
  eigenformer::Tensor<float, 2> x(1, 4);
  x.setZero();
  return eigenformer::greedy_sample(x)(0);
}
