// Device memory and results for the micro-tests, one source for both builds.
#pragma once
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "launch.cuh"

#ifdef TOKENMILL_EMULATED
template <class T>
T* device_array(size_t n) {
    return static_cast<T*>(emulator::device_malloc(n * sizeof(T)));
}
inline void copy(void* to, const void* from, size_t bytes) { memmove(to, from, bytes); }
inline std::string trouble() { return emulator::reports(); }
#else
template <class T>
T* device_array(size_t n) {
    void* p = nullptr;
    cudaMalloc(&p, n * sizeof(T));
    cudaMemset(p, 0xff, n * sizeof(T));
    return static_cast<T*>(p);
}
inline void copy(void* to, const void* from, size_t bytes) { cudaMemcpy(to, from, bytes, cudaMemcpyDefault); }
inline std::string trouble() {
    const cudaError_t error = cudaDeviceSynchronize();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
#endif

template <class T>
T* uploaded(const std::vector<T>& values) {
    T* p = device_array<T>(values.size());
    copy(p, values.data(), values.size() * sizeof(T));
    return p;
}

// Where all micro-tests write, and the file that gets one line each: name, FNV-1a hash of all words, the first words.
// A line that starts with `~` informs tolerances and may differ between devices.
struct Record {
    FILE* file;
    u32* out = device_array<u32>(size);
    int failures = 0;
    static constexpr size_t size = 1 << 16;

    void line(const std::string& name, int status, size_t words) {
        const std::string error = trouble();
        std::vector<u32> values(words);
        copy(values.data(), out, words * 4);
        u64 hash = 0xcbf29ce484222325ull;
        for (u32 word : values)
            for (int i = 0; i < 32; i += 8) hash = (hash ^ (word >> i & 255)) * 0x100000001b3ull;
        fprintf(file, "%s\t%016" PRIx64 "\t", name.c_str(), hash);
        for (size_t i = 0; i < values.size() && i < 64; i++) fprintf(file, "%s%08x", i ? " " : "", values[i]);
        if (status || !error.empty()) {
            failures++;
            fprintf(file, "\tFAILED with %d: %s", status, error.substr(0, error.find('\n')).c_str());
        }
        fprintf(file, "\n");
        std::vector<u32> poison(size, 0xffffffffu);
        copy(out, poison.data(), size * 4);
    }
};

// The first 1024-byte boundary of a CTA's dynamic shared memory: its address, and a pointer to it.
#define ALIGNED_SMEM(address, pointer)                          \
    DYN_SMEM(pointer##_raw);                                    \
    const u32 address = (smem_u32(pointer##_raw) + 1023) & ~1023u; \
    char* pointer = pointer##_raw + (address - smem_u32(pointer##_raw))
