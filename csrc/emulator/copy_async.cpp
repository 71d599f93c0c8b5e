// cp.async: small copies by single threads, in the generic proxy, complete at the thread's own wait.
#include "race.h"
#include "report.h"

namespace emulator {
// Moves the data; that it has landed counts only after a wait.
void run_copies(std::vector<CopyAsync>& copies) {
    for (const CopyAsync& c : copies) {
        memcpy(c.to, c.from, c.bytes);
        memset(c.to + c.bytes, 0, c.size - c.bytes);
    }
    copies.clear();
    statistics.async_operations++;
}

void cp_async(u32 dst, const void* src, u32 size, u32 bytes) {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    char* to = shared_pointer(dst, size, size, "cp.async", pc);
    if (!to) return;
    if ((uintptr_t)src % size || bytes > size) {
        report(Problem::misaligned, pc, 1,
               format("MISALIGNED: cp.async of %u bytes from %s, at %s", bytes, describe(static_cast<const char*>(src)).c_str(),
                      source_line(pc).c_str()),
               {by_line(t), format("needed  a source at a multiple of %u, at most %u bytes", size, size)});
        return;
    }
    const Epoch by{t.copy_clock + 1, t.cta->number << 12 | (u32)actors.cp_async(t.number)};
    if (bytes) {
        if (!in_arena(src)) {
            report(Problem::wild, pc, 2, format("WILD POINTER: cp.async from %p, at %s", src, source_line(pc).c_str()),
                   {by_line(t)});
            abort_launch();
        }
        access(static_cast<const char*>(src), bytes, plain_read, t, by, pc);
    }
    access(to, size, is_write, t, by, pc);
    memset(to, 0xff, size);  // whoever reads before the wait finds NaN, not yesterday's data
    t.copy_issued = by.clock;
    t.copies.push_back({to, static_cast<const char*>(src), size, bytes});
    if (config.async == AsyncMode::early) run_copies(t.copies);
}

void cp_async_wait(int groups) {
    Thread& t = *current;
    while ((int)t.copy_groups.size() > groups) {
        run_copies(t.copy_groups.front().copies);
        const u32 done = t.copy_groups.front().clock;
        t.copy_guaranteed = std::max(t.copy_guaranteed, done);
        u32& known = t.knows.at(generic, actors.cp_async(t.number));
        known = std::max(known, done);
        t.copy_groups.erase(t.copy_groups.begin());
    }
}

bool run_copies_for_mbarrier(Thread& t) {
    if (t.copy_arrivals.empty()) return false;
    const CopyArrival arrival = std::move(t.copy_arrivals.front());
    t.copy_arrivals.erase(t.copy_arrivals.begin());
    for (CopyGroup& group : t.copy_groups) run_copies(group.copies);
    run_copies(t.copies);
    Mbarrier& m = t.cta->mbarriers[arrival.mbarrier];
    if (!m.pending) {
        report(Problem::mbarrier, arrival.pc, 0,
               format("MBARRIER: an arrival more than the count of %u in phase %u, by the cp.asyncs of %s", m.count, m.phase,
                      source_line(arrival.pc).c_str()));
        return true;
    }
    m.pending_knows.cta = t.cta->number;
    m.pending_knows.join(arrival.knows);
    m.pending--;
    complete_phase_if_done(*t.cta, m);
    return true;
}
}  // namespace emulator

using namespace emulator;

void cp_async_commit() {
    Thread& t = *current;
    t.copy_groups.push_back({std::move(t.copies), ++t.copy_clock});
    t.copies.clear();
}

void cp_async_mbar_arrive(u32 bar) {
    const u32 pc = EMULATOR_PC;
    Thread& t = *current;
    Mbarrier* m = find_mbarrier(*t.cta, bar, "cp.async.mbarrier.arrive", pc);
    if (!m) abort_launch();
    CopyArrival arrival{t.knows, (size_t)(m - t.cta->mbarriers.data()), pc};
    t.copy_guaranteed = ++t.copy_clock;
    arrival.knows.at(generic, actors.cp_async(t.number)) = t.copy_clock;
    t.step();
    t.copy_arrivals.push_back(std::move(arrival));
    if (config.async == AsyncMode::early) run_copies_for_mbarrier(t);
}
