"""gated_add_norm: every backend against float64; gradients, dropout masks, determinism, tracing, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, Dtypes, allowed, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from fastgate import backends, ops, reference
from fastgate.errors import ArgumentError

BACKENDS = {found.backend: found for found in backends.implementations("gated_add_norm")}
SEED = 81985529216486895
# Which optional operands a call has, and the dropout probability.
CALLS = {
    "plain": ((), 0.0),
    "bias": (("bias",), 0.0),
    "dropout": (("bias",), 0.1),
    "gate": (("bias", "gate", "shift"), 0.0),
    "everything": (("bias", "gate", "scale", "shift"), 0.3),
    "replacement": (("scale", "shift"), 0.0),
    "two norms": (("bias", "weight2", "norm_bias2"), 0.0),
    "two norms and dropout": (("bias", "scale", "weight2", "norm_bias2"), 0.5),
}


def make(sizes, dtypes, call, seed=0):
    """The operands by name, as the schema takes them."""
    names, dropout_p = CALLS[call]
    generator = torch.Generator().manual_seed(seed)
    hidden = sizes[-1:]

    def draw(shape, dtype, mean=0.0):
        return (mean + torch.randn(shape, generator=generator)).to(dtype)

    given = dict.fromkeys(ops.OPERANDS)
    given.update(x=draw(sizes, dtypes.x), residual=draw(sizes, dtypes.residual, 0.5))
    given.update(weight=draw(hidden, dtypes.parameters, 1.0), norm_bias=draw(hidden, dtypes.parameters))
    given.update(eps=1e-5, eps2=1e-6, dropout_p=dropout_p)
    for name in names:
        given[name] = draw(
            () if name == "gate" else hidden, dtypes.parameters, 1.0 if name == "weight2" else 0.0
        )
    if dropout_p:
        given["seed"] = torch.tensor(SEED)
    return given


def keep_mask(given):
    x = given["x"]
    if not given["dropout_p"]:
        return None
    return reference.keep_mask(
        given["seed"], x.numel() // x.shape[-1], x.shape[-1], given["dropout_p"]
    ).reshape(x.shape)


def eager(given, mask):
    """What one would write in torch, in the operands' own precision."""
    sublayer, u = given["x"], given["residual"]
    if given["bias"] is not None:
        sublayer = sublayer + given["bias"]
    if mask is not None:
        sublayer = sublayer * mask / (1 - given["dropout_p"])
    if given["gate"] is not None:
        sublayer = sublayer * given["gate"]
    if given["scale"] is not None:
        u = u * given["scale"]
    u = u + sublayer
    if given["shift"] is not None:
        u = u + given["shift"]
    if given["weight"] is None:
        return u

    def norm(value, weight, bias, eps):  # torch's own wants one dtype
        return layer_norm(value, value.shape[-1:], weight.to(value.dtype), bias.to(value.dtype), eps)

    y = norm(u, given["weight"], given["norm_bias"], given["eps"])
    return y if given["weight2"] is None else norm(y, given["weight2"], given["norm_bias2"], given["eps2"])


def double(given):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def differentiable(given):
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }


def gradients(function, given, grad):
    """y and its gradients by name, of a function of the operands."""
    given = differentiable(given)
    y = function(given)
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    found = torch.autograd.grad(y, [given[name] for name in names], grad.to(y.dtype))
    return y.detach(), dict(zip(names, found, strict=True))


def wanted_bits(given):
    return 3 | sum(bit for name, bit in ops.PARAMETER_BIT.items() if given[name] is not None)


def run(backend, given, grad):
    """y and the gradients by name, from one backend's own functions."""
    operands = [given[name] for name in ops.OPERANDS]
    y = backend.forward(*operands)
    wanted = wanted_bits(given)
    dx, dresidual, rows = backend.backward(grad.to(y.dtype), *operands, wanted)
    found = {"x": dx, "residual": dresidual}
    for name, row in zip([n for n in ops.PARAMETERS if wanted & ops.PARAMETER_BIT[n]], rows, strict=True):
        found[name] = (row.sum() if name == "gate" else row).to(given[name].dtype)
    return y, found


def condition(given, mask):
    """A rounding of a norm's input moves its output by |input| * rstd roundings; two norms multiply."""
    grown, wide = 1.0, double(given)
    u = eager({**wide, "weight": None}, mask)
    for eps, weight, bias in (("eps", "weight", "norm_bias"), ("eps2", "weight2", "norm_bias2")):
        if wide[weight] is None or not u.numel():
            break
        rstd = (u.var(-1, unbiased=False) + given[eps]).rsqrt()
        grown *= max(1.0, float((u.abs().amax(-1) * rstd).max()))
        u = layer_norm(u, u.shape[-1:], wide[weight], wide[bias], given[eps])
    return grown


def gate_condition(given, grad, truth):
    """The gate's gradient is one sum of many terms that cancel: its unit is that of the terms' magnitudes."""
    probe = {**double(given), "gate": torch.full(given["x"].shape, float(given["gate"]), dtype=torch.float64)}
    _, terms = gradients(lambda g: eager(g, keep_mask(given)), probe, grad.double())
    return max(1.0, float(terms["gate"].abs().sum() / truth.abs()))


def check(backend, given):
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(given["x"].shape, generator=generator).to(
        torch.promote_types(given["x"].dtype, given["residual"].dtype)
    )
    mask = keep_mask(given)
    truth, true_grads = gradients(lambda g: eager(g, mask), double(given), grad)
    torchs, torchs_grads = gradients(lambda g: eager(g, mask), given, grad)
    y, grads = run(backend, given, grad)
    grown = condition(given, mask)
    assert y.shape == given["x"].shape
    assert y.dtype == grad.dtype
    assert error(y, truth) <= allowed(torchs, truth, y.dtype, grown)
    assert grads.keys() == true_grads.keys()
    for name, got in grads.items():
        assert got.dtype == given[name].dtype and got.shape == given[name].shape
        true = true_grads[name]
        terms = gate_condition(given, grad, true) if name == "gate" and true.abs() > 0 else 1.0
        assert error(got, true) <= allowed(torchs_grads[name], true, got.dtype, grown * terms), name


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        pytest.param(name, dtypes, id=f"{name}-{dtypes}")
        for name, backend in BACKENDS.items()
        for dtypes in DTYPES
        if {dtypes.x, dtypes.residual} <= backend.dtypes
    ],
)
def test_backends_are_as_exact_as_torch(name, dtypes, shape, call, poisoned):
    check(BACKENDS[name], make(shape.sizes, dtypes, call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_run_the_reference(dtype):
    assert ops.implementation("gated_add_norm", "cpu", dtype, torch.float32).backend == "reference"
    x, vector = torch.randn(3, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    y = ops.gated_add_norm(x, x, vector, vector, 1e-5)
    assert torch.equal(y, reference.gated_add_norm(x, x, vector, vector, 1e-5))
    if "cpp" in BACKENDS:
        with pytest.raises(
            RuntimeError, match="gated_add_norm: x: got another dtype, wanted float32 or bfloat16"
        ):
            BACKENDS["cpp"].forward(*make((3, 8), Dtypes(dtype, dtype, dtype, ""), "plain").values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.sampled_from([0, 1]), st.integers(1, 20).map(lambda n: 2 * n + 1)),
    hidden=st.one_of(st.integers(1, 40), st.integers(1, 8192).filter(lambda n: n & (n - 1) != 0)),
    dtypes=st.sampled_from(DTYPES[:3]),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, rows, hidden, dtypes, call, seed):
    check(BACKENDS[name], make((rows, hidden), dtypes, call, seed))


@pytest.mark.parametrize("call", CALLS)
def test_explicit_backward_passes_gradcheck(call):
    given = double(make((5, 6), DTYPES[0], call))
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and name != "seed"]

    def function(*tensors):
        operands = {**given, **dict(zip(names, tensors, strict=True))}
        return torch.ops.fastgate.gated_add_norm(*operands.values())

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in names])


def test_philox_gives_the_published_numbers():
    """Known answers of Random123: all bits clear, all bits set."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    clear = reference.philox(zero, (zero,) * 4)
    assert [int(w) for w in clear] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = reference.philox(torch.tensor(-1), (ones,) * 4)
    assert [int(w) for w in full] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share(dropout_p):
    mask = reference.keep_mask(torch.tensor(SEED), 200, 203, dropout_p)
    spread = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - (1 - dropout_p)) < 4 * spread
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("hidden", [1, 6, 384, 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
@pytest.mark.parametrize("name", BACKENDS)
def test_masks_are_equal_forward_and_backward_in_every_backend(name, seed, hidden):
    """Read back from the values: x adds 10 where it is kept; its gradient is zero where it is not."""
    rows = 9
    given = make((rows, hidden + 1), DTYPES[0], "plain")
    given.update(dropout_p=0.4, seed=torch.tensor(seed), bias=torch.full((hidden + 1,), 10.0), eps=1e-5)
    given["x"], given["residual"] = torch.zeros(rows, hidden + 1), torch.zeros(rows, hidden + 1)
    given.update(weight=torch.ones(hidden + 1), norm_bias=torch.zeros(hidden + 1))
    mask = reference.keep_mask(given["seed"], rows, hidden + 1, 0.4)
    y, grads = run(
        BACKENDS[name], given, torch.randn(rows, hidden + 1, generator=torch.Generator().manual_seed(1))
    )
    mixed = mask.any(1) & ~mask.all(1)  # elsewhere the norm hides which it was
    assert torch.equal(y[mixed] > 0, mask[mixed])
    given["residual"] = make((rows, hidden + 1), DTYPES[0], "plain", seed=5)["residual"]
    _, grads = run(
        BACKENDS[name], given, torch.randn(rows, hidden + 1, generator=torch.Generator().manual_seed(1))
    )
    if hidden > 1:
        assert torch.equal(grads["x"] != 0, mask)


def test_dropout_follows_the_default_generator():
    given = make((4, 64), DTYPES[0], "plain")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    torch.manual_seed(11)
    first = ops.gated_add_norm(*positional, dropout_p=0.5)
    second = ops.gated_add_norm(*positional, dropout_p=0.5)
    torch.manual_seed(11)
    again = ops.gated_add_norm(*positional, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("call", ["bias", "everything", "two norms and dropout"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bits_repeat(name, call):
    """The same bits at every call, and from memory that starts elsewhere."""
    given = make((131, 195), DTYPES[0], call)
    grad = torch.randn(131, 195, generator=torch.Generator().manual_seed(1))
    y, grads = run(BACKENDS[name], given, grad)
    for offset in (0, 1, 5):
        moved = dict(given)
        for operand in ("x", "residual"):
            room = torch.empty(given[operand].numel() + offset)
            moved[operand] = room[offset:].view(131, 195).copy_(given[operand])
        again, grads_again = run(BACKENDS[name], moved, grad)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[key], grads_again[key]) for key in grads)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled library is not built")
def test_bits_do_not_depend_on_threads():
    given = make((1203, 130), DTYPES[0], "everything")
    grad = torch.randn(1203, 130, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    y, grads = run(BACKENDS["cpp"], given, grad)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again, grads_again = run(BACKENDS["cpp"], given, grad)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[key], grads_again[key]) for key in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_operands(name):
    given = make((6, 20), DTYPES[0], "gate")
    wide = {
        **given,
        "x": torch.randn(6, 40)[:, ::2],
        "residual": torch.randn(20, 6).t(),
        "bias": torch.randn(40)[::2],
    }
    dense = {
        key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in wide.items()
    }
    grad = torch.randn(20, 6).t()
    y, grads = run(BACKENDS[name], wide, grad)
    y_dense, grads_dense = run(BACKENDS[name], dense, grad.contiguous())
    assert torch.equal(y, y_dense) and y.is_contiguous()
    assert all(torch.allclose(grads[key], grads_dense[key], rtol=1e-6, atol=1e-6) for key in grads)


@pytest.mark.parametrize("call", CALLS)
def test_public_function_trains_like_the_reference(call):
    """ops.gated_add_norm with autograd against the reference's own mathematics under plain autograd."""
    given = make((7, 48), DTYPES[0], call)
    grad = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    keywords = [
        name for name in ops.OPERANDS if name not in ("x", "residual", "weight", "norm_bias", "eps", "seed")
    ]

    def public(operands):
        torch.manual_seed(5)
        positional = [operands[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
        return ops.gated_add_norm(*positional, **{name: operands[name] for name in keywords})

    if given["dropout_p"]:
        torch.manual_seed(5)
        given["seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64)
    y, grads = gradients(public, given, grad)
    truth, true_grads = gradients(lambda g: eager(g, keep_mask(given)), given, grad)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for name, true in true_grads.items():
        torch.testing.assert_close(grads[name], true, rtol=1e-4, atol=1e-4, msg=name)


def test_only_the_gradients_asked_for():
    given = make((4, 16), DTYPES[0], "everything")
    gate = given["gate"].requires_grad_()
    y = ops.gated_add_norm(
        given["x"],
        given["residual"],
        given["weight"],
        given["norm_bias"],
        1e-5,
        gate=gate,
        bias=given["bias"],
    )
    (got,) = torch.autograd.grad(y.square().sum(), gate)
    twin = given["gate"].detach().requires_grad_()
    again = eager({**given, "gate": twin, "scale": None, "shift": None}, None)
    (want,) = torch.autograd.grad(again.square().sum(), twin)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_x_and_residual_do_not_share_their_grad():
    x, residual = (torch.randn(3, 8).requires_grad_() for _ in range(2))
    ops.gated_add_norm(x, residual, torch.ones(8), torch.zeros(8), 1e-5).sum().backward()
    x.grad.add_(1.0)
    assert not torch.equal(x.grad, residual.grad)


def test_autocast_mixes_precisions():
    linear = torch.nn.Linear(32, 48)
    residual = torch.randn(5, 48, requires_grad=True)
    weight, norm_bias = torch.ones(48, requires_grad=True), torch.zeros(48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        x = linear(torch.randn(5, 32))
        y = ops.gated_add_norm(x, residual, weight, norm_bias, 1e-12, bias=linear.bias)
    assert x.dtype == torch.bfloat16 and y.dtype == torch.float32
    y.square().sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()
    want = layer_norm(x.detach().float() + linear.bias + residual, (48,), weight, norm_bias, 1e-12)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_inference_calls_the_implementation_without_autograd():
    given = make((3, 16), DTYPES[0], "plain")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    positional[2] = positional[2].requires_grad_()
    assert ops.gated_add_norm(*positional).grad_fn is not None
    with torch.no_grad():
        y = ops.gated_add_norm(*positional)
    with torch.inference_mode():
        assert torch.equal(ops.gated_add_norm(*positional), y)
    assert y.grad_fn is None


@pytest.mark.parametrize("gate", [0.0, 0.25, 1.0])
def test_gate_may_be_a_number(gate):
    given = make((3, 16), DTYPES[0], "bias")
    positional = [given[name] for name in ("x", "residual", "weight", "norm_bias", "eps")]
    as_number = ops.gated_add_norm(*positional, bias=given["bias"], gate=gate)
    as_tensor = ops.gated_add_norm(*positional, bias=given["bias"], gate=torch.tensor(gate))
    assert torch.equal(as_number, as_tensor)


@pytest.mark.parametrize("call", ["plain", "everything", "two norms"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_opcheck(call, dtypes):
    given = make((3, 10), dtypes, call)
    grad = torch.randn(3, 10)
    torch.library.opcheck(torch.ops.fastgate.gated_add_norm.default, tuple(differentiable(given).values()))
    torch.library.opcheck(
        torch.ops.fastgate.gated_add_norm_backward.default, (grad, *given.values(), wanted_bits(given))
    )


@pytest.mark.parametrize("call", ["bias", "everything"])
def test_compiles_whole(call):
    """torch.compile without a graph break, forward and backward, to the eager values."""
    given = make((6, 24), DTYPES[0], call)
    keywords = {name: given[name] for name in ("gate", "scale", "shift")}
    dropout_p = given["dropout_p"]

    def function(x, residual, weight, norm_bias, bias):
        return ops.gated_add_norm(
            x.tanh(), residual, weight, norm_bias, 1e-5, bias=bias, dropout_p=dropout_p, **keywords
        ).sin()

    inputs = [given[name].requires_grad_() for name in ("x", "residual", "weight", "norm_bias", "bias")]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.manual_seed(3)
    want = torch.autograd.grad(function(*inputs).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


REFUSED = {
    "residual": (dict(residual=torch.zeros(2, 8)), "x, residual, weight, norm_bias"),
    "weight": (dict(weight=torch.zeros(7)), "x, residual, weight, norm_bias"),
    "integers": (dict(x=torch.zeros(3, 8, dtype=torch.int64)), "x, residual"),
    "bias": (dict(bias=torch.zeros(9)), "bias"),
    "scale": (dict(scale=torch.zeros(1)), "scale"),
    "shift": (dict(shift=torch.zeros(3, 8)), "shift"),
    "gate": (dict(gate=torch.zeros(1)), "gate"),
    "dropout_p": (dict(dropout_p=1.0), "dropout_p"),
    "negative dropout_p": (dict(dropout_p=-0.1), "dropout_p"),
    "half a norm": (dict(weight2=torch.zeros(8)), "weight2, norm_bias2"),
    "second norm's shape": (dict(weight2=torch.zeros(8), norm_bias2=torch.zeros(2)), "weight2, norm_bias2"),
    "gate and second norm": (dict(weight2=torch.zeros(8), norm_bias2=torch.zeros(8), gate=0.5), "gate"),
    "device": (dict(residual=torch.zeros(3, 8, device="meta")), "x, residual, weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = dict(
        x=torch.zeros(3, 8),
        residual=torch.zeros(3, 8),
        weight=torch.ones(8),
        norm_bias=torch.zeros(8),
        eps=1e-5,
    )
    with pytest.raises(ArgumentError, match=f"^gated_add_norm: {argument}: got .*, wanted .*; ") as caught:
        ops.gated_add_norm(**{**given, **wrong})
    assert isinstance(caught.value, ValueError)
