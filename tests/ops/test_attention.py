"""Attention over unpadded batches: backends against fp64, dropout masks, gradients, probabilities."""

import pytest
import torch
from helpers.cases import allowed, error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate.errors import ArgumentError
from fastgate.ops import backends, reference
from fastgate.ops.attention import attention, attention_probabilities
from fastgate.ops.ragged import SequenceOffsets

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# (queries, keys) a sequence, and why.
LENGTHS = {
    "uneven": ((5, 1, 17, 40, 3), (5, 1, 17, 40, 3)),
    "one query a sequence": ((1, 1, 1), (4, 9, 100)),
    "more queries than keys": ((20, 90), (7, 33)),
    "more than a block of queries": ((70, 130), (70, 130)),
    "no keys, no queries": ((3, 0, 2), (0, 4, 2)),
    "even": ((16, 16), (16, 16)),
    "nothing": ((), ()),
}
# heads, hidden: head_dim 32, 64, and one that is no multiple of a vector.
WIDTHS = ((12, 384), (2, 128), (3, 30))


def packed(lengths, hidden, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (SequenceOffsets(tuple(n), CPU) for n in lengths)
    rows = (queries.rows, keys.rows, keys.rows)
    return queries, keys, [torch.randn(n, hidden, generator=generator).to(dtype) for n in rows]


def draw_biases(hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(hidden, generator=generator).to(dtype) for _ in range(3)]


def exact(q, k, v, queries, keys, heads, scale, dropout_p=0.0, seed=None, biases=()):
    """fp64, one sequence and one head at a time, by the definition: every bias added, the keys' too."""
    for_each = [t.double() for t in (q, k, v)]
    if biases:
        for_each = [t + bias.double() for t, bias in zip(for_each, biases, strict=True)]
    q, k, v = for_each
    out = 0 * q.double()
    width = q.shape[1] // heads
    mask = None
    if dropout_p:
        mask = reference.keep_mask(seed, queries.rows * heads, keys.longest, dropout_p)
    at = of = 0
    for n, m in zip(queries.lengths, keys.lengths, strict=True):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            one, two, three = (
                q[at : at + n, part].double(),
                k[of : of + m, part].double(),
                v[of : of + m, part].double(),
            )
            p = torch.softmax(one @ two.T * scale, -1)
            if mask is not None:
                p = p * mask[torch.arange(at, at + n) * heads + h][:, :m] / (1 - dropout_p)
            out[at : at + n, part] = p @ three
        at, of = at + n, of + m
    return out


@pytest.mark.parametrize("implementation", backends.implementations("attention"), ids=lambda i: i.backend)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, hidden", WIDTHS)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_backend_is_as_near_to_fp64_as_torch(
    implementation, dtype, heads, hidden, case, dropout_p, bias_dtype, poisoned
):
    queries, keys, (q, k, v) = packed(LENGTHS[case], hidden, dtype)
    scale, seed = (hidden // heads) ** -0.5, torch.tensor(1234567) if dropout_p else None
    biases = draw_biases(hidden, bias_dtype) if bias_dtype else ()
    args = (queries.cu_seqlens, keys.cu_seqlens, heads, scale, dropout_p, seed)
    args = (*(biases or (None, None, None)), *args)
    out = implementation.forward(q, k, v, *args)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = exact(*leaves, queries, keys, heads, scale, dropout_p, seed, biases)
    sums = [(t + b).to(dtype) for t, b in zip((q, k, v), biases, strict=True)] if biases else (q, k, v)
    sums = [t.detach().requires_grad_() for t in sums]
    ours = reference.attention(*sums, queries, keys, heads, scale, dropout_p, seed)
    unit = torch.finfo(dtype).eps
    bound = 2 * (ours.double() - truth).abs().max().item() + 4 * unit if q.numel() else 0.0
    assert out.dtype == dtype and out.shape == q.shape
    assert q.numel() == 0 or (out.double() - truth).abs().max().item() <= bound

    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = implementation.backward(grad, q, k, v, *args)
    wants = torch.autograd.grad(truth, leaves, grad.double(), materialize_grads=True)
    torchs = torch.autograd.grad(ours, sums, grad, materialize_grads=True)
    for got, want, torchs_own in zip(found, wants, torchs, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if want.numel():
            bound = (12 if dtype == torch.float32 else 4) * unit * max(want.abs().max().item(), 1.0)
            if (
                implementation.backend == "reference"
            ):  # torch's own products are less exact on some processors
                bound = max(bound, allowed(torchs_own, want, dtype))
            assert error(got, want) <= bound


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lengths", [((2, 0, 3), (3, 2, 1)), ((2, 1), (0, 3)), ((3, 3), (3, 3))])
def test_gradcheck_of_the_references_backward(lengths, dropout_p):
    """The backward equations written out, in float64, against differences and against autograd."""
    queries, keys, tensors = packed(lengths, 6, torch.float64)
    rest = (queries, keys, 2, 0.7, dropout_p, torch.tensor(1234567) if dropout_p else None)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return reference.attention(*tensors, *rest)

        @staticmethod
        def backward(ctx, grad):
            return reference.attention_backward(grad, *ctx.saved_tensors, *rest)

    leaves = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(Reference.apply, leaves)
    out = reference.attention(*leaves, *rest)
    grad = torch.randn_like(out)
    by_autograd = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    written_out = reference.attention_backward(grad, *tensors, *rest)
    for got, want in zip(written_out, by_autograd, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_lengths_and_widths(lengths, heads, width):
    queries, keys, (q, k, v) = packed((lengths, lengths), heads * width)
    out = attention(q, k, v, queries, keys, heads, 0.3)
    torch.testing.assert_close(out.double(), exact(q, k, v, queries, keys, heads, 0.3), rtol=1e-5, atol=1e-5)


def test_autograd_matches_the_backward_and_repeats():
    queries, keys, tensors = packed(LENGTHS["uneven"], 64)
    results = []
    for _ in range(2):
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        torch.manual_seed(5)
        out = attention(q, k, v, queries, keys, 4, 0.25, 0.2)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [(True, True, True), (True, False, False), (False, True, True)])
def test_biases_train_as_added_ones_do(given, dtype, dropout_p):
    """The gradients are those of biases added before; that of the keys' bias is zeros, and there."""
    queries, keys, rows = packed(LENGTHS["uneven"], 64, dtype)
    one, two = ([t.clone().requires_grad_() for t in (*rows, *draw_biases(64))] for _ in range(2))
    names = [n for n, there in zip(("q_bias", "k_bias", "v_bias"), given, strict=True) if there]
    places = [3 + place for place, there in enumerate(given) if there]
    torch.manual_seed(5)
    biases = dict(zip(names, (one[place] for place in places), strict=True))
    out = attention(*one[:3], queries, keys, 4, 0.25, dropout_p, **biases)
    sums = [
        (t + bias).to(dtype) if there else t for t, bias, there in zip(two[:3], two[3:], given, strict=True)
    ]
    torch.manual_seed(5)
    wanted = attention(*sums, queries, keys, 4, 0.25, dropout_p)
    assert torch.equal(out, wanted) if not given[1] else torch.allclose(out, wanted, rtol=0.02, atol=0.02)
    grad = torch.randn(out.shape).to(dtype)
    got, want = (
        torch.autograd.grad(result, [*leaves[:3], *(leaves[place] for place in places)], grad)
        for result, leaves in ((out, one), (wanted, two))
    )
    rough = 5e-2 if dtype == torch.bfloat16 else 1e-4
    for place, found, true in zip([0, 1, 2, *places], got, want, strict=True):
        assert found.dtype == true.dtype and found.shape == true.shape
        if place == 4:
            assert not found.any()
        else:
            torch.testing.assert_close(found, true, rtol=rough, atol=rough * float(true.abs().max()))


def test_biases_that_do_not_fit_are_refused():
    queries, keys, rows = packed(((3,), (3,)), 8)
    for name in ("q_bias", "k_bias", "v_bias"):
        with pytest.raises(ArgumentError, match=rf"attention: {name}: got shape \(4,\)"):
            attention(*rows, queries, keys, 2, 0.5, **{name: torch.zeros(4)})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference_with_biases(dropout_p):
    queries, keys, tensors = packed(((3, 2), (3, 4)), 6)
    q_bias, k_bias, v_bias = draw_biases(6, torch.float64)
    leaves = [t.double().requires_grad_() for t in (*tensors, q_bias, v_bias)]

    def function(q, k, v, q_bias, v_bias):
        torch.manual_seed(2)
        return attention(
            q, k, v, queries, keys, 2, 0.5, dropout_p, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_gradcheck_of_the_reference():
    queries, keys, tensors = packed(((3, 2), (3, 4)), 6)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, queries, keys, 2, 0.5), leaves)


def test_opcheck():
    queries, keys, (q, k, v) = packed(LENGTHS["uneven"], 32)
    args = (queries.cu_seqlens, keys.cu_seqlens, 4, 0.35, 0.0, None)
    for biases in ((None, None, None), [bias.requires_grad_() for bias in draw_biases(32)]):
        operands = (q.requires_grad_(), k, v, *biases, *args)
        torch.library.opcheck(torch.ops.fastgate.attention.default, operands)


def compiled():
    found = backends.implementations("attention")[-1]
    if found.backend == "reference":
        pytest.skip("no compiled library here")
    return found


def test_bad_ends_are_refused():
    forward, q = compiled().forward, torch.randn(4, 8)
    for ends in ([0, 5], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(RuntimeError, match="attention: cu_q: got ends that do not rise from 0 to 4"):
            cu = torch.tensor(ends, dtype=torch.int32)
            forward(q, q, q, None, None, None, cu, cu, 2, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="attention: cu_q: got another dtype"):
        forward(q, q, q, None, None, None, *(torch.tensor([0.0, 4.0]),) * 2, 2, 1.0, 0.0, None)


@pytest.mark.parametrize("implementation", backends.implementations("attention"), ids=lambda i: i.backend)
def test_thirds_of_one_products_rows_need_no_copy(implementation):
    queries, keys, (rows, *_) = packed(LENGTHS["uneven"], 3 * 64)
    rest = (None, None, None, queries.cu_seqlens, keys.cu_seqlens, 4, 0.25, 0.0, None)
    thirds, grad = rows.split(64, 1), rows.t().contiguous().t()[:, 5:69]
    for q, k, v in (thirds, [third.t().contiguous().t() for third in thirds]):
        dense = [t.contiguous() for t in (q, k, v)]
        assert torch.equal(implementation.forward(q, k, v, *rest), implementation.forward(*dense, *rest))
        for got, want in zip(
            implementation.backward(grad, q, k, v, *rest),
            implementation.backward(grad.contiguous(), *dense, *rest),
            strict=True,
        ):
            assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_bits_do_not_depend_on_threads(dropout_p):
    """Long enough for seven threads to share, one sequence's heads among several of them."""
    implementation, lengths = compiled(), (130, 7, 300, 61, 0)
    queries, keys, (q, k, v) = packed((lengths, lengths), 96)
    rest = (None,) * 3, queries.cu_seqlens, keys.cu_seqlens, 3, 0.2, dropout_p, torch.tensor(9)
    operands = (q, k, v, *rest[0], *rest[1:])
    want = (implementation.forward(*operands), *implementation.backward(q, *operands))
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        got = (implementation.forward(*operands), *implementation.backward(q, *operands))
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


def test_probabilities_reproduce_the_output():
    queries, keys, (q, k, v) = packed(((5, 3), (5, 3)), 16)
    places = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    p = attention_probabilities(q, k, queries, keys, places, 6, 2, 0.4)
    assert p.shape == (2, 2, 5, 6) and p[1, :, :3, 3:].abs().max() == 0 and p[0, :, :, 5].max() == 0
    grid = torch.zeros(2, 6, 16)
    grid[0, :5], grid[1, :3] = v[:5], v[5:]
    mixed = (p @ grid.view(2, 6, 2, 8).transpose(1, 2)).transpose(1, 2).reshape(2, 5, 16)
    out = attention(q, k, v, queries, keys, 2, 0.4)
    torch.testing.assert_close(torch.cat([mixed[0], mixed[1, :3]]), out, rtol=1e-5, atol=1e-5)
