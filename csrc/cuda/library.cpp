// Registers the CUDA ops under fastgate_cuda, a namespace of their own: fastgate/ops/backends.py puts them in their slots.
#include "ops.h"

STABLE_TORCH_LIBRARY(fastgate_cuda, m) {
  m.def("gated_add_norm(" FASTGATE_GATED_ADD_NORM_SCHEMA ") -> Tensor");
  m.def(
      "gated_add_norm_backward(Tensor grad, " FASTGATE_GATED_ADD_NORM_SCHEMA
      ", int wanted) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastgate_cuda, CUDA, m) {
  m.impl("gated_add_norm", TORCH_BOX(&fastgate::cuda::gated_add_norm));
  m.impl("gated_add_norm_backward", TORCH_BOX(&fastgate::cuda::gated_add_norm_backward));
}
