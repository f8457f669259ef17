"""`save` and `load`: a directory with the weights that are left (safetensors) and what they mean (JSON)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from .errors import ArgumentError, CheckpointError, say
from .families import FAMILIES, base_class
from .patch import patch
from .prune import prune
from .replacement import KINDS
from .state import encoder_state

FORMAT = 1
META, WEIGHTS, CONFIG = "fastgate.json", "model.safetensors", "config.json"


def save(model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a patched model to the directory `path`: `fastgate.json`, `config.json`, `model.safetensors`.

    Only weights that are left are written. Everything is written beside `path` and then renamed, so a crash
    leaves the former checkpoint as it was. `tokenizer`: saved in the same directory if given. Returns the
    path.

    Raises NothingPatched for a model that is not patched, ArgumentError if a gate is not hardened or `path`
    is in use by something that is no checkpoint.
    """
    state = encoder_state(model)
    soft = [i for i, gate in enumerate(state.gates) if isinstance(gate, torch.Tensor)]
    if soft:
        raise ArgumentError(
            say(
                "save",
                "model",
                f"soft gates in layers {soft}",
                "gates of 0 or 1",
                "harden the gates (Pruner.harden) first",
            )
        )
    hf = base_class(model)
    if hf.__module__ not in {family.module.__name__ for family in FAMILIES}:
        raise ArgumentError(
            say(
                "save",
                "model",
                type(model).__name__,
                "an encoder or a head of transformers",
                "save the encoder inside it and rebuild the rest",
            )
        )
    target = Path(path)
    if target.exists() and not (target / META).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError(
            say(
                "save",
                "path",
                target,
                "a new directory, an empty one, or a fastgate checkpoint",
                "choose another path",
            )
        )

    closed = [i for i, gate in enumerate(state.gates) if gate == 0.0]
    kinds = {replacement.kind for i in closed if (replacement := state.replacement(i)) is not None} or {
        "zero"
    }
    if len(kinds) > 1:
        raise ArgumentError(
            say("save", "model", f"replacements {sorted(kinds)}", "one kind", "prune with one replacement")
        )
    tensors = _left(model, state.encoder, closed)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.config.to_json_file(aside / CONFIG, use_diff=False)  # type: ignore[union-attr, operator]
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        meta = {
            "format": FORMAT,
            "class": hf.__name__,
            "kept": [i for i in range(state.num_layers) if i not in closed],
            "replacement": kinds.pop(),
            "demand": state.runtime.asked,
            "sha256": _digest(aside / WEIGHTS),
        }
        (aside / META).write_text(json.dumps(meta, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        os.chmod(aside, 0o755)
        _put(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read a checkpoint that `save` wrote: the patched, pruned model, in eval mode, on the CPU.

    Raises CheckpointError if it is missing, incomplete, damaged, or of a newer format.
    """
    source = Path(path)
    meta = _read_json(source, META)
    _check(source, meta)
    config_data = _read_json(source, CONFIG)
    hf = _known_class(source, meta["class"])
    weights = source / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(
            say("load", str(weights), "no such file", "the weights", "copy the whole directory again")
        )
    if _digest(weights) != meta["sha256"]:
        raise CheckpointError(
            say(
                "load",
                str(weights),
                "contents that do not match their checksum",
                meta["sha256"][:12] + "...",
                "the file was cut short or changed: copy it again or save the model anew",
            )
        )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(
            say("load", str(weights), str(error), "a safetensors file", "save the model anew")
        ) from error
    try:
        config = AutoConfig.for_model(**config_data)
        model = hf(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            say(
                "load",
                str(source / CONFIG),
                str(error),
                "a configuration transformers reads",
                "save the model anew",
            )
        ) from error
    try:
        patch(model, demand=meta.get("demand"))
        prune(model, meta["kept"], meta["replacement"])
    except ArgumentError as error:
        wanted = "layers and a demand that the model has"
        raise CheckpointError(
            say("load", str(source / META), str(error), wanted, "save the model anew")
        ) from error
    _fill(model, tensors, weights)
    return model.eval()


def _left(model: nn.Module, encoder: nn.Module, closed: list[int]) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint needs: no attention weights of closed layers, and tied tensors once."""
    prefix = next(
        (f"{name}." if name else "" for name, module in model.named_modules() if module is encoder), ""
    )
    gone = tuple(
        f"{prefix}encoder.layer.{i}.attention.{part}." for i in closed for part in ("self", "output.dense")
    )
    layers = range(len(encoder.encoder.layer))  # type: ignore[union-attr, arg-type]
    unused = tuple(f"{prefix}encoder.layer.{i}.attention.replacement." for i in layers if i not in closed)
    left, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if (
            not name.startswith(gone)
            and not name.startswith(unused)
            and (place not in seen or tensor.numel() == 0)
        ):
            seen.add(place)
            left[name] = tensor.detach().cpu().contiguous()
    return left


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], weights: Path) -> None:
    here = model.state_dict()
    places: dict[int, str] = {}
    for name, tensor in here.items():
        places.setdefault(tensor.data_ptr(), name)
    tied = {
        name
        for name, tensor in here.items()
        if places[tensor.data_ptr()] != name and places[tensor.data_ptr()] in tensors
    }
    missing, unknown = sorted(set(here) - set(tensors) - tied), sorted(set(tensors) - set(here))
    if missing or unknown:
        raise CheckpointError(
            say(
                "load",
                str(weights),
                f"missing {missing[:3]}, unknown {unknown[:3]}",
                "the tensors the configuration needs",
                "save the model anew",
            )
        )
    wrong = [
        f"{n}: {tuple(t.shape)} for {tuple(here[n].shape)}"
        for n, t in tensors.items()
        if t.shape != here[n].shape
    ]
    if wrong:
        raise CheckpointError(
            say("load", str(weights), "; ".join(wrong[:3]), "shapes as in config.json", "save the model anew")
        )
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors, strict=False)


def _put(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; a former checkpoint is moved away first and removed after."""
    former = None
    if target.exists():
        former = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, former / "checkpoint")
    os.replace(aside, target)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _read_json(source: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((source / name).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            say(
                "load",
                str(source / name),
                "no such file",
                "a checkpoint written by fastgate.save",
                "check the path",
            )
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            say("load", str(source / name), f"damaged JSON ({error})", "a JSON object", "save the model anew")
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            say("load", str(source / name), type(data).__name__, "a JSON object", "save the model anew")
        )
    return data


def _check(source: Path, meta: dict[str, Any]) -> None:
    found = meta.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(
            say("load", str(source / META), f"format {found}", f"at most {FORMAT}", "upgrade fastgate")
        )
    kept = meta.get("kept")
    good = (
        found == FORMAT
        and isinstance(meta.get("class"), str)
        and isinstance(kept, list)
        and all(type(i) is int for i in kept)
        and meta.get("replacement") in KINDS
        and meta.get("demand") in (None, "first", "all")
        and isinstance(meta.get("sha256"), str)
    )
    if not good:
        raise CheckpointError(
            say(
                "load",
                str(source / META),
                "missing or wrong fields",
                "what fastgate.save writes",
                "save the model anew",
            )
        )


def _known_class(source: Path, name: str) -> type[nn.Module]:
    for family in FAMILIES:
        if name in family.heads():
            found: type[nn.Module] = getattr(family.module, name)
            return found
    raise CheckpointError(
        say(
            "load",
            str(source / META),
            f"class {name!r}",
            "an encoder or head of transformers that fastgate knows",
            "upgrade fastgate",
        )
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
