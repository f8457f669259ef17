// Attention's forward in bfloat16 by tiles (amx.h).
#pragma once

#include "heads.h"

namespace fastgate::cpu {

// Whether this processor has them, and heads are made of whole ones.
bool takes_tiles(const Problem& o);

// Floats of memory that a task takes at most.
int64_t tiles_scratch(int64_t longest_q, int64_t longest_k, int64_t width);

// Tasks `begin` to `end`, to rows of `out`, bfloat16.
void forward_tiles(const Problem& o, void* out, Scratch& scratch, int64_t begin, int64_t end);

}  // namespace fastgate::cpu
