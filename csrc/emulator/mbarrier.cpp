// mbarriers: phases, arrivals, transaction bytes.
#include <algorithm>

#include "race.h"
#include "report.h"

namespace emulator {
namespace {
// The mbarrier at a shared::cluster address, whose initialisation must come before this use.
Mbarrier* use(u32 address, Cta** owner, const char* what, u32 pc) {
    const Place place = resolve(address);
    Cta* cta = place.cta ? place.cta : current->cta;
    *owner = cta;
    Mbarrier* m = find_mbarrier(*cta, place.offset, what, pc);
    if (m && !current->knows.covers(last_write(cta->smem + m->address).epoch, generic))
        report(Problem::mbarrier, pc, m->pc,
               format("MBARRIER: %s at %s is not ordered after its mbar_init at %s", what, source_line(pc).c_str(),
                      source_line(m->pc).c_str()),
               {by_line(*current), cta == current->cta ? "needed  fence_mbar_init(), then a barrier, before others use it"
                                                      : "needed  fence_mbar_init(), then cluster_sync(), before other CTAs use it"});
    return m;
}

void arrive(u32 address, int64_t bytes, u32 pc) {
    Cta* cta;
    Mbarrier* m = use(address, &cta, "mbarrier.arrive", pc);
    if (!m) abort_launch();
    m->outstanding += bytes;
    m->pending_knows.cta = cta->number;
    m->pending_knows.join(current->knows);
    current->step();
    if (!m->pending) {
        report(Problem::mbarrier, pc, 0,
               format("MBARRIER: an arrival more than the count of %u in phase %u, at %s", m->count, m->phase, source_line(pc).c_str()),
               {by_line(*current), format("at      mbarrier 0x%x, initialised at %s", m->address, source_line(m->pc).c_str())});
        return;
    }
    m->pending--;
    complete_phase_if_done(*cta, *m);
}

bool wait(u32 address, u32 parity, bool until_complete, u32 pc) {
    Cta* cta;
    Mbarrier* m = use(address, &cta, "mbarrier.try_wait", pc);
    if (!m) abort_launch();
    if (cta != current->cta) {
        report(Problem::mbarrier, pc, 1, format("MBARRIER: a wait on another CTA's mbarrier, at %s", source_line(pc).c_str()),
               {by_line(*current), "limit   mbarrier.try_wait takes shared::cta addresses"});
        abort_launch();
    }
    const size_t index = (size_t)(m - cta->mbarriers.data());  // others may be initialised meanwhile
    do {
        const Mbarrier& now = cta->mbarriers[index];
        if ((now.phase & 1) != (parity & 1)) {
            if (!now.done_knows.own.empty()) current->knows.join(now.done_knows);
            return true;
        }
        block(State::mbarrier, "mbar_wait, mbarrier", cta->mbarriers[index].address, parity, pc);
    } while (until_complete);
    const Mbarrier& now = cta->mbarriers[index];
    if ((now.phase & 1) == (parity & 1)) return false;
    if (!now.done_knows.own.empty()) current->knows.join(now.done_knows);
    return true;
}

void show_to_async_proxy(View first, View last) {
    Thread& t = *current;
    for (int v = first; v <= last; v++) t.knows.at((View)v, t.number) = t.knows.at(generic, t.number);
    t.step();
}
}  // namespace

Mbarrier* find_mbarrier(Cta& cta, u32 offset, const char* what, u32 pc) {
    for (Mbarrier& m : cta.mbarriers)
        if (m.live && m.address == offset) return &m;
    report(Problem::mbarrier, pc, 2,
           format("MBARRIER: %s at %s on shared address 0x%x, which holds no initialised mbarrier", what, source_line(pc).c_str(), offset),
           {by_line(*current), "needed  mbar_init, fence_mbar_init() and a barrier first; cluster_sync() for another CTA's"});
    return nullptr;
}

void complete_phase_if_done(Cta& cta, Mbarrier& m) {
    if (!m.pending && m.outstanding < 0)
        report(Problem::transactions, m.pc, 1,
               format("TRANSACTIONS: %lld bytes more than expected have arrived in phase %u of mbarrier 0x%x", -(long long)m.outstanding,
                      m.phase, m.address),
               {"at      the mbarrier initialised at " + source_line(m.pc),
                "needed  mbar_arrive_tx with all bytes of the phase, before its last arrival"});
    if (m.pending || m.outstanding) return;
    m.phase++;
    m.pending = m.count;
    m.done_knows.cta = cta.number;
    if (m.done_knows.own.empty()) m.done_knows.own.assign((size_t)(views * actors.count), 0);
    if (!m.pending_knows.own.empty() || !m.pending_knows.foreign.empty()) m.done_knows.join(m.pending_knows);
    for (int v = 0; v < views; v++) m.done_knows.at((View)v, actors.load(m.slot)) = m.phase;
    for (Thread& t : cta.threads)
        if (t.state == State::mbarrier && t.wait_object == m.address) make_ready(t);
    events++;
}
}  // namespace emulator

using namespace emulator;

void mbar_init(u32 bar, u32 count) {
    const u32 pc = EMULATOR_PC;
    char* p = shared_pointer(bar, 8, 8, "mbarrier.init", pc);
    if (!p) return;
    Cta& cta = *current->cta;
    if (!count || count > 0xfffff)
        report(Problem::mbarrier, pc, 3, format("MBARRIER: a count of %u at %s", count, source_line(pc).c_str()), {"limit   1 to 1048575"});
    Mbarrier* free_slot = nullptr;
    for (Mbarrier& m : cta.mbarriers) {
        if (m.live && m.address == bar) {
            report(Problem::mbarrier, pc, m.pc,
                   format("MBARRIER: mbar_init at %s of a live mbarrier, initialised at %s", source_line(pc).c_str(), source_line(m.pc).c_str()),
                   {by_line(*current), "needed  mbar_inval before it is initialised again"});
            return;
        }
        if (!m.live && m.address == bar) free_slot = &m;  // its clocks go on from its last life
    }
    if (!free_slot) {
        if (cta.mbarriers.size() == (size_t)Actors::loads) {
            report(Problem::mbarrier, pc, 4, format("MBARRIER: more than %d mbarriers in a CTA, at %s", Actors::loads, source_line(pc).c_str()),
                   {"limit   the emulator's own; raise Actors::loads"});
            abort_launch();
        }
        cta.mbarriers.push_back(Mbarrier());
        free_slot = &cta.mbarriers.back();
        free_slot->slot = (int)cta.mbarriers.size() - 1;
    }
    access(p, 8, is_write | is_mbarrier, *current, current->epoch(), pc);
    mark_mbarrier(p, true);
    Mbarrier& m = *free_slot;
    m.live = true;
    m.address = bar;
    m.count = m.pending = count;
    m.outstanding = 0;
    m.fenced = false;
    m.phase += m.phase & 1;  // even: a fresh barrier; never back, so that old loads stay old
    m.pc = pc;
    m.pending_knows = Knowledge();
    m.done_knows = Knowledge();
}

void mbar_inval(u32 bar) {
    const u32 pc = EMULATOR_PC;
    Cta* cta;
    Mbarrier* m = use(bar, &cta, "mbarrier.inval", pc);
    if (!m) return;
    access(cta->smem + m->address, 8, is_write | is_mbarrier, *current, current->epoch(), pc);
    mark_mbarrier(cta->smem + m->address, false);
    m->live = false;
}

void mbar_arrive(u32 bar) { ::emulator::arrive(bar, 0, EMULATOR_PC); }
void mbar_arrive_tx(u32 bar, u32 bytes) { ::emulator::arrive(bar, bytes, EMULATOR_PC); }
void mbar_arrive_cluster(u32 bar) { ::emulator::arrive(bar, 0, EMULATOR_PC); }
bool mbar_try_wait(u32 bar, u32 parity) { return ::emulator::wait(bar, parity, false, EMULATOR_PC); }
void mbar_wait(u32 bar, u32 parity) { ::emulator::wait(bar, parity, true, EMULATOR_PC); }
void mbar_wait_cluster(u32 bar, u32 parity) { ::emulator::wait(bar, parity, true, EMULATOR_PC); }

void mbar_expect_tx(u32 bar, u32 bytes) {
    Cta* cta;
    Mbarrier* m = use(bar, &cta, "mbarrier.expect_tx", EMULATOR_PC);
    if (m) m->outstanding += bytes;
}

// Orders only the initialisation: whatever else the thread wrote still needs fence_proxy_async().
void fence_mbar_init() {
    for (Mbarrier& m : current->cta->mbarriers)
        if (m.live && last_write(current->cta->smem + m.address).epoch.id == current->epoch().id) m.fenced = true;
    current->step();
}
void fence_proxy_async() { show_to_async_proxy(async_shared, async_shared); }
void fence_proxy_async_global() { show_to_async_proxy(async_global, async_global); }
void fence_proxy_async_all() { show_to_async_proxy(async_shared, async_global); }
