#include "few_tokens.cu"

extern "C" void run_few_tokens(const int *grid, int threads, const Arguments *arguments) {
    launch(grid, threads, [=] { few_tokens(*arguments); });
}
