// Vector clocks: what each actor of a launch knows to have happened, the basis of the race detector.
//
// An actor is a thread or an asynchronous engine working for one: the wgmmas of a warp, the loads of an mbarrier, the
// bulk stores and the cp.asyncs of a thread. Every actor counts its own steps. A thread's knowledge says, for every
// actor of its own CTA, up to which step that actor's accesses come before whatever the thread does next. It is kept
// three times: for plain accesses, and for accesses by the async proxy to shared and to global memory, which see a
// plain write only after the writer's fence.proxy.async. Knowledge about other CTAs is a list of snapshots.
#pragma once
#include <memory>
#include <vector>

#include "dialect.h"

namespace emulator {
enum View { generic = 0, async_shared = 1, async_global = 2, views = 3 };

// One step of one actor: `id` holds the CTA's number above 12 bits of actor number. Clock 0: never.
struct Epoch {
    u32 clock, id;
    u32 cta() const { return id >> 12; }
    int actor() const { return (int)(id & 4095); }
};
constexpr u32 predecessor_cta = 0xfffff;  // the grid before this one

enum class Role { thread, wgmma, load, store, cp_async, predecessor };

// The actor numbers of a launch.
struct Actors {
    static constexpr int loads = 64, stores = 32;  // mbarriers, and threads that store in bulk, per CTA
    int threads = 0, warps = 0, count = 0;
    void lay_out(int thread_count) {
        threads = thread_count;
        warps = (threads + 31) / 32;
        count = (predecessor() + 1 + 7) & ~7;
    }
    int wgmma(int warp) const { return threads + warp; }
    int load(int slot) const { return threads + warps + slot; }
    int store(int slot) const { return threads + warps + loads + slot; }
    int cp_async(int thread) const { return threads + warps + loads + stores + thread; }
    int predecessor() const { return 2 * threads + warps + loads + stores; }
    Role role(int actor) const {
        if (actor < threads) return Role::thread;
        if (actor < load(0)) return Role::wgmma;
        if (actor < store(0)) return Role::load;
        if (actor < cp_async(0)) return Role::store;
        return actor < predecessor() ? Role::cp_async : Role::predecessor;
    }
    // The number within its role: thread, warp, mbarrier slot, store slot, thread.
    int number(int actor) const {
        switch (role(actor)) {
            case Role::wgmma: return actor - wgmma(0);
            case Role::load: return actor - load(0);
            case Role::store: return actor - store(0);
            case Role::cp_async: return actor - cp_async(0);
            default: return actor;
        }
    }
};
extern Actors actors;

typedef std::shared_ptr<const std::vector<u32>> Snapshot;
struct Foreign {
    u32 cta;
    Snapshot clocks;
};

struct Knowledge {
    u32 cta = 0;
    std::vector<u32> own;  // [view][actor]; empty: knows nothing
    std::vector<Foreign> foreign;

    u32& at(View view, int actor) { return own[(size_t)(view * actors.count + actor)]; }
    u32 at(View view, int actor) const { return own[(size_t)(view * actors.count + actor)]; }
    bool covers(Epoch epoch, View view) const {
        if (epoch.cta() == cta) return at(view, epoch.actor()) >= epoch.clock;
        if (epoch.cta() == predecessor_cta) return at(view, actors.predecessor()) >= epoch.clock;
        for (const Foreign& f : foreign)
            if (f.cta == epoch.cta()) return (*f.clocks)[(size_t)(view * actors.count + epoch.actor())] >= epoch.clock;
        return false;
    }
    bool has_heard_of(u32 other) const {
        for (const Foreign& f : foreign)
            if (f.cta == other) return true;
        return other == cta;
    }
    static void raise(std::vector<u32>& clocks, const std::vector<u32>& by) {
        u32* __restrict__ to = clocks.data();
        const u32* __restrict__ from = by.data();
        for (size_t i = 0, n = by.size(); i < n; i++) to[i] = to[i] > from[i] ? to[i] : from[i];
    }
    // Everything known here, as snapshots that another CTA can keep.
    std::vector<Foreign> snapshot() const {
        std::vector<Foreign> all = foreign;
        all.push_back({cta, std::make_shared<std::vector<u32>>(own)});
        return all;
    }
    void join(const Foreign& other) {
        if (other.cta == cta) {
            if (own.empty()) own = *other.clocks;
            else raise(own, *other.clocks);
            return;
        }
        if (!own.empty())
            for (int v = 0; v < views; v++) {
                const u32 seen = (*other.clocks)[(size_t)(v * actors.count + actors.predecessor())];
                if (seen > at((View)v, actors.predecessor())) at((View)v, actors.predecessor()) = seen;
            }
        for (Foreign& f : foreign)
            if (f.cta == other.cta) {
                if (f.clocks == other.clocks) return;
                auto merged = std::make_shared<std::vector<u32>>(*f.clocks);
                raise(*merged, *other.clocks);
                f.clocks = merged;
                return;
            }
        foreign.push_back(other);
    }
    void join(const std::vector<Foreign>& others) {
        for (const Foreign& f : others) join(f);
    }
    void join(const Knowledge& other) {
        if (other.cta != cta) return join(other.snapshot());
        if (own.empty()) own = other.own;
        else raise(own, other.own);
        for (const Foreign& f : other.foreign) join(f);
    }
};
}  // namespace emulator
