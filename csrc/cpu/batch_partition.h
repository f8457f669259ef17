// A batch split into one part per thread, each of whole sequences. A thread takes its part through many
// layers: what it writes stays in its own cache, and it waits for the others only at the end.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/cu_seqlens.h"

namespace fastgate::cpu {

struct BatchPart {
  Tensor h, cu_seqlens;            // unpadded rows, and where their sequences end
  OptionalTensor output_rows;      // rows of h, one a sequence
  std::vector<Tensor> neighbours;  // has_left_neighbour of shift_norm, or what those with a halo read
  int64_t sequence = 0, row = 0;   // the part's first ones, in the whole batch
};

// The sequences at which a batch is split, from 0 to their number. No split where one thread would have much
// more to do than the others, or too few rows to be worth reading every weight for.
inline std::vector<int64_t> split_points(const std::vector<int64_t>& ends) {
  constexpr int64_t kMinRows = 64;  // of a part
  const int64_t last = ends.size() - 1, rows = ends.back(), threads = torch::stable::get_num_threads();
  std::vector<int64_t> points = {0};
  for (int64_t part = 1; part < threads; ++part) {
    const int64_t ideal = part * rows / threads;
    int64_t sequence = std::lower_bound(ends.begin(), ends.end(), ideal) - ends.begin();
    if (sequence > 0 && ideal - ends[sequence - 1] < ends[sequence] - ideal) --sequence;
    points.push_back(sequence);
  }
  points.push_back(last);
  int64_t largest = 0;
  for (int64_t part = 0; part < threads; ++part)
    largest = std::max(largest, ends[points[part + 1]] - ends[points[part]]);
  const bool worth_it = rows >= kMinRows * threads && 8 * largest * threads <= 9 * rows;
  return worth_it ? points : std::vector<int64_t>{0, last};
}

// `count` numbers, each less `amount`: (count,) int64.
inline Tensor subtract(const int64_t* numbers, int64_t count, int64_t amount, const Tensor& like) {
  Tensor to = empty(&count, 1, ScalarType::Long, like);
  std::transform(
      numbers, numbers + count, static_cast<int64_t*>(to.data_ptr()), [&](int64_t n) { return n - amount; });
  return to;
}

// The parts of a batch; only `whole` where it is not split. one_query_per_sequence: output_rows is used.
inline std::vector<BatchPart> partition(const BatchPart& whole, bool one_query_per_sequence) {
  const std::vector<int64_t> ends = read_cu_seqlens("fused_layers", "cu_seqlens", whole.cu_seqlens);
  const int64_t sequences = ends.size() - 1;
  const bool all_rows = ends.back() == whole.h.size(0);  // not only output rows, which no attention reads
  const OptionalTensor& rows_of_outputs = whole.output_rows;
  const bool one_each = rows_of_outputs && rows_of_outputs->scalar_type() == ScalarType::Long &&
                        rows_of_outputs->dim() == 1 && rows_of_outputs->numel() == sequences;
  if (!all_rows || whole.neighbours.size() > 1 || (one_query_per_sequence && !one_each)) return {whole};
  const std::vector<int64_t> points = split_points(ends);
  if (points.size() == 2) return {whole};
  const Tensor output_rows = one_query_per_sequence ? dense(*rows_of_outputs) : whole.h;
  std::vector<BatchPart> parts;
  for (size_t i = 0; i + 1 < points.size(); ++i) {
    const int64_t row = ends[points[i]], rows = ends[points[i + 1]] - row, count = points[i + 1] - points[i];
    const auto slice = [&](Tensor t) { return torch::stable::narrow(t, 0, row, rows); };
    BatchPart part = {
        slice(whole.h), subtract(&ends[points[i]], count + 1, row, whole.h), {}, {}, points[i], row};
    if (one_query_per_sequence) {
      const int64_t* numbers = static_cast<const int64_t*>(output_rows.data_ptr()) + points[i];
      part.output_rows = subtract(numbers, count, row, whole.h);
    }
    for (const Tensor& has_left_neighbour : whole.neighbours)
      part.neighbours.push_back(slice(has_left_neighbour));
    parts.push_back(part);
  }
  return parts;
}

}  // namespace fastgate::cpu
