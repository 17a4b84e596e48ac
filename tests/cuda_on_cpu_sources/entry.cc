#include "few_tokens.cu"

extern "C" void run_few_tokens(const int *grid, int threads, const Arguments *arguments) {
    launch(grid, threads, [=] { few_tokens(*arguments); });
}

#if RANKED
extern "C" void run_down(
    const int *grid, int threads, const u8 *x, const u8 *a, float *ax, int tokens, int columns,
    int rank, float scaling) {
    launch(grid, threads, [=] { down(x, a, ax, tokens, columns, rank, scaling); });
}
#endif
