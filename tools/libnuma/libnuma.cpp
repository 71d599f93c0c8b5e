// Stands in for libnuma where it is not installed: says that memory cannot be bound to NUMA nodes.
//
// vLLM's CPU build is linked against libnuma.so.1 and does not load without it, although it goes on without binding
// memory where numa_available() is negative. These are the functions that it refers to (numa(3)); where there is no
// NUMA none but the first is ever called.

struct bitmask;

extern "C" {

int numa_available() { return -1; }

int numa_migrate_pages(int, bitmask*, bitmask*) { return -1; }

void numa_set_strict(int) {}

void numa_bitmask_free(bitmask*) {}

bitmask* numa_get_mems_allowed() { return nullptr; }

bitmask* numa_parse_nodestring(const char*) { return nullptr; }

void numa_set_interleave_mask(bitmask*) {}

void numa_set_membind(bitmask*) {}

}
