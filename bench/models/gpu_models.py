"""Whole models on a GPU: fastgate and Hugging Face's in turn on the same batches, and their kernels.

    python bench/models/gpu_models.py --out FOLDER [--traces FOLDER] [--seconds N] [--quick]

Random weights of BERT-base's sizes in bfloat16, random ids, real lengths (lengths.json): no other file and no
hub is needed. Each model sees a batch several times, which compiles and captures; then they take turns, and
medians count. The baselines run the dense model. `sdpa`, `eager`, `compile` (sdpa under torch.compile with
CUDA graphs) and `flash`, where the flash_attn package is, run the padded batch; `flash varlen` runs it
flattened, without padding (flattened.py). Before the timing fastgate's logits, and those of `flash varlen`,
are found equal to Hugging Face's; of a pruned model the same attention is left out there. FLOPs are those of
the products that the batch needs, two a multiply-add, with nothing for padding. FOLDER gets models.jsonl, a
line a scenario as it is done, and models.md, tables and aims; the folder of --traces (the same, if none is
named) a profiler trace a model. After N seconds no scenario is begun, and `compile` is left out where it
would end later. A scenario that fails is a line, too, and the next one goes on. `--quick`: tiny, on any
device, to show that it runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A profiler that is taken down between traces loses the kernels of graphs.
os.environ.setdefault("TEARDOWN_CUPTI", "0")

sys.path.insert(0, str(Path(__file__).parents[1]))  # lengths.py is shared with bench/kernels

import flattened
import torch
from gpu_tables import Line, pruned_attention_kernels, tables
from lengths import mix
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import fastgate
from fastgate.benchmark.baselines import Baseline
from fastgate.benchmark.equivalence import check_baselines, check_outputs
from fastgate.benchmark.matmul_bound import MatmulLowerBound
from fastgate.env import environment
from fastgate.models.handle import get_encoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
KEEPS = {"fastgate": None, "fastgate {0,4,8}": (0, 4, 8), "fastgate {0,1}": (0, 1)}
WARM_CALLS = 4  # before the timing: they compile, capture and replay
COMPILE_SECONDS = 60.0  # torch.compile of BERT-base, at most
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """lengths: of the sequences. padded: what the baselines pad them to. repeats: turns that are timed."""

    name: str
    lengths: tuple[int, ...]
    padded: int
    repeats: int
    trains: bool = False

    def batch(self, vocabulary: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.lengths), self.padded)
        ids = torch.randint(min(1000, vocabulary // 2), vocabulary, shape, generator=generator)
        mask = (torch.arange(self.padded) < torch.tensor(self.lengths)[:, None]).long()
        made = {"input_ids": ids * mask, "attention_mask": mask}
        if self.trains:
            made["labels"] = torch.randint(0, 2, shape[:1], generator=generator)
        return {name: t.to(DEVICE) for name, t in made.items()}


def scenarios(quick: bool) -> list[Scenario]:
    imdb, sst2 = mix("imdb"), mix("sst2")
    if quick:
        short = tuple(min(n, 24) for n in sst2[:4])
        return [
            Scenario("half padding", short, 40, 2),
            Scenario("batch 1, length 32", (32,), 32, 2),
            Scenario("training step", short, 32, 2, trains=True),
        ]
    return [  # by importance: the last ones may not be reached
        Scenario("half padding", imdb, 512, 15),
        Scenario("batch 1, length 32", (32,), 32, 200),
        Scenario("training step", imdb[:64], 512, 10, trains=True),
        Scenario("batch 32, short", sst2[:32], max(sst2[:32]), 50),
        Scenario("batch 128, short", sst2[:128], max(sst2[:128]), 50),
    ]


def config(quick: bool) -> BertConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 200}
    return BertConfig(**(sizes if quick else {}))


def dense(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(quick)).eval()
    return model.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)


def ours(reference: nn.Module, keep: Sequence[int] | None, **options: Any) -> Any:
    model = fastgate.patch(copy.deepcopy(reference), **options)
    if keep is not None:
        fastgate.prune(model, keep=list(keep), replacement="zero")
    return model


def baselines(
    reference: nn.Module, scenario: Scenario, batch: Batch, deadline: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the models, those that do not run here and why)."""
    models: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name in ("sdpa", "eager"):
        models[name] = copy.deepcopy(reference)
        models[name].set_attn_implementation(name)
    if importlib.util.find_spec("flash_attn") is None:
        absent["flash"] = "flash_attn is not installed"
    else:
        models["flash"] = copy.deepcopy(reference)
        models["flash"].set_attn_implementation("flash_attention_2")
    why_not = (flattened.missing() if ON_GPU else None) or differs(reference, batch)
    if why_not:
        absent["flash varlen"] = why_not
    else:
        models["flash varlen"] = flattened.FlattenedClassifier(reference).train(reference.training)
    if not ON_GPU or scenario.trains:
        absent["compile"] = "timed in inference on a GPU"
    elif time.monotonic() + COMPILE_SECONDS > deadline:
        absent["compile"] = "no time is left to compile it"
    else:
        models["compile"] = torch.compile(
            copy.deepcopy(models["sdpa"]), mode="reduce-overhead", dynamic=False
        )
    return models, absent


def differs(reference: Any, batch: Batch) -> str | None:
    """Why the flattened model does not compute what `reference` computes; None if it does."""
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    try:
        model = flattened.FlattenedClassifier(reference).eval()
        baseline = Baseline(lambda padded: model(**flattened.flatten(dict(padded))).logits, "flattened")
        return check_baselines({"": baseline}, reference, [inputs])[1].get("")
    except Exception as error:
        return one_line(error)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def inference(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    compiled = isinstance(model, torch._dynamo.OptimizedModule)

    def call() -> Any:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return model(**batch).logits

    return call


def training(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def call() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return call


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, device included; who begins changes from turn to turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(repeats):
        begin = turn % len(order)
        for name in order[begin:] + order[:begin]:
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            found[name].append(time.perf_counter() - start)
    return found


def needed_flops(model: Any, batch: Batch) -> int:
    given = {name: t for name, t in batch.items() if name != "labels"}
    return MatmulLowerBound(model.eval(), [given]).flops[0]


def run(scenario: Scenario, quick: bool, deadline: float = float("inf")) -> dict[str, Any]:
    """One line of the results."""
    reference = dense(quick)
    batch = scenario.batch(reference.config.vocab_size)
    ours_by_name = {name: ours(reference, keep) for name, keep in KEEPS.items()}
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    worst = max(check_outputs(model, reference, [inputs]) for model in ours_by_name.values())
    flops = {
        name: needed_flops(model, batch) * (3 if scenario.trains else 1)
        for name, model in ours_by_name.items()
    }
    others, absent = baselines(reference, scenario, batch, deadline)
    make = training if scenario.trains else inference
    flat = flattened.flatten(batch)
    calls = {
        name: make(model, flat if name == "flash varlen" else batch)
        for name, model in (ours_by_name | others).items()
    }
    absent |= warm_up(calls, must_run=list(ours_by_name))
    seconds = in_turn(calls, scenario.repeats)
    rows: dict[str, dict[str, Any]] = {
        name: {"ms": 1e3 * statistics.median(taken)} for name, taken in seconds.items()
    }
    for name, model in ours_by_name.items():
        row = rows[name]
        row["tflop_per_s"] = flops[name] / row["ms"] / 1e9
        row["speedups"] = {other: rows[other]["ms"] / row["ms"] for other in others if other in rows}
        graphs = get_encoder(model).runtime.executor.graphs
        row["graphs"] = {
            "captures": graphs.captures,
            "replays": graphs.replays,
            "eager_reasons": dict(graphs.eager_reasons),
        }
        row |= replay_times(graphs, quick)
    return {
        "scenario": scenario.name,
        "rows": sum(scenario.lengths),
        "filled": sum(scenario.lengths) / (len(scenario.lengths) * scenario.padded),
        "largest_difference": worst,
        "models": rows,
        "absent": absent,
    }


def warm_up(calls: dict[str, Callable[[], Any]], must_run: Sequence[str]) -> dict[str, str]:
    """Calls each one WARM_CALLS times. Takes out the baselines that raise, and says why."""
    absent = {}
    for name in list(calls):
        try:
            for _ in range(WARM_CALLS):
                calls[name]()
            wait()
        except Exception as error:
            if name in must_run:
                raise
            absent[name] = one_line(error)
            del calls[name]
    return absent


def replay_times(graphs: Any, quick: bool) -> dict[str, float]:
    """Of the last graph: a replay among others like it, and the kernels in it by themselves, microseconds."""
    if not ON_GPU or not graphs.graphs:
        return {}
    graph = next(reversed(graphs.graphs.values()))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 5 if quick else 200
    for _ in range(3):
        graph.replay()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    with profiled() as profile:
        graph.replay()
    return {
        "replay_us": 1e3 * start.elapsed_time(end) / count,
        "kernels_us": sum(took for _, took in kernels_of(profile)),
    }


@contextmanager
def profiled() -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait()
    with torch.profiler.profile(activities=activities) as profile:
        yield profile
        wait()


def kernels_of(profile: Any) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel, in the order in which they began; copies and fills are none."""
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    return [(e.name, e.time_range.elapsed_us()) for e in sorted(kernels, key=lambda e: e.time_range.start)]


def trace(out: Path, quick: bool) -> dict[str, Any]:
    """Kernels of an encoder by the attentions that are kept, and of a layer's feed-forward steps alone."""
    reference = encoder(quick, 12)
    lengths = (24,) * 4 if quick else mix("sst2")[:128]
    batch = Scenario("trace", lengths, max(lengths), 1).batch(reference.config.vocab_size)
    found: dict[str, Any] = {"layers": 12, "kernels": {}, "names": {}}
    keeps = {"all": None, "{0,4,8}": (0, 4, 8), "{0,1}": (0, 1), "none": (), "none, half the layers": ()}
    with profiled():
        wait()  # what the first profile sets up is in no other
    with torch.inference_mode():
        for name, keep in keeps.items():
            model = ours(encoder(quick, 6) if "half" in name else reference, keep, graphs=False)
            for _ in range(2):
                model(**batch)
            with profiled() as profile:
                model(**batch)
            file = "_".join(filter(None, re.split(r"\W+", name)))
            profile.export_chrome_trace(str(out / f"trace_{file}.json.gz"))
            names = [kernel for kernel, _ in kernels_of(profile)]
            found["kernels"][name] = len(names)
            found["names"][name] = names
        found["feed_forward"] = feed_forward_kernels(model, int(batch["attention_mask"].sum()))
    return found


def encoder(quick: bool, layers: int) -> nn.Module:
    """Without a pooler: every attended row is read."""
    torch.manual_seed(0)
    sizes = config(quick)
    sizes.num_hidden_layers = layers
    model = BertModel(sizes, add_pooling_layer=False).eval()
    return model.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32)


def feed_forward_kernels(model: Any, rows: int) -> int:
    """Kernels of the three steps that a layer with a pruned attention still has."""
    from fastgate.ops.gated_add_norm import gated_add_norm
    from fastgate.ops.linear_gelu import linear_gelu

    layer, following = model.encoder.layer[0], model.encoder.layer[1].attention.output.LayerNorm
    first, second, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
    h = torch.randn(rows, first.in_features, device=DEVICE, dtype=first.weight.dtype)

    def steps() -> Tensor:
        x = nn.functional.linear(linear_gelu(h, first.weight, first.bias), second.weight)
        return gated_add_norm(
            x, h, norm.weight, norm.bias, norm.eps, bias=second.bias,
            weight2=following.weight, norm_bias2=following.bias, eps2=following.eps,
        )  # fmt: skip

    steps()
    with profiled() as profile:
        steps()
    return len(kernels_of(profile))


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for folder in (args.out, args.traces or args.out):
        folder.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []

    def write(line: Line, mode: str = "a") -> None:
        with (args.out / "models.jsonl").open(mode) as file:
            file.write(json.dumps(line) + "\n")

    write({"environment": environment()}, "w")
    kernels = trace(args.traces or args.out, args.quick)
    write({"trace": kernels, "pruned_attention_kernels": pruned_attention_kernels(kernels)})
    for scenario in scenarios(args.quick):
        if time.monotonic() - start > args.seconds:
            lines.append({"scenario": scenario.name, "failed": f"the {args.seconds:g} seconds are over"})
        else:
            try:
                lines.append(run(scenario, args.quick, start + args.seconds))
            except Exception as error:
                traceback.print_exc()
                lines.append({"scenario": scenario.name, "failed": one_line(error)})
        write(lines[-1])
        (args.out / "models.md").write_text(tables(lines, kernels))
        if ON_GPU:
            torch.cuda.empty_cache()
    failed = [line["scenario"] for line in lines if "failed" in line]
    print(
        f"{len(lines) - len(failed)} scenarios, not timed: {', '.join(failed) or 'none'}; "
        f"a pruned attention costs {pruned_attention_kernels(kernels):g} kernels"
    )
    return 0 if pruned_attention_kernels(kernels) == 0 and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
