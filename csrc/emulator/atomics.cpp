// Flags and atomics: relaxed, acquire and release operations with scopes, memory fences, polling.
#include "atomics.h"

#include <cstring>

#include "race.h"
#include "report.h"

namespace emulator {
namespace {
// What the last writer of each flag has published; a relaxed write publishes what its thread fenced before.
std::unordered_map<const void*, std::vector<Published>> flags;

// Two operations synchronise when each one's scope includes the other's thread.
bool inclusive(Scope release, Scope acquire, u32 releaser, const Cta& acquirer) {
    if (releaser == acquirer.number) return true;
    for (Cta* peer : acquirer.cluster->ctas)
        if (peer->number == releaser) return release != Scope::cta && acquire != Scope::cta;
    return release >= Scope::gpu && acquire >= Scope::gpu;
}

Published everything(Scope scope, u32 pc) { return {current->knows.snapshot(), scope, current->cta->number, pc}; }

void acquire(const std::vector<Published>& published, Scope scope, u32 pc) {
    for (const Published& p : published) {
        if (inclusive(p.scope, scope, p.cta, *current->cta)) current->knows.join(p.what);
        else current->cta->narrow_scope_pc = p.scope < Scope::gpu ? p.pc : pc;
    }
}

void touch(void* p, size_t bytes, bool write, u32 pc) {
    const char* address = static_cast<const char*>(p);
    if (!in_arena(p)) {
        if (on_fiber_stack(p)) return;
        report(Problem::wild, pc, 0, format("WILD POINTER: atomic access at %p, at %s", p, source_line(pc).c_str()),
               {by_line(*current)});
        abort_launch();
    }
    if ((uintptr_t)p % bytes) {
        report(Problem::misaligned, pc, 0,
               format("MISALIGNED: atomic access of %zu bytes to %s, at %s", bytes, describe(address).c_str(),
                      source_line(pc).c_str()));
        abort_launch();
    }
    access(address, bytes, is_atomic | (write ? is_write : 0), *current, current->epoch(), pc);
}

u64 value_at(const void* p, size_t bytes) {
    u64 value = 0;
    memcpy(&value, p, bytes);
    return value;
}

// A thread that reads the same value from the same flag again sleeps until something has happened.
void poll(const void* p, size_t bytes, const char* what, u32 pc) {
    Thread& t = *current;
    if (t.poll_event != events) t.polls = 0;
    const bool again = t.last_poll == p && t.last_poll_value == value_at(p, bytes);
    t.polls++;
    t.poll_event = events;
    if (again || t.polls > 100000) block(State::polling, what, smem_or_heap_offset(p), value_at(p, bytes), pc);
    else if (t.polls > 16) yield(State::running);  // several flags in turn
    t.last_poll = p;
    t.last_poll_value = value_at(p, bytes);
}

void publish(const void* p, bool release, bool continues, Scope scope, u32 pc) {
    std::vector<Published>& flag = flags[p];
    if (!continues) flag.clear();  // a plain store ends the release sequence, a read-modify-write continues it
    if (release) {
        flag.push_back(everything(scope, pc));
        current->step();
    } else {
        flag.insert(flag.end(), current->fenced.begin(), current->fenced.end());
    }
    if (flag.size() > 64) flag.erase(flag.begin(), flag.end() - 64);
    events++;
    current->last_poll = nullptr;
}

void observe(const void* p, bool acquires, Scope scope, u32 pc) {
    auto flag = flags.find(p);
    if (flag == flags.end()) return;
    if (acquires) acquire(flag->second, scope, pc);
    else current->observed.insert(current->observed.end(), flag->second.begin(), flag->second.end());
    if (current->observed.size() > 256) current->observed.erase(current->observed.begin(), current->observed.end() - 256);
}

template <class T>
u64 apply(Rmw operation, u64 old_bits, u64 bits, u64 expected) {
    const T old = bits_as<T>(old_bits), value = bits_as<T>(bits);
    switch (operation) {
        case Rmw::add: return bits_as<u64>((T)(old + value));
        case Rmw::exchange: return bits;
        case Rmw::compare_exchange: return old_bits == expected ? bits : old_bits;
        case Rmw::minimum: return value < old ? bits : old_bits;
        case Rmw::maximum: return value > old ? bits : old_bits;
        case Rmw::bit_and: return old_bits & bits;
        case Rmw::bit_or: return old_bits | bits;
        case Rmw::bit_xor: return old_bits ^ bits;
    }
    return old_bits;
}
}  // namespace

void clear_sync_variables() { flags.clear(); }

u32 load_flag(const u32* p, Order order, Scope scope) {
    const u32 pc = EMULATOR_PC;
    touch(const_cast<u32*>(p), 4, false, pc);
    poll(p, 4, order == Order::acquire ? "ld.acquire of" : "ld.relaxed of", pc);
    observe(p, order == Order::acquire, scope, pc);
    return *p;
}

void store_flag(u32* p, u32 value, Order order, Scope scope) {
    const u32 pc = EMULATOR_PC;
    touch(p, 4, true, pc);
    publish(p, order == Order::release, false, scope, pc);
    *p = value;
}

u64 read_modify_write(Rmw operation, Number number, void* p, u64 value, u64 expected, Order order, Scope scope) {
    const u32 pc = EMULATOR_PC;
    const size_t bytes = number == Number::u64 || number == Number::f64 ? 8 : 4;
    touch(p, bytes, true, pc);
    const auto next = [&] {
        const u64 old = value_at(p, bytes);
        switch (number) {
            case Number::u32: return apply<u32>(operation, old, value, expected);
            case Number::s32: return apply<int32_t>(operation, old, value, expected);
            case Number::u64: return apply<u64>(operation, old, value, expected);
            case Number::f32: return apply<float>(operation, old, value, expected);
            case Number::f64: return apply<double>(operation, old, value, expected);
        }
        return old;
    };
    if (next() == value_at(p, bytes)) poll(p, bytes, "atomic polling", pc);  // changes nothing: a spin lock or a look
    const u64 old = value_at(p, bytes), now = next();
    observe(p, order == Order::acquire || order == Order::acq_rel, scope, pc);
    if (now != old || order == Order::release || order == Order::acq_rel || !current->fenced.empty()) {
        const u64 happened = events;
        publish(p, order == Order::release || order == Order::acq_rel, true, scope, pc);
        if (now == old) {  // wakes nobody
            events = happened;
            current->last_poll = p;
        }
    }
    memcpy(p, &now, bytes);
    return old;
}

void volatile_read(void* p, size_t bytes, u32 pc) {
    if (!in_arena(p)) return;
    touch(p, bytes, false, pc);
    if (bytes > 8) return;
    poll(p, bytes, "volatile read of", pc);
    observe(p, false, Scope::sys, pc);
}

void volatile_write(void* p, size_t bytes, u32 pc) {
    if (!in_arena(p)) return;
    touch(p, bytes, true, pc);
    publish(p, false, false, Scope::sys, pc);
}

void thread_fence(Scope scope) {
    const u32 pc = EMULATOR_PC;
    current->fenced.assign(1, everything(scope, pc));
    current->step();
    acquire(current->observed, scope, pc);
    current->observed.clear();
}
}  // namespace emulator
