"""Outputs, gradients and trained weights of two checkouts of fastgate, compared bit for bit.

    python bench/models/same_bits.py OLD NEW [--only TEXT] [--threads 1] [--keep FOLDER]

OLD and NEW are folders that hold a built checkout, of any layout: only fastgate's public functions are
called. Each checkout runs every case in a process of its own. The cases: BERT and RoBERTa under every head;
unpruned and pruned with each replacement; patched and frozen; float32, bfloat16 and autocast; padding on the
right and on the left; outputs, losses, hidden states; gradients of models that are not frozen, with and
without dropout; a short run of SelfPruningTrainer; and checkpoints that OLD wrote, loaded by both. A case
that raises must raise the same type of error in both. Every case that differs is one line; the last line is a
summary. The exit status is 0 if all cases are equal. All of them take about five minutes of one core a
checkout; `--only minilm` and `--only checkpoint` run parts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("Bert", "Roberta")
HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForNextSentencePrediction",
    "ForPreTraining",
)
VOCABULARY = 120
# name -> sizes of the encoder, lengths of the sequences
SIZES = {
    "tiny": ({"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}, (14, 9, 3, 1)),
    "minilm": ({"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}, (33, 7, 21, 12)),
}
LAYERS = 4
# What is pruned: the layers that keep their attention, and the replacement. None: nothing.
PRUNINGS: dict[str, tuple[tuple[int, ...], str] | None] = {
    "unpruned": None,
    "zero 0,2": ((0, 2), "zero"),
    "mean 0,2": ((0, 2), "mean"),
    "affine 0,2": ((0, 2), "affine"),
    "shift 0,2": ((0, 2), "shift"),
    "shift 1": ((1,), "shift"),
    "shift none": ((), "shift"),
    "zero none": ((), "zero"),
}
DTYPES = ("fp32", "bf16", "autocast")
LARGE = 1 << 14  # elements: of larger tensors a digest is compared
Result = dict[str, Tensor]


def model_of(family: str, head: str, size: str, dropout: float = 0.0) -> Any:
    """A random model of transformers; the weights depend on their names only."""
    import transformers

    sizes, lengths = SIZES[size]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, max_position_embeddings=max(lengths) + 4,
        type_vocab_size=2, num_labels=2 if "Question" in head else 3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **sizes,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = getattr(transformers, family + head)(config)
    draw(model, lambda name: True)
    return model.eval()


def draw(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Fills the chosen parameters with values that are large enough for attention to matter."""
    for name, parameter in model.named_parameters():
        if chosen(name):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            is_scale = "LayerNorm" in name and name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator) * 0.15 + (1.0 if is_scale else 0.0)
            parameter.data.copy_(values)


def batch_of(model: Any, head: str, size: str, side: str, labels: bool) -> dict[str, Tensor]:
    """Random ids and masks; with labels, those of the head."""
    generator = torch.Generator().manual_seed(7)
    lengths = SIZES[size][1]
    shape = (len(lengths), max(lengths))
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    batch = {
        "input_ids": torch.where(mask.bool(), ids, model.config.pad_token_id),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }
    if labels:
        batch |= labels_of(head, mask, generator)
    if head == "ForMultipleChoice":
        batch = {name: t.view(2, -1, shape[1]) if t.dim() == 2 else t for name, t in batch.items()}
    return batch


def labels_of(head: str, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    rows, length = mask.shape

    def classes(*shape: int, n: int) -> Tensor:
        return torch.randint(0, n, shape, generator=generator)

    if head in ("ForTokenClassification", "ForMaskedLM", "ForPreTraining"):
        some = mask.bool() & (torch.rand(mask.shape, generator=generator) < 0.6)
        n = 3 if "Token" in head else VOCABULARY
        labels = {"labels": torch.where(some, classes(rows, length, n=n), -100)}
        return labels | ({"next_sentence_label": classes(rows, n=2)} if head == "ForPreTraining" else {})
    if head == "ForQuestionAnswering":
        return {"start_positions": classes(rows, n=length), "end_positions": classes(rows, n=length)}
    if head == "Model":
        return {}
    return {"labels": classes(2 if head == "ForMultipleChoice" else rows, n=2)}


def prepared(model: Any, pruning: str, frozen: bool, dtype: str) -> Any:
    """The model patched, pruned and frozen as the case says."""
    import fastgate

    fastgate.patch(model)
    kept_and_replacement = PRUNINGS[pruning]
    if kept_and_replacement is not None:
        kept, replacement = kept_and_replacement
        fastgate.prune(model, keep=list(kept), replacement=replacement)
        draw(model, lambda name: ".replacement." in name)
    if dtype == "bf16":
        model.to(torch.bfloat16)
    if frozen:
        fastgate.freeze(model)
    return model


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def compact(tensor: Tensor) -> Tensor:
    """The tensor, or a digest of its type, shape and bits if it is large: thousands of them are compared."""
    if tensor.numel() <= LARGE:
        return tensor
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output, by a name."""
    if isinstance(value, Tensor):
        yield name, value.detach().clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(f"{name}.{key}", item)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from tensors(f"{name}.{i}", item)


def calls_of(model: Any, head: str, size: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The batches of a case, with what is asked for beside them."""
    for side in ("right", "left"):
        yield side, batch_of(model, head, size, side, labels=False)
        yield f"{side}, labels", batch_of(model, head, size, side, labels=True)
    batch = batch_of(model, head, size, "right", labels=False)
    yield "hidden states", {**batch, "output_hidden_states": True}
    if head in ("Model", "ForTokenClassification", "ForMaskedLM"):
        rows = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 3 == 0)
        yield "rows", {**batch, "rows": rows}
    one = {name: t[:1] for name, t in batch.items()}
    yield "batch 1", one
    yield "batch 1 again", one  # a plan that the first call compiled


def outputs(family: str, head: str, size: str, pruning: str, frozen: bool, dtype: str) -> Result:
    model = prepared(model_of(family, head, size), pruning, frozen, dtype)
    result: Result = {}
    with torch.inference_mode(), precision(dtype):
        for name, batch in calls_of(model, head, size):
            try:
                result |= dict(tensors(name, model(**batch)))
            except Exception as error:
                result[f"{name} raised {type(error).__name__}"] = torch.zeros(0)
    return result


def gradients(family: str, head: str, size: str, pruning: str, dropout: float, dtype: str) -> Result:
    model = prepared(model_of(family, head, size, dropout), pruning, False, dtype).train()
    batch = batch_of(model, head, size, "right", labels=True)
    torch.manual_seed(11)
    with precision(dtype):
        output = model(**batch)
        loss = (
            output.loss if head != "Model" else output[0].float().square().mean() + output[1].float().mean()
        )
    loss.backward()
    result = dict(tensors("output", output)) | {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"gradient of {name}"] = parameter.grad
    return result


def trained(replacement: str, target: str) -> Result:
    """The weights after a short run of SelfPruningTrainer with a teacher."""
    import transformers

    import fastgate

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (48, 9), generator=generator)
    rows = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": int(r[1] > 60)} for r in ids]
    sought = {"sparsity": fastgate.Sparsity(0.5), "speedup": fastgate.Speedup(1.6)}[target]
    config = fastgate.PruningConfig(
        sought, replacement=replacement, warm=0.1, ramp=0.4, harden=0.7, gate_lr=0.3
    )
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, max_steps=12, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, seed=3, learning_rate=1e-3, logging_strategy="no",
        )  # fmt: skip
        transformers.set_seed(5)
        model = model_of("Bert", "ForSequenceClassification", "tiny", dropout=0.1)
        teacher = model_of("Bert", "ForSequenceClassification", "tiny")
        trainer = fastgate.SelfPruningTrainer(
            model=model, args=args, train_dataset=rows, pruning=config, teacher=teacher
        )
        with contextlib.redirect_stdout(None):
            trainer.train()
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def loaded(folder: Path, family: str, head: str, pruning: str, write: bool) -> Result:
    """The outputs of a checkpoint that the old version wrote."""
    import fastgate

    path = folder / f"{family}{head} {pruning}".replace(" ", "_").replace(",", "")
    if write:
        fastgate.save(prepared(model_of(family, head, "tiny"), pruning, False, "fp32"), str(path))
    model = fastgate.load(str(path)).eval()
    with torch.inference_mode():
        output = model(**batch_of(model, head, "tiny", "right", labels=False))
    return dict(tensors("output", output)) | dict(tensors("weight", dict(model.state_dict())))


def cases(checkpoints: Path, write: bool) -> Iterator[tuple[str, Callable[[], Result]]]:
    """(title, what computes its tensors)"""
    import transformers

    combinations = [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f + h)]
    for size in SIZES:
        for family, head in combinations:
            for pruning in PRUNINGS:
                if size == "minilm" and pruning not in ("unpruned", "zero 0,2", "shift 0,2"):
                    continue
                title = f"{size} {family}{head}, {pruning}"
                for dtype in DTYPES:
                    for frozen in (False, True):
                        yield (
                            f"{title}, {dtype}, {'frozen' if frozen else 'patched'}",
                            lambda a=(family, head, size, pruning, frozen, dtype): outputs(*a),
                        )
                    for dropout in (0.0, 0.1):
                        yield (
                            f"{title}, {dtype}, gradients, dropout {dropout}",
                            lambda a=(family, head, size, pruning, dropout, dtype): gradients(*a),
                        )
    for replacement in ("zero", "shift"):
        for target in ("sparsity", "speedup"):
            title = f"SelfPruningTrainer, {replacement}, {target}"
            yield title, lambda a=(replacement, target): trained(*a)
    for family, head in combinations:
        for pruning in ("unpruned", "mean 0,2", "shift 0,2", "shift none"):
            yield (
                f"checkpoint {family}{head}, {pruning}",
                lambda a=(checkpoints, family, head, pruning, write): loaded(*a),
            )


def serve(folder: Path, results: Path, only: str, threads: int, write: bool) -> None:
    """A child: every case's tensors, or the error it ends with, into one file."""
    import transformers

    import fastgate

    found_in = Path(fastgate.__file__).resolve()
    if folder.resolve() not in found_in.parents:
        raise SystemExit(f"same_bits: fastgate came from {found_in}, wanted {folder}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    checkpoints = results.parent / "checkpoints"
    stored: dict[str, Result | str] = {}
    for title, compute in cases(checkpoints, write):
        if only in title:
            try:
                stored[title] = {name: compact(tensor) for name, tensor in compute().items()}
            except Exception as error:
                stored[title] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    torch.save(stored, results)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def difference(old: Result | str, new: Result | str) -> str | None:
    """What differs between two results of a case, or None."""
    if isinstance(old, str) or isinstance(new, str):
        both = isinstance(old, str) and isinstance(new, str)
        if both and old.partition(":")[0] == new.partition(":")[0]:
            return None
        return f"old {old if isinstance(old, str) else 'ran'}, new {new if isinstance(new, str) else 'ran'}"
    if old.keys() != new.keys():
        only_old, only_new = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        return f"only old has {only_old[:3]}, only new has {only_new[:3]}"
    unequal = [name for name in old if not same_bits(old[name], new[name])]
    if not unequal:
        return None
    name = unequal[0]
    a, b = old[name], new[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {a.dtype} {tuple(a.shape)}, new {b.dtype} {tuple(b.shape)}"
    if a.dtype == torch.uint8:
        return f"{len(unequal)} of {len(old)} tensors, first {name}: a large one, of other bits"
    largest = (a.double() - b.double()).abs().max().item()
    return f"{len(unequal)} of {len(old)} tensors, first {name}: largest difference {largest:.1e}"


def run(folder: Path, results: Path, only: str, threads: int, write: bool) -> dict[str, Result | str]:
    command = [sys.executable, __file__, str(folder), "--serve", str(results), "--only", only]
    command += ["--threads", str(threads), *(["--write"] if write else [])]
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True)
    stored: dict[str, Result | str] = torch.load(results, weights_only=True)
    return stored


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="Cases whose title has this text.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="Leave results and checkpoints in this folder.")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.old, args.serve, args.only, args.threads, args.write)
        return 0
    if args.new is None:
        parser.error("OLD and NEW are needed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        old = run(args.old, folder / "old.pt", args.only, args.threads, write=True)
        new = run(args.new, folder / "new.pt", args.only, args.threads, write=False)
    differing = 0
    for title, result in old.items():
        line = difference(result, new.get(title, "missing"))
        if line is not None:
            differing += 1
            print(f"DIFFERS {title}: {line}")
    raised = sorted({result for result in old.values() if isinstance(result, str)})
    for text in raised:
        print(f"raised in both, {sum(result == text for result in old.values())} cases: {text}")
    failing = sum(isinstance(result, str) for result in old.values())
    print(f"{len(old)} cases, {differing} differ, {failing} raise in the old version")
    return 1 if differing or not old else 0


if __name__ == "__main__":
    sys.exit(main())
