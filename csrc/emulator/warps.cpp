// What the lanes of a warp do together: rendezvous, shuffles, votes, reductions, elect, __syncwarp.
#include "race.h"
#include "report.h"

namespace emulator {
void collective(int operation, const char* name, u32 mask, void* argument, void (*action)(Warp&, Rendezvous&), u32 pc) {
    Warp& warp = *current->warp;
    const u32 me = 1u << current->lane;
    statistics.collectives++;
    if (!(mask & me)) {
        report(Problem::collective, pc, 0,
               format("MASK: %s at %s is executed by a lane that its mask 0x%x leaves out", name, source_line(pc).c_str(), mask),
               {by_line(*current)});
        abort_launch();
    }
    Rendezvous* here = nullptr;
    for (Rendezvous& r : warp.rendezvous)
        if (r.live && r.operation == operation && r.mask == mask && !(r.arrived & me)) {
            here = &r;
            break;
        }
    if (!here) {
        for (Rendezvous& r : warp.rendezvous)
            if (!r.live) {
                here = &r;
                break;
            }
        if (!here) {
            report(Problem::collective, pc, 1, format("DIVERGENT: lanes of a warp are at more than 8 different operations, at %s",
                                                      source_line(pc).c_str()));
            abort_launch();
        }
        *here = Rendezvous();
        here->live = true;
        here->operation = operation;
        here->mask = mask;
        here->pc = pc;
    }
    here->arrived |= me;
    here->arguments[current->lane] = argument;
    if (here->arrived != mask) {
        block(State::collective, name, mask, 0, pc);
        return;
    }
    action(warp, *here);
    here->live = false;
    warp.each(mask & ~me, [](Thread& t, int) { make_ready(t); });
}

void same_in_warpgroup(Warp& warp, u64 what, const char* name, u32 pc) {
    const size_t first = (size_t)warp.number & ~size_t{3};
    if (first + 4 > warp.cta->warps.size())
        report(Problem::wgmma, pc, 4, format("WARPGROUP: %s at %s in a warpgroup of fewer than four warps", name, source_line(pc).c_str()));
    warp.warpgroup_log.push_back(what);
    const size_t position = warp.warpgroup_log.size() - 1;
    for (size_t w = first; w < first + 4 && w < warp.cta->warps.size(); w++) {
        const std::vector<u64>& log = warp.cta->warps[w].warpgroup_log;
        if (log.size() > position && log[position] != what)
            report(Problem::wgmma, pc, 5,
                   format("WARPGROUP: the warps of one warpgroup do different things at %s", source_line(pc).c_str()),
                   {"by      " + thread_name(warp.cta->number, warp.number * 32),
                    "needed  all four warps execute the same wgmma and setmaxnreg instructions with the same operands"});
    }
}

// ---- shuffles -------------------------------------------------------------------------------------------------------------
namespace {
struct ShuffleArgument {
    Shuffle kind;
    u32 value, result;
    int operand, width;
};

void do_shuffle(Warp&, Rendezvous& r) {
    for (int l = 0; l < 32; l++) {
        if (!(r.mask >> l & 1)) continue;
        ShuffleArgument& a = *static_cast<ShuffleArgument*>(r.arguments[l]);
        const int base = l & ~(a.width - 1);
        int source = l;
        switch (a.kind) {
            case Shuffle::index: source = base + (a.operand & (a.width - 1)); break;
            case Shuffle::xor_: source = l ^ a.operand; break;
            case Shuffle::up: source = l - a.operand; break;
            case Shuffle::down: source = l + a.operand; break;
        }
        // segments: reading below is refused for up, above for the others; then a lane keeps its own value
        if (a.kind == Shuffle::xor_ ? source >= base + a.width : source < base || source >= base + a.width) source = l;
        if (r.mask >> source & 1) {
            a.result = static_cast<ShuffleArgument*>(r.arguments[source])->value;
            continue;
        }
        report(Problem::shuffle, r.pc, 0,
               format("SHUFFLE: lane %d reads lane %d, which is not in the mask 0x%x, at %s", l, source, r.mask,
                      source_line(r.pc).c_str()));
        a.result = 0xdeadbeef;
    }
}

struct VoteArgument {
    Vote kind;
    u32 value, result;
};
void do_vote(Warp&, Rendezvous& r) {
    u32 ballot = 0;
    for (int l = 0; l < 32; l++)
        if (r.mask >> l & 1 && static_cast<VoteArgument*>(r.arguments[l])->value) ballot |= 1u << l;
    for (int l = 0; l < 32; l++) {
        if (!(r.mask >> l & 1)) continue;
        VoteArgument& a = *static_cast<VoteArgument*>(r.arguments[l]);
        switch (a.kind) {
            case Vote::ballot: a.result = ballot; break;
            case Vote::any: a.result = ballot != 0; break;
            case Vote::all: a.result = ballot == r.mask; break;
            case Vote::match_any:
                a.result = 0;
                for (int o = 0; o < 32; o++)
                    if (r.mask >> o & 1 && static_cast<VoteArgument*>(r.arguments[o])->value == a.value) a.result |= 1u << o;
        }
    }
}

struct ReduceArgument {
    Reduce kind;
    u32 value, result;
};
u32 reduced(Reduce kind, u32 a, u32 b) {
    switch (kind) {
        case Reduce::add: return a + b;
        case Reduce::min_signed: return (u32)std::min((int)a, (int)b);
        case Reduce::max_signed: return (u32)std::max((int)a, (int)b);
        case Reduce::min_unsigned: return std::min(a, b);
        case Reduce::max_unsigned: return std::max(a, b);
        case Reduce::bit_and: return a & b;
        case Reduce::bit_or: return a | b;
        case Reduce::bit_xor: return a ^ b;
    }
    return 0;
}
void do_reduce(Warp&, Rendezvous& r) {
    bool first = true;
    u32 all = 0;
    for (int l = 0; l < 32; l++) {
        if (!(r.mask >> l & 1)) continue;
        const ReduceArgument& a = *static_cast<ReduceArgument*>(r.arguments[l]);
        all = first ? a.value : reduced(a.kind, all, a.value);
        first = false;
    }
    for (int l = 0; l < 32; l++)
        if (r.mask >> l & 1) static_cast<ReduceArgument*>(r.arguments[l])->result = all;
}
}  // namespace

u32 shuffle(Shuffle kind, u32 mask, u32 value, int operand, int width) {
    ShuffleArgument a{kind, value, value, operand, width};
    collective(shuffle_operation * 16 + (int)kind, "shfl.sync", mask, &a, do_shuffle, EMULATOR_PC);
    return a.result;
}

u32 vote(Vote kind, u32 mask, u32 value) {
    VoteArgument a{kind, value, 0};
    collective(vote_operation * 16 + (int)kind, "vote.sync", mask, &a, do_vote, EMULATOR_PC);
    return a.result;
}

u32 reduce(Reduce kind, u32 mask, u32 value) {
    ReduceArgument a{kind, value, 0};
    collective(reduce_operation * 16 + (int)kind, "redux.sync", mask, &a, do_reduce, EMULATOR_PC);
    return a.result;
}
}  // namespace emulator

using namespace emulator;

bool elect_one() {
    collective(elect_operation * 16, "elect.sync", ~0u, nullptr, [](Warp&, Rendezvous&) {}, EMULATOR_PC);
    return current->lane == 0;
}

void __syncwarp(u32 mask) {
    const auto meet = [](Warp& warp, Rendezvous& r) {
        Knowledge all;
        all.cta = warp.cta->number;
        warp.each(r.mask, [&](Thread& t, int) {
            all.join(t.knows);
            t.step();
        });
        warp.each(r.mask, [&](Thread& t, int) { t.knows.join(all); });
    };
    collective(syncwarp_operation * 16, "__syncwarp", mask, nullptr, meet, EMULATOR_PC);
}

void __nanosleep(unsigned) { yield(State::running); }

namespace emulator {
void trap() {
    const u32 pc = EMULATOR_PC;
    report(Problem::exit, pc, 0, format("TRAP: __trap() at %s", source_line(pc).c_str()),
           {by_line(*current)});
    abort_launch();
    __builtin_unreachable();
}
}  // namespace emulator
