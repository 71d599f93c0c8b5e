// Fibers: each CUDA thread of a launch runs on a stack of its own and is switched by hand.
#pragma once
#include <cstddef>

namespace emulator {
struct Fiber {
    void* stack_pointer = nullptr;
    char* stack_bottom = nullptr;   // lowest usable byte; the page below is a guard
    void* sanitizer_stack = nullptr;
};

constexpr size_t fiber_stack_bytes = 64 << 10;  // includes the guard page
constexpr size_t max_fibers = 30000;            // Linux allows 65530 mappings; a guarded stack takes two

// Makes room for `count` stacks; false when the system refuses.
bool reserve_stacks(size_t count);
// Whether an address lies on some fiber's stack.
bool on_fiber_stack(const void* address);
// Prepares stack `index` so that the next switch to `fiber` starts `entry`, which must not return.
void prepare(Fiber& fiber, size_t index, void (*entry)());
// Continues in `to`; returns when something switches back to `from`. `last`: `from` will never be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);
// To be called first on a new fiber.
void fiber_started(Fiber& self, Fiber& parent);
}  // namespace emulator
