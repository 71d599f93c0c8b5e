// Reports: collected per launch, each different problem once, printed as at most a screenful.
#pragma once
#include <string>
#include <vector>

#include "clocks.h"

namespace emulator {
enum class Problem : int {
    race, bounds, wild, uninitialised, mbarrier_data, misaligned, collective, barrier, cluster, registers,
    mbarrier, transactions, tensor_map, wgmma, shuffle, exit, deadlock, launch, scope
};

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
// `file.cuh:123` of a call, seen through the primitives' own inline functions.
std::string source_line(u32 pc);
// "CTA (1,0,0) thread 37" and the like, for an actor's epoch.
std::string actor_name(Epoch epoch);
std::string thread_name(u32 cta, int thread);
struct Thread;
std::string by_line(const Thread& thread);  // the "by" line of a report

// Adds a report unless the same problem at the same two places was reported before. `details` are its further lines.
void report(Problem problem, u32 pc, u32 other_pc, const std::string& title, const std::vector<std::string>& details = {});
void clear_reports();
int report_count();
}  // namespace emulator
