"""Absorbed attention: the reference by definition and by gradcheck, masks, the public function, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers.absorbed_cases import (
    CASES,
    SEED,
    SPLIT,
    Case,
    as_implementation,
    check,
    check_masks,
    make,
    run,
    traceable,
    truth,
)
from helpers.cases import BF16, FP32
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate.errors import ArgumentError
from fastgate.ops import backends, reference, registry
from fastgate.ops.absorbed_attention import _chosen, absorbed_attention
from fastgate.ops.attention import attention
from fastgate.ops.ragged import SequenceOffsets

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IMPLEMENTATIONS = backends.implementations("absorbed_attention")


def operands(lengths, hidden=32, dtype=torch.float64, seed=1):
    """(q, x, key, value, value_bias) and the key's bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((len(lengths), hidden), (sum(lengths), hidden), *((hidden, hidden),) * 2, *((hidden,),) * 2)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return drawn[:5], drawn[5]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(implementation, case, id=f"{implementation.backend}-{case}")
        for implementation in IMPLEMENTATIONS
        for case in (*CASES, *SPLIT)
        if case.dtype in implementation.dtypes
    ],
)
def test_as_exact_as_torch(implementation, case):
    check(implementation, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.hidden < 100], ids=str)
def test_reference_is_the_definition(case):
    """In float64, backward written out against autograd through the definition."""
    call = make(case._replace(dtype=torch.float64))
    for got, true in zip(run(registry.REFERENCE["absorbed_attention"], call), truth(call), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lengths", [(3, 1, 4), (2, 0, 3), (3, 3)])
def test_gradcheck_of_the_references_backward(lengths, dropout_p):
    call = make(Case(lengths, 2, 5, torch.float64, dropout_p, "small"))
    rest = (call.rest[0], *call.rest[1:])

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, probe, x):
            ctx.save_for_backward(probe, x)
            return registry.REFERENCE["absorbed_attention"].forward(probe, x, *rest)

        @staticmethod
        def backward(ctx, *grads):
            return registry.REFERENCE["absorbed_attention"].backward(*grads, *ctx.saved_tensors, *rest)

    leaves = [t.detach().requires_grad_() for t in (call.probe, call.x)]
    assert torch.autograd.gradcheck(Reference.apply, leaves)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    heads=st.integers(2, 20),
    hidden=st.integers(8, 90),  # the error of a few numbers is a matter of luck
    dropout_p=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_any_lengths_and_widths(lengths, heads, hidden, dropout_p, dtype):
    check(IMPLEMENTATIONS[-1], Case(tuple(lengths), heads, hidden, dtype, dropout_p, "any"))


@pytest.mark.parametrize("case", [(130, 7, 300, 61, 0), (700,)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], ids=lambda i: i.backend)
def test_bits_do_not_depend_on_threads(implementation, case, dtype):
    """Long enough for seven threads to share, one sequence's heads among several of them."""
    call = make(Case(case, 12, 384, dtype, 0.2, "threads"))
    want = run(implementation, call)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, two) for one, two in zip(run(implementation, call), want, strict=True))


@pytest.mark.parametrize("strided", ["probe", "x", "grad"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.backend)
def test_strided_operands(implementation, strided):
    """Operands with any strides give what dense ones give."""
    call = make(Case((5, 9), 3, 32, FP32, 0.0, "strides"))
    wide = getattr(call, strided).repeat_interleave(2, -1)[..., ::2]
    for got, want in zip(
        run(implementation, call._replace(**{strided: wide})), run(implementation, call), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], ids=lambda i: i.backend)
def test_the_compiled_op_refuses_what_would_read_elsewhere(implementation):
    call = make(Case((5, 9), 3, 32, FP32, 0.5, "small"))
    cu_seqlens, *rest = call.rest
    wrong = {
        "cu_seqlens: got ends that do not rise": (call.probe, call.x, cu_seqlens + 1, *rest),
        "probe, x: got shapes": (call.probe, call.x[:, :16], cu_seqlens, *rest),
        "probe, x: got other or unequal dtypes": (call.probe, call.x.double(), cu_seqlens, *rest),
        "seed: got none": (call.probe, call.x, cu_seqlens, *rest[:2], None),
    }
    for message, operands in wrong.items():
        with pytest.raises(RuntimeError, match=f"absorbed_attention: {message}"):
            implementation.forward(*operands)
    with pytest.raises(
        RuntimeError, match="absorbed_attention_backward: grad_mixed, grad_total: got another"
    ):
        implementation.backward(call.grad[:1], None, *call.operands)


@pytest.mark.parametrize("seed", [0, SEED, -3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.backend)
def test_masks_are_the_references(implementation, seed):
    check_masks(implementation, 13, seed, FP32)


@pytest.mark.parametrize("lengths", [(5, 1, 17, 3), (7, 7), (4, 0, 2)])
def test_absorbed_is_attention_with_one_query(lengths):
    heads = 4
    keys, queries = SequenceOffsets(lengths, CPU), SequenceOffsets((1,) * len(lengths), CPU)
    drawn, key_bias = operands(lengths)
    q, x, key, value, value_bias = leaves = [t.requires_grad_() for t in drawn]
    out = absorbed_attention(*leaves, keys, heads, 0.35, 0.0)
    want = attention(q, x @ key.T + key_bias, x @ value.T + value_bias, queries, keys, heads, 0.35)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(want.square().sum(), leaves)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_expectation():
    draws = 2000
    x, q, weight, bias = torch.randn(40, 16), torch.randn(1, 16), torch.randn(16, 16), torch.randn(16)
    kept = absorbed_attention(q, x, weight, weight, bias, SequenceOffsets((40,), CPU), 2, 0.3, 0.0)
    torch.manual_seed(0)
    keys = SequenceOffsets((40,) * draws, CPU)
    drawn = absorbed_attention(
        q.repeat(draws, 1), x.repeat(draws, 1), weight, weight, bias, keys, 2, 0.3, 0.5
    )
    spread = drawn.std(0)
    assert spread.min() > 0.05
    assert ((drawn.mean(0) - kept[0]).abs() < 5 * spread / draws**0.5).all()


def test_dropout_is_the_shared_mask_of_a_drawn_seed():
    """Sequence * heads + head is the mask's row, a row's place in its sequence the column."""
    lengths, heads, width = (5, 0, 9), 4, 8
    (q, x, key, value, bias), _ = operands(lengths)
    torch.manual_seed(5)
    out = absorbed_attention(q, x, key, value, bias, SequenceOffsets(lengths, CPU), heads, 0.35, 0.5)
    torch.manual_seed(5)
    mask = reference.keep_mask(torch.randint(2**63 - 1, ()), len(lengths) * heads, max(lengths), 0.5)
    k, v = (x @ key.T).view(-1, heads, width), (x @ value.T + bias).view(-1, heads, width)
    at = 0
    for s, n in enumerate(lengths):
        for h in range(heads):
            p = torch.softmax(0.35 * (k[at : at + n, h] @ q[s].view(heads, width)[h]), 0)
            want = (p * mask[s * heads + h, :n] / 0.5) @ v[at : at + n, h]
            torch.testing.assert_close(out[s].view(heads, width)[h], want)
        at += n


def test_inference_repeats_training_without_autograd():
    lengths = (5, 3)
    (q, *rest), _ = operands(lengths, dtype=FP32)
    keys = SequenceOffsets(lengths, CPU)
    trained = absorbed_attention(q.requires_grad_(), *rest, keys, 4, 0.35)
    with torch.no_grad():
        out = absorbed_attention(q, *rest, keys, 4, 0.35)
    assert trained.grad_fn is not None and out.grad_fn is None and torch.equal(out, trained)


def test_weights_and_rows_are_brought_to_the_querys_precision():
    """As under autocast: the query comes from a product in bfloat16, weights are float32."""
    lengths = (5, 3)
    (q, x, key, value, bias), _ = operands(lengths, dtype=FP32)
    leaves = [t.requires_grad_() for t in (x, key, value, bias)]
    out = absorbed_attention(q.bfloat16(), *leaves, SequenceOffsets(lengths, CPU), 4, 0.35, 0.1)
    assert out.dtype == BF16
    for leaf, grad in zip(leaves, torch.autograd.grad(out.float().square().sum(), leaves), strict=True):
        assert grad.dtype == FP32 and grad.shape == leaf.shape and grad.isfinite().all()


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_of_float32(enabled):
    """Its products leave the probes in bfloat16: the rows follow them; the gradients come back in float32."""
    lengths = (5, 3)
    drawn, _ = operands(lengths, dtype=FP32)
    leaves = [t.requires_grad_() for t in drawn]
    exact = absorbed_attention(*leaves, SequenceOffsets(lengths, CPU), 4, 0.35)
    with torch.autocast("cpu", BF16, enabled=enabled):
        out = absorbed_attention(*leaves, SequenceOffsets(lengths, CPU), 4, 0.35)
    rough = 3e-2 * float(exact.detach().abs().max()) if enabled else 0.0
    torch.testing.assert_close(out.float(), exact, rtol=0.0, atol=rough)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.float().square().sum(), leaves), strict=True):
        assert grad.dtype == FP32 and grad.shape == leaf.shape and grad.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(5, 1, 9), (4, 0, 2)])
def test_opcheck(lengths, dropout_p):
    call = make(Case(lengths, 2, 16, FP32, dropout_p, "small"))
    probe, x = (t.detach().requires_grad_() for t in (call.probe, call.x))
    torch.library.opcheck(torch.ops.fastgate.absorbed_attention.default, (probe, x, *call.rest))
    outputs = torch.ops.fastgate.absorbed_attention(call.probe, call.x, *call.rest)
    for grad_total in (call.grad_total, None):
        arguments = (call.grad, grad_total, *outputs, *call.operands)
        torch.library.opcheck(torch.ops.fastgate.absorbed_attention_backward.default, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(5, 3, 9), (4, 0, 2), (6, 6)])
def test_compiles_whole(lengths, dropout_p):
    """torch.compile without a graph break, forward and backward, to the eager values."""
    drawn, _ = operands(lengths, dtype=FP32)
    leaves = [t.mul_(0.4).requires_grad_() for t in drawn]
    keys = traceable(SequenceOffsets(lengths, CPU))

    def function(q, x, *weights):
        return absorbed_attention(q.tanh(), x, *weights, keys, 4, 0.35, dropout_p).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for one in (compiled, function):
        torch.manual_seed(3)
        out = one(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_backend_that_does_not_fit_leaves_the_call_to_torch(monkeypatch):
    class Kernels:
        DTYPES = (FP32,)
        forward = forward_saving = backward = backward_saved = None

        @staticmethod
        def fits(probe):
            return probe.shape[1] < 4

    registry.implementation("absorbed_attention", "cpu", FP32)  # loads the registry
    monkeypatch.setitem(registry.IMPLEMENTATIONS, ("absorbed_attention", "cpu"), as_implementation(Kernels))
    assert _chosen(torch.zeros(1, 4, 8)).backend == "reference"
    assert _chosen(torch.zeros(1, 3, 8)).backend == "triton"


REFUSED = {
    "queries": (dict(q=torch.zeros(3, 8)), "q"),
    "heads": (dict(heads=3), "q"),
    "integers": (dict(q=torch.zeros(2, 8, dtype=torch.int64)), "q, x"),
    "rows": (dict(x=torch.zeros(6, 8)), "x"),
    "key": (dict(key=torch.zeros(8, 4)), "key, value"),
    "value": (dict(value=torch.zeros(4, 8)), "key, value"),
    "value_bias": (dict(value_bias=torch.zeros(1)), "value_bias"),
    "dropout_p": (dict(dropout_p=1.0), "dropout_p"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = dict(
        q=torch.zeros(2, 8),
        x=torch.zeros(5, 8),
        key=torch.zeros(8, 8),
        value=torch.zeros(8, 8),
        value_bias=None,
        keys=SequenceOffsets((2, 3), CPU),
        heads=2,
        scale=1.0,
        dropout_p=0.0,
    )
    with pytest.raises(ArgumentError, match=f"^absorbed_attention: {argument}: got .*, wanted .*; "):
        absorbed_attention(**{**given, **wrong})
