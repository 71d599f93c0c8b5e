// Volatile accesses behave as relaxed ones (PTX ISA, "Volatile operations").
#pragma once
#include "machine.h"

namespace emulator {
void volatile_read(void* p, size_t bytes, u32 pc);
void volatile_write(void* p, size_t bytes, u32 pc);
void clear_sync_variables();
}  // namespace emulator
