// flags: -Wfatal-errors -ffast-math
// expect: eigenformer: -ffast-math (or a part of it
#include <eigenformer/eigenformer.h>
int main() {}
