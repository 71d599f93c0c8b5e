// The arena's extent, for the detector's shadow.
#pragma once
#include "machine.h"

namespace emulator {
char* arena_begin();  // reserves it; nullptr when the system refuses
size_t arena_bytes();
char* heap_begin();
size_t heap_used();
bool inside_shared(const Cta& cta, u32 offset, size_t bytes);
}  // namespace emulator
