// What kernels/emulator.py calls: plain C functions over one emulated device per loaded library.
#include "host.h"
#include "memory.h"

using namespace emulator;

extern "C" {
void* tokenmill_emulator_malloc(size_t bytes) { return device_malloc(bytes); }
void tokenmill_emulator_free_all() { device_free_all(); }
void tokenmill_emulator_predecessor_writes(void* memory, size_t bytes) { predecessor_writes(memory, bytes); }
const char* tokenmill_emulator_reports() { return reports(); }
void tokenmill_emulator_configure(u64 seed, int async, int resident_ctas, int sm_count) {
    config.seed = seed;
    config.async = (AsyncMode)async;
    config.resident_ctas = resident_ctas;
    config.sm_count = sm_count;
}
void tokenmill_emulator_statistics(u64* values) {
    const u64 all[] = {statistics.switches, statistics.collectives, statistics.accesses, statistics.cells,
                       statistics.async_operations, statistics.warp_wgmmas, statistics.barriers};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) values[i] = all[i];
}
}
