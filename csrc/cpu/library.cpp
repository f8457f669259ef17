// Registers the CPU ops under fastgate_cpu; fastgate/ops/backends.py enters them in the registry.
#include "ops.h"

// clang-format off
STABLE_TORCH_LIBRARY(fastgate_cpu, m) {
  m.def("absorbed_attention(" FASTGATE_SCHEMA(ABSORBED_ATTENTION) ") -> (Tensor, Tensor)");
  m.def("absorbed_attention_backward(Tensor grad_mixed, Tensor? grad_total, " FASTGATE_SCHEMA(ABSORBED_ATTENTION)
        ") -> (Tensor, Tensor)");
  m.def("attention(" FASTGATE_SCHEMA(ATTENTION) ") -> Tensor");
  m.def("attention_backward(Tensor grad, " FASTGATE_SCHEMA(ATTENTION) ") -> (Tensor, Tensor, Tensor)");
  m.def("embed_norm(" FASTGATE_SCHEMA(EMBED_NORM) ") -> Tensor");
  m.def("embed_norm_backward(Tensor grad, " FASTGATE_SCHEMA(EMBED_NORM)
        ", int requested) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("fused_layers(Tensor h, Tensor?[] operands, int[] kinds, float[] numbers, Tensor cu_seqlens, "
      "Tensor? output_rows, Tensor[] neighbours) -> Tensor");
  m.def("gated_add_norm(" FASTGATE_SCHEMA(GATED_ADD_NORM) ") -> Tensor");
  m.def("gated_add_norm_backward(Tensor grad, " FASTGATE_SCHEMA(GATED_ADD_NORM)
        ", int requested) -> (Tensor, Tensor, Tensor)");
  m.def("packs_bfloat16() -> bool");
  m.def("packed_linear(Tensor x, Tensor panels, Tensor? bias, int columns, bool gelu) -> Tensor");
  m.def("shift_norm(" FASTGATE_SCHEMA(SHIFT_NORM) ") -> Tensor");
  m.def("shift_norm_backward(Tensor grad, " FASTGATE_SCHEMA(SHIFT_NORM)
        ", int requested) -> (Tensor, Tensor)");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(fastgate_cpu, CPU, m) {
  m.impl("absorbed_attention", TORCH_BOX(&fastgate::cpu::absorbed_attention));
  m.impl("absorbed_attention_backward", TORCH_BOX(&fastgate::cpu::absorbed_attention_backward));
  m.impl("attention", TORCH_BOX(&fastgate::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&fastgate::cpu::attention_backward));
  m.impl("embed_norm", TORCH_BOX(&fastgate::cpu::embed_norm));
  m.impl("embed_norm_backward", TORCH_BOX(&fastgate::cpu::embed_norm_backward));
  m.impl("fused_layers", TORCH_BOX(&fastgate::cpu::fused_layers));
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cpu::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cpu::gated_add_norm_backward));
  m.impl("packed_linear", TORCH_BOX(&fastgate::cpu::packed_linear));
  m.impl("shift_norm", TORCH_BOX(&fastgate::cpu::shift_norm));
  m.impl("shift_norm_backward", TORCH_BOX(&fastgate::cpu::shift_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cpu, CompositeExplicitAutograd, m) {
  m.impl("packs_bfloat16", TORCH_BOX(&fastgate::cpu::packs_bfloat16));
}
