// Registers the CUDA ops under fastgate_cuda; fastgate/ops/backends.py enters them in the registry.
#include "ops.h"

STABLE_TORCH_LIBRARY(fastgate_cuda, m) {
  m.def("gated_add_norm(" FASTGATE_SCHEMA(GATED_ADD_NORM) ") -> Tensor");
  m.def(
      "gated_add_norm_backward(Tensor grad, " FASTGATE_SCHEMA(
          GATED_ADD_NORM) ", int requested) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cuda, CUDA, m) {
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cuda::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cuda::gated_add_norm_backward));
}
