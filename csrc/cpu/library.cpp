// Registers the CPU ops under fastgate_cpu, a namespace of their own: fastgate/backends.py puts them in their slots.
#include "ops.h"

#define ATTENTION_OPERANDS                                                                              \
  "Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor cu_q, "         \
  "Tensor cu_k, int heads, float scale, float dropout_p, Tensor? seed"

STABLE_TORCH_LIBRARY(fastgate_cpu, m) {
  m.def("attention(" ATTENTION_OPERANDS ") -> Tensor");
  m.def("attention_backward(Tensor grad, " ATTENTION_OPERANDS ") -> (Tensor, Tensor, Tensor)");
  m.def("dropout(Tensor x, float dropout_p, Tensor seed) -> Tensor");
  m.def("gated_add_norm(" FASTGATE_GATED_ADD_NORM_SCHEMA ") -> Tensor");
  m.def(
      "gated_add_norm_backward(Tensor grad, " FASTGATE_GATED_ADD_NORM_SCHEMA
      ", int wanted) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastgate::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&fastgate::cpu::attention_backward));
  m.impl("dropout", TORCH_BOX(&fastgate::cpu::dropout));
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cpu::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cpu::gated_add_norm_backward));
}
