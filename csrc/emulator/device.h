// What ptx.cuh is in the emulated build: the CUDA C++ dialect for a host compiler, and the primitives.
#pragma once
#include <cstring>

// The memory functions as device code calls them: the emulator checks every byte they touch. The label renames the
// compiler's own calls too, so it stands before everything else; only kernels include this header.
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("emulated_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("emulated_memmove");
void* memset(void*, int, size_t) noexcept __asm__("emulated_memset");
}

#include "dialect.h"

#include "arithmetic.h"
#include "primitives.h"

// Inline assembly cannot be executed or checked here: it belongs into ptx*.cuh, with an emulated twin in primitives.h.
#define asm inline_assembly_is_not_modelled_by_the_emulator
