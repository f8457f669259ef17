// cu_seqlens, the ends of an unpadded batch's sequences, and the division of sequences and other work among
// threads.
#pragma once

#include <algorithm>
#include <vector>

#include "ops.h"

namespace fastgate::cpu {

// The numbers of a cu_seqlens, (sequences + 1,) int32 or int64, checked to rise from 0 to `rows` (-1: to any
// number).
inline std::vector<int64_t> read_cu_seqlens(
    const char* op, const char* name, const Tensor& cu_seqlens, int64_t rows = -1) {
  const auto dtype = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Int || dtype == ScalarType::Long) && cu_seqlens.dim() == 1 &&
          cu_seqlens.size(0) > 0,
      op, ": ", name,
      ": got another dtype or shape, wanted (sequences + 1,) int32; cumulate the lengths from 0");
  const Tensor contiguous = dense(cu_seqlens);
  std::vector<int64_t> ends(contiguous.size(0));
  for (size_t i = 0; i < ends.size(); ++i)
    ends[i] = dtype == ScalarType::Int ? static_cast<const int32_t*>(contiguous.data_ptr())[i]
                                       : static_cast<const int64_t*>(contiguous.data_ptr())[i];
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

// Calls work(begin, end) on ranges of the units 0 <= u < groups * units, one range per thread, of nearly
// equal cost. Group g (a sequence, say) has units g * units to (g + 1) * units - 1 (its heads). cost(group):
// of one of its units, in float operations. A range costs at least kMinCost, because less is not worth waking
// a thread.
constexpr double kMinCost = 400000.0;

template <class Cost, class Work>
void parallel_by_cost(int64_t groups, int64_t units, const Cost& cost, const Work& work) {
  double total = 0.0;
  for (int64_t s = 0; s < groups; ++s) total += units * cost(s);
  const double threads = torch::stable::get_num_threads();
  const auto ranges = static_cast<int64_t>(std::max(1.0, std::min(threads, total / kMinCost)));
  if (ranges == 1) return work(0, groups * units);
  std::vector<int64_t> ends(ranges + 1, groups * units);
  ends[0] = 0;
  double before = 0.0;
  int64_t range = 1;
  for (int64_t s = 0; s < groups; ++s) {
    const double unit_cost = cost(s);
    for (; range < ranges && before + units * unit_cost >= range * total / ranges; ++range) {
      const auto within = static_cast<int64_t>((range * total / ranges - before) / unit_cost + 0.5);
      ends[range] = s * units + std::min(units, within);
    }
    before += units * unit_cost;
  }
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (ends[i] < ends[i + 1]) work(ends[i], ends[i + 1]);
  });
}

}  // namespace fastgate::cpu
