// Facts about the hardware that the emulator relies on, one source for both builds: its answers are emulated.txt, and a
// GPU's must be the same line by line (lines that start with `~` only inform tolerances).
//
//   nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a -I csrc csrc/micro/micro.cu -o micro && ./micro gpu.txt
//   tokenmill kernels micro --compare gpu.txt
#include "copies.cuh"
#include "matrices.cuh"
#include "warps.cuh"

// Writes all lines to the file; the number of tests that failed to run, negative when the file cannot be written.
extern "C" int tokenmill_micro(const char* path, Stream) {
    Record record{fopen(path, "w")};
    if (!record.file) return -1;
    run_copies(record);
    run_matrices(record);
    run_warps(record);
    fclose(record.file);
    return record.failures;
}

#ifndef TOKENMILL_EMULATED
int main(int count, char** arguments) { return tokenmill_micro(count > 1 ? arguments[1] : "/dev/stdout", nullptr); }
#endif
