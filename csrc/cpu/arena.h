// Memory for the buffers of one thread's work: allocated once, handed out in aligned pieces.
#pragma once

#include <cstdint>
#include <memory>

namespace fastgate::cpu {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
// The distance between rows of n floats: an odd number of cache lines, or a column would fall into a few
// cache sets.
constexpr int64_t row_stride(int64_t n) { return round_up(n, 16) | 16; }

// Uninitialised floats. Every piece begins at a cache line.
class Arena {
 public:
  using Mark = float*;
  // size: the sum of the pieces, each rounded up to a multiple of 16.
  explicit Arena(int64_t size) : memory_(new float[size + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (-address % 64) / sizeof(float);
  }
  float* take(int64_t size) {
    float* taken = next_;
    next_ += round_up(size, 16);
    return taken;
  }
  // What was taken after the mark is free again.
  Mark mark() const { return next_; }
  void release(Mark mark) { next_ = mark; }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

}  // namespace fastgate::cpu
