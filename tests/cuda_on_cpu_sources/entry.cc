#include SOURCE

extern "C" void run(const int *grid, int threads, const Arguments *arguments) {
    launch(grid, threads, [=] { NAME(*arguments); });
}
