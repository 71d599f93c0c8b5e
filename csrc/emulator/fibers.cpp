#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#ifndef __x86_64__
#error "The emulator's fiber switch is written for x86-64; build on such a machine or add a switch for this one here."
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the old stack, changes stacks, restores them: about 5 ns, where swapcontext's
// system call takes 450.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
__asm__(R"(
.text
.p2align 4
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {
char* stacks = nullptr;
size_t stacks_bytes = 0;
const size_t page = (size_t)sysconf(_SC_PAGESIZE);
}  // namespace

bool reserve_stacks(size_t count) {
    const size_t bytes = count * fiber_stack_bytes;
    if (bytes <= stacks_bytes) return true;
    if (stacks) munmap(stacks, stacks_bytes);
    stacks_bytes = 0;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return stacks = nullptr, false;
    stacks = static_cast<char*>(memory);
    stacks_bytes = bytes;
    for (size_t i = 0; i < count; i++)
        if (mprotect(stacks + i * fiber_stack_bytes, page, PROT_NONE)) return false;
    return true;
}

bool on_fiber_stack(const void* address) { return (size_t)(static_cast<const char*>(address) - stacks) < stacks_bytes; }

void prepare(Fiber& fiber, size_t index, void (*entry)()) {
    char* stack = stacks + index * fiber_stack_bytes;
    fiber.stack_bottom = stack + page;
#ifdef EMULATOR_ASAN
    // frames of a fiber that never returned are still marked as out of scope
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack_bottom, fiber_stack_bytes - page);
#endif
    // stacks are a power of two apart: a different start for each keeps them out of each other's cache sets
    char* top = stack + fiber_stack_bytes - index % 16 * 192;
    void** word = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
    *--word = nullptr;  // the return address that `entry` does not use; keeps its stack aligned by the ABI
    *--word = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--word = nullptr;
    fiber.stack_pointer = word;
    fiber.sanitizer_stack = nullptr;
}

#ifdef EMULATOR_ASAN
namespace {
size_t usable_bytes(const Fiber& fiber) {
    return fiber.stack_bottom && on_fiber_stack(fiber.stack_bottom) ? fiber_stack_bytes - page : 0;
}
}  // namespace

void switch_fiber(Fiber& from, Fiber& to, bool last) {
    size_t bytes = usable_bytes(to);
    const void* bottom = to.stack_bottom;
    if (!bytes) {  // the thread's own stack
        pthread_attr_t attributes;
        void* lowest;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &lowest, &bytes);
        pthread_attr_destroy(&attributes);
        bottom = lowest;
    }
    __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer_stack, bottom, bytes);
    emulator_switch(&from.stack_pointer, to.stack_pointer);
    __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
}

void fiber_started(Fiber&, Fiber&) { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
void switch_fiber(Fiber& from, Fiber& to, bool) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
void fiber_started(Fiber&, Fiber&) {}
#endif
}  // namespace emulator
