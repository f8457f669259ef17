"""`save` and `load`: a folder with the weights of a patched model (safetensors) and what they mean (JSON).

Format 2 is three files. `config.json` is that of transformers. For a pruned model it has a `model_type` of
fastgate's and an entry `fastgate` (checkpoint_config.py). `model.safetensors` has the weights.
`fastgate.json` has the format, the class, the entry `fastgate` again, and the SHA-256 of the other two. A
model that is patched and not pruned has the config and the weights that transformers writes.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastgate.errors import ArgumentError, CheckpointError, Unsupported, format_error
from fastgate.models import atomic_files, compat
from fastgate.models.architectures import base_class, is_known_class
from fastgate.models.checkpoint_config import INTERRUPTED, KEY, MODEL_TYPES, PRUNED, Layout, described
from fastgate.models.checkpoint_files import (
    ANEW,
    CONFIG,
    FORMAT,
    META,
    WEIGHTS,
    check_header,
    class_named,
    digest_of,
    folder_to_read,
    header_of,
    layout_in,
    model_config,
    one_line,
    read_json,
    snapshot,
)
from fastgate.models.checkpoint_structure import build, check, check_hooks, fill, shared
from fastgate.models.compat import WEIGHTS_ENTRY
from fastgate.models.handle import EncoderHandle, check_module, get_encoder
from fastgate.models.pruning import refuse_adapters
from fastgate.nn.choices import ReplacementKind

_LAYER_NAME = re.compile(r"encoder\.layer\.(\d+)\.")


# -- saving


def save(
    model: nn.Module, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write a patched model to the folder `path`: `fastgate.json`, `config.json`, `model.safetensors`.

    Removed weights are not written. These files, and those of `tokenizer`, replace those of the same names
    all at once; every other file in the folder stays. A crash or a full disk leaves the former checkpoint as
    it was. With fastgate imported, the Auto classes of transformers read the folder too.

    Args:
        model: A patched model, pruned or not, frozen or not.
        path: The folder. It is made if it is missing.
        tokenizer: A tokenizer of transformers to write beside the model.

    Returns:
        The path.

    Raises:
        NothingPatched: For a model that is not patched.
        ArgumentError: If a gate is not hardened, `path` holds a model that fastgate did not write, or
            `tokenizer` is no tokenizer.
        Unsupported: For a model that its config does not describe, which `load` could not build.
    """
    check_module("save", model)
    refuse_adapters("save", model)
    handle, hf = get_encoder(model, "save"), known_class(model)
    layout = layout_of(handle)
    if layout.unfinished:
        soft = [i for i, gate in enumerate(handle.gates) if isinstance(gate, torch.Tensor)]
        got = f"soft gates in layers {soft}" if soft else "gates that are still being learned"
        remedy = "harden the gates (Pruner.harden) first"
        raise ArgumentError(format_error("save", "model", got, "gates of 0 or 1", remedy))
    check_hooks(model)
    _check_tokenizer(tokenizer)
    target = folder_to_write(path)
    _refuse_foreign(target)
    _write(model, hf, layout, target.resolve(), tokenizer)
    return target


def write_pruned(
    model: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write what `save` writes over whatever model is in the folder, unfinished gates too.

    A model of the user's own class is written so that no loader takes it for a whole one; `load` cannot build
    it. tensors: what to write in place of the model's state dict.
    """
    layout = layout_of(get_encoder(model))
    _write(model, base_class(model), layout, folder_to_write(path).resolve(), None, tensors)


def known_class(model: nn.Module) -> type[nn.Module]:
    """The class of transformers of an encoder or a head, which `load` makes again."""
    hf = base_class(model)
    if is_known_class(hf):
        return hf
    remedy = "save the encoder inside it and rebuild the rest"
    if hasattr(model, "_orig_mod") or hf.__name__ in ("DataParallel", "DistributedDataParallel"):
        remedy = "pass the model that is wrapped (model.module, or model._orig_mod after torch.compile)"
    elif hf.__name__ == "SentenceTransformer":
        remedy = "call its own save_pretrained(path), which writes fastgate's format"
    wanted = "an encoder or a head of transformers"
    raise ArgumentError(format_error("save", "model", type(model).__name__, wanted, remedy))


def layout_of(handle: EncoderHandle) -> Layout:
    """What the weights of a patched model mean."""
    handle.check_layers("save")
    gates = handle.gates
    skipped = [i for i, gate in enumerate(gates) if not isinstance(gate, torch.Tensor) and gate == 0.0]
    replacements = [handle.replacement(i) for i in skipped]
    kinds: set[ReplacementKind] = {"zero" if r is None else r.kind for r in replacements} or {"zero"}
    if len(kinds) > 1:
        remedy = "prune with one replacement"
        raise ArgumentError(
            format_error("save", "model", f"replacements {sorted(kinds)}", "one kind", remedy)
        )
    runtime: Any = handle.runtime
    return Layout(
        tuple(i for i in range(handle.num_layers) if i not in skipped),
        kinds.pop(),
        runtime.asked,
        runtime.pooling,
        runtime.unfinished or any(isinstance(gate, torch.Tensor) for gate in gates),
    )


def unused_names(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Prefixes of what a checkpoint leaves out: attention of skipped layers, replacements of others."""
    if layout.unfinished:
        return ()
    encoder = get_encoder(model).encoder
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is encoder)
    names = []
    for i in range(len(encoder.encoder.layer)):
        attention = f"{prefix}encoder.layer.{i}.attention"
        parts = ("replacement.",) if i in layout.kept else ("self.", "output.dense.")
        names += [f"{attention}.{part}" for part in parts]
    return tuple(names)


def folder_to_write(path: str | os.PathLike[str]) -> Path:
    """The folder to save to, `~` expanded."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        remedy = 'pass a path, such as "pruned"'
        raise ArgumentError(format_error("save", "path", repr(path), "the path of a folder", remedy))
    target, remedy = Path(os.fsdecode(path)).expanduser(), "choose another path"
    try:
        if "\0" in str(target):
            raise ValueError("a null character")
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # too long, or with a character that no path has
        got = f"{str(target)[:80]!r} ({one_line(error)[:80]})"
        raise ArgumentError(format_error("save", "path", got, "a path of this system", remedy)) from error
    if not existing.is_dir():
        got = str(target) if existing == target else f"{target}, under the file {existing}"
        raise ArgumentError(format_error("save", "path", got, "a folder or a new path", remedy))
    return target


def _check_tokenizer(tokenizer: object) -> None:
    """Refuse what would write no tokenizer, or files in the place of the model's."""
    if tokenizer is None:
        return
    files = callable(getattr(tokenizer, "save_pretrained", None))
    if not files or isinstance(tokenizer, type | nn.Module | PreTrainedConfig):
        got, remedy = type(tokenizer).__name__, "load it: transformers.AutoTokenizer.from_pretrained(name)"
        raise ArgumentError(format_error("save", "tokenizer", got, "a tokenizer of transformers", remedy))


def _refuse_foreign(target: Path) -> None:
    """Refuse to put a model in the place of one that fastgate did not write."""
    folder = target.resolve()
    if (folder / META).is_file() or atomic_files.is_interrupted(folder) or _is_pruned_config(folder / CONFIG):
        return
    names = [name for name in (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json") if (folder / name).exists()]
    if names:
        got = f"{target}, which has a {names[0]} that fastgate did not write"
        wanted = "a new folder, one without a model, or a fastgate checkpoint"
        remedy = "choose another path, or delete the model there"
        raise ArgumentError(format_error("save", "path", got, wanted, remedy))


def _is_pruned_config(path: Path) -> bool:
    with suppress(OSError, CheckpointError):
        return read_json(path).get("model_type") in MODEL_TYPES
    return False


def _write(
    model: Any,
    hf: type[nn.Module],
    layout: Layout,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check that `load` can build the model again, then write its files and put them in place."""
    plain = layout.is_plain(len(get_encoder(model).gates))
    config, unused = _config_to_write(model, hf), unused_names(model, layout)
    if is_known_class(hf) and not layout.unfinished:
        _check_buildable(model, hf, config, layout, unused)
    tensors = _tensors(model, unused, state_dict, tied=plain)
    pruned = described(config, layout)
    notice = {name: pruned[name] for name in ("model_type", WEIGHTS_ENTRY)}
    with atomic_files.replace_files(folder, json.dumps(notice | {KEY: {INTERRUPTED: True}})) as staging:
        with _errors_of_the_disk():
            if plain:
                PreTrainedModel.save_pretrained(model, staging, state_dict=tensors)
            else:
                (staging / CONFIG).write_text(json.dumps(pruned, indent=2, sort_keys=True) + "\n")
                save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / WEIGHTS).chmod((staging / CONFIG).stat().st_mode & 0o777)  # safetensors takes 0600
        meta = {
            "format": FORMAT,
            "class": hf.__name__,
            **layout.as_json(),
            "sha256": {name: digest_of(staging / name) for name in (CONFIG, WEIGHTS)},
        }
        (staging / META).write_text(json.dumps(meta, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def _config_to_write(model: Any, hf: type[nn.Module]) -> dict[str, Any]:
    """The model's config as JSON, with the class and the dtype that transformers adds."""
    if is_known_class(hf) and type(model.config) not in PRUNED:
        wanted = "a config class of transformers, such as BertConfig"
        raise Unsupported(
            format_error("save", "model.config", type(model.config).__name__, wanted, "use that class")
        )
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [hf.__name__], str(model.dtype).removeprefix("torch.")
    try:
        data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except (TypeError, ValueError) as error:
        remedy = "remove what JSON cannot hold from the config"
        raise Unsupported(
            format_error("save", "model.config", error, "values that JSON can hold", remedy)
        ) from error
    data.pop("_name_or_path", None)
    return data


def _check_buildable(
    model: nn.Module, hf: type[nn.Module], data: dict[str, Any], layout: Layout, unused: tuple[str, ...]
) -> None:
    layers = get_encoder(model).num_layers
    if data["num_hidden_layers"] != layers:
        got, remedy = f"{layers} layers", f"set model.config.num_hidden_layers = {layers}"
        wanted = f"{data['num_hidden_layers']}, as in model.config.num_hidden_layers"
        raise Unsupported(format_error("save", "model", got, wanted, remedy))
    try:
        rebuilt = build(hf, model_config(data, hf, "model.config", layers), layout)
    except Exception as error:
        remedy = "undo the change of the config before saving"
        wanted = "a config that a model can be built from"
        raise Unsupported(format_error("save", "model.config", one_line(error), wanted, remedy)) from error
    check(model, rebuilt, unused)


def _tensors(
    model: nn.Module, unused: tuple[str, ...], state_dict: Mapping[str, torch.Tensor] | None, tied: bool
) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint needs, on the CPU. tied: under all of their names, not one."""
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(unused)}
    copies = compat.tied_names(model)
    names = [name for name, others in shared(own).items() if tied or name == _first(others, copies)]
    source = own if state_dict is None else state_dict
    missing = [name for name in names if name not in source]
    if missing:
        remedy = "pass the whole state dict of the model, or leave state_dict out"
        got = f"no {missing[:3]}"
        raise ArgumentError(format_error("save_pretrained", "state_dict", got, "these tensors", remedy))
    tensors: dict[str, torch.Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name in names:
        tensor = source[name].detach().cpu().contiguous()
        place = (tensor.data_ptr(), tensor.shape)
        tensors[name] = tensor.clone() if not tied and tensor.numel() and place in places else tensor
        places.add(place)
    return tensors


def _first(names: list[str], copies: Mapping[str, str]) -> str:
    """The name under which a shared tensor is saved: an encoder without the head must find its own."""
    return next((name for name in names if name not in copies), names[0])


@contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """A full disk is an OSError here too, as it is where Python writes."""
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), WEIGHTS) from error


# -- loading


def load(path: str | os.PathLike[str]) -> PreTrainedModel:
    """Read a checkpoint that `save` wrote.

    Folders that `save_pretrained` of a pruned model or a Trainer wrote are such checkpoints too. A save that
    was interrupted gives the old model or the new one, never a mix. No file is changed and no code is run.

    Args:
        path: The folder.

    Returns:
        The patched, pruned model, in eval mode, on the CPU, in the dtype that it was saved in.

    Raises:
        CheckpointError: If the checkpoint is missing, incomplete, damaged, or of a newer format.
    """
    folder = folder_to_read(path)
    meta, data, file = snapshot(folder)
    weights = folder / WEIGHTS
    header = header_of(file, weights)
    hf = class_named(meta["class"], folder)
    layers = len({match[1] for name in header if (match := _LAYER_NAME.search(name))})
    config = model_config(data, hf, str(folder / CONFIG), layers)
    layout = layout_in(meta, data, folder, config)
    config.name_or_path = str(folder)
    try:
        model = build(hf, config, layout)
    except Exception as error:
        wanted = "a config and a layout that a model can be built from"
        raise CheckpointError(
            format_error("load", str(folder / CONFIG), one_line(error), wanted, ANEW)
        ) from error
    check_header(model, header, weights)
    try:
        tensors = {name: file.get_tensor(name) for name in header}
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(format_error("load", str(weights), one_line(error), wanted, ANEW)) from error
    return fill(model, tensors)
