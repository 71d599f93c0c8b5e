// Emulated memory: one arena of shared-memory slots and the device heap, with bounds of every object.
#include <sys/mman.h>

#include <algorithm>

#include "memory.h"
#include "race.h"
#include "report.h"

namespace emulator {
namespace {
constexpr size_t slots_bytes = (size_t)slot_bytes * max_resident, heap_bytes = size_t{1} << 30;
char* arena = nullptr;
char* heap_top = nullptr;
std::vector<Allocation> allocations;  // in order of address

char* heap() { return arena + slots_bytes; }

bool reserve_arena() {
    if (arena) return true;
    void* memory = mmap(nullptr, slots_bytes + heap_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    arena = static_cast<char*>(memory);
    heap_top = heap();
    return true;
}
}  // namespace

char* arena_begin() { return reserve_arena() ? arena : nullptr; }
size_t arena_bytes() { return slots_bytes + heap_bytes; }
size_t heap_used() { return arena ? (size_t)(heap_top - heap()) : 0; }
char* heap_begin() { return heap(); }

bool in_arena(const void* p) { return (size_t)(static_cast<const char*>(p) - arena) < slots_bytes + heap_bytes; }

char* slot_memory(u32 slot) { return arena + (size_t)slot * slot_bytes; }

Cta* shared_owner(const void* p) {
    const size_t offset = (size_t)(static_cast<const char*>(p) - arena);
    if (offset >= slots_bytes) return nullptr;
    for (Cta* cta : resident)
        if (cta->slot == offset / slot_bytes) return cta;
    return nullptr;
}

// ---- device heap -------------------------------------------------------------------------------------------------------
void* device_malloc(size_t bytes) {
    if (!reserve_arena()) return nullptr;
    // a red zone as large as the allocation: address space is free, and wild indices are often off by a row or a tile
    const size_t distance = bytes + std::max<size_t>(bytes, 65536);
    char* begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(heap_top) + 511) & ~uintptr_t{255});
    if (bytes > heap_bytes || begin + distance > heap() + heap_bytes) return nullptr;
    heap_top = begin + distance;
    memset(begin, 0xff, bytes);
    allocations.push_back({begin, bytes});
    return begin;
}

void device_free_all() {
    allocations.clear();
    if (!arena) return;
    clear_heap_shadow();
    madvise(heap(), heap_used(), MADV_DONTNEED);
    heap_top = heap();
}

const Allocation* allocation_of(const char* p) {
    static size_t last = 0;
    if (last < allocations.size() && p >= allocations[last].begin && p < allocations[last].begin + allocations[last].bytes)
        return &allocations[last];
    auto next = std::upper_bound(allocations.begin(), allocations.end(), p,
                                 [](const char* address, const Allocation& a) { return address < a.begin; });
    if (next == allocations.begin()) return nullptr;
    last = (size_t)(next - allocations.begin()) - 1;
    return &allocations[last];
}

// ---- shared memory -------------------------------------------------------------------------------------------------------
char* dynamic_smem() {
    // only 16-byte alignment is promised: kernels that need 1024 must align themselves
    return current->cta->smem + shared_base + 16 * (config.seed % 8);
}

void* static_smem(const void* key, size_t bytes, size_t alignment) {
    Cta& cta = *current->cta;
    auto known = cta.statics.find(key);
    if (known != cta.statics.end()) return cta.smem + known->second.address;
    const u32 address = (cta.static_end + 16 + (u32)alignment - 1) & ~((u32)alignment - 1);
    cta.static_end = address + (u32)bytes;
    if (grid.dynamic_smem + (cta.static_end - cta.dynamic_end) > (size_t)smem_per_cta + 512 || cta.static_end > slot_bytes)
        report(Problem::bounds, 0, 0,
               format("SHARED MEMORY: %zu bytes dynamic and %u static exceed the %d that a CTA can have",
                      grid.dynamic_smem, cta.static_end - cta.dynamic_end, smem_per_cta));
    cta.statics[key] = {address, (u32)bytes};
    return cta.smem + address;
}


Place resolve(u32 address) {
    const u32 window = address >> 24, offset = address & 0xffffff;
    if (!window) return {current->cta, offset};
    const Cluster& cluster = *current->cta->cluster;
    return {window - 1 < cluster.ctas.size() ? cluster.ctas[window - 1] : nullptr, offset};
}

// Whether [offset, offset + bytes) lies inside one shared object of the CTA.
bool inside_shared(const Cta& cta, u32 offset, size_t bytes) {
    if (offset >= shared_base && offset + bytes <= cta.dynamic_end) return true;
    for (const auto& [key, object] : cta.statics)
        if (offset >= object.address && offset + bytes <= object.address + object.bytes) return true;
    return false;
}

char* shared_pointer(u32 address, u32 bytes, u32 alignment, const char* what, u32 pc) {
    const Place place = resolve(address);
    if (!place.cta || !inside_shared(*place.cta, place.offset, bytes)) {
        report(Problem::bounds, pc, 0,
               format("OUT OF BOUNDS: %s of %u bytes at shared address 0x%x, at %s", what, bytes, address,
                      source_line(pc).c_str()),
               {by_line(*current),
                place.cta ? format("limit   dynamic shared memory is 0x%x..0x%x (LaunchConfig::dynamic_smem = %zu)",
                                   shared_base, place.cta->dynamic_end, grid.dynamic_smem)
                          : "limit   the cluster has no CTA of this rank"});
        return nullptr;
    }
    if (place.offset % alignment) {
        report(Problem::misaligned, pc, 0,
               format("MISALIGNED: %s at shared address 0x%x, at %s", what, address, source_line(pc).c_str()),
               {by_line(*current),
                format("needed  a multiple of %u", alignment)});
        return nullptr;
    }
    return place.cta->smem + place.offset;
}

u64 smem_or_heap_offset(const void* p) {
    if (Cta* cta = shared_owner(p)) return (u64)(static_cast<const char*>(p) - cta->smem);
    const Allocation* a = allocation_of(static_cast<const char*>(p));
    return a ? (u64)(static_cast<const char*>(p) - a->begin) : (u64)(uintptr_t)p;
}

std::string describe(const char* p) {
    if (Cta* cta = shared_owner(p)) {
        const u32 offset = (u32)(p - cta->smem);
        for (const auto& [key, object] : cta->statics)
            if (offset >= object.address && offset < object.address + object.bytes)
                return format("static shared memory + %u (address 0x%x)", offset - object.address, offset);
        return format("shared address 0x%x (dynamic + %d)", offset,
                      (int)offset - (int)(shared_base + 16 * (config.seed % 8)));
    }
    const Allocation* a = allocation_of(p);
    if (!a) return "global memory outside all allocations";
    const size_t index = (size_t)(a - allocations.data());
    return format("global memory: byte %td of the %zu of allocation %zu", p - a->begin, a->bytes, index);
}
}  // namespace emulator

u32 smem_u32(const void* pointer) {
    using namespace emulator;
    Cta* owner = shared_owner(pointer);
    if (!owner) {
        const u32 pc = EMULATOR_PC;
        report(Problem::bounds, pc, 1,
               format("NOT SHARED: smem_u32 of a pointer that is not into shared memory, at %s", source_line(pc).c_str()));
        return 0;
    }
    const u32 offset = (u32)(static_cast<const char*>(pointer) - owner->smem);
    return owner == current->cta ? offset : offset | (owner->rank + 1) << 24;
}
