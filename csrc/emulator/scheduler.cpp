// Launches: starts CTAs, runs their warps in seeded random order, performs asynchronous work at seeded moments.
#include <dlfcn.h>

#include <algorithm>
#include <map>

#include "atomics.h"
#include "memory.h"
#include "race.h"
#include "report.h"

namespace emulator {
Config config;
Statistics statistics;
const Indices* indices = nullptr;
ArgumentBuffer argument_buffer;
Grid grid;
Thread* current = nullptr;
std::vector<Cta*> resident;
std::vector<BulkLoad> loads_in_flight;
u64 events = 0;
bool aborted = false;
char* module_base = nullptr;
void find_modules();  // hooks.cpp

namespace {
Fiber scheduler;
std::vector<Warp*> runnable;
std::vector<u32> free_slots;
std::vector<Cluster*> clusters;
void (*kernel_thread)(const void*) = nullptr;
u64 random_state = 1;
u32 next_cta = 0, total_ctas = 0;

dim3 cluster_count() {
    return dim3(grid.grid.x / grid.cluster.x, grid.grid.y / grid.cluster.y, grid.grid.z / grid.cluster.z);
}
u32 cluster_ctas() { return grid.cluster.x * grid.cluster.y * grid.cluster.z; }

void start_random(u64 seed) {
    random_state = seed * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 8; i++) random_bits();
}

// ---- the life of a thread ------------------------------------------------------------------------------------------------
void check_exit(const Thread& t) {
    const std::string by = by_line(t);
    if (t.copy_issued > t.copy_guaranteed)
        report(Problem::exit, 1, 0, "EXIT: a thread ends with cp.asyncs that it has not waited for",
               {by, "needed  cp_async_commit() and cp_async_wait<0>() before the end"});
    if (t.lane == 0 && t.warp->wgmmas_waited < t.warp->wgmmas_committed + (t.warp->wgmmas.empty() ? 0u : 1u))
        report(Problem::exit, 2, 0, "EXIT: a warp ends with wgmmas in flight",
               {by, "needed  wgmma_commit() and wgmma_wait<0>() before the end"});
    if (t.stores_waited < t.stores_committed + (t.stores.empty() ? 0u : 1u))
        report(Problem::exit, 3, 0, "EXIT: a thread ends while its bulk or TMA store may still read shared memory",
               {by, "needed  bulk_commit() and bulk_wait_read<0>() before the end"});
    if (t.cluster_arrivals > t.cta->cluster->phase)
        report(Problem::exit, 4, 0, "EXIT: a thread ends between cluster_arrive() and cluster_wait()", {by});
}

void thread_main() {
    fiber_started(current->fiber, scheduler);
    kernel_thread(&argument_buffer);
    Thread& t = *current;
    check_exit(t);
    t.warp->wgmmas.clear();  // reported above; the registers that they would use are gone
    t.warp->wgmma_groups.clear();
    t.cta->present--;
    if (t.cta->cluster->ctas.size() > 1) {
        t.cta->at_exit.join(t.knows);
        if (!t.cta->present) check_peers_done(*t.cta);
    }
    t.warp->present &= ~(1u << t.lane);
    warp_shrank(*t.warp);
    cluster_check(*t.cta->cluster);
    yield(State::done);
}

void start_thread(Cta& cta, int number) {
    Thread& t = cta.threads[(size_t)number];
    t = Thread();
    const u32 n = (u32)number;
    t.where.thread = {n % grid.block.x, n / grid.block.x % grid.block.y, n / grid.block.x / grid.block.y};
    t.where.block = cta.index;
    t.where.block_size = grid.block;
    t.where.grid_size = grid.grid;
    t.cta = &cta;
    t.number = number;
    t.warp = &cta.warps[(size_t)number / 32];
    t.lane = number % 32;
    t.knows.cta = cta.number;
    t.knows.own.assign((size_t)(views * actors.count), 0);
    t.knows.at(generic, number) = 1;
    t.store_slot = -1;
    prepare(t.fiber, (size_t)cta.slot * (size_t)actors.threads + n, thread_main);
    t.warp->present |= 1u << t.lane;
    make_ready(t);
}

Cta* start_cta(Cluster& cluster, u32 rank, uint3 index) {
    Cta* cta = new Cta();
    cta->index = index;
    cta->number = index.x + grid.grid.x * (index.y + grid.grid.y * index.z);
    cta->rank = rank;
    cta->cluster = &cluster;
    cta->at_exit.cta = cta->number;
    cta->slot = free_slots.back();
    free_slots.pop_back();
    cta->smem = slot_memory(cta->slot);
    cta->dynamic_end = shared_base + 16 * (u32)(config.seed % 8) + (u32)grid.dynamic_smem;
    cta->static_end = cta->dynamic_end + 2048;
    cta->present = actors.threads;
    // registers per thread as if the kernel were compiled for this block size
    const u32 registers = std::min<u32>(65536 / (u32)actors.threads / 8 * 8, 248);
    memset(cta->smem, 0xff, slot_bytes);
    clear_slot_shadow(cta->slot);
    cta->threads.resize((size_t)actors.threads);
    cta->warps.resize((size_t)actors.warps);
    for (int w = 0; w < actors.warps; w++) {
        cta->warps[(size_t)w].cta = cta;
        cta->warps[(size_t)w].number = w;
        cta->warps[(size_t)w].registers = registers;
    }
    resident.push_back(cta);
    cluster.ctas.push_back(cta);
    return cta;
}

void start_cluster() {
    const dim3 count = cluster_count();
    const u32 number = next_cta / cluster_ctas();
    const uint3 at = {number % count.x, number / count.x % count.y, number / count.x / count.y};
    Cluster* cluster = new Cluster();
    clusters.push_back(cluster);
    for (u32 rank = 0; rank < cluster_ctas(); rank++) {
        const uint3 inside = {rank % grid.cluster.x, rank / grid.cluster.x % grid.cluster.y,
                              rank / grid.cluster.x / grid.cluster.y};
        start_cta(*cluster, rank, {at.x * grid.cluster.x + inside.x, at.y * grid.cluster.y + inside.y,
                                   at.z * grid.cluster.z + inside.z});
    }
    for (Cta* cta : cluster->ctas)
        for (int i = 0; i < actors.threads; i++) start_thread(*cta, i);
    next_cta += cluster_ctas();
}

void end_cluster(Cluster* cluster) {
    for (Cta* cta : cluster->ctas) {
        if (cta->loads_in_flight)
            report(Problem::exit, 5, 0,
                   format("EXIT: a CTA ends with %d TMA or bulk loads in flight into its shared memory", cta->loads_in_flight),
                   {"needed  mbar_wait on their mbarrier before the end"});
        for (size_t i = 0; i < loads_in_flight.size();)
            if (loads_in_flight[i].cta == cta) run_load(i);
            else i++;
        for (Thread& t : cta->threads)
            while (!t.store_groups.empty()) run_store_group(t);
    }
    for (Cta* cta : cluster->ctas) {
        free_slots.push_back(cta->slot);
        resident.erase(std::find(resident.begin(), resident.end(), cta));
        delete cta;
    }
    clusters.erase(std::find(clusters.begin(), clusters.end(), cluster));
    delete cluster;
}

// ---- deadlocks -------------------------------------------------------------------------------------------------------------
std::string what_is_missing(const Thread& t) {
    switch (t.state) {
        case State::mbarrier:
            for (const Mbarrier& m : t.cta->mbarriers)
                if (m.live && m.address == t.wait_object)
                    return format(" parity %llu: in phase %u, %u arrivals and %lld bytes outstanding",
                                  (unsigned long long)t.wait_value, m.phase, m.pending, (long long)m.outstanding);
            return "";
        case State::collective:
            for (const Rendezvous& r : t.warp->rendezvous)
                if (r.live && r.arrived >> t.lane & 1)
                    return format(": lanes 0x%08x have not come", r.mask & ~r.arrived);
            return "";
        case State::barrier: {
            const u32 absent = t.warp->present & ~t.warp->at_barrier;
            if (t.warp->at_barrier && absent) return format(": lanes 0x%08x of the warp have not come", absent);
            const Barrier& b = t.cta->barriers[t.wait_object & 15];
            return format(": %d of %d threads have come", b.arrived, b.needed < 0 ? t.cta->present : b.needed);
        }
        case State::registers: return format(": %u are free", t.cta->register_pool);
        case State::polling: return format(": value %llu", (unsigned long long)t.wait_value);
        case State::cluster:
            return format(": %u of %d threads have come", t.cta->cluster->arrived, t.cta->cluster->present());
        default: return "";
    }
}

// Threads that wait at the same place for the same thing are one line: where, for what, what is missing, who.
void report_deadlock() {
    struct Group {
        const Cta* cta;
        int first_warp, last_warp, threads;
        std::vector<u32> ctas;
    };
    std::map<std::string, Group> groups;
    for (Cta* cta : resident)
        for (Thread& t : cta->threads) {
            if (t.state == State::done) continue;
            const std::string what = format("%s: %s 0x%llx%s", source_line(t.wait_pc).c_str(), t.waiting_for,
                                            (unsigned long long)t.wait_object, what_is_missing(t).c_str());
            Group& g = groups.try_emplace(what, Group{cta, t.number / 32, t.number / 32, 0, {}}).first->second;
            g.threads++;
            g.last_warp = std::max(g.last_warp, t.number / 32);
            g.first_warp = std::min(g.first_warp, t.number / 32);
            if (g.ctas.empty() || g.ctas.back() != cta->number) g.ctas.push_back(cta->number);
        }
    std::vector<std::string> lines;
    for (const auto& [what, g] : groups) {
        if (lines.size() == 14) {
            lines.push_back(format("... and %zu more", groups.size() - 14));
            break;
        }
        std::string who = format("CTA (%u,%u,%u)", g.cta->index.x, g.cta->index.y, g.cta->index.z);
        if (g.ctas.size() > 1) who += format(" and %zu more CTAs", g.ctas.size() - 1);
        who += g.first_warp == g.last_warp ? format(", warp %d", g.first_warp) : format(", warps %d to %d", g.first_warp, g.last_warp);
        lines.push_back(what + format("  [%s: %d threads]", who.c_str(), g.threads));
    }
    if (next_cta < total_ctas)
        lines.push_back(format("%u CTAs have not started: only a cooperative launch may wait for CTAs of a higher number",
                               total_ctas - next_cta));
    report(Problem::deadlock, 0, 0, "DEADLOCK: no thread can go on", lines);
    aborted = true;
}

// ---- the loop --------------------------------------------------------------------------------------------------------------
// One asynchronous operation; false when nothing was chosen. `must`: nothing else can run.
bool step_asynchronous(bool must) {
    const bool any_time = config.async == AsyncMode::random;
    if (!loads_in_flight.empty() && (must || any_time)) {
        run_load(random_below(loads_in_flight.size()));
        return true;
    }
    if (resident.empty() || !(any_time || must)) return false;
    // in the last resort something may only be waiting for a cp.async that is to arrive on an mbarrier
    for (size_t attempt = 0; attempt < (must ? resident.size() : 1); attempt++) {
        Cta& cta = *resident[must ? attempt : random_below(resident.size())];
        if (must) {
            for (Thread& t : cta.threads)
                if (run_copies_for_mbarrier(t)) return true;
            continue;
        }
        Warp& warp = cta.warps[random_below(cta.warps.size())];
        if (!warp.wgmma_groups.empty()) return run_wgmma_group(warp), true;
        Thread& t = cta.threads[random_below(cta.threads.size())];
        if (!t.copy_groups.empty() && random_below(2)) run_copies(t.copy_groups.front().copies);
        else run_copies_for_mbarrier(t);
        if (!t.store_groups.empty()) return run_store_group(t), true;
    }
    return false;
}

bool wake_pollers(bool all) {
    bool any = false;
    for (Cta* cta : resident)
        for (Thread& t : cta->threads)
            if (t.state == State::polling && (t.poll_event != events || all)) {
                make_ready(t);
                any = true;
            }
    return any;
}

// A warp's turn: its runnable lanes, in rotated order, for a random number of rounds.
void run_warp(Warp& warp) {
    int rounds = random_below(8) == 0 ? 1 : (int)random_below(64);
    while (warp.runnable && rounds-- >= 0 && !aborted) {
        const u32 turn = random_below(32), lanes = warp.runnable;
        for (u32 i = 0; i < 32; i++) {
            const u32 lane = (i + turn) & 31;
            if (!(lanes >> lane & 1) || aborted) continue;
            Thread& t = warp.lane((int)lane);
            if (t.state != State::running) continue;
            current = &t;
            indices = &t.where;
            switch_fiber(scheduler, t.fiber);
        }
        current = nullptr;
        if (config.async == AsyncMode::random && random_below(4) == 0) step_asynchronous(false);
    }
}

void run_all() {
    while (!aborted && (next_cta < total_ctas || !clusters.empty())) {
        while (next_cta < total_ctas && free_slots.size() >= cluster_ctas()) start_cluster();
        if (runnable.empty()) {
            if (!step_asynchronous(true) && !wake_pollers(false)) report_deadlock();
            continue;
        }
        run_warp(*runnable[random_below(runnable.size())]);
        runnable.erase(std::remove_if(runnable.begin(), runnable.end(), [](Warp* w) { return !w->runnable; }),
                       runnable.end());
        if (random_below(4) == 0) wake_pollers(false);
        for (size_t i = 0; i < clusters.size();) {
            Cluster* cluster = clusters[i];
            if (!cluster->present()) end_cluster(cluster);
            else i++;
        }
    }
}

int refuse(int cuda_error, const std::string& title, const std::string& detail) {
    report(Problem::launch, 0, 0, title, {detail});
    return -cuda_error;
}

int check_launch() {
    constexpr int invalid_value = 1, invalid_configuration = 9, cooperative_too_large = 720;
    const u64 threads = (u64)grid.block.x * grid.block.y * grid.block.z;
    const u64 ctas = (u64)grid.grid.x * grid.grid.y * grid.grid.z;
    if (!threads || threads > 1024)
        return refuse(invalid_configuration, format("LAUNCH: %llu threads in a CTA", (unsigned long long)threads), "limit   1 to 1024");
    if (threads % 32)
        return refuse(invalid_configuration, format("LAUNCH: %llu threads in a CTA", (unsigned long long)threads),
                      "limit   the emulator runs whole warps: a multiple of 32");
    if (!ctas || ctas >= predecessor_cta)
        return refuse(invalid_configuration, format("LAUNCH: %llu CTAs", (unsigned long long)ctas), "limit   1 to 1048574");
    if (grid.dynamic_smem > (size_t)smem_per_cta)
        return refuse(invalid_value, format("LAUNCH: %zu bytes of dynamic shared memory", grid.dynamic_smem),
                      format("limit   %d", smem_per_cta));
    if (cluster_ctas() < 1 || cluster_ctas() > 16 || grid.grid.x % grid.cluster.x || grid.grid.y % grid.cluster.y ||
        grid.grid.z % grid.cluster.z)
        return refuse(invalid_configuration, format("LAUNCH: clusters of %u x %u x %u", grid.cluster.x, grid.cluster.y, grid.cluster.z),
                      "limit   1 to 16 CTAs, dividing the grid in each dimension");
    const u64 per_sm = std::min<u64>({2048 / threads, 32, 233472 / (grid.dynamic_smem + 1024)});
    if (grid.cooperative && ctas > per_sm * (u64)config.sm_count)
        return refuse(cooperative_too_large,
                      format("LAUNCH: a cooperative grid of %llu CTAs cannot be resident", (unsigned long long)ctas),
                      format("limit   %llu per SM on %d SMs", (unsigned long long)per_sm, config.sm_count));
    if (grid.cooperative && (ctas > max_resident || ctas * threads > max_fibers))
        return refuse(cooperative_too_large,
                      format("LAUNCH: the emulator cannot hold %llu CTAs of %llu threads at once", (unsigned long long)ctas,
                             (unsigned long long)threads),
                      format("limit   %u CTAs and %zu threads; make device_sm_count() smaller for tests", max_resident, max_fibers));
    return 0;
}
}  // namespace

u64 random_bits() {  // xorshift64*
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1Dull >> 20;
}

Thread& Warp::lane(int l) const { return cta->threads[(size_t)(number * 32 + l)]; }

void make_ready(Thread& t) {
    t.state = State::running;
    if (!t.warp->runnable) runnable.push_back(t.warp);
    t.warp->runnable |= 1u << t.lane;
}

void yield(State state) {
    Thread& t = *current;
    t.state = state;
    if (state != State::running) t.warp->runnable &= ~(1u << t.lane);
    statistics.switches++;
    switch_fiber(t.fiber, scheduler, state == State::done);
}

void block(State state, const char* what, u64 object, u64 value, u32 pc) {
    current->waiting_for = what;
    current->wait_object = object;
    current->wait_value = value;
    current->wait_pc = pc;
    yield(state);
}

void abort_launch() {
    aborted = true;
    yield(State::done);
    __builtin_unreachable();
}

int run_grid(void (*kernel)(const void*), const void* kernel_address, const Grid& requested) {
    grid = requested;
    kernel_thread = kernel;
    clear_reports();
    statistics = Statistics();
    Dl_info module;
    if (!module_base && dladdr(kernel_address, &module)) module_base = static_cast<char*>(module.dli_fbase);
    if (int error = check_launch()) return error;
    total_ctas = grid.grid.x * grid.grid.y * grid.grid.z;
    actors.lay_out((int)(grid.block.x * grid.block.y * grid.block.z));
    u32 slots = grid.cooperative ? total_ctas : std::max<u32>((u32)std::max(config.resident_ctas, 1), cluster_ctas());
    slots = std::min({slots, max_resident, (total_ctas + cluster_ctas() - 1) / cluster_ctas() * cluster_ctas()});
    if (!arena_begin() || !reserve_stacks((size_t)slots * (size_t)actors.threads))
        return refuse(2, "LAUNCH: the system gives no memory for the emulated device", "needed  about 10 GiB of address space");
    find_modules();
    clear_sync_variables();
    start_random(config.seed);
    events = 0;
    next_cta = 0;
    aborted = false;
    free_slots.clear();
    for (u32 i = slots; i--;) free_slots.push_back(i);
    if (grid.dependent) begin_dependent_launch();
    else clear_heap_shadow();  // the end of a grid orders everything before the next
    forget_readers();
    run_all();
    current = nullptr;
    if (grid.dependent) end_dependent_launch();
    for (Cta* cta : resident) delete cta;  // after an abort
    for (Cluster* cluster : clusters) delete cluster;
    resident.clear();
    clusters.clear();
    runnable.clear();
    loads_in_flight.clear();
    return report_count();
}
}  // namespace emulator
