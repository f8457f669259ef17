"""The compiled CPU ops, called directly: operands that do not fit raise an error and are not read or written
past their ends. tests/sanitize.sh runs this under AddressSanitizer."""

from __future__ import annotations

import math

import pytest
import torch

from fastgate.ops import backends
from fastgate.ops.linear import pack

MISSING = backends.load_cpu_library()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING)
ROWS, HEADS, HIDDEN = 7, 2, 16


def ends(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape or (ROWS, HIDDEN)).to(dtype)


def operands(op):
    """By name, in the schema's order, such that the op runs."""
    vector, seed = rows(HIDDEN), torch.tensor(3)
    cu, has_left_neighbour = ends(0, 3, ROWS), torch.zeros(ROWS, dtype=torch.bool)
    ids = torch.arange(ROWS)
    attention = dict(
        q=rows(), k=rows(), v=rows(), q_bias=vector, k_bias=vector, v_bias=vector, cu_q=cu, cu_k=cu,
        heads=HEADS, scale=0.5, dropout_p=0.1, seed=seed,
    )  # fmt: skip
    absorbed = dict(
        probe=rows(2, HEADS, HIDDEN), x=rows(), cu_seqlens=cu, scale=0.5, dropout_p=0.1, seed=seed
    )
    embed = dict(
        words=ids, positions=ids, types=ids % 2, word_table=rows(), position_table=rows(),
        type_table=rows(2, HIDDEN), weight=vector, norm_bias=vector, eps=1e-5, dropout_p=0.1, seed=seed,
        weight2=vector, norm_bias2=vector, eps2=1e-5, padding_idx=0, position_padding_idx=-1,
    )  # fmt: skip
    norm = dict(
        x=rows(), residual=rows(), weight=vector, norm_bias=vector, eps=1e-5, bias=vector,
        gate=torch.tensor(0.5), scale=vector, offset=vector, dropout_p=0.1, seed=seed, weight2=None,
        norm_bias2=None, eps2=0.0,
    )  # fmt: skip
    shift = dict(
        x=rows(), has_left_neighbour=has_left_neighbour, offset=vector, scale=vector, before=vector,
        after=vector, weight=vector, norm_bias=vector, eps=1e-5,
    )  # fmt: skip
    panels = torch.randn(2, HIDDEN, 32)
    linear = dict(x=rows(), panels=panels, bias=rows(40), columns=40, gelu=True)
    square, third = pack(rows(HIDDEN, HIDDEN)), pack(rows(3 * HIDDEN, HIDDEN))
    layers = dict(
        h=rows(),
        operands=[third.data, vector, None, vector, square.data, vector, vector, vector]
        + [vector] * 6
        + [square.data, vector, rows(HIDDEN, HIDDEN), rows(HIDDEN, HIDDEN), vector, square.data]
        + [vector] * 3,
        kinds=[0, HEADS, 3, -1, 1, HEADS],
        numbers=[1e-5, 0.5, 1e-5, 0.0, 1e-5, 0.5],
        cu_seqlens=cu,
        output_rows=torch.tensor([0, 3]),
        neighbours=[has_left_neighbour],
    )
    return {
        "attention": attention,
        "attention_backward": dict(grad=rows(), **attention),
        "absorbed_attention": absorbed,
        "absorbed_attention_backward": dict(
            grad_mixed=rows(2, HEADS, HIDDEN), grad_total=rows(2, HEADS), **absorbed
        ),
        "embed_norm": embed,
        "embed_norm_backward": dict(grad=rows(), **embed, requested=127),
        "gated_add_norm": norm,
        "gated_add_norm_backward": dict(grad=rows(), **norm, requested=255),
        "shift_norm": shift,
        "shift_norm_backward": dict(grad=rows(), **shift, requested=127),
        "packed_linear": linear,
        "fused_layers": layers,
    }[op]


OPS = (
    "attention",
    "attention_backward",
    "absorbed_attention",
    "absorbed_attention_backward",
    "embed_norm",
    "embed_norm_backward",
    "gated_add_norm",
    "gated_add_norm_backward",
    "shift_norm",
    "shift_norm_backward",
    "packed_linear",
    "fused_layers",
)
BIG = 2**62
# What may stand in an operand's place: every one of these must raise or be computed from, never be read past.
TENSORS = (
    lambda t: t[:-1] if t.dim() else t[None].expand(3),
    lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    lambda t: t.reshape(-1)[:0],
    lambda t: t[None],
    lambda t: t.transpose(0, -1) if t.dim() else t,
    lambda t: t.new_zeros(()),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.bfloat16),
    lambda t: torch.full_like(t, -1),
    lambda t: torch.full_like(t, 2**30) if t.dtype != torch.bool else ~t,
    lambda t: t.flip(0) if t.dim() else t,
    lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,  # not contiguous, and right
    lambda t: t.expand(2, *t.shape),
    lambda t: t.to("meta"),
)
NUMBERS = (0, -1, 1, 3, 5, BIG, -BIG, 2**63 - 1)
FLOATS = (-0.5, 1.0, 2.0, math.inf, math.nan)


def changed(op):
    """(operands of op with one of them another, what was changed) for every operand and change."""
    given = operands(op)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            others = [lambda t=value, c=change: c(t) for change in TENSORS] + [lambda: None]
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            others = [lambda n=n: n for n in NUMBERS]
        elif isinstance(value, float):
            others = [lambda n=n: n for n in FLOATS]
        elif isinstance(value, list):
            others = [lambda v=value: v[:-1], lambda v=value: v[1:], lambda: [], lambda v=value: v + v]
            for place, one in enumerate(value):
                if isinstance(one, torch.Tensor):
                    changes = [lambda t=one, c=change: c(t) for change in TENSORS]
                else:
                    changes = [lambda n=n: n for n in (NUMBERS if isinstance(one, int) else FLOATS)]
                for change in changes:
                    others.append(lambda v=value, p=place, c=change: [*v[:p], c(), *v[p + 1 :]])
        else:
            others = [lambda: rows(3)]
        for number, other in enumerate(others):
            yield given | {name: other()}, f"{name}, change {number}"


@pytest.mark.parametrize("op", OPS)
def test_operands_that_do_not_fit_are_refused(op):
    """Or computed from, where their elements are enough."""
    call = getattr(torch.ops.fastgate_cpu, op).default
    call(*operands(op).values())
    refused = 0
    for given, what in changed(op):
        try:
            call(*given.values())
        except (RuntimeError, NotImplementedError, TypeError) as error:
            assert str(error), what
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("attention", dict(cu_q=ends(0, 5, 3, ROWS)), "cu_q"),
        ("attention", dict(cu_q=ends(0, 3, ROWS + 1)), "cu_q"),
        ("attention", dict(cu_k=ends(-2, 3, ROWS)), "cu_k"),
        ("attention", dict(heads=3), "multiple of heads"),
        ("attention", dict(dropout_p=1.0), "dropout_p"),
        ("attention", dict(dropout_p=math.nan), "dropout_p"),
        ("attention_backward", dict(grad=rows(HIDDEN, ROWS)), "grad"),
        ("absorbed_attention", dict(cu_seqlens=ends(0, 2**30, ROWS)), "cu_seqlens"),
        ("absorbed_attention_backward", dict(grad_mixed=rows(HIDDEN, HEADS, 2)), "grad_mixed"),
        ("embed_norm", dict(words=torch.full((ROWS,), 10**9)), "ids"),
        ("embed_norm", dict(weight2=None), "both or neither"),
        ("gated_add_norm", dict(gate=torch.zeros(0)), "gate"),
        ("gated_add_norm", dict(norm_bias2=rows(HIDDEN)), "both or neither"),
        ("packed_linear", dict(columns=-5, panels=rows(0, HIDDEN, 32), bias=None), "shapes"),
        ("packed_linear", dict(columns=BIG), "shapes"),
        ("fused_layers", dict(h=rows().to(torch.int8)), "h: got another dtype"),
        ("fused_layers", dict(kinds=[0, HEADS, 3, 2**63 - 1, 1, HEADS]), "neighbours"),
        ("fused_layers", dict(kinds=[0, HEADS, 3, -1, 1, 0]), "heads"),
        ("fused_layers", dict(output_rows=torch.tensor([0, ROWS])), "output_rows"),
    ],
)
def test_the_error_names_the_operand(op, change, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastgate_cpu, op).default(*(operands(op) | change).values())


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_over_nothing_is_the_bias(biased, poisoned):
    bias = torch.arange(40.0) if biased else None
    found = torch.ops.fastgate_cpu.packed_linear.default(rows(5, 0), rows(2, 0, 32), bias, 40, False)
    assert torch.equal(found, torch.zeros(5, 40) if bias is None else bias.expand(5, 40))
