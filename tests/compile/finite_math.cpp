// flags: -Wfatal-errors -ffinite-math-only
// expect: eigenformer: -ffast-math (or a part of it
#include <eigenformer/sampling.h>
int main() {}
