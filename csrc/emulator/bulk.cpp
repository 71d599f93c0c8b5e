// Bulk copies and TMA: boxes of tensors as lists of chunks, checked at issue, moved some time before their wait.
#include <algorithm>

#include "arithmetic.h"
#include "race.h"
#include "report.h"

#include "../descriptors.cuh"  // after the dialect, whose words it uses

namespace emulator {
namespace {
constexpr u32 all_bytes = ~0u;

Swizzle swizzle_of(const CUtensorMap& map) { return (Swizzle)map.swizzle; }
u32 box_bytes(const CUtensorMap& map) {
    u32 bytes = map.element_bytes;
    for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
    return bytes;
}
u32 swizzle_alignment(const CUtensorMap& map) {
    switch (swizzle_of(map)) {
        case Swizzle::b128: return 1024;
        case Swizzle::b64: return 512;
        case Swizzle::b32: return 256;
        default: return 128;
    }
}

bool usable(const CUtensorMap* map, int rank, u32 pc) {
    if (map->valid == tensor_map_magic && map->rank == rank) return true;
    report(Problem::tensor_map, pc, 0,
           format("TENSOR MAP: %s, at %s", map->valid != tensor_map_magic ? "not made by make_tensor_map" : "of another rank than the instruction",
                  source_line(pc).c_str()),
           {by_line(*current)});
    return false;
}

// The box at `at` in 16-byte chunks of `shared` (a CTA's shared address 0 plus offset), in the swizzled order of the map.
// `action(shared chunk, global chunk or nullptr when all outside, mask of the bytes inside the tensor)`.
template <class Action>
void for_each_chunk(const CUtensorMap& map, const Coordinates& at, u32 offset, Action action) {
    const u32 row_bytes = map.box[0] * map.element_bytes;
    u32 rows = 1;
    for (int i = 1; i < map.rank; i++) rows *= map.box[i];
    for (u32 row = 0; row < rows; row++) {
        bool inside = true;
        long long address = (long long)map.base;
        u32 rest = row;
        for (int i = 1; i < map.rank; i++) {
            const long long c = (long long)at.c[i] + rest % map.box[i];
            rest /= map.box[i];
            inside &= c >= 0 && c < (long long)map.size[i];
            address += c * (long long)map.stride[i];
        }
        for (u32 byte = 0; byte < row_bytes; byte += 16) {
            const long long first = (long long)at.c[0] * map.element_bytes + byte;
            u32 valid = 0;
            for (int i = 0; inside && i < 16; i++)
                if (first + i >= 0 && first + i < (long long)(map.size[0] * map.element_bytes)) valid |= 1u << i;
            action(swizzled(offset + row * row_bytes + byte, swizzle_of(map)),
                   valid ? reinterpret_cast<char*>(address + first) : nullptr, valid);
        }
    }
}

u32 out_of_bounds_fill(const CUtensorMap& map) {
    if (!map.nan_fill) return 0;
    return map.element_bytes == 4 ? 0x7fffffff : 0x7fff7fff;
}

void move(const Chunk& c, u32 fill) {
    if (c.valid == all_bytes) {
        memcpy(c.to, c.from, c.bytes);
        return;
    }
    for (u32 i = 0; i < c.bytes; i++) c.to[i] = c.valid >> i & 1 ? c.from[i] : (char)(fill >> 8 * (i & 3));
}

void add(const Chunk& c, Sum sum) {
    const u32 size = sum == Sum::f32 || sum == Sum::s32 ? 4 : sum == Sum::u8 ? 1 : 2;
    for (u32 i = 0; i < c.bytes; i += size) {
        if (c.valid != all_bytes && !(c.valid >> i & 1)) continue;
        u32 a = 0, b = 0;
        memcpy(&a, c.to + i, size);
        memcpy(&b, c.from + i, size);
        switch (sum) {
            case Sum::f32: a = __float_as_uint(__uint_as_float(a) + __uint_as_float(b)); break;
            case Sum::f16: a = to_f16(h2f(a) + h2f(b)); break;
            case Sum::bf16: a = to_bf16(bf2f(a) + bf2f(b)); break;
            default: a += b;
        }
        memcpy(c.to + i, &a, size);
    }
}

// ---- loads ----------------------------------------------------------------------------------------------------------------
// Checks the load against everything before it and queues it.
void issue_load(BulkLoad load) {
    Cta& cta = *load.cta;
    Mbarrier* m = find_mbarrier(cta, load.bar, "a TMA or bulk load", load.pc);
    if (!m) abort_launch();
    const Epoch initialised = last_write(cta.smem + m->address).epoch;
    if (!current->knows.covers(initialised, generic) || !(m->fenced || current->knows.covers(initialised, async_shared)))
        report(Problem::mbarrier, load.pc, m->pc,
               format("MBARRIER: the load at %s uses an mbarrier whose mbar_init at %s it may not see", source_line(load.pc).c_str(),
                      source_line(m->pc).c_str()),
               {by_line(*current), "needed  fence_mbar_init() by the initialising thread, then a barrier (of the cluster, for another CTA's)"});
    load.phase = m->phase;
    const Epoch by{m->phase + 1, cta.number << 12 | (u32)actors.load(m->slot)};
    for (const Chunk& c : load.chunks) {
        access(c.to, c.bytes, is_write | is_async, *current, by, load.pc);
        memset(c.to, 0xff, c.bytes);  // whoever reads before the wait finds NaN, not yesterday's data
        if (!c.from || !c.valid) continue;
        const u32 first = c.valid == all_bytes ? 0 : (u32)__builtin_ctz(c.valid);
        const u32 end = c.valid == all_bytes ? c.bytes : 32 - (u32)__builtin_clz(c.valid);
        if (!in_arena(c.from + first)) {
            report(Problem::wild, load.pc, 3, format("WILD POINTER: a bulk load from %p, at %s", static_cast<const void*>(c.from), source_line(load.pc).c_str()),
                   {by_line(*current)});
            abort_launch();
        }
        access(c.from + first, end - first, is_async, *current, by, load.pc);
    }
    cta.loads_in_flight++;
    loads_in_flight.push_back(std::move(load));
    if (config.async == AsyncMode::early) run_load(loads_in_flight.size() - 1);
}

// The CTAs that a (multicast) load goes to: the one that `dst` names, or those of the mask.
std::vector<Cta*> targets(u32 dst, u32 bar, bool multicast, u32 mask, u32 pc) {
    const Place place = resolve(dst);
    if (resolve(bar).cta != place.cta)
        report(Problem::mbarrier, pc, 5, format("MBARRIER: the load at %s goes to one CTA and completes on another's mbarrier", source_line(pc).c_str()),
               {by_line(*current), "needed  mapa of both addresses, with the same rank"});
    if (!multicast) return {place.cta};
    std::vector<Cta*> all;
    const Cluster& cluster = *current->cta->cluster;
    for (u32 rank = 0; rank < 16; rank++) {
        if (!(mask >> rank & 1)) continue;
        if (rank < cluster.ctas.size()) all.push_back(cluster.ctas[rank]);
        else report(Problem::cluster, pc, 5, format("CLUSTER: multicast to rank %u of a cluster of %zu, at %s", rank, cluster.ctas.size(), source_line(pc).c_str()),
                    {by_line(*current)});
    }
    return all;
}

// ---- stores ---------------------------------------------------------------------------------------------------------------
struct StoreSteps {
    Epoch read, written;  // shared memory read; global memory written
};
StoreSteps store_steps(Thread& t, u32 pc) {
    if (t.store_slot < 0) {
        if (t.cta->store_slots == Actors::stores) {
            report(Problem::exit, pc, 6, format("STORES: more than %d threads of a CTA issue bulk stores, at %s", Actors::stores, source_line(pc).c_str()),
                   {"limit   the emulator's own; raise Actors::stores"});
            abort_launch();
        }
        t.store_slot = t.cta->store_slots++;
    }
    const u32 id = t.cta->number << 12 | (u32)actors.store(t.store_slot), group = t.stores_committed + 1;
    return {{2 * group - 1, id}, {2 * group, id}};
}

void check_store(const Chunk& c, const StoreSteps& steps, bool adds, u32 pc) {
    access(c.from, c.bytes, is_async, *current, steps.read, pc);
    if (!c.to || !c.valid) return;
    const u32 first = c.valid == all_bytes ? 0 : (u32)__builtin_ctz(c.valid);
    const u32 end = c.valid == all_bytes ? c.bytes : 32 - (u32)__builtin_clz(c.valid);
    if (!in_arena(c.to + first)) {
        report(Problem::wild, pc, 4, format("WILD POINTER: a bulk store to %p, at %s", static_cast<void*>(c.to), source_line(pc).c_str()), {by_line(*current)});
        abort_launch();
    }
    access(c.to + first, end - first, is_write | is_async | (adds ? is_atomic : 0), *current, steps.written, pc);
}
}  // namespace

void run_load(size_t index) {
    BulkLoad load = std::move(loads_in_flight[index]);
    loads_in_flight.erase(loads_in_flight.begin() + (std::ptrdiff_t)index);
    statistics.async_operations++;
    for (const Chunk& c : load.chunks) move(c, load.fill);
    Cta& cta = *load.cta;
    cta.loads_in_flight--;
    for (Mbarrier& m : cta.mbarriers) {
        if (!m.live || m.address != load.bar) continue;
        if (m.phase != load.phase)
            report(Problem::transactions, load.pc, 0,
                   format("TRANSACTIONS: the load at %s completed after its mbarrier's phase had ended", source_line(load.pc).c_str()),
                   {format("at      mbarrier 0x%x of CTA (%u,%u,%u), initialised at %s", m.address, cta.index.x, cta.index.y, cta.index.z,
                           source_line(m.pc).c_str()),
                    format("needed  mbar_arrive_tx with all bytes of the phase: this load has %u", load.bytes)});
        m.outstanding -= load.bytes;
        complete_phase_if_done(cta, m);
    }
}

void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, bool multicast, u32 ctas) {
    const u32 pc = EMULATOR_PC;
    if (!shared_pointer(dst, bytes, 16, "cp.async.bulk", pc)) return;
    if (bytes % 16 || (uintptr_t)src % 16) {
        report(Problem::misaligned, pc, 2, format("MISALIGNED: cp.async.bulk of %u bytes from %p, at %s", bytes, src, source_line(pc).c_str()),
               {by_line(*current), "needed  multiples of 16"});
        return;
    }
    const u32 offset = resolve(dst).offset, bar_offset = resolve(bar).offset;
    for (Cta* cta : targets(dst, bar, multicast, ctas, pc))
        issue_load({cta, {{cta->smem + offset, static_cast<const char*>(src), bytes, all_bytes}}, bytes, bar_offset, 0, pc, 0});
}

void tma_load(u32 dst, const CUtensorMap* map, const Coordinates& at, u32 bar, bool multicast, u32 ctas) {
    const u32 pc = EMULATOR_PC;
    if (!usable(map, at.rank, pc)) return;
    const u32 bytes = box_bytes(*map);
    if (!shared_pointer(dst, bytes, swizzle_alignment(*map), "cp.async.bulk.tensor", pc)) return;
    const u32 bar_offset = resolve(bar).offset;
    for (Cta* cta : targets(dst, bar, multicast, ctas, pc)) {
        BulkLoad load{cta, {}, bytes, bar_offset, 0, pc, out_of_bounds_fill(*map)};
        for_each_chunk(*map, at, resolve(dst).offset, [&](u32 shared, const char* global, u32 valid) {
            load.chunks.push_back({cta->smem + shared, global, 16, valid});
        });
        issue_load(std::move(load));
    }
}

void run_store_group(Thread& t) {
    for (const BulkStore& store : t.store_groups.front())
        for (const Chunk& c : store.chunks) {
            if (!c.to) continue;
            if (store.sum != Sum::none) add(c, store.sum);
            else if (c.valid == all_bytes) memcpy(c.to, c.from, c.bytes);
            else
                for (u32 i = 0; i < c.bytes; i++)
                    if (c.valid >> i & 1) c.to[i] = c.from[i];
        }
    t.store_groups.erase(t.store_groups.begin());
    statistics.async_operations++;
    events++;
}

void bulk_store(void* dst, u32 src, u32 bytes, bool add_f32) {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    const char* from = shared_pointer(src, bytes, 16, "cp.async.bulk store", pc);
    if (!from) return;
    if (bytes % 16 || (uintptr_t)dst % 16) {
        report(Problem::misaligned, pc, 3, format("MISALIGNED: cp.async.bulk of %u bytes to %p, at %s", bytes, dst, source_line(pc).c_str()),
               {by_line(*current), "needed  multiples of 16"});
        return;
    }
    const Chunk chunk{static_cast<char*>(dst), from, bytes, all_bytes};
    check_store(chunk, store_steps(t, pc), add_f32, pc);
    t.stores.push_back({{chunk}, add_f32 ? Sum::f32 : Sum::none});
}

void tma_store(const CUtensorMap* map, u32 src, const Coordinates& at, bool add) {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    if (!usable(map, at.rank, pc)) return;
    if (!shared_pointer(src, box_bytes(*map), swizzle_alignment(*map), "cp.async.bulk.tensor store", pc)) return;
    const StoreSteps steps = store_steps(t, pc);
    static const Sum sums[] = {Sum::u8, Sum::f16, Sum::bf16, Sum::f32, Sum::s32};
    BulkStore store{{}, add ? sums[map->type] : Sum::none};
    for_each_chunk(*map, at, src, [&](u32 shared, char* global, u32 valid) {
        store.chunks.push_back({global, t.cta->smem + shared, 16, valid});
        check_store(store.chunks.back(), steps, add, pc);
    });
    t.stores.push_back(std::move(store));
}

void bulk_wait(int groups, bool only_read) {
    Thread& t = *current;
    while ((int)t.store_groups.size() > groups) run_store_group(t);
    const u32 done = t.stores_committed > (u32)groups ? t.stores_committed - (u32)groups : 0;
    t.stores_waited = std::max(t.stores_waited, done);
    if (t.store_slot < 0 || !done) return;
    for (int v = 0; v < views; v++) {
        u32& known = t.knows.at((View)v, actors.store(t.store_slot));
        known = std::max(known, 2 * done - (only_read ? 1 : 0));
    }
}

// ---- tensor maps ------------------------------------------------------------------------------------------------------------
int make_tensor_map(CUtensorMap* map, const void* base, u32 type, u32 element_bytes, int rank, const u64* size,
                    const u64* stride_bytes, const u32* box, u32 swizzle, bool nan_fill) {
    constexpr int invalid_value = 1, not_supported = 801;
    const auto refuse = [](int error, const std::string& why) {
        clear_reports();
        report(Problem::tensor_map, 0, 0, "TENSOR MAP: " + why);
        return -error;
    };
    if (rank < 1 || rank > 5) return refuse(invalid_value, format("rank %d; it is 1 to 5", rank));
    if ((uintptr_t)base % 16) return refuse(invalid_value, format("base %p is not a multiple of 16", base));
    for (int i = 0; i < rank; i++) {
        if (!size[i] || size[i] > 1ull << 32) return refuse(invalid_value, format("dimension %d has %llu elements", i, (unsigned long long)size[i]));
        if (!box[i] || box[i] > 256) return refuse(invalid_value, format("the box has %u elements in dimension %d; 1 to 256", box[i], i));
        if (i && (stride_bytes[i] % 16 || stride_bytes[i] >= 1ull << 40))
            return refuse(invalid_value, format("the stride of dimension %d is %llu bytes; a multiple of 16", i, (unsigned long long)stride_bytes[i]));
        if (i && stride_bytes[i] < (i == 1 ? size[0] * element_bytes : stride_bytes[i - 1]))
            return refuse(invalid_value, format("the stride of dimension %d is smaller than what it strides over", i));
    }
    const u32 row = box[0] * element_bytes, width = swizzle ? 16u << swizzle : 0;
    if (row % 16) return refuse(invalid_value, format("the box is %u bytes wide; a multiple of 16", row));
    if (swizzle > 3 || (width && row > width)) return refuse(invalid_value, format("the box is %u bytes wide; the swizzle's width is %u", row, width));
    if (width && row < width)
        return refuse(not_supported, format("the box is %u bytes wide; the emulator models swizzles only for boxes of their full width, %u", row, width));
    *map = CUtensorMap();
    map->base = reinterpret_cast<u64>(base);
    for (int i = 0; i < rank; i++) {
        map->size[i] = size[i];
        map->stride[i] = i ? stride_bytes[i] : element_bytes;
        map->box[i] = box[i];
    }
    map->rank = (uint8_t)rank;
    map->element_bytes = (uint8_t)element_bytes;
    map->type = (uint8_t)type;
    map->swizzle = (uint8_t)swizzle;
    map->nan_fill = nan_fill;
    map->valid = tensor_map_magic;
    return 0;
}
}  // namespace emulator

using namespace emulator;

void bulk_copy_cluster(u32 dst, u32 src, u32 bytes, u32 bar) {
    const u32 pc = EMULATOR_PC;
    char* to = shared_pointer(dst, bytes, 16, "cp.async.bulk to the cluster", pc);
    const char* from = shared_pointer(src, bytes, 16, "cp.async.bulk to the cluster", pc);
    if (!to || !from) return;
    issue_load({resolve(dst).cta, {{to, from, bytes, all_bytes}}, bytes, resolve(bar).offset, 0, pc, 0});
}

void bulk_commit() {
    Thread& t = *current;
    t.store_groups.push_back(std::move(t.stores));
    t.stores.clear();
    t.stores_committed++;
    if (config.async == AsyncMode::early) run_store_group(t);
}
