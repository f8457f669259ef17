// Attention's forward in bfloat16 by AMX (gemm/amx_gemm.h).
#pragma once

#include "cpu/attention_task.h"

namespace fastgate::cpu {

// Whether this processor has AMX, and a head's width is a multiple of a panel's.
bool amx_attention_fits(const AttentionProblem& o);

// The size of the arena that a task needs at most.
int64_t amx_arena_size(int64_t longest_q, int64_t longest_k, int64_t width);

// Tasks `begin` to `end`, to rows of `out`, bfloat16.
void amx_forward_tasks(const AttentionProblem& o, void* out, Arena& arena, int64_t begin, int64_t end);

}  // namespace fastgate::cpu
