// Two translation units with different -march in one program: neither answers for the other, and
// INT8 results agree to the bit.
#include <cstdio>
#include <string>

std::string baseline_isa();
std::string avx2_isa();
double baseline_result();
double avx2_result();

int main() {
#if defined(__x86_64__)
  if (baseline_isa() != "generic" || avx2_isa() != "avx2") {
    std::printf("two_isas: got %s and %s\n", baseline_isa().c_str(), avx2_isa().c_str());
    return 1;
  }
  const double baseline = baseline_result();
  if (!__builtin_cpu_supports("avx2")) {
    std::printf("two_isas: linked; this machine has no AVX2, so only the baseline ran\n");
    return 0;
  }
  const double avx2 = avx2_result();
#else
  const double baseline = baseline_result(), avx2 = avx2_result();
#endif
  std::printf("two_isas: %s gives %.17g, %s gives %.17g\n", baseline_isa().c_str(), baseline,
              avx2_isa().c_str(), avx2);
  return baseline == avx2 ? 0 : 1;
}
