#include "report.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <unordered_map>
#include <unordered_set>

#include "machine.h"

namespace emulator {
namespace {
struct Report {
    std::string title;
    std::vector<std::string> details;
};
std::vector<Report> collected;
std::unordered_set<u64> known;
std::string text;

// The innermost frame of an inlined call that is not one of the primitives' own headers.
std::string look_up(u32 pc) {
    Dl_info module;
    if (!dladdr(module_base + pc, &module) || !module.dli_fname) return "?";
    const std::string command = format("addr2line -i -s -e '%s' 0x%lx 2>/dev/null", module.dli_fname,
                                       (unsigned long)(module_base + pc - 1 - static_cast<char*>(module.dli_fbase)));
    std::string found = "?";
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) return found;
    char line[512];
    while (fgets(line, sizeof line, pipe)) {
        found = line;
        found.erase(std::min(found.find_first_of("\n"), found.find(" (discriminator")));
        const std::string file = found.substr(0, found.find(':'));
        if (file != "primitives.h" && file != "arithmetic.h" && file != "dialect.h") break;
    }
    pclose(pipe);
    return found;
}
}  // namespace

std::string format(const char* text, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(buffer, sizeof buffer, text, arguments);
    va_end(arguments);
    return buffer;
}

std::string source_line(u32 pc) {
    static std::unordered_map<u32, std::string> memory;
    if (!pc) return "?";
    std::string& line = memory[pc];
    if (line.empty()) line = look_up(pc);
    return line;
}

std::string thread_name(u32 cta, int thread) {
    return format("CTA (%u,%u,%u) thread %d (warp %d, lane %d)", cta % grid.grid.x, cta / grid.grid.x % grid.grid.y,
                  cta / grid.grid.x / grid.grid.y, thread, thread / 32, thread % 32);
}

std::string by_line(const Thread& thread) { return "by      " + thread_name(thread.cta->number, thread.number); }

std::string actor_name(Epoch epoch) {
    if (epoch.cta() == predecessor_cta) return "the grid before this one";
    const u32 cta = epoch.cta();
    const std::string of = format("CTA (%u,%u,%u) ", cta % grid.grid.x, cta / grid.grid.x % grid.grid.y,
                                  cta / grid.grid.x / grid.grid.y);
    const int number = actors.number(epoch.actor());
    switch (actors.role(epoch.actor())) {
        case Role::thread: return thread_name(cta, number);
        case Role::wgmma: return of + format("wgmma of warp %d", number);
        case Role::load: {
            std::string name = of + "TMA or bulk load";
            for (Cta* c : resident)
                if (c->number == cta && number < (int)c->mbarriers.size())
                    name += format(" on mbarrier 0x%x", c->mbarriers[(size_t)number].address);
            return name;
        }
        case Role::store: return of + "TMA or bulk store";
        case Role::cp_async: return of + format("cp.async of thread %d", number);
        case Role::predecessor: break;
    }
    return "the grid before this one";
}

void report(Problem problem, u32 pc, u32 other_pc, const std::string& title, const std::vector<std::string>& details) {
    if (!known.insert((u64)problem << 58 ^ (u64)pc << 28 ^ other_pc).second) return;
    if ((int)collected.size() >= config.max_reports) return;
    collected.push_back({title, details});
    if (config.echo) {
        fprintf(stderr, "%s\n", title.c_str());
        for (const std::string& line : details) fprintf(stderr, "  %s\n", line.c_str());
    }
}

void clear_reports() {
    collected.clear();
    known.clear();
}

int report_count() { return (int)collected.size(); }

// The first reports in full as far as a screen reaches, the others by their titles.
const char* reports() {
    constexpr size_t screen = 44;
    text.clear();
    size_t lines = 0;
    for (size_t i = 0; i < collected.size(); i++) {
        const Report& r = collected[i];
        text += r.title + "\n";
        lines++;
        if (lines + r.details.size() + (collected.size() - i) > screen) continue;
        for (const std::string& line : r.details) text += "    " + line + "\n";
        lines += r.details.size();
    }
    if ((int)known.size() > (int)collected.size())
        text += format("... and %d more\n", (int)(known.size() - collected.size()));
    return text.c_str();
}
}  // namespace emulator
