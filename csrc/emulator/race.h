// The race detector: every access to emulated memory is checked against what came before it.
#pragma once
#include "machine.h"

namespace emulator {
enum AccessFlags { plain_read = 0, is_write = 1, is_async = 2, is_atomic = 4, is_mbarrier = 8 };

// Records that `by` accesses [p, p + bytes) with what `observer` knows, and reports what is wrong with it.
void access(const char* p, size_t bytes, int flags, Thread& observer, Epoch by, u32 pc);
// The mbarrier words: plain data accesses to them are reported.
void mark_mbarrier(const char* p, bool live);
// When and where an address was last written.
struct LastWrite {
    Epoch epoch;
    u32 pc;
};
LastWrite last_write(const char* p);
// When a CTA of a cluster has exited: every access of its peers to its shared memory must come before.
void check_peers_done(const Cta& cta);
void clear_slot_shadow(u32 slot);
void clear_heap_shadow();
// All recorded accesses become the predecessor grid's.
void hand_heap_shadow_to_predecessor(size_t heap_bytes);
void mark_predecessor_write(const char* p, size_t bytes);
void forget_readers();
}  // namespace emulator
