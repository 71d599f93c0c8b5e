// Where the kernel's plain loads and stores arrive: device code is compiled with -fsanitize=thread, and these are the
// functions that it then calls; ThreadSanitizer's own run-time library is never linked.
#include <link.h>

#include <cstring>

#include "atomics.h"
#include "race.h"
#include "report.h"

namespace emulator {
namespace {
struct Segment {
    const char *begin, *end;
};
std::vector<Segment> module_segments;  // constants and statics of all loaded modules

int add_segments(dl_phdr_info* module, size_t, void*) {
    for (int i = 0; i < module->dlpi_phnum; i++) {
        const auto& header = module->dlpi_phdr[i];
        if (header.p_type != PT_LOAD) continue;
        const char* begin = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
        module_segments.push_back({begin, begin + header.p_memsz});
    }
    return 0;
}

// Local variables: is a wgmma in flight using them as registers?
void stack_access(const char* p, size_t bytes, bool is_write, u32 pc) {
    for (const RegistersInUse& r : current->in_use)
        if (p < r.first + r.bytes && p + bytes > r.first && (r.accumulator || is_write))
            report(Problem::registers, pc, r.pc,
                   format("REGISTERS IN USE: %s of %s at %s while the wgmma issued at %s is in flight",
                          is_write ? "write" : "read", r.accumulator ? "an accumulator" : "an A fragment",
                          source_line(pc).c_str(), source_line(r.pc).c_str()),
                   {by_line(*current),
                    "needed  wgmma_commit() and a wgmma_wait that covers this wgmma"});
    if (is_write && current->wgmma_fences && current->written_since_fence.size() < 65536)
        current->written_since_fence.push_back({p, (u32)bytes});
}

void elsewhere(const char* p, size_t bytes, bool is_write, u32 pc) {
    if ((size_t)(p - reinterpret_cast<const char*>(&current->where)) < sizeof(Indices)) return;  // threadIdx and its like
    for (const Segment& s : module_segments)
        if (p >= s.begin && p < s.end) return;
    report(Problem::wild, pc, 0,
           format("WILD POINTER: %s of %zu bytes at %p, at %s", is_write ? "write" : "read", bytes,
                  static_cast<const void*>(p), source_line(pc).c_str()),
           {by_line(*current),
            "needed  device memory: a host pointer means nothing to a kernel"});
    abort_launch();
}

inline void plain(const void* address, size_t bytes, bool write, u32 pc) {
    const char* p = static_cast<const char*>(address);
    if (in_arena(p)) access(p, bytes, write ? is_write : plain_read, *current, current->epoch(), pc);
    else if (!on_fiber_stack(p)) elsewhere(p, bytes, write, pc);
    else if (!current->in_use.empty() || (write && current->wgmma_fences)) stack_access(p, bytes, write, pc);
}
}  // namespace

void find_modules() {
    module_segments.clear();
    dl_iterate_phdr(add_segments, nullptr);
}
}  // namespace emulator

using namespace emulator;

#define EMULATOR_HOOKS(n)                                                                                          \
    extern "C" void __tsan_read##n(void* p) { if (current) plain(p, n, false, EMULATOR_PC); }                      \
    extern "C" void __tsan_write##n(void* p) { if (current) plain(p, n, true, EMULATOR_PC); }                      \
    extern "C" void __tsan_unaligned_read##n(void* p) { if (current) plain(p, n, false, EMULATOR_PC); }            \
    extern "C" void __tsan_unaligned_write##n(void* p) { if (current) plain(p, n, true, EMULATOR_PC); }            \
    extern "C" void __tsan_volatile_read##n(void* p) { if (current) volatile_read(p, n, EMULATOR_PC); }            \
    extern "C" void __tsan_volatile_write##n(void* p) { if (current) volatile_write(p, n, EMULATOR_PC); }          \
    extern "C" void __tsan_unaligned_volatile_read##n(void* p) { if (current) volatile_read(p, n, EMULATOR_PC); }  \
    extern "C" void __tsan_unaligned_volatile_write##n(void* p) { if (current) volatile_write(p, n, EMULATOR_PC); } \
    extern "C" void __tsan_read_write##n(void* p) {                                                                \
        if (!current) return;                                                                                      \
        plain(p, n, false, EMULATOR_PC);                                                                           \
        plain(p, n, true, EMULATOR_PC);                                                                            \
    }                                                                                                              \
    extern "C" void __tsan_unaligned_read_write##n(void* p) {                                                      \
        if (!current) return;                                                                                      \
        plain(p, n, false, EMULATOR_PC);                                                                           \
        plain(p, n, true, EMULATOR_PC);                                                                            \
    }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t n) { if (current) plain(p, n, false, EMULATOR_PC); }
void __tsan_write_range(void* p, size_t n) { if (current) plain(p, n, true, EMULATOR_PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void* emulated_memcpy(void* to, const void* from, size_t n) {
    if (current && n) plain(from, n, false, EMULATOR_PC), plain(to, n, true, EMULATOR_PC);
    return memmove(to, from, n);
}
void* emulated_memmove(void* to, const void* from, size_t n) {
    if (current && n) plain(from, n, false, EMULATOR_PC), plain(to, n, true, EMULATOR_PC);
    return memmove(to, from, n);
}
void* emulated_memset(void* to, int byte, size_t n) {
    if (current && n) plain(to, n, true, EMULATOR_PC);
    return memset(to, byte, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    if (current && n) plain(from, n, false, EMULATOR_PC), plain(to, n, true, EMULATOR_PC);
    return memmove(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    if (current && n) plain(from, n, false, EMULATOR_PC), plain(to, n, true, EMULATOR_PC);
    return memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
    if (current && n) plain(to, n, true, EMULATOR_PC);
    return memset(to, byte, n);
}
}
