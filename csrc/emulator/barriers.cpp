// Barriers of a CTA (bar.sync, bar.arrive), of a cluster, and the register budget of setmaxnreg.
#include <algorithm>

#include "race.h"
#include "report.h"

namespace emulator {
namespace {
constexpr int all_threads = -1;

std::string barrier_name(const BarrierRequest& r) {
    return r.threads == all_threads ? "__syncthreads" : format("barrier %u of %d threads", r.id, r.threads);
}

void complete(Barrier& barrier) {
    for (Warp* warp : barrier.waiting) {
        const u32 lanes = warp->at_barrier;
        warp->at_barrier = 0;
        warp->each(lanes, [&](Thread& t, int) {
            t.knows.join(barrier.knows);
            if (&t != current) make_ready(t);
        });
    }
    barrier = Barrier();
    events++;
}

bool is_complete(const Cta& cta, const Barrier& barrier) {
    if (!barrier.arrived) return false;
    return barrier.arrived >= (barrier.needed == all_threads ? cta.present : barrier.needed);
}

// All present lanes of the warp have come: the warp arrives as a whole.
void warp_arrives(Warp& warp) {
    const int first = __builtin_ctz(warp.at_barrier);
    const BarrierRequest request = warp.request[first];
    warp.each(warp.at_barrier, [&](Thread& t, int l) {
        const BarrierRequest& other = warp.request[l];
        if (other.id == request.id && other.threads == request.threads && other.only_arrives == request.only_arrives &&
            (other.pc == request.pc || source_line(other.pc) == source_line(request.pc)))
            return;
        report(Problem::barrier, request.pc, other.pc,
               "DIVERGENT: lanes of one warp are at different barriers",
               {format("lane %-2d at %-24s %s", first, source_line(request.pc).c_str(), barrier_name(request).c_str()),
                format("lane %-2d at %-24s %s", l, source_line(other.pc).c_str(), barrier_name(other).c_str()),
                by_line(t),
                "needed  bar.sync and bar.arrive are executed by all threads of a warp together"});
    });
    Cta& cta = *warp.cta;
    Barrier& barrier = cta.barriers[request.id];
    statistics.barriers++;
    if (!barrier.arrived) {
        barrier.needed = request.threads;
        barrier.knows.cta = cta.number;
    } else if (barrier.needed != request.threads) {
        report(Problem::barrier, request.pc, 1,
               format("BARRIER: %s at %s, but others wait at it for %d threads", barrier_name(request).c_str(),
                      source_line(request.pc).c_str(), barrier.needed));
    }
    warp.each(warp.at_barrier, [&](Thread& t, int) {
        barrier.knows.join(t.knows);
        t.step();
    });
    barrier.arrived += request.threads == all_threads ? __builtin_popcount(warp.at_barrier) : 32;
    if (request.only_arrives) {
        const u32 lanes = warp.at_barrier;
        warp.at_barrier = 0;
        warp.each(lanes, [](Thread& t, int) {
            if (&t != current) make_ready(t);
        });
    } else {
        barrier.waiting.push_back(&warp);
    }
    if (is_complete(cta, barrier)) complete(barrier);
}

void arrive(const BarrierRequest& request) {
    if (request.id > 15 || (request.threads != all_threads && (request.threads <= 0 || request.threads % 32))) {
        report(Problem::barrier, request.pc, 0,
               format("BARRIER: %s at %s", barrier_name(request).c_str(), source_line(request.pc).c_str()),
               {"limit   barriers 0 to 15, a multiple of 32 threads"});
        abort_launch();
    }
    Warp& warp = *current->warp;
    const u32 me = 1u << current->lane;
    warp.at_barrier |= me;
    warp.request[current->lane] = request;
    if (warp.at_barrier == warp.present) warp_arrives(warp);
    // `complete` and a finished bar.arrive have taken this lane off the barrier
    if (warp.at_barrier & me)
        block(State::barrier, request.threads == all_threads ? "__syncthreads, barrier" : "named_bar_sync, barrier",
              request.id, (u64)request.threads, request.pc);
}
}  // namespace

void warp_shrank(Warp& warp) {
    if (warp.at_barrier && warp.at_barrier == warp.present) {
        // unless the warp has arrived already and waits for others
        bool waits = false;
        for (const Barrier& b : warp.cta->barriers)
            waits |= std::find(b.waiting.begin(), b.waiting.end(), &warp) != b.waiting.end();
        if (!waits) warp_arrives(warp);
    }
    for (Barrier& b : warp.cta->barriers)
        if (b.needed == all_threads && is_complete(*warp.cta, b)) complete(b);
}

// ---- clusters -------------------------------------------------------------------------------------------------------------
void cluster_check(Cluster& cluster) {
    if (!cluster.arrived || (int)cluster.arrived < cluster.present()) return;
    cluster.done.swap(cluster.pending);
    cluster.pending.clear();
    cluster.arrived = 0;
    cluster.phase++;
    for (Cta* cta : cluster.ctas)
        for (Thread& t : cta->threads)
            if (t.state == State::cluster) make_ready(t);
    events++;
}

// ---- setmaxnreg -----------------------------------------------------------------------------------------------------------
namespace {
struct RegisterRequest {
    int count;
    bool increase;
};

// Warps that wait get their registers as soon as others have given back enough.
void serve_waiting(Cta& cta) {
    for (Warp& warp : cta.warps) {
        u32 wanted = 0;
        for (int l = 0; l < 32; l++)
            if (warp.lane(l).state == State::registers) wanted = (u32)warp.lane(l).wait_object;
        const u32 more = (wanted - warp.registers) * 32;
        if (!wanted || more > cta.register_pool) continue;
        cta.register_pool -= more;
        warp.registers = wanted;
        warp.each(~0u, [](Thread& t, int) {
            if (t.state == State::registers) make_ready(t);
        });
    }
}
}  // namespace

void set_max_registers(int count, bool increase) {
    const u32 pc = EMULATOR_PC;
    RegisterRequest request{count, increase};
    collective(setmaxnreg_operation * 16, "setmaxnreg", ~0u, &request, [](Warp& warp, Rendezvous& r) {
        const RegisterRequest& wanted = *static_cast<RegisterRequest*>(r.arguments[0]);
        const u32 target = (u32)wanted.count;
        same_in_warpgroup(warp, (u64)target << 1 | (wanted.increase ? 1 : 0), "setmaxnreg", r.pc);
        if (wanted.increase ? target < warp.registers : target > warp.registers)
            report(Problem::registers, r.pc, 0,
                   format("SETMAXNREG: %s to %u registers from %u, at %s", wanted.increase ? "increase" : "decrease", target,
                          warp.registers, source_line(r.pc).c_str()));
        if (wanted.increase || target > warp.registers) return;
        warp.cta->register_pool += (warp.registers - target) * 32;
        warp.registers = target;
        serve_waiting(*warp.cta);
    }, pc);
    Warp& warp = *current->warp;
    if (!increase || (u32)count <= warp.registers) return;
    const u32 more = ((u32)count - warp.registers) * 32;
    if (more <= current->cta->register_pool) {
        current->cta->register_pool -= more;
        warp.registers = (u32)count;
        warp.each(~0u, [](Thread& t, int) {
            if (t.state == State::registers) make_ready(t);
        });
        return;
    }
    block(State::registers, "setmaxnreg.inc to", (u64)count, 0, pc);
}
}  // namespace emulator

using namespace emulator;

void __syncthreads() { arrive({0, all_threads, false, EMULATOR_PC}); }
void named_bar_sync(u32 id, u32 n) { arrive({id, (int)n, false, EMULATOR_PC}); }
void named_bar_arrive(u32 id, u32 n) { arrive({id, (int)n, true, EMULATOR_PC}); }

namespace emulator {
int syncthreads_count(int predicate) {
    const u32 pc = EMULATOR_PC;
    // two barriers around a count: the first gathers, the second keeps the next use out
    Cta& cta = *current->cta;
    if (predicate) cta.predicates++;
    arrive({0, all_threads, false, pc});
    const int count = cta.predicates;
    arrive({0, all_threads, false, pc});
    cta.predicates = 0;
    arrive({0, all_threads, false, pc});
    return count;
}
}  // namespace emulator

u32 cluster_rank() { return current->cta->rank; }
u32 cluster_size() { return (u32)current->cta->cluster->ctas.size(); }

void cluster_arrive() {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    Cluster& cluster = *t.cta->cluster;
    if (t.cluster_arrivals > cluster.phase)
        report(Problem::cluster, pc, 2, format("CLUSTER: a second cluster_arrive() without cluster_wait(), at %s", source_line(pc).c_str()),
               {by_line(t)});
    Knowledge all;
    all.cta = ~0u;  // nobody's: keeps every CTA as a snapshot
    all.foreign = cluster.pending;
    all.join(t.knows);
    cluster.pending = all.foreign;
    t.step();
    t.cluster_arrivals = cluster.phase + 1;
    cluster.arrived++;
    cluster_check(cluster);
}

void cluster_wait() {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    Cluster& cluster = *t.cta->cluster;
    if (!t.cluster_arrivals) {
        report(Problem::cluster, pc, 3, format("CLUSTER: cluster_wait() without cluster_arrive(), at %s", source_line(pc).c_str()),
               {by_line(t)});
        return;
    }
    while (cluster.phase < t.cluster_arrivals) block(State::cluster, "cluster_wait, phase", cluster.phase, 0, pc);
    t.knows.join(cluster.done);
}

u32 mapa(u32 address, u32 rank) {
    const u32 pc = EMULATOR_PC;
    if (rank >= cluster_size()) {
        report(Problem::cluster, pc, 4, format("CLUSTER: mapa to rank %u of a cluster of %u, at %s", rank, cluster_size(), source_line(pc).c_str()),
               {by_line(*current)});
        return address;
    }
    return (address & 0xffffff) | (rank + 1) << 24;
}

u32 ld_cluster(u32 address) {
    const u32 pc = EMULATOR_PC;
    const char* p = shared_pointer(address, 4, 4, "ld.shared::cluster", pc);
    if (!p) return 0xffffffff;
    access(p, 4, plain_read, *current, current->epoch(), pc);
    u32 value;
    memcpy(&value, p, 4);
    return value;
}

void st_cluster(u32 address, u32 value) {
    const u32 pc = EMULATOR_PC;
    char* p = shared_pointer(address, 4, 4, "st.shared::cluster", pc);
    if (!p) return;
    access(p, 4, is_write, *current, current->epoch(), pc);
    memcpy(p, &value, 4);
}
