// Products of small float32 matrices that lie in the caches, and memory for them.
#pragma once

#include <cstdint>
#include <memory>

namespace fastgate::cpu {

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Distance between rows of n floats: an odd number of cache lines, or a column of a matrix would sit in a few sets.
constexpr int64_t stride(int64_t n) { return up(n, 16) | 16; }

// c (m, n) = a (m, k) b (k, n), or += . n is a multiple of 16; a's element (i, p) is a[i*a_row + p*a_step]. An element
// of c is one chain of additions along k, whatever m and n are. next: n * k floats that the caller reads afterwards and
// would wait for; they are brought nearer meanwhile. Null: none.
struct Left {
  const float* at;
  int64_t row, step;
};
void multiply(
    bool add, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
    const float* next = nullptr);

// c (m, n) = a (m, k) b^T, b (n, k), both with rows of adjacent elements. k is a multiple of 16. An element of c does
// not depend on m and n.
void multiply_rows(
    const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k);

// Uninitialised floats that begin at a cache line, handed out in parts that do, too.
class Scratch {
 public:
  using Mark = float*;
  // size: the sum of what is taken, where every part is a multiple of 16.
  explicit Scratch(int64_t size) : memory_(new float[size + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (-address % 64) / sizeof(float);
  }
  float* take(int64_t size) {
    float* taken = next_;
    next_ += up(size, 16);
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
