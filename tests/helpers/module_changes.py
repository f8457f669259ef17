"""What users do to one module of a model: hooks, wrappers, adapters, other modules, flags, weights.

Numbers in it are multiples of 1/64, which every dtype holds exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Make = Callable[[nn.Module, str], None]


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    above, _, last = name.rpartition(".")
    return model.get_submodule(above), last


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, last = parent_of(model, name)
    parent._modules[last] = module


def numbers(like: Tensor, *shape: int) -> Tensor:
    """Multiples of 1/64 from -1/4 to 1/4, the same for a shape in every dtype."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randint(-16, 17, shape, generator=generator) / 64).to(like.dtype)


def scaled(value: Any, factor: float = 1.5) -> Any:
    """A tensor, or the first of a tuple, times `factor`; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value * factor
    if type(value) is tuple and value:
        return (scaled(value[0], factor), *value[1:])
    return value


class Watch:
    """A hook that counts its calls and changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1


class Wrapped(nn.Module):
    """A module that calls another one and scales what it returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.inner(*args, **kwargs))


class Adapter(nn.Module):
    """A Linear with a product of low rank beside it, which may show the layer's weight as its own."""

    def __init__(self, base: nn.Module, readable: bool) -> None:
        super().__init__()
        self.base_layer = base
        weight = base.weight
        self.down = nn.Parameter(numbers(weight, 2, weight.shape[1]))
        self.up = nn.Parameter(numbers(weight, weight.shape[0], 2))
        self.readable = readable

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("weight", "bias", "in_features", "out_features") and self.readable:
                return getattr(self._modules["base_layer"], name)
            raise

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + (x @ self.down.T) @ self.up.T


class TunedNorm(nn.Module):
    """A LayerNorm that calls a changed copy and keeps the old one beside it, as PEFT's LNTuning does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.copies = nn.ModuleDict({"default": copy.deepcopy(base)})
        with torch.no_grad():
            for parameter in self.copies.parameters():
                parameter.add_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.copies["default"](x)


class Halved(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Marked(Tensor):
    """A tensor subclass that computes as a plain tensor does."""


class Doubled(Tensor):
    """A tensor subclass whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is nn.functional.linear else out


def subclass_of(module: nn.Module) -> type[nn.Module]:
    base = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(base.forward(self, *args, **kwargs))

    return type("My" + base.__name__, (base,), {"forward": forward})


def _hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, output: scaled(output))


def _pre_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: scaled(args) if args else None)


def _keyword_hook(model: nn.Module, name: str) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return scaled(args), {key: scaled(value) for key, value in kwargs.items()}

    model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def _watch(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(Watch())


def _backward_hook(model: nn.Module, name: str) -> None:
    def hook(module: nn.Module, into: Any, out: Any) -> Any:
        return tuple(None if g is None else g * 1.5 for g in into)

    model.get_submodule(name).register_full_backward_hook(hook)


def _backward_pre_hook(model: nn.Module, name: str) -> None:
    def hook(module: nn.Module, out: Any) -> Any:
        return tuple(None if g is None else g * 1.5 for g in out)

    model.get_submodule(name).register_full_backward_pre_hook(hook)


def _forward(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    before = module.forward
    module.forward = lambda *args, **kwargs: scaled(before(*args, **kwargs))  # type: ignore[method-assign]


def _wrap(model: nn.Module, name: str) -> None:
    put(model, name, Wrapped(model.get_submodule(name)))


def _subclass(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    module.__class__ = subclass_of(module)


def _lora(model: nn.Module, name: str) -> None:
    put(model, name, Adapter(model.get_submodule(name), readable=False))


def _readable_lora(model: nn.Module, name: str) -> None:
    put(model, name, Adapter(model.get_submodule(name), readable=True))


def _tuned_norm(model: nn.Module, name: str) -> None:
    put(model, name, TunedNorm(model.get_submodule(name)))


def _parametrize(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Halved())


def _marked(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Marked))


def _doubled(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubled))


def _no_bias(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_parameter("bias", None)


def _no_weight(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_parameter("weight", None)


def _eps(model: nn.Module, name: str) -> None:
    model.get_submodule(name).eps = 0.5  # type: ignore[assignment]


def _rms(model: nn.Module, name: str) -> None:
    norm = model.get_submodule(name)
    rms = nn.RMSNorm(norm.normalized_shape, eps=1e-5)
    rms.weight = norm.weight
    put(model, name, rms)


def _dropout_all(model: nn.Module, name: str) -> None:
    model.get_submodule(name).p = 1.0  # type: ignore[assignment]


def _dropout_identity(model: nn.Module, name: str) -> None:
    put(model, name, nn.Identity())


def _max_norm(model: nn.Module, name: str) -> None:
    model.get_submodule(name).max_norm = 0.5  # type: ignore[assignment]


def _by_frequency(model: nn.Module, name: str) -> None:
    model.get_submodule(name).scale_grad_by_freq = True  # type: ignore[assignment]


def _activation_function(model: nn.Module, name: str) -> None:
    intermediate = model.get_submodule(name)
    intermediate._modules.pop("intermediate_act_fn", None)
    intermediate.__dict__["intermediate_act_fn"] = torch.tanh


def _activation_module(model: nn.Module, name: str) -> None:
    intermediate = model.get_submodule(name)
    intermediate.__dict__.pop("intermediate_act_fn", None)
    intermediate._modules["intermediate_act_fn"] = nn.Hardswish()


def _scaling(model: nn.Module, name: str) -> None:
    model.get_submodule(name).scaling = 0.25  # type: ignore[assignment]


def _frozen(model: nn.Module, name: str) -> None:
    model.get_submodule(name).requires_grad_(False)


def _inner_train(model: nn.Module, name: str) -> None:
    model.get_submodule(name).train()


def _inner_eval(model: nn.Module, name: str) -> None:
    model.get_submodule(name).eval()


def _wide(model: nn.Module, name: str) -> None:
    if model.dtype == torch.bfloat16:
        model.get_submodule(name).float()


def _in_place(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.data.add_(0.25)


def _new_weight(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    module.weight = nn.Parameter(numbers(module.weight, *module.weight.shape) + 0.25)


def anything(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList)


def leaf(module: nn.Module) -> bool:
    return not module._modules and not isinstance(module, nn.ModuleList)


def of(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) in kinds


def named(suffix: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__.endswith(suffix)


linears, norms, tables = of(nn.Linear), of(nn.LayerNorm), of(nn.Embedding)
weighted = of(nn.Linear, nn.LayerNorm, nn.Embedding)

# Name of a change -> (how it is made, the modules it can be made at).
CHANGES: dict[str, tuple[Make, Callable[[nn.Module], bool]]] = {
    "hook": (_hook, anything),
    "pre_hook": (_pre_hook, anything),
    "keyword_hook": (_keyword_hook, anything),
    "watch": (_watch, anything),
    "backward_hook": (_backward_hook, anything),
    "backward_pre_hook": (_backward_pre_hook, anything),
    "forward": (_forward, anything),
    "wrap": (_wrap, leaf),
    "subclass": (_subclass, leaf),
    "lora": (_lora, linears),
    "readable_lora": (_readable_lora, linears),
    "tuned_norm": (_tuned_norm, norms),
    "parametrize": (_parametrize, weighted),
    "marked": (_marked, weighted),
    "doubled": (_doubled, linears),
    "no_bias": (_no_bias, of(nn.Linear, nn.LayerNorm)),
    "no_weight": (_no_weight, norms),
    "eps": (_eps, norms),
    "rms": (_rms, norms),
    "dropout_all": (_dropout_all, of(nn.Dropout)),
    "dropout_identity": (_dropout_identity, of(nn.Dropout)),
    "max_norm": (_max_norm, tables),
    "by_frequency": (_by_frequency, tables),
    "activation_function": (_activation_function, named("Intermediate")),
    "activation_module": (_activation_module, named("Intermediate")),
    "scaling": (_scaling, named("SelfAttention")),
    "frozen": (_frozen, anything),
    "inner_train": (_inner_train, anything),
    "inner_eval": (_inner_eval, anything),
    "wide": (_wide, norms),
    "in_place": (_in_place, weighted),
    "new_weight": (_new_weight, weighted),
}
