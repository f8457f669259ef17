// Sequences of packed rows: where they end, and how threads share them, and other work, out.
#pragma once

#include <algorithm>
#include <vector>

#include "ops.h"

namespace fastgate::cpu {

// The ends of the sequences, from 0 to rows (to any number: -1), of (sequences + 1,) int32 or int64.
inline std::vector<int64_t> read_cu_seqlens(const char* op, const char* name, const Tensor& cu_seqlens, int64_t rows = -1) {
  const auto dtype = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Int || dtype == ScalarType::Long) && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op, ": ",
      name, ": got another dtype or shape, wanted (sequences + 1,) int32; cumulate the lengths from 0");
  const Tensor given = dense(cu_seqlens);
  std::vector<int64_t> ends(given.size(0));
  for (size_t i = 0; i < ends.size(); ++i)
    ends[i] = dtype == ScalarType::Int ? static_cast<const int32_t*>(given.data_ptr())[i]
                                       : static_cast<const int64_t*>(given.data_ptr())[i];
  if (rows < 0) rows = ends.back();
  STD_TORCH_CHECK(
      ends.front() == 0 && ends.back() == rows && std::is_sorted(ends.begin(), ends.end()), op, ": ", name,
      ": got ends that do not rise from 0 to ", rows, "; cumulate the lengths from 0");
  return ends;
}

inline int64_t longest_sequence(const std::vector<int64_t>& ends) {
  int64_t longest = 0;
  for (size_t i = 1; i < ends.size(); ++i) longest = std::max(longest, ends[i] - ends[i - 1]);
  return longest;
}

// Calls work(begin, end) on shares of the units 0 <= u < groups * each, `each` to a group (a sequence: its heads), at
// equal cost, on a thread each. cost(group): of one of its units, in float operations; a share has kShare of them at
// least, because less is not worth waking a thread.
constexpr double kShare = 400000.0;

template <class Cost, class Work>
void parallel_by_cost(int64_t groups, int64_t each, const Cost& cost, const Work& work) {
  double total = 0.0;
  for (int64_t s = 0; s < groups; ++s) total += each * cost(s);
  const double threads = torch::stable::get_num_threads();
  const auto shares = static_cast<int64_t>(std::max(1.0, std::min(threads, total / kShare)));
  if (shares == 1) return work(0, groups * each);
  std::vector<int64_t> ends(shares + 1, groups * each);
  ends[0] = 0;
  double before = 0.0;
  int64_t share = 1;
  for (int64_t s = 0; s < groups; ++s) {
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
