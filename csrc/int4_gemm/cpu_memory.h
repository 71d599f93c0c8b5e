// Working memory that a thread keeps from call to call; what is in it is undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tokenmill::int4 {
namespace {

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { release(); }

  // At least so many bytes, aligned to a cache line. Throws std::bad_alloc.
  uint8_t* at_least(size_t wanted) {
    if (wanted > size_) {
      release();
      // Several megabytes are read in large strides: with small pages each of them waits for another translation.
      alignment_ = wanted >= kHugePage ? kHugePage : 64;
      const size_t size = (wanted + alignment_ - 1) / alignment_ * alignment_;
      bytes_ = static_cast<uint8_t*>(::operator new(size, std::align_val_t(alignment_)));
      size_ = size;
#ifdef __linux__
      if (alignment_ == kHugePage) madvise(bytes_, size_, MADV_HUGEPAGE);  // a wish: refused is slower, not wrong
#endif
    }
    return bytes_;
  }

 private:
  static constexpr size_t kHugePage = size_t(1) << 21;

  void release() {
    if (bytes_) ::operator delete(bytes_, std::align_val_t(alignment_));
    bytes_ = nullptr;
    size_ = 0;
  }

  uint8_t* bytes_ = nullptr;
  size_t size_ = 0, alignment_ = 0;
};

}  // namespace
}  // namespace tokenmill::int4
