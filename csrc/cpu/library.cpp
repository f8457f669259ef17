// Registers the CPU ops under fastgate_cpu, a namespace of their own: fastgate/ops/backends.py puts them in their slots.
#include "ops.h"

#define ATTENTION_OPERANDS                                                                              \
  "Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor cu_q, "         \
  "Tensor cu_k, int heads, float scale, float dropout_p, Tensor? seed"

#define ABSORBED_ATTENTION_OPERANDS \
  "Tensor probe, Tensor x, Tensor cu_seqlens, float scale, float dropout_p, Tensor? seed"

#define EMBED_NORM_OPERANDS                                                                             \
  "Tensor words, Tensor positions, Tensor? types, Tensor word_table, Tensor position_table, "           \
  "Tensor type_table, Tensor weight, Tensor norm_bias, float eps, float dropout_p, Tensor? seed, "      \
  "Tensor? weight2, Tensor? norm_bias2, float eps2, int padding_idx, int position_padding_idx"

#define SHIFT_NORM_OPERANDS                                                                             \
  "Tensor x, Tensor linked, Tensor shift, Tensor scale, Tensor before, Tensor after, Tensor weight, "   \
  "Tensor norm_bias, float eps"

STABLE_TORCH_LIBRARY(fastgate_cpu, m) {
  m.def("absorbed_attention(" ABSORBED_ATTENTION_OPERANDS ") -> (Tensor, Tensor)");
  m.def(
      "absorbed_attention_backward(Tensor grad, Tensor? grad_total, " ABSORBED_ATTENTION_OPERANDS
      ") -> (Tensor, Tensor)");
  m.def("attention(" ATTENTION_OPERANDS ") -> Tensor");
  m.def("attention_backward(Tensor grad, " ATTENTION_OPERANDS ") -> (Tensor, Tensor, Tensor)");
  m.def("embed_norm(" EMBED_NORM_OPERANDS ") -> Tensor");
  m.def(
      "embed_norm_backward(Tensor grad, " EMBED_NORM_OPERANDS
      ", int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_add_norm(" FASTGATE_GATED_ADD_NORM_SCHEMA ") -> Tensor");
  m.def(
      "gated_add_norm_backward(Tensor grad, " FASTGATE_GATED_ADD_NORM_SCHEMA
      ", int wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "packed_layers(Tensor h, Tensor?[] operands, int[] kinds, float[] numbers, Tensor cu_seqlens, Tensor? wanted, "
      "Tensor[] links) -> Tensor");
  m.def("packs_bfloat16() -> bool");
  m.def("packed_linear(Tensor x, Tensor panels, Tensor? bias, int columns, bool gelu) -> Tensor");
  m.def("shift_norm(" SHIFT_NORM_OPERANDS ") -> Tensor");
  m.def("shift_norm_backward(Tensor grad, " SHIFT_NORM_OPERANDS ", int wanted) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cpu, CPU, m) {
  m.impl("absorbed_attention", TORCH_BOX(&fastgate::cpu::absorbed_attention));
  m.impl("absorbed_attention_backward", TORCH_BOX(&fastgate::cpu::absorbed_attention_backward));
  m.impl("attention", TORCH_BOX(&fastgate::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&fastgate::cpu::attention_backward));
  m.impl("embed_norm", TORCH_BOX(&fastgate::cpu::embed_norm));
  m.impl("embed_norm_backward", TORCH_BOX(&fastgate::cpu::embed_norm_backward));
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cpu::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cpu::gated_add_norm_backward));
  m.impl("packed_layers", TORCH_BOX(&fastgate::cpu::packed_layers));
  m.impl("packed_linear", TORCH_BOX(&fastgate::cpu::packed_linear));
  m.impl("shift_norm", TORCH_BOX(&fastgate::cpu::shift_norm));
  m.impl("shift_norm_backward", TORCH_BOX(&fastgate::cpu::shift_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cpu, CompositeExplicitAutograd, m) {
  m.impl("packs_bfloat16", TORCH_BOX(&fastgate::cpu::packs_bfloat16));
}
