"""Damaged checkpoints: `fastgate.load` raises a FastgateError or returns the model that was saved.

Where a case also corrects the checksums, as an attacker would, the model may be another one; then only errors
that are none of fastgate's, crashes, hangs and foreign code count.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from helpers.encoders import draw_replacements, make
from helpers.fuzzing import HOSTILE, damage, hostile_json
from torch import Tensor

import fastgate

META, WEIGHTS, CONFIG = "fastgate.json", "model.safetensors", "config.json"
MODELS: tuple[tuple[str, str, tuple[int, ...] | None, str], ...] = (
    ("Bert", "ForSequenceClassification", (1,), "affine"),
    ("Roberta", "ForTokenClassification", (), "shift"),
    ("Bert", "Model", None, "zero"),
    ("XLMRoberta", "ForMaskedLM", (0,), "zero"),
)


class Wrong(AssertionError):
    """A damaged checkpoint was accepted, or refused by another error than fastgate's."""


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (_explode, (str(self.path),))


def _explode(path: str) -> None:
    Path(path).write_text("code was run")


class Originals:
    """Whole checkpoints as bytes by file name, and the logits of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[dict[str, bytes]] = []
        self.logits: list[dict[str, Tensor]] = []
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 90, (2, 6), generator=generator)
        for i, (family, head, keep, replacement) in enumerate(MODELS):
            model = fastgate.patch(make(family, head, layers=2, hidden_size=16, intermediate_size=16))
            if keep is not None:
                fastgate.prune(model, keep, replacement)
                draw_replacements(model)
            path = fastgate.save(model, folder / f"original-{i}")
            self.files.append({p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()})
            self.logits.append(self.run(fastgate.load(path)))

    def run(self, model: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = model(self.ids)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _sign(files: dict[str, bytes]) -> None:
    """Make the checksums in fastgate.json those of the files, whatever form they have there."""
    try:
        meta = json.loads(files[META])
        old = meta["sha256"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return

    def digest(name: str) -> str:
        return hashlib.sha256(files.get(name, b"")).hexdigest()

    meta["sha256"] = {name: digest(name) for name in old} if isinstance(old, dict) else digest(WEIGHTS)
    for key in list(meta):
        if key.endswith("_sha256"):
            meta[key] = digest(CONFIG if "config" in key else WEIGHTS)
    files[META] = json.dumps(meta).encode()


def _with_header(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file whose header says something else of one tensor."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(("shape", "dtype", "offsets", "rename", "delete", "any", "length", "swap", "metadata"))
    if kind == "shape":
        header[name]["shape"] = rng.choice(
            ([], [0], [1], header[name]["shape"][::-1], [2**40, 2**40], [-1], [10**30], "x")
        )
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "X", 3, None)
        )
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 0], [-1, 4], [0, 2**62], [4, 0], [2**64, 2**65], "x", [])
        )
    elif kind == "rename":
        header[rng.choice(("", "x", "bert", "../x", "a" * 5000, "embeddings.word_embeddings.weight"))] = (
            header.pop(name)
        )
    elif kind == "delete":
        del header[name]
    elif kind == "any":
        header[name] = rng.choice(HOSTILE)
    elif kind == "swap":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(HOSTILE)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = rng.choice((0, 2**63, 2**64 - 1, len(text) - 1, 10**9)) if kind == "length" else len(text)
    return f"header: {kind}", struct.pack("<Q", length) + text + data[8 + size :]


def _change_tensors(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Valid weights of other values, shapes or dtypes."""
    from safetensors.torch import load, save

    tensors = load(data)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("nan", "reshape", "dtype", "scalar", "more", "less", "empty", "wide"))
    value = tensors[name]
    if kind == "nan":
        tensors[name] = torch.full_like(value, float("nan"))
    elif kind == "reshape":
        tensors[name] = value.flatten()[None]
    elif kind == "dtype":
        tensors[name] = value.to(rng.choice((torch.float64, torch.int64, torch.bool, torch.uint8)))
    elif kind == "scalar":
        tensors[name] = torch.zeros(())
    elif kind == "more":
        tensors["more." + name] = value.clone()
    elif kind == "less":
        del tensors[name]
    elif kind == "empty":
        tensors[name] = torch.zeros(0)
    else:
        tensors[name] = torch.zeros(*value.shape[:-1], value.shape[-1] + 1) if value.dim() else value
    return f"tensors: {kind}", save(tensors)


def mutate(
    rng: random.Random, originals: Originals, bomb: Path
) -> tuple[int, str, dict[str, bytes | None], bool]:
    """(which original, what was done, the files, whether they were signed); None: a folder in its place."""
    which = rng.randrange(len(MODELS))
    files: dict[str, Any] = dict(originals.files[which])
    descriptions = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("bytes", "bytes", "json", "json", "json", "header", "tensors", "files", "pickle"))
        name = rng.choice(sorted(files))
        data = files[name] or b""
        if kind == "json":
            name = rng.choice((META, CONFIG, CONFIG))
            try:
                contents = json.loads(files.get(name) or b"")
            except (ValueError, RecursionError):
                continue
            if not isinstance(contents, dict) or not contents:
                continue
            what, files[name] = hostile_json(rng, contents)
        elif kind in ("header", "tensors"):
            name = WEIGHTS
            try:
                what, files[name] = (_with_header if kind == "header" else _change_tensors)(
                    rng, files.get(name) or b""
                )
            except Exception:  # damaged by the change before
                continue
        elif kind == "files":
            what = rng.choice(("delete", "swap", "other", "folder", "upper", "all"))
            if what == "delete":
                del files[name]
            elif what == "swap":
                other = rng.choice(sorted(files))
                files[name], files[other] = files[other], files[name]
            elif what == "other":
                files[name] = originals.files[(which + 1) % len(MODELS)].get(name, b"")
            elif what == "folder":
                files[name] = None
            elif what == "upper":
                files[name.upper()] = files.pop(name)
            else:
                files = {}
        elif kind == "pickle":
            name = rng.choice((
                "pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt",
                "tokenizer.pkl", "model.safetensors",
                "fastgate.json", "config.json", "adapter_model.bin", "evil.py",
                "modeling_evil.py", "conftest.py",
                "__init__.py", "sitecustomize.py", "tokenizer_config.json",
            ))  # fmt: skip
            code = f"open({str(bomb)!r}, 'w').write('code was run')\nclass Evil: pass\n".encode()
            files[name] = code if name.endswith(".py") else pickle.dumps(Bomb(bomb))
            what = "pickle"
        else:
            what, files[name] = damage(rng, data)
        descriptions.append(f"{name}: {what}")
        if not files:
            break
    signed = rng.random() < 0.5
    if signed and all(value is not None for value in files.values()):
        _sign(files)
    return which, "; ".join(descriptions), files, signed


def run_case(seed: int, originals: Originals, fixed: tuple[str, bool] | None = None) -> tuple[str, str]:
    """(what happened, what was done). Raises Wrong."""
    rng = random.Random(seed)
    folder, bomb = originals.folder / "case", originals.folder / "bomb"
    which, change, files, signed = mutate(rng, originals, bomb)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    change = f"{'signed ' if signed else ''}{MODELS[which][0]}{MODELS[which][1]}: {change}"
    same = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == originals.files[which]
    before = os.getcwd()
    try:
        model = fastgate.load(folder)
    except fastgate.FastgateError as error:
        if same:
            raise Wrong(f"{change}: an undamaged checkpoint was refused: {error}") from error
        outcome = (
            "refused" if isinstance(error, fastgate.CheckpointError) else f"refused by {type(error).__name__}"
        )
    except Exception as error:
        raise Wrong(f"{change}: {type(error).__name__}: {str(error)[:300]}") from error
    else:
        outcome = "loaded, signed" if signed else "loaded the same"
        if not signed and not _equal(originals.run(model), originals.logits[which]):
            raise Wrong(f"{change}: another model was loaded in silence")
    if bomb.exists():
        bomb.unlink()
        raise Wrong(f"{change}: code from the checkpoint was run")
    if os.getcwd() != before:
        raise Wrong(f"{change}: the working folder was changed")
    return outcome, change


def _equal(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return outputs.keys() == wanted.keys() and all(
        outputs[name].dtype == value.dtype and torch.equal(outputs[name], value)
        for name, value in wanted.items()
    )
