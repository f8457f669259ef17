// A batch cut into a part a thread, of whole sequences, which the thread takes through many layers: what it writes stays
// in its own cache, and none waits for another but at the end.
#pragma once

#include <algorithm>
#include <vector>

#include "sequences.h"

namespace fastgate::cpu {

struct Part {
  Tensor h, cu_seqlens;           // packed rows, where the sequences lie among them
  OptionalTensor wanted;          // rows of h, one a sequence
  std::vector<Tensor> links;      // (rows,) bool as shift_norm takes it, or what shifts to fewer rows read
  int64_t sequence = 0, row = 0;  // of the batch, that it begins with
};

// Where sequences that end at `ends` are cut. Not at all where a thread would have much more to do than the others, or
// rows too few to be worth reading every weight for.
inline std::vector<int64_t> cuts(const std::vector<int64_t>& ends) {
  constexpr int64_t kLeast = 64;  // rows of a part
  const int64_t last = ends.size() - 1, rows = ends.back(), threads = torch::stable::get_num_threads();
  std::vector<int64_t> found = {0};
  for (int64_t part = 1; part < threads; ++part) {
    const int64_t ideal = part * rows / threads;
    int64_t at = std::lower_bound(ends.begin(), ends.end(), ideal) - ends.begin();
    if (at > 0 && ideal - ends[at - 1] < ends[at] - ideal) --at;
    found.push_back(at);
  }
  found.push_back(last);
  int64_t most = 0;
  for (int64_t part = 0; part < threads; ++part) most = std::max(most, ends[found[part + 1]] - ends[found[part]]);
  return rows >= kLeast * threads && 8 * most * threads <= 9 * rows ? found : std::vector<int64_t>{0, last};
}

// (count,) int64: numbers less `by`.
inline Tensor less(const int64_t* from, int64_t count, int64_t by, const Tensor& like) {
  Tensor to = empty(&count, 1, ScalarType::Long, like);
  std::transform(from, from + count, static_cast<int64_t*>(to.data_ptr()), [&](int64_t n) { return n - by; });
  return to;
}

// The parts of a batch; one, as it is, where it is not cut. single: `wanted` is read.
inline std::vector<Part> parts_of(const Part& whole, bool single) {
  const std::vector<int64_t> ends = ends_of("packed_layers", "cu_seqlens", whole.cu_seqlens);
  const int64_t sequences = ends.size() - 1;
  const bool packed = ends.back() == whole.h.size(0);  // not demanded rows alone, which no attention reads
  const bool one_each = whole.wanted && whole.wanted->scalar_type() == ScalarType::Long && whole.wanted->dim() == 1 &&
                        whole.wanted->numel() == sequences;
  if (!packed || whole.links.size() > 1 || (single && !one_each)) return {whole};
  const std::vector<int64_t> cut = cuts(ends);
  if (cut.size() == 2) return {whole};
  const Tensor wanted = single ? dense(*whole.wanted) : whole.h;
  std::vector<Part> parts;
  for (size_t i = 0; i + 1 < cut.size(); ++i) {
    const int64_t row = ends[cut[i]], rows = ends[cut[i + 1]] - row, count = cut[i + 1] - cut[i];
    const auto slice = [&](Tensor t) { return torch::stable::narrow(t, 0, row, rows); };
    Part part = {slice(whole.h), less(&ends[cut[i]], count + 1, row, whole.h), {}, {}, cut[i], row};
    if (single) part.wanted = less(static_cast<const int64_t*>(wanted.data_ptr()) + cut[i], count, row, whole.h);
    for (const Tensor& linked : whole.links) part.links.push_back(slice(linked));
    parts.push_back(part);
  }
  return parts;
}

}  // namespace fastgate::cpu
