// Dependent launches: the grid before may still run until griddepcontrol.wait, and here it does its worst. Whatever it
// wrote or read is unordered with this grid until then, and buffers declared with predecessor_writes hold poison.
#include <cstring>

#include "memory.h"
#include "race.h"
#include "report.h"

namespace emulator {
namespace {
struct Pending {
    char* memory;
    std::vector<char> content;
};
std::vector<Pending> declared;
bool hidden = false;

void reveal() {
    if (!hidden) return;
    for (const Pending& p : declared) memcpy(p.memory, p.content.data(), p.content.size());
    hidden = false;
    events++;
}
}  // namespace

void predecessor_writes(void* memory, size_t bytes) {
    declared.push_back({static_cast<char*>(memory), std::vector<char>(bytes)});
}

void begin_dependent_launch() {
    hand_heap_shadow_to_predecessor(heap_used());
    for (Pending& p : declared) {
        memcpy(p.content.data(), p.memory, p.content.size());
        memset(p.memory, 0xff, p.content.size());
        mark_predecessor_write(p.memory, p.content.size());
    }
    hidden = true;
}

void end_dependent_launch() {
    reveal();
    declared.clear();
}

}  // namespace emulator

using namespace emulator;

void griddep_wait() {
    reveal();
    for (int v = 0; v < views; v++) current->knows.at((View)v, actors.predecessor()) = 1;
}

void griddep_launch() {}
