// flags: -ffast-math -fno-fast-math -fno-math-errno -fno-trapping-math
// expect-success
#include <eigenformer/sampling.h>
int main() {}
