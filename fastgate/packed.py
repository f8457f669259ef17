"""PackedLinear: a Linear whose weight lies as the CPU's product wants it. `freeze` puts it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .errors import Unsupported, say
from .ops.linear import ONEDNN_DTYPES, Packed, pack

_REMEDY = "call fastgate.thaw(model) first"


class PackedLinear(nn.Module):
    """What `linear` computes, from a packed copy of its weight, for inference only.

    The state dict holds `weight` (out_features, in_features) and `bias` as the Linear's does, and loads them;
    there is no `weight` to change in place, which would go unnoticed. `to` another dtype packs anew.
    """

    def __init__(self, module: nn.Linear, packed: Packed | None = None):
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.packed = packed or pack(module.weight)
        self.bias = module.bias
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.product(x, self.bias)

    def thawed(self) -> nn.Linear:
        """The Linear it was made of."""
        module = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        module.weight = nn.Parameter(self.packed.dense())
        module.bias = self.bias
        return module.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _put(self, weight: Tensor) -> None:
        if weight.device.type != "cpu" or weight.dtype not in ONEDNN_DTYPES:
            got = f"{weight.dtype} on {weight.device}"
            raise Unsupported(say("freeze", "model", got, "float32 or bfloat16 on the CPU", _REMEDY))
        self.packed = pack(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._put(fn(self.packed.dense()))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.packed.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = prefix + "weight"
        weight = state_dict.get(name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        if weight is None:
            if strict:
                missing_keys.append(name)
        elif weight.shape != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {name}: got {tuple(weight.shape)}, wanted {wanted}")
        else:
            self._put(weight.to(self.packed.dtype))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: oneDNN's layout cannot be copied, and is another on another machine."""
        return {**self.__dict__, "packed": self.packed.dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "packed": pack(state["packed"])})
