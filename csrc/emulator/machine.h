// The state of the emulated device during a launch, shared by all parts of the emulator. Not for kernels.
#pragma once
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "fibers.h"
#include "host.h"
#include "primitives.h"

namespace emulator {
struct Cta;
struct Cluster;
struct Thread;
struct Warp;

// The program counter of the kernel's call, as an offset into its module.
#define EMULATOR_PC ((u32)(static_cast<char*>(__builtin_return_address(0)) - module_base))
extern char* module_base;

// ---- asynchronous work -------------------------------------------------------------------------------------------------
// A piece of an asynchronous copy. Pieces of at most 16 bytes have a bit per byte that is inside the tensor.
struct Chunk {
    char* to;
    const char* from;  // nullptr: all outside
    u32 bytes, valid;
};
enum class Sum : uint8_t { none, f32, f16, bf16, s32, u8 };
struct BulkLoad {
    Cta* cta;  // whose shared memory and mbarrier it completes on
    std::vector<Chunk> chunks;
    u32 bytes, bar, phase, pc, fill;
};
struct BulkStore {
    std::vector<Chunk> chunks;
    Sum sum;
};
struct CopyAsync {
    char* to;
    const char* from;
    u32 size, bytes;
};
struct CopyGroup {
    std::vector<CopyAsync> copies;  // empty: they have landed
    u32 clock;
};
// A cp.async.mbarrier.arrive: what the mbarrier learns when the copies so far have landed.
struct CopyArrival {
    Knowledge knows;
    size_t mbarrier;  // its slot
    u32 pc;
};
struct WgmmaOperation {
    WgmmaShape shape;
    u64 a_descriptor, b_descriptor;
    bool accumulate;
    void* d[32];
    const u32* a[32];
    u32 a_values[32][4];
    u32 pc;
};

// ---- threads and warps ---------------------------------------------------------------------------------------------------
enum class State : uint8_t { running, collective, barrier, mbarrier, cluster, registers, polling, done };

// Registers that a wgmma in flight reads (A fragment) or accumulates into.
struct RegistersInUse {
    const char* first;
    size_t bytes;
    bool accumulator;
    u32 group, pc;
};
// What a thread has published (release) or observed and not yet acquired, with the scope it holds for.
struct Published {
    std::vector<Foreign> what;
    Scope scope;
    u32 cta, pc;
};
struct Thread {
    Indices where;
    Fiber fiber;
    Cta* cta;
    Warp* warp;
    int number, lane;
    State state;
    const char* waiting_for;  // and its object, value, and place: for the deadlock report
    u64 wait_object, wait_value;
    u32 wait_pc;
    Knowledge knows;

    std::vector<CopyAsync> copies;  // not yet committed
    std::vector<CopyGroup> copy_groups;
    std::vector<CopyArrival> copy_arrivals;
    u32 copy_clock;                    // counts commits and arrivals; a copy's step is the next one
    u32 copy_issued, copy_guaranteed;  // the newest copy's step; up to which some wait has asked
    std::vector<BulkStore> stores;
    std::vector<std::vector<BulkStore>> store_groups;
    u32 stores_committed, stores_waited;
    int store_slot;

    u32 wgmma_fences;
    std::vector<std::pair<const char*, u32>> written_since_fence;  // own stack: candidate registers
    std::vector<RegistersInUse> in_use;

    std::vector<Published> fenced, observed;  // by memory fences: released so far; seen by relaxed reads
    const void* last_poll;
    u64 last_poll_value, poll_event;
    u32 polls;
    u32 cluster_arrivals;

    Epoch epoch() const;
    void step() { knows.at(generic, number)++; }
};
struct Rendezvous {
    bool live;
    int operation;
    u32 mask, arrived, pc;
    void* arguments[32];
};
struct BarrierRequest {
    u32 id;
    int threads;
    bool only_arrives;
    u32 pc;
};
struct Warp {
    Cta* cta;
    int number;
    u32 runnable, present;  // lanes; present: not exited
    Rendezvous rendezvous[8];
    u32 at_barrier;
    BarrierRequest request[32];
    std::vector<WgmmaOperation> wgmmas;  // not yet committed
    std::vector<std::vector<WgmmaOperation>> wgmma_groups;
    u32 wgmmas_committed, wgmmas_waited;
    std::vector<u64> warpgroup_log;  // what all four warps of a warpgroup must do alike
    u32 registers;

    Thread& lane(int l) const;
    template <class F>
    void each(u32 mask, F function) const {
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) function(lane(l), l);
    }
};

// ---- CTAs and clusters -----------------------------------------------------------------------------------------------------
struct Barrier {
    int needed, arrived;
    Knowledge knows;
    std::vector<Warp*> waiting;
};
struct Mbarrier {
    bool live;
    u32 address, count, pending;
    int64_t outstanding;  // transaction bytes
    u32 phase, pc;
    bool fenced;  // its initialisation is visible to the async proxy once it is ordered before it
    int slot;
    Knowledge pending_knows, done_knows;
};
struct StaticSmem {
    u32 address, bytes;
};
struct Cta {
    u32 number, slot, rank;
    Cluster* cluster;
    uint3 index;
    char* smem;  // shared address 0
    u32 dynamic_end, static_end;
    int present;  // threads that have not exited
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<Mbarrier> mbarriers;
    std::map<const void*, StaticSmem> statics;
    int store_slots, loads_in_flight;
    u32 register_pool;
    u32 narrow_scope_pc;  // a release or acquire that did not synchronise because its scope was too narrow
    Knowledge at_exit;    // of all threads that have exited, in a cluster
    int predicates;  // of a __syncthreads_count under way
};
struct Cluster {
    std::vector<Cta*> ctas;
    u32 arrived, phase;
    std::vector<Foreign> pending, done;
    int present() const {
        int n = 0;
        for (Cta* cta : ctas) n += cta->present;
        return n;
    }
};

// ---- the running launch ------------------------------------------------------------------------------------------------------
extern Grid grid;
extern Thread* current;  // nullptr: host code or the scheduler
extern std::vector<Cta*> resident;
extern std::vector<BulkLoad> loads_in_flight;
extern u64 events;  // counts everything that can end a poll
extern bool aborted;

u64 random_bits();
inline u32 random_below(size_t n) { return (u32)(random_bits() % n); }

// scheduler.cpp
void make_ready(Thread& thread);
void yield(State state);
void block(State state, const char* what, u64 object, u64 value, u32 pc);
void abort_launch();  // from a fiber: never returns to the kernel

// barriers.cpp
void warp_shrank(Warp& warp);  // a lane has exited: barriers and rendezvous may be complete now
void cluster_check(Cluster& cluster);

// What lanes meet for; times 16, plus a variant, as `operation` below: lanes at different ones do not meet.
enum Operation {
    shuffle_operation, vote_operation, reduce_operation, elect_operation, syncwarp_operation, load_operation,
    store_operation, mma_operation, wgmma_operation, fence_operation, commit_operation, wait_operation,
    setmaxnreg_operation
};
// warps.cpp: the last lane of `mask` to arrive executes `action` for all.
void collective(int operation, const char* name, u32 mask, void* argument, void (*action)(Warp&, Rendezvous&), u32 pc);

// Reports a warp that does something else than the warps of its warpgroup did at the same point of their sequence.
void same_in_warpgroup(Warp& warp, u64 what, const char* name, u32 pc);

// memory.cpp
constexpr u32 shared_base = 1024, slot_bytes = 256 << 10, max_resident = 512;
struct Place {
    Cta* cta;
    u32 offset;
};
char* slot_memory(u32 slot);
bool in_arena(const void* p);
u64 smem_or_heap_offset(const void* p);  // a short name for an address in reports
Cta* shared_owner(const void* p);
Place resolve(u32 address);  // shared::cluster addresses; cta nullptr: no such CTA
// The bytes at a 32-bit shared address, checked for bounds and alignment; nullptr after a report.
char* shared_pointer(u32 address, u32 bytes, u32 alignment, const char* what, u32 pc);
std::string describe(const char* p);
struct Allocation {
    char* begin;
    size_t bytes;
};
const Allocation* allocation_of(const char* p);

// predecessor.cpp
void begin_dependent_launch();
void end_dependent_launch();

// mbarrier.cpp
Mbarrier* find_mbarrier(Cta& cta, u32 offset, const char* what, u32 pc);
void complete_phase_if_done(Cta& cta, Mbarrier& mbarrier);

// copy_async.cpp, bulk.cpp, wgmma.cpp: perform one pending operation
void run_copies(std::vector<CopyAsync>& copies);
bool run_copies_for_mbarrier(Thread& thread);  // cp.async.mbarrier.arrive: false when none is pending
void run_load(size_t index);
void run_store_group(Thread& thread);
void run_wgmma_group(Warp& warp);
}  // namespace emulator
