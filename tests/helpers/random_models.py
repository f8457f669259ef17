"""Random models, calls and changes, and one check: fastgate gives what transformers gives, or refuses.

`cases(changed)` is the hypothesis strategy. `check(case)` raises Difference where fastgate is different and
says nothing, loses something, or raises anything but a FastgateError. Otherwise it returns what happened.

The tolerance comes from transformers itself. With `truth` the outputs in float64, an output may be off by
twice what transformers is off by in the same dtype. Where that does not suffice, it may be off by eight times
what rounding every weight once more changes in float64, which is what a backward stable computation may do.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import random_changes as changes
from helpers.encoders import ALL, VECTORS
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "tanh", "gelu_fast")
MASKS = ("none", "full", "right", "left", "random", "some_empty", "all_empty")
MASK_DTYPES = {"int64": torch.int64, "bool": torch.bool, "float32": torch.float32, "int32": torch.int32}
MODES = ("eval", "inference", "train", "autocast")
TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForPreTraining")
# The rows that a demand of "first" leaves out are read by these.
READ_MORE = (*TOKEN_HEADS, "ForQuestionAnswering")
ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-50}


class Difference(AssertionError):
    """fastgate and transformers differ, and nothing was said. kind: which property does not hold."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Change:
    """A change of random_changes. place: which of the modules that fit. when: before, after or frozen."""

    kind: str
    place: int = 0
    when: str = "before"


@dataclass(frozen=True)
class Case:
    """Everything that decides one case. The defaults are a plain model and call."""

    # The model.
    family: str = "Bert"
    head: str = "Model"
    layers: int = 1
    heads: int = 1
    head_dim: int = 4
    ffn: int = 8
    activation: str = "gelu"
    vocabulary: int = 20
    types: int = 2
    pad: int = 0
    spare_positions: int = 8
    eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention: str = "sdpa"
    labels: int = 3
    chunk: int = 0
    pooler: bool = True
    # The call.
    batch: int = 2
    length: int = 4
    mask: str = "none"
    mask_dtype: str = "int64"
    token_types: bool = False
    position_ids: bool = False
    embeds: bool = False
    with_labels: bool = False
    hidden_states: Any = None
    attentions: bool = False
    return_dict: bool | None = None
    rows: bool = False
    seed: int = 0
    # How it runs.
    dtype: str = "float32"
    mode: str = "eval"
    gradients: bool = False
    # What is done to it.
    changes: tuple[Change, ...] = ()
    demand: str | None = None
    keep: tuple[int, ...] | None = None
    replacement: str = "zero"
    freeze: bool = False
    copy: bool = False
    save: bool = False

    @staticmethod
    def of(text: str) -> Case:
        data = json.loads(text)
        data["changes"] = tuple(Change(**change) for change in data.get("changes", ()))
        if data.get("keep") is not None:
            data["keep"] = tuple(data["keep"])
        return Case(**data)

    def __str__(self) -> str:
        """As JSON, what differs from the defaults."""
        values = dataclasses.asdict(self)
        plain = dataclasses.asdict(Case())
        return json.dumps({k: v for k, v in values.items() if k in ("family", "head") or v != plain[k]})

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(range(self.layers)) if self.keep is None else self.keep


@st.composite
def cases(draw: Any, changed: bool) -> Case:
    """changed: with one or two changes by a user; without any, nothing but what is documented is refused."""
    family, head = draw(st.sampled_from(ALL))
    layers = draw(st.integers(1, 4))
    vocabulary = draw(st.integers(5, 60))
    length = draw(st.integers(1, 12))
    few = st.sampled_from((False, False, False, True))
    attention = draw(st.sampled_from(("sdpa", "sdpa", "eager")))
    mask = draw(st.sampled_from(MASKS))
    if attention == "eager" and mask.endswith("empty"):
        mask = "random"  # a softmax over nothing: compared with SDPA alone
    embeds = draw(few)
    mode = draw(st.sampled_from(MODES))
    dtype = "float32" if mode == "autocast" else draw(st.sampled_from((*DTYPES, "float32", "float32")))
    keep = draw(st.none() | st.sets(st.integers(0, layers - 1)).map(lambda s: tuple(sorted(s))))
    freeze = mode in ("eval", "inference") and dtype != "float64" and draw(st.booleans())
    drawn = draw(st.lists(_change(freeze), min_size=1, max_size=2).map(tuple)) if changed else ()
    # What drops at random cannot be compared.
    rates = (0.0,) if any(change.kind == "inner_train" for change in drawn) else (0.0, 0.1)
    return Case(
        family=family,
        head=head,
        layers=layers,
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from((2, 3, 4, 5, 7, 8, 16, 32))),
        ffn=draw(st.integers(1, 48)),
        activation=draw(st.sampled_from(("gelu",) * 4 + ACTIVATIONS)),
        vocabulary=vocabulary,
        types=draw(st.integers(1, 3)),
        pad=draw(st.integers(0, min(vocabulary - 1, 4))),
        spare_positions=draw(st.integers(0, 9)),
        eps=draw(st.sampled_from((1e-12, 1e-5, 1e-2))),
        hidden_dropout=draw(st.sampled_from(rates)),
        attention_dropout=draw(st.sampled_from(rates)),
        attention=attention,
        labels=2
        if head in ("ForQuestionAnswering", "ForNextSentencePrediction")
        else draw(st.integers(1, 4)),
        chunk=draw(st.sampled_from((0, 0, 0, 0, 0, 1))),
        pooler=head != "Model" or draw(st.booleans()),
        batch=draw(st.integers(1, 4)),
        length=length,
        mask=mask,
        mask_dtype=draw(st.sampled_from(("int64", *MASK_DTYPES))),
        token_types=draw(st.booleans()),
        position_ids=draw(few),
        embeds=embeds,
        with_labels=draw(st.booleans()),
        hidden_states=draw(st.sampled_from((None,) * 6 + (True, True, 0, layers, (0, -1)))),
        attentions=attention == "eager" and draw(few),
        return_dict=draw(st.sampled_from((None, None, False))),
        rows=(head in TOKEN_HEADS or head == "Model") and draw(few),
        seed=draw(st.integers(0, 2**16)),
        dtype=dtype,
        mode=mode,
        gradients=mode in ("eval", "train", "autocast") and not freeze and draw(st.booleans()),
        changes=drawn,
        demand=draw(st.sampled_from((None,) * 4 + ("all", "first"))),
        keep=keep,
        replacement=draw(st.sampled_from(tuple(VECTORS))),
        freeze=freeze,
        copy=not any(change.kind in changes.NOT_COPIED for change in drawn) and draw(few),
        save=draw(few),
    )


def _change(freeze: bool) -> st.SearchStrategy[Change]:
    def possible(change: Change) -> bool:
        if change.kind in changes.AT_FIRST and change.when != "before":
            return False
        return not (change.when == "frozen" and change.kind in changes.NEED_WEIGHTS)

    when = ("before", "after", "frozen") if freeze else ("before", "after")
    strategy = st.builds(
        Change, st.sampled_from(tuple(changes.CHANGES)), st.integers(0, 99), st.sampled_from(when)
    )
    return strategy.filter(possible)


# The model and its inputs.


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    """The model of transformers, weights large enough for attention to matter, in the case's dtype."""
    torch.manual_seed(case.seed)
    first = case.pad + 1 if case.family != "Bert" else 0
    config = getattr(transformers, f"{case.family}Config")(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=case.ffn,
        hidden_act=case.activation,
        max_position_embeddings=first + case.length + case.spare_positions,
        type_vocab_size=case.types,
        pad_token_id=case.pad,
        layer_norm_eps=case.eps,
        hidden_dropout_prob=0.0 if case.mode == "train" else case.hidden_dropout,
        attention_probs_dropout_prob=0.0 if case.mode == "train" else case.attention_dropout,
        num_labels=case.labels,
        chunk_size_feed_forward=case.chunk,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = case.attention
    kind = getattr(transformers, case.family + case.head)
    model = kind(config) if case.head != "Model" else kind(config, add_pooling_layer=case.pooler)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.3)
    model = model.to(DTYPES[case.dtype]).to(dtype)
    return model.train(case.mode == "train")


@dataclass
class Call:
    inputs: dict[str, Tensor]
    mask: Tensor  # (batch, length) bool: attended
    requested: Tensor | None  # the rows asked for
    labelled: Tensor | None


def call_of(case: Case, dtype: torch.dtype) -> Call:
    g = torch.Generator().manual_seed(case.seed + 1)
    choices = 2 if case.head == "ForMultipleChoice" else 1
    rows, length = case.batch * choices, case.length
    shape = (rows, length)
    mask = torch.ones(shape, dtype=torch.bool)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    places = torch.arange(length)[None]
    if case.mask == "right":
        mask = places < lengths
    elif case.mask == "left":
        mask = places >= length - lengths
    elif case.mask in ("random", "some_empty"):
        mask = torch.rand(shape, generator=g) < 0.6
        mask[:, int(torch.randint(0, length, (), generator=g))] = True
        if case.mask == "some_empty":
            mask[rows // 2] = False
    elif case.mask == "all_empty":
        mask = torch.zeros(shape, dtype=torch.bool)
    inputs: dict[str, Tensor] = {}
    if case.embeds:
        inputs["inputs_embeds"] = (
            torch.randn(*shape, case.hidden, generator=g).to(DTYPES[case.dtype]).to(dtype)
        )
    else:
        inputs["input_ids"] = torch.randint(0, case.vocabulary, shape, generator=g)
    if case.mask != "none":
        inputs["attention_mask"] = mask.to(MASK_DTYPES[case.mask_dtype])
    if case.token_types:
        inputs["token_type_ids"] = torch.randint(0, case.types, shape, generator=g)
    if case.position_ids:
        inputs["position_ids"] = torch.randint(0, length, shape, generator=g)
    labelled = None
    if choices > 1:
        inputs = {name: value.view(case.batch, choices, *value.shape[1:]) for name, value in inputs.items()}
    if case.with_labels:
        some = torch.rand(shape, generator=g) < 0.5
        some[0, 0] = True
        several = max(case.labels, 2)
        if case.head in TOKEN_HEADS:
            labelled = some
            top = case.labels if "Token" in case.head else case.vocabulary
            inputs["labels"] = torch.where(some, torch.randint(0, top, shape, generator=g), -100)
            if case.head == "ForPreTraining":
                inputs["next_sentence_label"] = torch.randint(0, 2, (rows,), generator=g)
        elif case.head == "ForQuestionAnswering":
            for name in ("start_positions", "end_positions"):
                inputs[name] = torch.randint(0, length, (rows,), generator=g)
        elif case.head == "ForSequenceClassification" and case.labels == 1:
            inputs["labels"] = torch.randn(rows, generator=g).to(DTYPES[case.dtype]).to(dtype)
        elif case.head != "Model":
            top = several if case.head == "ForSequenceClassification" else 2
            inputs["labels"] = torch.randint(0, top, (case.batch,), generator=g)
    requested = torch.rand(shape, generator=g) < 0.5 if case.rows else None
    return Call(inputs, mask, requested, labelled)


def read_rows(case: Case, call: Call) -> Tensor | None:
    """(batch, length) bool: the rows of the last hidden state, or of a token head's logits, that are read."""
    if case.hidden_states or case.attentions:
        return None
    if case.head == "Model":
        if call.requested is not None:
            return call.requested
        if case.demand == "first":
            return torch.arange(case.length).eq(0).expand(call.mask.shape)
        return call.mask
    if case.head in TOKEN_HEADS:
        if call.requested is not None:
            return call.requested if call.labelled is None else call.requested | call.labelled
        if call.labelled is not None and case.mode == "train" and case.demand != "all":
            return call.labelled
        return call.mask if call.labelled is None else call.mask | call.labelled
    return None


# The same changes on both sides.


def make_changes(case: Case, when: str, model: nn.Module, names: list[str | None]) -> None:
    """names: where each change of the case is made; None, or a module that was pruned away: nowhere."""
    for change, name in zip(case.changes, names, strict=True):
        if change.when == when and name is not None and _is_there(model, name):
            changes.CHANGES[change.kind][0](model, name)


def _is_there(model: nn.Module, name: str) -> bool:
    try:
        return not hasattr(model.get_submodule(name), "fastgate_removed")
    except AttributeError:
        return False


def names_of(case: Case, model: nn.Module) -> list[str | None]:
    names: list[str | None] = []
    for change in case.changes:
        possible = changes.places(model, change.kind)
        names.append(possible[change.place % len(possible)] if possible else None)
    return names


def vectors_of(case: Case, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of a layer's replacement."""
    g = torch.Generator().manual_seed(case.seed + 7 + layer)
    return {
        name: (torch.randint(-32, 33, (case.hidden,), generator=g) / 64).to(dtype)
        for name in VECTORS[case.replacement]
    }


def remove_attention(case: Case, model: nn.Module, mask: Tensor, dtype: torch.dtype) -> None:
    """The reference for `prune`: the attention of transformers' layer gives N1(h + r(h))."""
    both = (mask[:, 1:] & mask[:, :-1])[..., None]  # a token and the one before it, both attended
    for i, layer in enumerate(model.base_model.encoder.layer):  # type: ignore[union-attr, arg-type]
        if i in case.kept:
            continue
        vectors = {name: nn.Parameter(value) for name, value in vectors_of(case, i, dtype).items()}
        layer.attention.vectors = nn.ParameterDict(vectors)

        def forward(h: Tensor, *args: Any, attention: Any = layer.attention, **kwargs: Any) -> Any:
            v = attention.vectors
            edge = torch.zeros_like(h[:, :1])
            total = h + v["shift"] if "shift" in v else h
            if "scale" in v:
                total = total + v["scale"] * h
            if "before" in v:
                total = total + v["before"] * torch.cat([edge, torch.where(both, h[:, :-1], 0)], 1)
                total = total + v["after"] * torch.cat([torch.where(both, h[:, 1:], 0), edge], 1)
            return attention.output.LayerNorm(total), None

        layer.attention.forward = forward


def fill_replacements(case: Case, model: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for i, layer in enumerate(model.base_model.encoder.layer):  # type: ignore[union-attr, arg-type]
            if i not in case.kept:
                for name, value in vectors_of(case, i, dtype).items():
                    getattr(layer.attention.replacement, name).copy_(value)


# What comes out.


@contextmanager
def running(case: Case, cast: bool) -> Iterator[None]:
    with torch.inference_mode(case.mode == "inference"), torch.set_grad_enabled(case.gradients):
        if case.mode == "autocast" and cast:
            with torch.autocast("cpu", torch.bfloat16):
                yield
        else:
            yield


def run(
    case: Case, model: nn.Module, dtype: torch.dtype, cast: bool = True, extra: bool = False
) -> dict[str, Tensor]:
    """Name -> the rows that are read of each output, and gradients. extra: pass the rows asked for."""
    call = call_of(case, dtype)
    inputs: dict[str, Any] = dict(call.inputs)
    if extra and call.requested is not None:
        inputs["rows"] = call.requested
    if case.hidden_states is not None:
        inputs["output_hidden_states"] = case.hidden_states
    if case.attentions:
        inputs["output_attentions"] = True
    if case.return_dict is not None:
        inputs["return_dict"] = case.return_dict
    if case.embeds and case.gradients:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].clone().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    with running(case, cast):
        outputs = model(**inputs)
        results = dict(_flat(case, call, outputs))
        if case.gradients:
            g = torch.Generator().manual_seed(case.seed + 3)
            weights = {name: torch.randn(value.shape, generator=g) for name, value in results.items()}
            total: Any = sum((value * weights[name].to(value)).sum() for name, value in results.items())
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
    if case.gradients:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results["grad " + name] = parameter.grad.detach()
        if case.embeds and inputs["inputs_embeds"].grad is not None:
            results["grad inputs_embeds"] = inputs["inputs_embeds"].grad
    return {name: value.detach().clone() for name, value in results.items()}


def _flat(case: Case, call: Call, outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """return_dict=False is flattened by place; the names are the same on both sides."""
    rows = read_rows(case, call)
    values = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    for name, value in values:
        several = value if isinstance(value, tuple | list) else (value,)
        for i, one in enumerate(v for v in several if v is not None):
            # A row that is read or not: the first two dimensions are those of the input, a vector follows.
            of_rows = one.dim() == 3 and one.shape[:2] == call.mask.shape
            yield f"{name}.{i}", one[rows] if of_rows and rows is not None else one


@contextmanager
def rounded(case: Case, model: nn.Module, seed: int) -> Iterator[None]:
    """Every weight off by at most one rounding of the case's dtype."""
    size = ROUNDING["bfloat16" if case.mode == "autocast" else case.dtype]
    g = torch.Generator().manual_seed(seed)
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        for p, value in kept:
            p.copy_(value * (1 + size * (2 * torch.rand(p.shape, generator=g, dtype=p.dtype) - 1)))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def off(value: Tensor, truth: Tensor) -> float:
    """The largest difference; where the truth is not finite, the value shall be the same."""
    if not truth.numel():
        return 0.0
    value, truth = value.double(), truth.double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    worst = float(torch.where(same, torch.zeros_like(truth), (value - truth).abs()).max())
    return worst if worst == worst else float("inf")


def compare(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor], truth_model: nn.Module) -> None:
    truth = _kept_results(case, run(case, truth_model, torch.float64, cast=False))
    size = ROUNDING["bfloat16" if case.mode == "autocast" else case.dtype]
    scale = max(
        (float(t.abs().max()) for n, t in truth.items() if n.startswith("grad ") and t.numel()), default=0.0
    )
    suspects: dict[str, float] = {}
    for name, wanted in theirs.items():
        gradient = name.startswith("grad ")
        if name not in ours:
            if (
                gradient
                and float(truth.get(name, wanted).abs().max() if wanted.numel() else 0.0) <= 64 * size * scale
            ):
                continue  # None in place of zeros
            raise Difference("no gradient" if gradient else "an output is missing", name)
        got = ours[name]
        if got.shape != wanted.shape:
            raise Difference("shape", f"{name}: {tuple(got.shape)}, transformers {tuple(wanted.shape)}")
        if got.dtype != wanted.dtype and not (case.mode == "autocast" and not gradient):
            raise Difference("dtype", f"{name}: {got.dtype}, transformers {wanted.dtype}")
        largest = float(truth[name].abs().max()) if wanted.numel() else 0.0
        tolerance = 2 * size * (max(largest, 0.1 * scale) if gradient else largest)
        if off(got, truth[name]) > 2 * off(wanted, truth[name]) + tolerance:
            suspects[name] = max(off(wanted, truth[name]), tolerance)
    more = [name for name in ours if name not in theirs and not name.startswith("grad ")]
    if more:
        raise Difference("an output more", ", ".join(more))
    for name in ours.keys() - theirs.keys():
        if float(ours[name].abs().max() if ours[name].numel() else 0.0) > 64 * size * scale:
            raise Difference("a gradient more", name)
    if not suspects:
        return
    for seed in range(6):
        with rounded(case, truth_model, seed):
            moved = _kept_results(case, run(case, truth_model, torch.float64, cast=False))
        for name in suspects:
            suspects[name] = max(suspects[name], off(moved[name], truth[name]))
    for name, allowed in suspects.items():
        worst = off(ours[name], truth[name])
        if worst > 8 * allowed:
            kind = "a gradient differs" if name.startswith("grad ") else "an output differs"
            raise Difference(kind, f"{name} by {worst:.3g}, allowed {8 * allowed:.3g}")


# What must not change.


def snapshot(model: nn.Module, values: bool = True) -> dict[str, Any]:
    """Classes, flags, hooks, what stands in the instances, parameters and buffers, the configuration."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = tuple(
            (kind, tuple(map(id, getattr(module, kind).values())))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        own = sorted(k for k in module.__dict__ if not k.startswith("_"))
        facts[f"module {name}"] = (type(module), module.training, hooks, own)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts[f"flag {name}"] = parameter.requires_grad
        facts[f"class {name}"] = type(parameter)
    for name, tensor in model.state_dict().items():
        facts[f"state {name}"] = tensor.detach().clone()
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    # transformers' heads note the problem_type, and its save_pretrained the others.
    noted = ("problem_type", "architectures", "dtype")
    facts["config"] = {k: v for k, v in config.items() if k not in noted}
    return facts


def assert_same(kind: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in before.keys() | after.keys():
        a, b = before.get(name), after.get(name)
        same = (
            torch.equal(a, b) and a.dtype == b.dtype
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a == b
        )
        if not same:
            what = "" if isinstance(a, Tensor) else f": {str(a)[:200]} became {str(b)[:200]}"
            raise Difference(kind, name + what)


def watched(model: nn.Module) -> dict[str, int]:
    return {
        name: hook.calls
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, changes.Watch)
    }


# The check.


@contextmanager
def step(name: str) -> Iterator[None]:
    """Only a FastgateError may leave."""
    try:
        yield
    except (fastgate.FastgateError, Difference):
        raise
    except Exception as error:
        raise Difference(f"{name} raised {type(error).__name__}", str(error)[:300]) from error


def expected(case: Case) -> bool:
    """Whether a refusal is what is documented: of a change, or of a demand that leaves out rows read."""
    return bool(case.changes) or (case.demand == "first" and case.head in READ_MORE)


def check(case: Case) -> str:
    """equal, refused or both fail; raises Difference otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        return _check(case)


def _check(case: Case) -> str:
    dtype = DTYPES[case.dtype]
    theirs, truth, ours = build(case, dtype), build(case, torch.float64), build(case, dtype)
    names = names_of(case, theirs)
    mask = call_of(case, dtype).mask
    try:
        for model in (theirs, truth):
            make_changes(case, "before", model, names)
        make_changes(case, "before", ours, names)
        if case.keep is not None:
            # In place before later changes, which see the modules that are left.
            remove_attention(case, theirs, mask, dtype)
            remove_attention(case, truth, mask, torch.float64)
        for model in (theirs, truth):
            make_changes(case, "after", model, names)
            make_changes(case, "frozen", model, names)
        wanted = run(case, theirs, dtype)
    except Exception as error:
        return f"transformers fails, {type(error).__name__}"
    before = snapshot(ours)
    try:
        return _ours(case, ours, theirs, truth, wanted, names, before)
    except fastgate.FastgateError as error:
        if not expected(case):
            raise Difference(f"a plain case was refused, {type(error).__name__}", str(error)[:300]) from error
        if not hasattr(ours.base_model, "fastgate_runtime"):
            assert_same("a refused patch changed the model", before, snapshot(ours))
        return "refused"


def _ours(
    case: Case,
    ours: nn.Module,
    theirs: nn.Module,
    truth: nn.Module,
    wanted: dict[str, Tensor],
    names: list[str | None],
    before: dict[str, Any],
) -> str:
    dtype = DTYPES[case.dtype]
    with step("patch"):
        fastgate.patch(ours, demand=case.demand)
    state = {name: value for name, value in snapshot(ours).items() if name.startswith(("state", "flag"))}
    assert_same("patch changed", {n: v for n, v in before.items() if n.startswith(("state", "flag"))}, state)
    if case.keep is not None:
        with step("prune"):
            fastgate.prune(ours, case.keep, case.replacement)
        fill_replacements(case, ours, dtype)
    with step("a change after patch"):
        make_changes(case, "after", ours, names)
    unfrozen = snapshot(ours)
    if case.freeze:
        with step("freeze"):
            fastgate.freeze(ours)
        with step("state_dict of a frozen model"):
            frozen = {f"state {n}": v for n, v in ours.state_dict().items()}
        assert_same("freeze changed", {n: v for n, v in unfrozen.items() if n.startswith("state")}, frozen)
        make_changes(case, "frozen", ours, names)
    if case.copy:
        with step("deepcopy"):
            ours = copy.deepcopy(ours)
    late = any(change.when == "frozen" for change in case.changes)
    with step("forward"):
        got = run(case, ours, dtype, extra=True)
    compare(case, got, _kept_results(case, wanted), truth)
    _compare_watches(case, ours, theirs)
    renormed = any(change.kind == "max_norm" for change in case.changes)  # a forward writes to the table
    if not case.freeze and not renormed:
        with step("a second forward"):
            again = run(case, ours, dtype, extra=True)
        for name, value in got.items():
            if (
                not name.startswith("grad ")
                and not torch.equal(value, again[name])
                and off(value, again[name]) != 0
            ):
                raise Difference("a second forward differs", name)
    if case.save:
        _round_trip(case, ours)
    if case.freeze and not late:
        with step("thaw"):
            fastgate.thaw(ours)
        if not renormed:
            assert_same("freeze and thaw changed", unfrozen, snapshot(ours))
    if case.keep is None:
        with step("unpatch"):
            fastgate.unpatch(ours)
        if not renormed and not any(change.when != "before" for change in case.changes):
            assert_same("patch and unpatch changed", before, snapshot(ours))
        if not renormed:
            with step("forward after unpatch"):
                last = run(case, ours, dtype)
            first = run(case, theirs, dtype)
            for name, value in first.items():
                if off(last[name], value) != 0:
                    raise Difference("after unpatch the model differs", name)
    return "equal"


def _kept_results(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradients of what `prune` removes, and those of replacements by fastgate's names."""
    removed = tuple(
        f"encoder.layer.{i}.attention.{part}."
        for i in range(case.layers)
        if i not in case.kept
        for part in ("self", "output.dense")
    )
    return {
        name.replace(".attention.vectors.", ".attention.replacement."): value
        for name, value in results.items()
        if not (name.startswith("grad ") and any(part in name for part in removed))
    }


def _compare_watches(case: Case, ours: nn.Module, theirs: nn.Module) -> None:
    """A hook that only looks has run wherever transformers runs it."""
    ours_called = watched(ours)
    for name, calls in watched(theirs).items():
        if calls and name in ours_called and not ours_called[name]:
            raise Difference("a hook did not run", name)


def _round_trip(case: Case, ours: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with step("save"):
            try:
                path = fastgate.save(ours, Path(folder) / "model")
            except fastgate.FastgateError:
                if not case.changes and case.pooler:  # load makes every encoder with its pooler
                    raise
                return
        with step("load of what was saved"):
            loaded = fastgate.load(path)
    saved, read = ours.state_dict(), loaded.state_dict()
    assert_same(
        "save and load changed",
        {f"state {k}": v for k, v in saved.items()},
        {f"state {k}": v for k, v in read.items()},
    )
    if case.freeze or any(c.kind in (*changes.HOOKS, "inner_train") for c in case.changes):
        return  # a frozen model rounds otherwise, and hooks are not saved
    plain = dataclasses.replace(case, mode="eval", gradients=False, with_labels=False)
    training = {module: module.training for module in ours.modules()}
    flags = [(p, p.requires_grad) for p in ours.parameters()]
    with step("forward of what was loaded"):
        first, second = (
            run(plain, ours.eval(), DTYPES[case.dtype], extra=True),
            run(plain, loaded, DTYPES[case.dtype], extra=True),
        )
    for module, was in training.items():
        module.training = was
    assert all(p.requires_grad == was for p, was in flags)
    for name, value in first.items():
        # A model that was changed may run other kernels than the plain one that is loaded.
        share = 0.1 if case.dtype == "bfloat16" else 1e-2
        allowed = share * off(value, torch.zeros_like(value)) if case.changes else 0.0
        if name not in second or off(second[name], value) > allowed:
            raise Difference("a loaded model differs", name)


# The smallest case that fails the same way.


def fails(case: Case, kind: str) -> bool:
    """Whether `check` raises a Difference of this kind."""
    try:
        check(case)
    except Difference as error:
        return error.kind == kind
    except Exception:
        return False
    return False


def with_fewer_changes(case: Case, kind: str) -> Case:
    """Without the changes that the failure does not need."""
    for change in case.changes:
        fewer = dataclasses.replace(case, changes=tuple(c for c in case.changes if c is not change))
        case = fewer if fails(fewer, kind) else case
    return case


def minimised(case: Case, kind: str, tries: int = 150) -> Case:
    """Field by field back to the plain case as long as it fails the same way."""
    moved = True
    while moved and tries > 0:
        moved = False
        for candidate in _smaller(case, Case()):
            tries -= 1
            if tries >= 0 and fails(candidate, kind):
                case, moved = candidate, True
                break
    return case


def _smaller(case: Case, plain: Case) -> Iterator[Case]:
    for i in range(len(case.changes)):
        yield dataclasses.replace(case, changes=case.changes[:i] + case.changes[i + 1 :])
    for field in dataclasses.fields(Case):
        if field.name != "changes" and getattr(case, field.name) != getattr(plain, field.name):
            yield dataclasses.replace(case, **{field.name: getattr(plain, field.name)})
    for i, change in enumerate(case.changes):
        for other in (dataclasses.replace(change, when="before"), dataclasses.replace(change, place=0)):
            if other != change and other.kind not in changes.AT_FIRST:
                yield dataclasses.replace(case, changes=(*case.changes[:i], other, *case.changes[i + 1 :]))
