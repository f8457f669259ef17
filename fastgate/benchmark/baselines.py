"""What `fastgate bench` times fastgate against: each baseline is Hugging Face's model in another runtime.

Each runs in the form that was the fastest of those tried (BERT, real batches of changing lengths, two cores):

- sdpa, eager: transformers as it is.
- compile: SDPA under torch.compile, with dynamic shapes and frozen weights. Compiling for each shape takes as
  long as hundreds of batches and ran no faster; without freezing the weights are not laid out beforehand.
- onnxruntime: the eager attention through the TorchScript exporter. Only in that graph does onnxruntime's
  optimizer find all there is to fuse (attention, embedding, bias and gelu, residual and norm); in SDPA's and
  in torch.export's graphs it finds no attention.
- openvino: SDPA through OpenVINO's own PyTorch front end, for latency. The eager attention is as fast or
  a little slower there; of ONNX graphs none was faster.

onnxruntime and openvino are optional packages, imported when asked for: the extra `baselines`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import FastgateError

Batch = Mapping[str, Tensor]
Run = Callable[[Batch], Tensor]  # batch -> logits


class Unavailable(FastgateError):
    """A baseline cannot run here. The message is the reason, in one line."""


@dataclass(frozen=True)
class Baseline:
    """A model to be timed: `run` maps a batch (batch, length) to its logits, `form` says how, in one line."""

    run: Run
    form: str


def build_baselines(
    names: Sequence[str], reference: Any, batch: Batch
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """(the baselines of these names that run here, why the others do not).

    reference: Hugging Face's model in evaluation mode, in the precision and on the device the baselines shall
    have; its weights are shared where they can be. batch: model inputs to trace it with; any other batch size
    and length runs too. The number of threads is torch's at this moment.

    On the CPU `compile` resets torch.compile: what this process compiled before is compiled again at its next
    call. Without it, models that were built here earlier would count against the limit of recompilations,
    beyond which torch.compile runs a model uncompiled.
    """
    built: dict[str, Baseline] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            built[name] = BASELINES[name](reference, batch)
        except Unavailable as reason:
            absent[name] = str(reason)
    return built, absent


def copy_sharing_weights(model: Any, attention: str | None = None) -> Any:
    """A copy of a model that shares its weights, with another attention implementation if one is named."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    if attention is not None:
        twin.set_attn_implementation(attention)
    return twin


def _logits(model: Callable[..., Any]) -> Run:
    def run(batch: Batch) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits

    return run


def _transformers(attention: str) -> Callable[[Any, Batch], Baseline]:
    def make(reference: Any, batch: Batch) -> Baseline:
        model = copy_sharing_weights(reference, attention)
        return Baseline(_logits(model), f"transformers, {attention} attention")

    return make


def _compiled(reference: Any, batch: Batch) -> Baseline:
    import torch._inductor.config as inductor

    model = copy_sharing_weights(reference, "sdpa")
    if next(model.parameters()).is_cuda:
        compiled = torch.compile(model, mode="reduce-overhead")
        return Baseline(_logits(compiled), "torch.compile of sdpa, CUDA graphs")
    torch.compiler.reset()
    logits = _logits(torch.compile(model, dynamic=True))
    seen: set[torch.Size] = set()

    def run(batch: Batch) -> Tensor:
        shape = batch["attention_mask"].shape
        if shape in seen:
            return logits(batch)
        seen.add(shape)  # it may be compiled now: a batch size of 1 is a case of its own to torch.compile
        with inductor.patch(freezing=True), torch.inference_mode():
            return logits(batch)

    with _quiet():
        try:
            run(batch)
        except torch._inductor.exc.InductorError as error:
            raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0]}") from error
    return Baseline(run, "torch.compile of sdpa, dynamic shapes, frozen weights")


def _onnxruntime(reference: Any, batch: Batch) -> Baseline:
    dtype = _need("onnxruntime", reference, "onnx", "onnxruntime")
    if dtype != torch.float32:
        # InferenceSession says so itself: NOT_IMPLEMENTED: could not find an implementation for MatMul(13).
        raise Unavailable(
            f"onnxruntime multiplies no matrices in {str(dtype).removeprefix('torch.')} on a CPU"
        )
    import onnxruntime

    names = _inputs(batch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        fused = _fused_graph(reference, batch, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    used = [given.name for given in session.get_inputs() if given.name in names]

    def run(batch: Batch) -> Tensor:
        (logits,) = session.run(None, {name: batch[name].numpy() for name in used})
        return torch.from_numpy(logits)

    nodes = ", ".join(f"{kind} {count}" for kind, count in fused.items())
    return Baseline(run, f"onnxruntime {onnxruntime.__version__}, fused: {nodes}")


def _fused_graph(reference: Any, batch: Batch, path: Path) -> dict[str, int]:
    """Write the model as ONNX, fused by onnxruntime's optimizer; returns the kinds it fused and how many."""
    from onnxruntime.transformers import optimizer

    names = _inputs(batch)
    config = reference.config
    axes = {name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}}
    if _logits_per_token(reference):
        axes["logits"][1] = "length"
    model = _Positional(copy_sharing_weights(reference, "eager"), names)
    torch.onnx.export(
        model, tuple(batch[name] for name in names), str(path),
        input_names=names, output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    graph = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size,
        opt_level=0,
    )  # fmt: skip
    graph.save_model_to_file(str(path))
    return {kind: count for kind, count in graph.get_fused_operator_statistics().items() if count}


def _openvino(reference: Any, batch: Batch) -> Baseline:
    dtype = _need("openvino", reference, "openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    names = _inputs(batch)
    model: Any = (
        copy_sharing_weights(reference) if dtype == torch.float32 else copy.deepcopy(reference).float()
    )
    model.set_attn_implementation("sdpa")
    with _quiet(), _without_telemetry():
        import openvino

        converted = openvino.convert_model(
            _Positional(model, names),
            example_input=tuple(batch[name] for name in names),
            input=[([-1, -1], openvino.Type.i64) for _ in names],
        )
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
    runs_in = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if runs_in != precision:
        raise Unavailable(f"openvino runs in {runs_in} on this processor, wanted {precision}")
    request = compiled.create_infer_request()

    def run(batch: Batch) -> Tensor:
        outputs = request.infer([batch[name].numpy() for name in names], share_inputs=True)
        return torch.from_numpy(outputs[0])

    version = importlib.metadata.version("openvino")
    return Baseline(run, f"openvino {version}, {runs_in}, latency hint, PyTorch front end")


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """OpenVINO's converter reports its use to a web service unless it opts out. While this module cannot be
    imported, it takes a stub of its own instead."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


class _Positional(nn.Module):
    """The model with its inputs in the order of `names`, giving the logits alone: what exporters trace."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model.eval(), names
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _need(name: str, reference: Any, *packages: str) -> torch.dtype:
    """The dtype of the model; raises Unavailable if a package is missing or the model is not on the CPU."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f'no package {" and ".join(missing)}; pip install "fastgate[baselines]"')
    parameter: Tensor = next(reference.parameters())
    if parameter.device.type != "cpu":
        raise Unavailable(f"{name} is timed on the CPU only, the model is on {parameter.device.type}")
    return parameter.dtype


def _inputs(batch: Batch) -> list[str]:
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]


def _logits_per_token(reference: Any) -> bool:
    return type(reference).__name__.endswith("ForTokenClassification")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and compilers talk about deprecations and tracing; none of it concerns who reads a table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


BASELINES: dict[str, Callable[[Any, Batch], Baseline]] = {
    "sdpa": _transformers("sdpa"),
    "eager": _transformers("eager"),
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
