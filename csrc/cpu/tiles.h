// Products of small float32 matrices that lie in the caches, and the sharing out of sequences among threads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "ops.h"
#include "rows.h"

namespace fastgate::cpu {

// As FASTGATE_CLONES, with the 64-byte vectors of x86-64-v4: for functions that compute more than they move.
#define FASTGATE_WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Distance between rows of n floats: an odd number of cache lines, or a column of a matrix would sit in a few sets.
constexpr int64_t stride(int64_t n) { return up(n, 16) | 16; }

// c (m, n) = a (m, k) b (k, n), or += . n is a multiple of 16; a's element (i, p) is a[i*a_row + p*a_step]. An element
// of c is one chain of additions along k, whatever m and n are.
struct Left {
  const float* at;
  int64_t row, step;
};
void multiply(bool add, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k);

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

// Calls work(begin, end) on shares of the units 0 <= u < sequences * each, which are `each` to a sequence, at equal
// cost, on a thread each. cost(sequence): of one of its units, in float operations; a share has kShare of them at
// least, because less is not worth waking a thread.
constexpr double kShare = 400000.0;

template <class Cost, class Work>
void share_out(int64_t sequences, int64_t each, const Cost& cost, const Work& work) {
  double total = 0.0;
  for (int64_t s = 0; s < sequences; ++s) total += each * cost(s);
  const double threads = torch::stable::get_num_threads();
  const auto shares = static_cast<int64_t>(std::max(1.0, std::min(threads, total / kShare)));
  if (shares == 1) return work(0, sequences * each);
  std::vector<int64_t> ends(shares + 1, sequences * each);
  ends[0] = 0;
  double before = 0.0;
  int64_t share = 1;
  for (int64_t s = 0; s < sequences; ++s) {
    const double unit = cost(s);
    for (; share < shares && before + each * unit >= share * total / shares; ++share) {
      const auto within = static_cast<int64_t>((share * total / shares - before) / unit + 0.5);
      ends[share] = s * each + std::min(each, within);
    }
    before += each * unit;
  }
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (ends[i] < ends[i + 1]) work(ends[i], ends[i + 1]);
  });
}

}  // namespace fastgate::cpu
