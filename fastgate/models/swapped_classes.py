"""The classes of a patched model: subclasses of the encoders and heads of transformers, under their names.

`patch` puts such a class in the place of a module's own. Pipelines, configs and pickles see the name that
they know. Each class is an attribute of this module, so that pickle finds it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.architectures import FAMILIES, Family, base_class
from fastgate.models.encoder_forward import forward_encoder
from fastgate.models.freezing import forward_frozen
from fastgate.models.handle import EncoderHandle
from fastgate.models.head_forward import masked_lm, output_rows_of_call
from fastgate.nn.choices import OutputRows
from fastgate.nn.packed_linear import check_apply

Forward = Callable[..., Any]

# The number of rows changes with each batch, and torch.compile would compile a graph for each number. So it
# leaves the encoder as it is, whose steps are compiled kernels and library products.
_uncompiled: Forward = torch.compiler.disable(  # type: ignore[no-untyped-call]
    forward_encoder, reason="fastgate's encoder runs an unpadded batch"
)


def _swapped_class(family: Family, hf: type[nn.Module], rows: OutputRows) -> type[nn.Module]:
    """A subclass of `hf` under the same name. rows: the output rows that it reads."""
    body: dict[str, Any] = {"fastgate_output_rows": rows, "__module__": __name__, "__doc__": hf.__doc__}
    if hf.__name__ == family.prefix + "Model":
        body |= {
            "forward": _encoder_forward(hf.forward),
            "_apply": _apply,
            "_load_from_state_dict": _load_from_state_dict,
        }
    elif rows == "labelled":
        body["forward"] = _head_forward(family, hf.__name__, hf.forward)
    return type(hf.__name__, (hf,), body)


def _encoder_forward(original: Forward) -> Forward:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _uncompiled if torch.compiler.is_compiling() else forward_encoder
        if self.fastgate_runtime.frozen:
            return forward_frozen(run, self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return forward


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`to` and the like, once it is known that every packed weight can be where it would be then."""
    check_apply(self, fn)
    module: nn.Module = base_class(self)._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
    return module


def _load_from_state_dict(self: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """As in torch, which without `strict` would not say that attention is missing."""
    EncoderHandle(self).check_state_dict(state_dict, prefix)
    base_class(self)._load_from_state_dict(self, state_dict, prefix, *rest)


def _head_forward(family: Family, name: str, original: Forward) -> Forward:
    """The forward of a head whose labels decide which rows are output rows."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        rows = output_rows_of_call(self, getattr(self, family.attribute).fastgate_runtime, arguments)
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return_dict = arguments.pop("return_dict", None)
            return masked_lm(self, family, rows, arguments, return_dict=return_dict)
        if rows is not None:
            kwargs["rows"] = rows
        return original(self, *args, **kwargs)

    return forward


def _swapped_classes() -> dict[type[nn.Module], type[nn.Module]]:
    classes = {}
    for family in FAMILIES:
        for name, rows in family.models().items():
            hf = getattr(family.module, name)
            classes[hf] = _swapped_class(family, hf, rows)
    return classes


SWAPPED = _swapped_classes()  # the class of transformers -> that of a patched model
_BY_NAME = {cls.__name__: cls for cls in SWAPPED.values()}


def __getattr__(name: str) -> type[nn.Module]:
    """A swapped class by its name: this is how pickle finds it."""
    if name not in _BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _BY_NAME[name]


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is of a class of this file."""
    return "fastgate_output_rows" in type(module).__dict__
