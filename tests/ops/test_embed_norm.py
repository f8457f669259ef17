"""embed_norm: every backend against float64; gradients, padding, autograd, autocast, tracing, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import BF16, FP16, FP32, SHAPES
from helpers.embed_cases import (
    CALLS,
    DTYPES,
    POSITIONS,
    SEED,
    WORDS,
    check,
    check_masks,
    check_strides,
    check_unrequested,
    eager,
    gradients,
    make,
    requested_bits,
    run,
)
from helpers.norm_cases import differentiable, double
from helpers.op_checks import assert_same_bits, backends_and_dtypes, check_compiles, check_inference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.ops import backends
from fastgate.ops.embed_norm import BIT, OPERANDS, TABLES, embed_norm

pytestmark = pytest.mark.slow

BACKENDS = {found.backend: found for found in backends.implementations("embed_norm")}
POSITIONAL = tuple(name for name in OPERANDS[:9])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtypes"), backends_and_dtypes(BACKENDS, DTYPES))
def test_backends_are_as_exact_as_torch(name, dtypes, shape, call, poisoned):
    *outer, hidden = shape.sizes
    check(BACKENDS[name], make(math.prod(outer), hidden, dtypes, call))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 41),
    hidden=st.one_of(st.integers(1, 40), st.integers(1, 8192).filter(lambda n: n & (n - 1) != 0)),
    dtypes=st.sampled_from(DTYPES[:3]),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, rows, hidden, dtypes, call, seed):
    check(BACKENDS[name], make(rows, hidden, dtypes, call, seed))


@pytest.mark.parametrize("call", CALLS)
def test_explicit_backward_passes_gradcheck(call):
    given = double(make(5, 6, DTYPES[0], call))
    given.update(padding_idx=-1, position_padding_idx=-1)  # whose gradient is not that of the function
    names = [name for name in BIT if given[name] is not None]

    def function(*tensors):
        operands = {**given, **dict(zip(names, tensors, strict=True))}
        return torch.ops.fastgate.embed_norm(*operands.values())

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("hidden", [1, 6, 384, 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
@pytest.mark.parametrize("name", BACKENDS)
def test_masks_are_equal_forward_and_backward_in_every_backend(name, seed, hidden):
    check_masks(BACKENDS[name], seed, hidden)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_operands(name):
    check_strides(BACKENDS[name])


@pytest.mark.parametrize("names", [("word_table",), ("type_table", "weight"), ("norm_bias2",)])
@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_gradients_asked_for(name, names, poisoned):
    check_unrequested(BACKENDS[name], names)


@pytest.mark.parametrize("call", ["plain", "two norms and dropout"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bits_repeat(name, call):
    given = make(131, 195, DTYPES[0], call)
    grad = torch.randn(131, 195, generator=torch.Generator().manual_seed(1))
    assert_same_bits(run(BACKENDS[name], given, grad), run(BACKENDS[name], given, grad))


@pytest.mark.parametrize("call", ["no types", "two norms and dropout"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_bits_do_not_depend_on_threads(name, call):
    """Large enough for seven threads to share; words in a table that goes by ids, types in one by columns."""
    given = make(700, 384, DTYPES[0], call)
    given["word_table"] = torch.randn(300, 384)
    given["words"] = torch.randint(300, (700,))
    grad = torch.randn(700, 384)
    first = run(BACKENDS[name], given, grad)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(first, run(BACKENDS[name], given, grad))


def test_a_table_with_a_row_for_most_of_the_ids():
    """Ids by the hundred, as positions' are: the tables' gradients against torch's, many rows to an id."""
    given = make(2000, 24, DTYPES[0], "plain")
    given["position_table"], given["positions"] = torch.randn(512, 24), torch.arange(2000) % 200
    for backend in BACKENDS.values():
        check(backend, given)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_the_compiled_op_refuses_what_would_read_elsewhere(name):
    given = make(9, 24, DTYPES[0], "dropout")
    backend, grad = BACKENDS[name], torch.randn(9, 24)
    wrong = {
        "ids: got another dtype or number": dict(positions=given["positions"][:3]),
        "ids: got another dtype": dict(words=given["words"].float()),
        "tables: got other dtypes or shapes": dict(type_table=torch.randn(2, 23)),
        "vectors: got 23 elements, wanted 24": dict(weight=torch.randn(23)),
        "seed: got none": dict(seed=None),
    }
    for message, changed in wrong.items():
        with pytest.raises(RuntimeError, match=f"embed_norm: {message}"):
            backend.forward(*{**given, **changed}.values())
    with pytest.raises(RuntimeError, match="embed_norm: ids: got one outside its table, wanted 0 to 36"):
        backend.backward(grad, *{**given, "words": given["words"] + 30}.values(), 127)
    with pytest.raises(RuntimeError, match="embed_norm_backward: grad: got another shape or dtype"):
        backend.backward(grad[:3], *given.values(), 127)


def public(given, **changed):
    """The public function on the schema's operands; the seed is drawn."""
    given = {**given, **changed}
    keywords = {name: given[name] for name in ("dropout_p", "weight2", "norm_bias2", "eps2")}
    for name in ("padding_idx", "position_padding_idx"):
        keywords[name] = None if given[name] == -1 else given[name]
    torch.manual_seed(5)
    return embed_norm(*[given[name] for name in POSITIONAL], **keywords)


@pytest.mark.parametrize("call", CALLS)
def test_public_function_trains_like_torch(call):
    given = make(9, 48, DTYPES[0], call)
    grad = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    if given["dropout_p"]:
        torch.manual_seed(5)
        given["seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64)
    y, grads = gradients(public, given, grad)
    truth, true_grads = gradients(eager, given, grad)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    for name, true in true_grads.items():
        torch.testing.assert_close(grads[name], true, rtol=1e-4, atol=1e-4, msg=name)


def test_padding_gets_no_gradient_as_in_nn_embedding():
    given = make(300, 16, DTYPES[0], "one type")
    assert (given["words"] == 1).any() and (given["positions"] == 1).any()
    _, grads = gradients(public, given, torch.randn(300, 16))
    for name in ("word_table", "position_table"):
        assert not grads[name][1].any() and grads[name][2].any()


def test_dropout_follows_the_default_generator():
    given = make(4, 64, DTYPES[0], "dropout")
    first = public(given)
    second = embed_norm(*[given[name] for name in POSITIONAL], dropout_p=0.1)
    assert torch.equal(first, public(given)) and not torch.equal(first, second)


@pytest.mark.parametrize(("tables", "vectors"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_leaves_the_tables_dtype(tables, vectors, enabled):
    given = make(5, 48, (tables, vectors), "two norms")
    with torch.autocast("cpu", BF16, enabled=enabled):
        y, grads = gradients(public, given, torch.randn(5, 48))
    assert y.dtype == tables
    assert all(grads[name].dtype == given[name].dtype for name in grads)
    assert torch.equal(y, public(given))


def test_inference_calls_the_implementation_without_autograd():
    given = differentiable(make(3, 16, DTYPES[0], "plain"))
    check_inference(public, given)


@pytest.mark.parametrize("dtype", [FP16, torch.float64])
def test_other_precisions_run_the_reference(dtype):
    assert ops.implementation("embed_norm", "cpu", dtype).backend == "reference"
    check(ops.implementation("embed_norm", "cpu", dtype), make(9, 24, (dtype, dtype), "plain"))


@pytest.mark.parametrize("call", ["plain", "no types", "two norms and dropout"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_opcheck(call, dtypes):
    given = make(3, 10, dtypes, call)
    grad = torch.randn(3, 10).to(dtypes[0])
    torch.library.opcheck(torch.ops.fastgate.embed_norm.default, tuple(differentiable(given).values()))
    torch.library.opcheck(
        torch.ops.fastgate.embed_norm_backward.default, (grad, *given.values(), requested_bits(given))
    )


@pytest.mark.parametrize("call", ["plain", "two norms and dropout"])
def test_compiles_whole(call):
    given = differentiable(make(6, 24, DTYPES[0], call))
    leaves = [given[name] for name in BIT if given[name] is not None]
    keywords = {name: given[name] for name in ("dropout_p", "weight2", "norm_bias2", "eps2")}

    def function(*tensors):
        return embed_norm(*tensors, given["eps"], **keywords).sin()

    check_compiles(function, [given[name] for name in POSITIONAL[:-1]], leaves)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(
    ("name", "wrong", "wanted"),
    [
        ("words", -1, WORDS),
        ("words", WORDS, WORDS),
        ("positions", POSITIONS, POSITIONS),
        ("types", 2, 2),
    ],
)
def test_ids_outside_a_table_are_named_on_the_cpu(dtype, name, wrong, wanted):
    given = make(9, 24, (dtype, dtype), "plain")
    given[name][4] = wrong
    with pytest.raises(
        IndexError, match=rf"^embed_norm: {name}: got ids from .*, wanted 0 to {wanted - 1}; "
    ):
        public(given)
    table = TABLES[("words", "positions", "types").index(name)]
    with pytest.raises(IndexError):
        nn.functional.embedding(given[name], given[table])


ROW = torch.zeros(3, dtype=torch.int64)
REFUSED = {
    "ids' shape": (dict(words=torch.zeros(1, 3, dtype=torch.int64)), "words, positions, types"),
    "ids' number": (dict(positions=torch.zeros(2, dtype=torch.int64)), "words, positions, types"),
    "ids' dtype": (dict(types=torch.zeros(3)), "words, positions, types"),
    "width": (dict(type_table=torch.zeros(2, 7)), "tables, weight"),
    "no rows": (dict(position_table=torch.zeros(0, 8)), "tables, weight"),
    "weight": (dict(weight=torch.zeros(7)), "tables, weight"),
    "dtype": (dict(word_table=torch.zeros(5, 8).bfloat16()), "tables"),
    "integers": (dict.fromkeys(TABLES, torch.zeros(5, 8, dtype=torch.int64)), "tables"),
    "device": (dict(word_table=torch.zeros(5, 8, device="meta")), "words, positions, tables, weight"),
    "norm_bias": (dict(norm_bias=torch.zeros(7)), "norm_bias"),
    "half a norm": (dict(weight2=torch.zeros(8)), "weight2, norm_bias2"),
    "second norm's shape": (dict(weight2=torch.zeros(8), norm_bias2=torch.zeros(2)), "weight2, norm_bias2"),
    "dropout_p": (dict(dropout_p=1.0), "dropout_p"),
    "padding_idx": (dict(padding_idx=5), "padding_idx"),
    "position_padding_idx": (dict(position_padding_idx=-2), "position_padding_idx"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_argument_and_a_remedy(what):
    wrong, argument = REFUSED[what]
    given = dict(
        words=ROW, positions=ROW, types=ROW, weight=torch.ones(8), norm_bias=torch.zeros(8), eps=1e-5
    )
    given.update(dict.fromkeys(TABLES, torch.zeros(5, 8)))
    with pytest.raises(ArgumentError, match=f"^embed_norm: {argument}: got .*, wanted .*; "):
        embed_norm(**{**given, **wrong})
