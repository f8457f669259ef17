"""What is written once in Python and once in C++: each op's operands, the bits of the gradients that are
requested of its backward, and the operands of half layers."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from fastgate.ops import backends, fused_layers, registry

# The modules, which functions of the same name hide in fastgate.ops.
embed_norm, gated_add_norm, shift_norm = (
    importlib.import_module(f"fastgate.ops.{op}") for op in ("embed_norm", "gated_add_norm", "shift_norm")
)

CSRC = Path(__file__).parents[2] / "csrc"
needs_library = pytest.mark.skipif(backends.load_cpu_library() != "", reason=backends.load_cpu_library())
needs_cuda_library = pytest.mark.skipif(
    backends.load_cuda_library() != "", reason=backends.load_cuda_library()
)
# Op -> (its bits for gradients that are tensors of their own, its parameters, the bit of each parameter).
GRADIENTS = {
    "gated_add_norm": (
        {"x": gated_add_norm.DX, "residual": gated_add_norm.DRESIDUAL},
        gated_add_norm.PARAMETERS,
        gated_add_norm.PARAMETER_BIT,
    ),
    "shift_norm": ({"x": shift_norm.DX}, shift_norm.PARAMETERS, shift_norm.PARAMETER_BIT),
    "embed_norm": (
        {name: embed_norm.BIT[name] for name in embed_norm.TABLES},
        embed_norm.PARAMETERS,
        {name: embed_norm.BIT[name] for name in embed_norm.PARAMETERS},
    ),
}
# Kind of a half layer -> the name that its places have in csrc/cpu/half_layers.h.
HALF_LAYERS = {
    fused_layers.ATTENTION: "attention",
    fused_layers.ABSORBED: "absorbed",
    fused_layers.FEED_FORWARD: "feed_forward",
    fused_layers.SHIFT_NORM: "shift_norm",
}


def python_name(constant):
    """kNormBias2 -> norm_bias2."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", constant.removeprefix("k")).lower()


def enumerators(text, enum):
    """The names in an enum whose values count from zero."""
    (names,) = re.findall(rf"enum {enum} : \w+ {{([^}}]*)}}", text)
    return [python_name(name) for name in re.findall(r"k\w+", names)]


def namespace(text, name):
    """The body of a namespace of a header."""
    (body,) = re.findall(rf"namespace {name} {{\n(.*?)\n}}(?!;)", text, re.DOTALL)
    return body


def arguments(library, op):
    """[(name, type)] of an op's schema."""
    return [
        (argument.name, str(argument.type)) for argument in getattr(library, op).default._schema.arguments
    ]


@needs_library
@pytest.mark.parametrize("backward", ["", "_backward"])
@pytest.mark.parametrize("op", backends.CPU_OPS)
def test_the_cpu_library_takes_the_operands_of_python(op, backward):
    """Except the outputs that Python's backward takes for the GPU's kernels: the CPU's compute them again."""
    outputs = {result.name for result in getattr(torch.ops.fastgate, op).default._schema.returns}
    python = arguments(torch.ops.fastgate, op + backward)
    expected = [(name, type_) for name, type_ in python if name not in outputs]
    assert arguments(torch.ops.fastgate_cpu, op + backward) == expected


@needs_cuda_library
@pytest.mark.parametrize("op", ["gated_add_norm", "gated_add_norm_backward"])
def test_the_cuda_library_takes_the_operands_of_python(op):
    assert arguments(torch.ops.fastgate, op) == arguments(torch.ops.fastgate_cuda, op)


@pytest.mark.parametrize("op", GRADIENTS)
def test_the_bits_of_requested_gradients_are_those_of_python(op):
    own, parameters, bits = GRADIENTS[op]
    text = namespace((CSRC / "gradient_bits.h").read_text(), f"{op}_gradients")
    assert enumerators(text, "Parameter") == [*parameters, "parameters"]
    constants = {python_name(name): int(value) for name, value in re.findall(r"(k\w+) = (\d+)", text)}
    first = constants.pop("first_parameter_bit")
    assert constants == own
    assert {name: first << place for place, name in enumerate(parameters)} == bits


@pytest.mark.parametrize("op", GRADIENTS)
def test_every_requested_gradient_is_that_of_a_tensor_operand(op):
    own, parameters, _ = GRADIENTS[op]
    operands = dict(arguments(torch.ops.fastgate, op))
    assert all("Tensor" in operands[name] for name in (*own, *parameters))


def test_no_other_file_of_c_plus_plus_writes_operands_or_bits():
    """The four copies of the bits that there were: CPU, CUDA, and the library's schemas."""
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text()
        if path.name != "ops.h":
            assert "Tensor weight, Tensor norm_bias" not in text, path
        if path.name != "gradient_bits.h":
            assert "enum Parameter" not in text, path


@pytest.mark.parametrize(("kind", "name"), HALF_LAYERS.items())
def test_half_layers_take_the_operands_of_python(kind, name):
    text = (CSRC / "cpu" / "half_layers.h").read_text()
    places = enumerators(namespace(text, f"{name}_operands"), "Place")
    assert places == [*fused_layers.OPERANDS[kind], "places"]


def test_half_layers_have_the_kinds_of_python():
    text = (CSRC / "cpu" / "half_layers.h").read_text()
    assert enumerators(text, "HalfLayer") == [HALF_LAYERS[kind] for kind in range(len(HALF_LAYERS))]
    assert int(re.findall(r"kAllRows = (-?\d+)", text)[0]) == fused_layers.ALL_ROWS
    assert enumerators(text, "Kinds") == ["kind", "size", "kinds_per_half"]
    assert enumerators(text, "Numbers") == ["eps", "scale_or_eps2", "numbers_per_half"]


def test_every_op_with_compiled_operands_is_compared():
    assert {*backends.CPU_OPS, "linear", "linear_gelu"} == set(registry.REFERENCE)
