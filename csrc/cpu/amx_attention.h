// Attention's forward in bfloat16 by tiles (amx.h).
#pragma once

#include "cpu/attention_task.h"

namespace fastgate::cpu {

// Whether this processor has them, and heads are made of whole ones.
bool amx_attention_fits(const AttentionProblem& o);

// Floats of memory that a task takes at most.
int64_t amx_arena_size(int64_t longest_q, int64_t longest_k, int64_t width);

// Tasks `begin` to `end`, to rows of `out`, bfloat16.
void amx_forward_tasks(const AttentionProblem& o, void* out, Arena& arena, int64_t begin, int64_t end);

}  // namespace fastgate::cpu
