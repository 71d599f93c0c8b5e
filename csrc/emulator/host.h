// The emulated device as host code sees it: memory, launches, tensor maps, settings. Used through launch.cuh.
#pragma once
#include "dialect.h"

// Opaque on hardware; here the plain description of a tiled tensor. Innermost dimension first.
struct alignas(64) CUtensorMap {
    u64 base, size[5], stride[5];  // sizes in elements, strides in bytes
    u32 box[5];
    uint8_t rank, element_bytes, type, swizzle, nan_fill;
    u32 valid;  // tensor_map_magic: the map was made by make_tensor_map
};

namespace emulator {
constexpr u32 tensor_map_magic = 0x7a7a0001;
constexpr int smem_per_cta = 232448;  // 227 KiB, H100 and B200

// When an asynchronous operation moves its data between its issue and the wait that guarantees it.
enum class AsyncMode : int { early = 0, late = 1, random = 2 };

struct Config {
    u64 seed = 1;                           // of all scheduling decisions: a launch is a function of seed and inputs
    AsyncMode async = AsyncMode::random;
    int resident_ctas = 4;                  // CTAs in flight at once (a cooperative launch: all of them)
    int sm_count = 132;
    int max_reports = 12;
    bool echo = false;                      // print each report to stderr when it is found
};
extern Config config;

struct Statistics {
    u64 switches, collectives, accesses, cells, async_operations, warp_wgmmas, barriers;
};
extern Statistics statistics;

// Device memory: filled with 0xff, a red zone behind each allocation. nullptr when there is no room.
void* device_malloc(size_t bytes);
void device_free_all();
// Declares that the grid before the next (dependent) launch writes these bytes: the launch finds 0xff in them until its
// first griddepcontrol.wait, and a touch that no such wait precedes is reported.
void predecessor_writes(void* memory, size_t bytes);

struct Grid {
    dim3 grid, block, cluster;
    size_t dynamic_smem;
    bool cooperative, dependent;
};

// All reports of the last launch as text, at most a screenful; "" when it was clean.
const char* reports();

int make_tensor_map(CUtensorMap* map, const void* base, u32 type, u32 element_bytes, int rank, const u64* size,
                    const u64* stride_bytes, const u32* box, u32 swizzle, bool nan_fill);

// Where a launch keeps its arguments: outside every fiber, so that each thread copies them as kernel parameters.
struct alignas(64) ArgumentBuffer {
    char bytes[8192];
};
extern ArgumentBuffer argument_buffer;
int run_grid(void (*kernel)(const void*), const void* kernel_address, const Grid& grid);

template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, A&&... arguments) {
    typedef std::tuple<void (*)(P...), std::decay_t<P>...> Call;
    static_assert(sizeof(Call) <= sizeof(ArgumentBuffer), "kernel parameters are limited to 4 KiB");
    new (&argument_buffer) Call(kernel, static_cast<P>(arguments)...);
    const auto thread = [](const void* call) {
        std::apply([](auto function, const auto&... parameters) { function(parameters...); },
                   *static_cast<const Call*>(call));
    };
    return run_grid(thread, reinterpret_cast<const void*>(kernel), grid);
}
}  // namespace emulator
