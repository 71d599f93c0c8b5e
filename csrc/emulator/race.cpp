#include "race.h"

#include <sys/mman.h>

#include "memory.h"
#include "report.h"

namespace emulator {
Actors actors;

namespace {
constexpr uint8_t async_write = 1, atomic_write = 2, mbarrier_word = 4;

// Four bytes of memory: the last write, the last read, and in `older` whatever else a later access must come after:
// reads by other actors, and writes of bytes that the last write left alone.
struct Cell {
    Epoch write, read;
    u32 write_pc, read_pc;
    uint8_t write_mask, read_mask, initialised, flags;
    u32 older;
};
struct Older {
    Epoch epoch;
    u32 pc;
    uint8_t mask;
    bool is_write;
    uint8_t flags;
};
Cell* shadow = nullptr;
std::vector<std::vector<Older>> pool(1);
std::vector<u32> pool_free;

Cell* shadow_begin() {
    if (!shadow) {
        void* memory = mmap(nullptr, arena_bytes() / 4 * sizeof(Cell), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fprintf(stderr, "emulator: no address space for the race detector (%zu GiB)\n",
                    arena_bytes() / 4 * sizeof(Cell) >> 30);
            abort();
        }
        shadow = static_cast<Cell*>(memory);
    }
    return shadow;
}
Cell& cell_of(const char* p) { return shadow[(size_t)(p - arena_begin()) >> 2]; }

std::vector<Older>& older(Cell& cell) {
    if (!cell.older) {
        if (pool_free.empty()) {
            pool_free.push_back((u32)pool.size());
            pool.emplace_back();
        }
        cell.older = pool_free.back();
        pool_free.pop_back();
    }
    return pool[cell.older];
}
void drop_older_if_empty(Cell& cell) {
    if (!cell.older || !pool[cell.older].empty()) return;
    pool_free.push_back(cell.older);
    cell.older = 0;
}

// ---- what a race report teaches ----------------------------------------------------------------------------------------------
const char* verb(Epoch by, bool is_write, bool is_atomic) {
    if (by.cta() != predecessor_cta && actors.role(by.actor()) != Role::thread)
        return is_write ? "writes asynchronously" : "reads asynchronously";
    return is_atomic ? "atomic" : is_write ? "writes" : "reads";
}

// What orders the earlier access before the later one on hardware, and is missing.
std::string advice(Epoch before, bool before_write, bool only_proxy_missing, Epoch now, bool shared) {
    if (only_proxy_missing)
        return shared ? "the barrier orders them, but TMA and wgmma see a plain write only after the writing thread's "
                        "fence_proxy_async(), between its write and the barrier"
                      : "the barrier orders them, but TMA sees a plain write to global memory only after the writing "
                        "thread's fence_proxy_async_global(), between its write and the barrier";
    if (before.cta() == predecessor_cta)
        return "griddep_wait() by this thread, or by one that a barrier puts before it: the grid before may still run";
    switch (actors.role(before.actor())) {
        case Role::load:
            return "mbar_wait on the load's mbarrier with the parity of the load's phase, by this thread or by one that a "
                   "barrier puts before it";
        case Role::wgmma:
            return "wgmma_commit(), wgmma_wait<0>() by that warp, then an arrival (mbarrier or barrier; by lane 0 only "
                   "after __syncwarp()) that the later access waits for";
        case Role::store:
            return before_write ? "bulk_commit(), bulk_wait<0>() by the thread that stores, then a barrier"
                                : "bulk_commit(), bulk_wait_read<0>() by the thread that stores, then a barrier";
        case Role::cp_async:
            return "cp_async_commit(), cp_async_wait<N>() with N small enough by that thread, then a barrier for the others";
        default: break;
    }
    if (before.cta() == now.cta()) {
        const int a = actors.number(before.actor()), b = actors.number(now.actor());
        if (actors.role(now.actor()) == Role::thread && a / 32 == b / 32)
            return "__syncwarp() between them: lanes of a warp do not run in step";
        return "a barrier between them (__syncthreads, named_bar_sync), or an mbarrier on which that thread arrives after "
               "its access and this one waits before its own";
    }
    if (shared) return "cluster_sync(), or mbar_arrive_cluster after that access and mbar_wait_cluster before this one";
    return "a release after that access (barrier, then st_release; or __threadfence and an atomic) and an acquire before "
           "this one (ld_acquire, then a barrier), both of scope gpu";
}

struct Earlier {
    Epoch epoch;
    u32 pc;
    bool is_write, is_atomic;
};
void report_race(const char* p, size_t bytes, bool is_write, bool is_atomic, const Earlier& before, const Thread& observer,
                 Epoch now, View view, u32 pc) {
    const bool shared = shared_owner(p) != nullptr;
    const bool only_proxy = before.is_write && view != generic && observer.knows.covers(before.epoch, generic);
    std::string needed = advice(before.epoch, before.is_write, only_proxy, now, shared);
    if (const u32 narrow = observer.cta->narrow_scope_pc)
        needed += format("; the flag access at %s has too narrow a scope", source_line(narrow).c_str());
    const std::string now_line = source_line(pc), before_line = source_line(before.pc);
    std::vector<std::string> details = {
        "at      " + describe(p),
        format("now     %-24s %s, by %s", now_line.c_str(), verb(now, is_write, is_atomic), actor_name(now).c_str()),
        format("before  %-24s %s, by %s", before_line.c_str(), verb(before.epoch, before.is_write, before.is_atomic),
               actor_name(before.epoch).c_str()),
        "needed  " + needed};
    report(Problem::race, pc, before.pc,
           format("RACE: %s of %zu bytes at %s is not ordered after the %s at %s", is_write ? "write" : "read", bytes,
                  now_line.c_str(), before.is_write ? "write" : "read", before_line.c_str()),
           details);
}

bool in_shared_bounds(const char* p, size_t bytes, bool is_write, const Thread& observer, u32 pc) {
    const Cta& own = *observer.cta;
    if (p >= own.smem + shared_base && p + bytes <= own.smem + own.dynamic_end) return true;
    Cta* owner = shared_owner(p);
    if (!owner || owner->cluster != own.cluster || !inside_shared(*owner, (u32)(p - owner->smem), bytes)) {
        report(Problem::bounds, pc, 0,
               format("OUT OF BOUNDS: %s of %zu bytes of shared memory at %s", is_write ? "write" : "read", bytes,
                      source_line(pc).c_str()),
               {by_line(observer), "at      " + (owner ? describe(p) : std::string("no resident CTA's shared memory")),
                format("limit   dynamic shared memory is 0x%x..0x%x (LaunchConfig::dynamic_smem = %zu)", shared_base,
                       own.dynamic_end, grid.dynamic_smem)});
        return false;
    }
    if (owner == &own) return true;
    if (!observer.knows.has_heard_of(owner->number)) {
        report(Problem::cluster, pc, 0,
               format("CLUSTER: access to the shared memory of CTA rank %u, which may not have started, at %s", owner->rank,
                      source_line(pc).c_str()),
               {by_line(observer), "needed  cluster_sync() before the first access to another CTA's shared memory"});
    } else if (!owner->present) {
        report(Problem::cluster, pc, 1,
               format("CLUSTER: access to the shared memory of CTA rank %u, which has exited, at %s", owner->rank,
                      source_line(pc).c_str()),
               {by_line(observer), "needed  cluster_sync() before that CTA exits"});
    }
    return true;
}

bool in_bounds(const char* p, size_t bytes, bool is_write, const Thread& observer, u32 pc) {
    if (p < heap_begin()) return in_shared_bounds(p, bytes, is_write, observer, pc);
    const Allocation* a = allocation_of(p);
    if (a && p + bytes <= a->begin + a->bytes) return true;
    report(Problem::bounds, pc, 1,
           format("OUT OF BOUNDS: %s of %zu bytes of global memory at %s", is_write ? "write" : "read", bytes,
                  source_line(pc).c_str()),
           {by_line(observer), "at      " + describe(p)});
    return false;
}

// One access to (part of) one cell.
struct Visit {
    const char* p;
    size_t bytes;  // of the whole access, for the report
    int flags;
    uint8_t mask;
    View view;
    Thread& observer;
    Epoch by;
    u32 pc;
    bool is_write() const { return flags & AccessFlags::is_write; }
    bool is_atomic() const { return flags & AccessFlags::is_atomic; }
    void race_with(const Earlier& before) const {
        report_race(p, bytes, is_write(), is_atomic(), before, observer, by, view, pc);
    }
    // A write must be visible in this access's own proxy, unless the async proxy made it.
    void must_follow_write(Epoch write, u32 write_pc, uint8_t write_flags) const {
        if (is_atomic() && (write_flags & atomic_write)) return;
        if (!observer.knows.covers(write, write_flags & async_write ? generic : view))
            race_with({write, write_pc, true, (write_flags & atomic_write) != 0});
    }
    void must_follow_read(Epoch read, u32 read_pc) const {
        if (!observer.knows.covers(read, generic)) race_with({read, read_pc, false, false});
    }
};

void check(Cell& cell, const Visit& visit) {
    if (cell.write.clock && (cell.write_mask & visit.mask)) visit.must_follow_write(cell.write, cell.write_pc, cell.flags);
    if (visit.is_write() && cell.read.clock && (cell.read_mask & visit.mask)) visit.must_follow_read(cell.read, cell.read_pc);
    if (cell.older)
        for (const Older& o : pool[cell.older]) {
            if (!(o.mask & visit.mask)) continue;
            if (o.is_write) visit.must_follow_write(o.epoch, o.pc, o.flags);
            else if (visit.is_write()) visit.must_follow_read(o.epoch, o.pc);
        }
}

void record_write(Cell& cell, const Visit& visit) {
    if (visit.mask != 15) {
        const uint8_t kept = (uint8_t)(cell.write.clock ? cell.write_mask & ~visit.mask : 0);
        if (cell.older)
            for (Older& o : pool[cell.older]) o.mask = (uint8_t)(o.mask & ~visit.mask);
        if (kept) older(cell).push_back({cell.write, cell.write_pc, kept, true, cell.flags});
        if (cell.older) {
            std::vector<Older>& list = pool[cell.older];
            list.erase(std::remove_if(list.begin(), list.end(), [](const Older& o) { return !o.mask; }), list.end());
        }
    } else if (cell.older) {
        pool[cell.older].clear();
    }
    drop_older_if_empty(cell);
    cell.write = visit.by;
    cell.write_pc = visit.pc;
    cell.write_mask = visit.mask;
    cell.initialised |= visit.mask;
    cell.read_mask = (uint8_t)(cell.read_mask & ~visit.mask);
    if (!cell.read_mask) cell.read.clock = 0;
    cell.flags = (uint8_t)((cell.flags & mbarrier_word) | (visit.flags & is_async ? async_write : 0) |
                           (visit.is_atomic() ? atomic_write : 0));
}

void record_read(Cell& cell, const Visit& visit) {
    const bool has_read = cell.read.clock != 0;
    const bool same = has_read && cell.read.id == visit.by.id && cell.read.clock == visit.by.clock;
    if (same) {
        cell.read_mask |= visit.mask;
        return;
    }
    if (!has_read || visit.observer.knows.covers(cell.read, generic)) {
        // whatever must come after this read comes after an earlier one of the same bytes too
        const uint8_t kept = (uint8_t)(has_read ? cell.read_mask & ~visit.mask : 0);
        if (kept) older(cell).push_back({cell.read, cell.read_pc, kept, false, 0});
        cell.read = visit.by;
        cell.read_pc = visit.pc;
        cell.read_mask = visit.mask;
        return;
    }
    std::vector<Older>& list = older(cell);
    for (Older& o : list) {
        if (o.is_write || o.epoch.id != visit.by.id) continue;
        if (o.epoch.clock == visit.by.clock) {
            o.mask |= visit.mask;
            return;
        }
        if (!(o.mask & ~visit.mask)) {
            o = {visit.by, visit.pc, visit.mask, false, 0};
            return;
        }
    }
    list.push_back({visit.by, visit.pc, visit.mask, false, 0});
}
}  // namespace

void access(const char* p, size_t bytes, int flags, Thread& observer, Epoch by, u32 pc) {
    statistics.accesses++;
    const bool shared = p < heap_begin();
    if (!in_bounds(p, bytes, flags & is_write, observer, pc)) return;
    const View view = !(flags & is_async) ? generic : shared ? async_shared : async_global;
    while (bytes) {
        const u32 offset = (u32)((uintptr_t)p & 3);
        const size_t n = bytes < 4 - offset ? bytes : 4 - offset;
        const Visit visit{p, bytes, flags, (uint8_t)(((1u << n) - 1) << offset), view, observer, by, pc};
        Cell& cell = cell_of(p);
        statistics.cells++;
        if ((cell.flags & mbarrier_word) && !(flags & is_mbarrier))
            report(Problem::mbarrier_data, pc, 0,
                   format("MBARRIER AS DATA: %s of %s, which holds an mbarrier, at %s", visit.is_write() ? "write" : "read",
                          describe(p).c_str(), source_line(pc).c_str()),
                   {"by      " + actor_name(by), "needed  mbar_inval before its memory is used for something else"});
        if (!visit.is_write() && shared && (visit.mask & ~cell.initialised))
            report(Problem::uninitialised, pc, 0,
                   format("UNWRITTEN: read of %s, which nothing has written, at %s", describe(p).c_str(),
                          source_line(pc).c_str()),
                   {"by      " + actor_name(by)});
        check(cell, visit);
        if (visit.is_write()) record_write(cell, visit);
        else if (!visit.is_atomic()) record_read(cell, visit);
        p += n;
        bytes -= n;
    }
}

void mark_mbarrier(const char* p, bool live) {
    for (int i = 0; i < 8; i += 4) {
        Cell& cell = cell_of(p + i);
        cell.flags = (uint8_t)(live ? cell.flags | mbarrier_word : cell.flags & ~mbarrier_word);
        if (!live) cell.initialised = 0;
    }
}

LastWrite last_write(const char* p) {
    const Cell& cell = cell_of(p);
    return {cell.write, cell.write_pc};
}

void check_peers_done(const Cta& cta) {
    const Cell* begin = &cell_of(cta.smem);
    const auto done = [&](Epoch by, u32 pc) {
        if (!by.clock || by.cta() == cta.number || cta.at_exit.covers(by, generic)) return;
        report(Problem::cluster, pc, 6,
               format("CLUSTER: CTA rank %u may have exited when its shared memory is accessed at %s", cta.rank,
                      source_line(pc).c_str()),
               {"by      " + actor_name(by), "needed  cluster_sync() after the last access and before that CTA exits"});
    };
    for (const Cell* cell = begin; cell != begin + slot_bytes / 4; cell++) {
        done(cell->write, cell->write_pc);
        done(cell->read, cell->read_pc);
        if (cell->older)
            for (const Older& o : pool[cell->older]) done(o.epoch, o.pc);
    }
}

void clear_slot_shadow(u32 slot) {
    memset(static_cast<void*>(shadow_begin() + (size_t)slot * slot_bytes / 4), 0, sizeof(Cell) * slot_bytes / 4);
}

void clear_heap_shadow() {
    if (!shadow) return;
    char* begin = reinterpret_cast<char*>(&cell_of(heap_begin()));  // page-aligned: slots are a multiple of a page
    madvise(begin, heap_used() / 4 * sizeof(Cell), MADV_DONTNEED);
}

void forget_readers() {
    pool.assign(1, {});
    pool_free.clear();
}

void hand_heap_shadow_to_predecessor(size_t heap_bytes) {
    const Epoch predecessor{1, predecessor_cta << 12 | (u32)actors.predecessor()};
    Cell* cell = shadow_begin() + (size_t)(heap_begin() - arena_begin()) / 4;
    for (Cell* end = cell + heap_bytes / 4; cell != end; cell++) {
        if (!cell->write.clock && !cell->read.clock && !cell->older) continue;
        if (cell->older) {
            for (const Older& o : pool[cell->older]) {
                if (o.is_write) cell->write.clock = 1, cell->write_mask |= o.mask;
                else cell->read.clock = 1, cell->read_mask |= o.mask;
            }
            cell->older = 0;
        }
        if (cell->write.clock) cell->write = predecessor;
        if (cell->read.clock) cell->read = predecessor;
        cell->flags = 0;
    }
}

void mark_predecessor_write(const char* p, size_t bytes) {
    const Epoch predecessor{1, predecessor_cta << 12 | (u32)actors.predecessor()};
    shadow_begin();
    for (const char* q = p; q < p + bytes; q = reinterpret_cast<const char*>(((uintptr_t)q & ~uintptr_t{3}) + 4)) {
        const u32 from = (u32)((uintptr_t)q & 3), to = (u32)std::min<size_t>(4, from + (size_t)(p + bytes - q));
        Cell& cell = cell_of(q);
        cell.write = predecessor;
        cell.write_mask = (uint8_t)(cell.write_mask | (((1u << (to - from)) - 1) << from));
    }
}

Epoch Thread::epoch() const { return {knows.at(generic, number), cta->number << 12 | (u32)number}; }
}  // namespace emulator
