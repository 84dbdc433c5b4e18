// Temporary memory of an operator call, kept between calls.
//
// The temporaries of a layer are a few megabytes, which the C library gives back to the system
// after every call: the page faults of the next call then cost more than the aggregation itself.
// Each calling thread keeps one block, up to kRetainedBytes; larger needs are met by the heap for
// that call only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace dwattn::cpu {

// Distance in elements of two temporary rows of `numbers`: an odd number of cache lines. Tiles of a
// product, and the aggregation on its way along the tokens, read the same columns of many rows, and
// at an even distance these share a half of the cache's sets or less, at a multiple of a page one.
constexpr int64_t spaced_row(int64_t numbers, int64_t element) {
  constexpr int64_t kLine = 64;
  return ((numbers * element + kLine - 1) / kLine | 1) * kLine / element;
}

class Scratch {
 public:
  static constexpr int64_t kRetainedBytes = 32 << 20;

  static constexpr int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) & -kAlignment; }

  // `bytes` is the sum of padded() over everything that take() will hand out.
  explicit Scratch(int64_t bytes) : bytes_(bytes) {
    Block& block = retained();
    if (bytes <= kRetainedBytes && !block.busy) {
      if (block.bytes < bytes) {
        std::free(block.memory);
        block.bytes = 0;
        block.memory = allocate(bytes);
        block.bytes = bytes;
      }
      block.busy = true;
      memory_ = block.memory;
      borrowed_ = true;
    } else {
      memory_ = allocate(bytes);
    }
  }
  ~Scratch() {
    if (borrowed_) {
      retained().busy = false;
    } else {
      std::free(memory_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* take(int64_t bytes) {
    const int64_t end = used_ + padded(bytes);
    if (end > bytes_) throw std::bad_alloc();
    void* at = static_cast<char*>(memory_) + used_;
    used_ = end;
    return at;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool busy = false;  // a nested call on this thread takes its memory from the heap
    ~Block() { std::free(memory); }
  };

  static Block& retained() {
    thread_local Block block;
    return block;
  }

  static void* allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(kAlignment, static_cast<size_t>(padded(bytes ? bytes : 1)));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  void* memory_ = nullptr;
  int64_t bytes_;
  int64_t used_ = 0;
  bool borrowed_ = false;
};

}  // namespace dwattn::cpu
