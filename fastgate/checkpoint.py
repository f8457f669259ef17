"""`save` and `load`: a folder with the weights that are left (safetensors) and what they mean (JSON).

Format 2 is three files. `config.json` is that of transformers. For a pruned model it has a `model_type` of
fastgate's and an entry `fastgate` (configs.py). `model.safetensors` has the weights. `fastgate.json` has the
format, the class, the entry `fastgate` again, and the SHA-256 of the other two. A model that is patched and
not pruned has the config and the weights that transformers writes.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import commit
from .configs import INTERRUPTED, KEY, MODEL_TYPES, PRUNED, Layout, described, read_layout
from .errors import ArgumentError, CheckpointError, Unsupported, say
from .families import FAMILIES, base_class
from .prune import refuse_adapters
from .state import POOLING_KEY, EncoderState, check_module, encoder_state
from .structure import DTYPES, build, check, check_hooks, fill, shared

FORMAT = 2
META, WEIGHTS, CONFIG = "fastgate.json", "model.safetensors", "config.json"
_LARGEST_JSON = 2**26  # bytes
# Sizes in a config, which must be positive and small enough to look at.
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_FOREIGN = ("quantization_config", "per_layer_config", "fusion_config", "distributed_config")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_ANEW = "save the model anew"


# -- saving


def save(model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a patched model to the folder `path`: `fastgate.json`, `config.json`, `model.safetensors`.

    Only weights that are left are written. These files, and those of `tokenizer` if it is given, replace
    those of the same names all at once; every other file in the folder stays. A crash or a full disk leaves
    the former checkpoint as it was. With fastgate imported the Auto classes of transformers read the folder
    too. Returns the path.

    Raises NothingPatched for a model that is not patched, ArgumentError if a gate is not hardened, `path`
    holds a model that fastgate did not write, or `tokenizer` is none, Unsupported for a model that its config
    does not describe, which `load` could not build.
    """
    check_module("save", model)
    refuse_adapters("save", model)
    state, hf = encoder_state(model, "save"), known_class(model)
    layout = layout_of(state)
    if layout.unfinished:
        soft = [i for i, gate in enumerate(state.gates) if isinstance(gate, torch.Tensor)]
        got = f"soft gates in layers {soft}" if soft else "gates that are still being learned"
        remedy = "harden the gates (Pruner.harden) first"
        raise ArgumentError(say("save", "model", got, "gates of 0 or 1", remedy))
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
    layout = layout_of(encoder_state(model))
    _write(model, base_class(model), layout, folder_to_write(path).resolve(), None, tensors)


def _is_known(hf: type[nn.Module]) -> bool:
    return any(hf.__module__ == f.module.__name__ and hf.__name__ in f.heads() for f in FAMILIES)


def known_class(model: nn.Module) -> type[nn.Module]:
    """The class of transformers of an encoder or a head, which `load` makes again."""
    hf = base_class(model)
    if _is_known(hf):
        return hf
    remedy = "save the encoder inside it and rebuild the rest"
    if hasattr(model, "_orig_mod") or hf.__name__ in ("DataParallel", "DistributedDataParallel"):
        remedy = "pass the model that is wrapped (model.module, or model._orig_mod after torch.compile)"
    elif hf.__name__ == "SentenceTransformer":
        remedy = "call its own save_pretrained(path), which writes fastgate's format"
    wanted = "an encoder or a head of transformers"
    raise ArgumentError(say("save", "model", type(model).__name__, wanted, remedy))


def layout_of(state: EncoderState) -> Layout:
    """What the weights of a patched model mean."""
    state.check_layers("save")
    gates = state.gates
    closed = [i for i, gate in enumerate(gates) if not isinstance(gate, torch.Tensor) and gate == 0.0]
    found = [state.replacement(i) for i in closed]
    kinds = {"zero" if one is None else one.kind for one in found} or {"zero"}
    if len(kinds) > 1:
        remedy = "prune with one replacement"
        raise ArgumentError(say("save", "model", f"replacements {sorted(kinds)}", "one kind", remedy))
    runtime = state.runtime
    return Layout(
        tuple(i for i in range(state.num_layers) if i not in closed),
        kinds.pop(),
        runtime.asked,
        runtime.pooling,
        runtime.unfinished or any(isinstance(gate, torch.Tensor) for gate in gates),
    )


def unused_names(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Prefixes of what a checkpoint leaves out: attention of closed layers, replacements of open ones."""
    if layout.unfinished:
        return ()
    encoder = encoder_state(model).encoder
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
        raise ArgumentError(say("save", "path", repr(path), "the path of a folder", remedy))
    target, remedy = Path(os.fsdecode(path)).expanduser(), "choose another path"
    try:
        if "\0" in str(target):
            raise ValueError("a null character")
        there = next(one for one in (target, *target.absolute().parents) if one.exists())
    except (OSError, ValueError) as error:  # too long, or with a character that no path has
        got = f"{str(target)[:80]!r} ({_one_line(error)[:80]})"
        raise ArgumentError(say("save", "path", got, "a path of this system", remedy)) from error
    if not there.is_dir():
        got = str(target) if there == target else f"{target}, under the file {there}"
        raise ArgumentError(say("save", "path", got, "a folder or a new path", remedy))
    return target


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse what would write no tokenizer, or files in the place of the model's."""
    if tokenizer is None:
        return
    files = callable(getattr(tokenizer, "save_pretrained", None))
    if not files or isinstance(tokenizer, type | nn.Module | PreTrainedConfig):
        got, remedy = type(tokenizer).__name__, "load it: transformers.AutoTokenizer.from_pretrained(name)"
        raise ArgumentError(say("save", "tokenizer", got, "a tokenizer of transformers", remedy))


def _refuse_foreign(target: Path) -> None:
    """Refuse to put a model in the place of one that fastgate did not write."""
    folder = target.resolve()
    if (folder / META).is_file() or commit.is_interrupted(folder) or _is_pruned_config(folder / CONFIG):
        return
    there = [name for name in (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json") if (folder / name).exists()]
    if there:
        got = f"{target}, which has a {there[0]} that fastgate did not write"
        wanted = "a new folder, one without a model, or a fastgate checkpoint"
        remedy = "choose another path, or delete the model there"
        raise ArgumentError(say("save", "path", got, wanted, remedy))


def _is_pruned_config(path: Path) -> bool:
    with suppress(OSError, CheckpointError):
        return _read_json(path).get("model_type") in MODEL_TYPES
    return False


def _write(
    model: Any,
    hf: type[nn.Module],
    layout: Layout,
    folder: Path,
    tokenizer: Any,
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check that `load` can build the model again, then write its files and put them in place."""
    plain = layout.is_plain(len(encoder_state(model).gates))
    config, unused = _config_to_write(model, hf), unused_names(model, layout)
    if _is_known(hf) and not layout.unfinished:
        _check_buildable(model, hf, config, layout, unused)
    tensors = _tensors(model, unused, given, tied=plain)
    pruned = described(config, layout)
    notice = {name: pruned[name] for name in ("model_type", "transformers_weights")}
    with commit.replace_files(folder, json.dumps(notice | {KEY: {INTERRUPTED: True}})) as staging:
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
            "sha256": {name: _digest(staging / name) for name in (CONFIG, WEIGHTS)},
        }
        (staging / META).write_text(json.dumps(meta, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def _config_to_write(model: Any, hf: type[nn.Module]) -> dict[str, Any]:
    """The model's config as JSON, with the class and the dtype that transformers adds."""
    if _is_known(hf) and type(model.config) not in PRUNED:
        wanted = "a config class of transformers, such as BertConfig"
        raise Unsupported(say("save", "model.config", type(model.config).__name__, wanted, "use that class"))
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [hf.__name__], str(model.dtype).removeprefix("torch.")
    try:
        data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except (TypeError, ValueError) as error:
        remedy = "remove what JSON cannot hold from the config"
        raise Unsupported(say("save", "model.config", error, "values that JSON can hold", remedy)) from error
    data.pop("_name_or_path", None)
    return data


def _check_buildable(
    model: nn.Module, hf: type[nn.Module], data: dict[str, Any], layout: Layout, unused: tuple[str, ...]
) -> None:
    layers = encoder_state(model).num_layers
    if data["num_hidden_layers"] != layers:
        got, remedy = f"{layers} layers", f"set model.config.num_hidden_layers = {layers}"
        wanted = f"{data['num_hidden_layers']}, as in model.config.num_hidden_layers"
        raise Unsupported(say("save", "model", got, wanted, remedy))
    try:
        rebuilt = build(hf, _model_config(data, hf, "model.config", layers), layout)
    except Exception as error:
        remedy = "undo the change of the config before saving"
        wanted = "a config that a model can be built from"
        raise Unsupported(say("save", "model.config", _one_line(error), wanted, remedy)) from error
    check(model, rebuilt, unused)


def _tensors(
    model: nn.Module, unused: tuple[str, ...], given: Mapping[str, torch.Tensor] | None, tied: bool
) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint needs, on the CPU. tied: under all of their names, not one."""
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(unused)}
    copies = getattr(model, "all_tied_weights_keys", None) or {}  # name -> the one that transformers keeps
    names = [name for name, others in shared(own).items() if tied or name == _first(others, copies)]
    source = own if given is None else given
    missing = [name for name in names if name not in source]
    if missing:
        remedy = "pass the whole state dict of the model, or leave state_dict out"
        got = f"no {missing[:3]}"
        raise ArgumentError(say("save_pretrained", "state_dict", got, "these tensors", remedy))
    found: dict[str, torch.Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name in names:
        tensor = source[name].detach().cpu().contiguous()
        place = (tensor.data_ptr(), tensor.shape)
        found[name] = tensor.clone() if not tied and tensor.numel() and place in places else tensor
        places.add(place)
    return found


def _first(names: list[str], copies: Mapping[str, str]) -> str:
    """The name under which a shared tensor is saved: an encoder without the head must find its own."""
    return next((name for name in names if name not in copies), names[0])


@contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """A full disk is an OSError here too, as it is where Python writes."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), WEIGHTS) from error


# -- loading


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Read a checkpoint that `save` wrote: the patched, pruned model, in eval mode, on the CPU.

    Folders that `save_pretrained` of a pruned model or a Trainer wrote are such checkpoints too. A save that
    was interrupted gives the old model or the new one, never a mix. No file is changed and no code is run.

    Raises CheckpointError if it is missing, incomplete, damaged, or of a newer format.
    """
    folder = _folder_to_read(path)
    meta, data, file = _snapshot(folder)
    weights = folder / WEIGHTS
    header = _header(file, weights)
    hf = _class_named(meta["class"], folder)
    layers = len({found[1] for name in header if (found := _LAYER.search(name))})
    config = _model_config(data, hf, str(folder / CONFIG), layers)
    layout = _layout(meta, data, folder, config)
    config.name_or_path = str(folder)
    try:
        model = build(hf, config, layout)
    except Exception as error:
        wanted = "a config and a layout that a model can be built from"
        raise CheckpointError(say("load", str(folder / CONFIG), _one_line(error), wanted, _ANEW)) from error
    _check_header(model, header, weights)
    try:
        tensors = {name: file.get_tensor(name) for name in header}
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(say("load", str(weights), _one_line(error), wanted, _ANEW)) from error
    return fill(model, tensors)


def verify(folder: Path) -> None:
    """Raises CheckpointError if the files of a checkpoint are not those that were saved together."""
    _check_digests(folder, _checked_meta(folder))


def _snapshot(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """`fastgate.json`, `config.json` and the open weights, which were saved together.

    A save at the same time may replace files between two reads: then they are read again.
    """
    for _ in range(20):
        before = _state_of(folder)
        try:
            meta = _checked_meta(folder)
            data = _read_json(commit.find(folder, CONFIG))
            _check_digests(folder, meta)
            file = _opened(commit.find(folder, WEIGHTS))
        except CheckpointError:
            if _state_of(folder) == before:
                raise
            continue
        if _state_of(folder) == before:
            return meta, data, file
    remedy = "load again when saving has ended"
    raise CheckpointError(say("load", "path", folder, "a folder that is not saved to all the time", remedy))


def _opened(weights: Path) -> Any:
    try:
        return safe_open(weights, "pt")
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(say("load", str(weights), _one_line(error), wanted, _ANEW)) from error


def _state_of(folder: Path) -> list[Any]:
    """What changes when a save puts its files in place: a file that is moved stays the same but for its
    place."""
    found: list[Any] = []
    for name in (META, CONFIG, WEIGHTS):
        try:
            place = commit.find(folder, name)
            stat = place.stat()
            found.append((place, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _folder_to_read(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        remedy = 'pass a path, such as "pruned"'
        raise ArgumentError(say("load", "path", repr(path)[:80], "the path of a folder", remedy))
    folder = Path(os.fsdecode(path)).expanduser()
    wanted = "the folder of a checkpoint written by fastgate.save"
    try:
        found = folder.is_dir()
    except OSError as error:
        raise CheckpointError(
            say("load", str(folder)[:80], _one_line(error)[:80], wanted, "check the path")
        ) from error
    if found:
        if not commit.find(folder, META).is_file():
            got = "an empty folder" if not any(folder.iterdir()) else "a folder without fastgate.json"
            remedy = "check the path"
            if (folder / CONFIG).is_file():
                remedy = "load a model of transformers with AutoModel.from_pretrained and call fastgate.patch"
            elif (folder / "pruned" / META).is_file():
                remedy = f"load {folder / 'pruned'}"
            raise CheckpointError(say("load", str(folder), f"{got} (no such file)", wanted, remedy))
        return folder
    got = "a file" if folder.exists() else "no such file or folder"
    remedy = f"pass the folder {folder.parent}" if folder.exists() else "check the path"
    raise CheckpointError(say("load", str(folder), got, wanted, remedy))


def _checked_meta(folder: Path) -> dict[str, Any]:
    path = commit.find(folder, META)
    meta = _read_json(path)
    if meta.get("format") not in (1, FORMAT) or type(meta["format"]) is not int:
        got, wanted = f"format {str(meta.get('format'))[:20]}", f"format 1 or {FORMAT}"
        raise CheckpointError(say("load", str(path), got, wanted, "upgrade fastgate"))
    old = meta["format"] == 1
    digests: Any = {WEIGHTS: meta.get("sha256")} if old else meta.get("sha256")
    whole = isinstance(digests, dict) and set(digests) == ({WEIGHTS} if old else {CONFIG, WEIGHTS})
    if not whole or not all(isinstance(value, str) for value in (*digests.values(), meta.get("class"))):
        raise CheckpointError(
            say("load", str(path), "missing or wrong fields", "what fastgate.save writes", _ANEW)
        )
    return meta | {"sha256": digests}


def _check_digests(folder: Path, meta: dict[str, Any]) -> None:
    for name, digest in meta["sha256"].items():
        path = commit.find(folder, name)
        try:
            found = _digest(path)
        except OSError as error:
            got = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
            remedy = "copy the whole folder again"
            raise CheckpointError(say("load", str(path), got, "a file that can be read", remedy)) from error
        if found != digest:
            remedy = "the file was cut short or changed: copy it again or save the model anew"
            got = "contents that do not match their checksum"
            raise CheckpointError(say("load", str(path), got, f"{digest[:12]} of {META}", remedy))


def _layout(meta: dict[str, Any], data: dict[str, Any], folder: Path, config: Any) -> Layout:
    """What fastgate.json says, which config.json must say too."""
    layers = config.num_hidden_layers
    pooling = data.get(POOLING_KEY, "first")
    known = meta if meta["format"] != 1 else {**meta, "pooling": pooling}
    layout = read_layout(known, str(folder / META), layers)
    if KEY in data and read_layout(data[KEY], str(folder / CONFIG), layers) != layout:
        wanted = f"what {META} says"
        raise CheckpointError(say("load", str(folder / CONFIG), f"another {KEY!r}", wanted, _ANEW))
    if pooling != layout.pooling:
        wanted = f"{layout.pooling!r}, as {META} says"
        raise CheckpointError(say("load", str(folder / CONFIG), f"pooling {pooling!r}", wanted, _ANEW))
    return layout


def _class_named(name: str, folder: Path) -> type[nn.Module]:
    for family in FAMILIES:
        if name in family.heads():
            found: type[nn.Module] = getattr(family.module, name)
            return found
    wanted = "an encoder or head of transformers that fastgate knows"
    remedy = "upgrade fastgate, or make that class, prune it the same, and call load_state_dict"
    raise CheckpointError(say("load", str(folder / META), f"class {name[:60]!r}", wanted, remedy))


def _model_config(data: dict[str, Any], hf: Any, where: str, layers: int) -> PreTrainedConfig:
    """The config of transformers in a JSON object, once nothing in it can do harm.

    layers: how many the weights have. Raises CheckpointError.
    """

    def refuse(name: str, wanted: str) -> CheckpointError:
        return CheckpointError(say("load", where, f"{name} {str(data.get(name))[:60]!r}", wanted, _ANEW))

    for name in _SIZES:
        if type(data.get(name)) is not int or not 0 < data[name] < 2**31:
            raise refuse(name, "a positive integer")
    if data["num_hidden_layers"] != layers:
        raise refuse("num_hidden_layers", f"{layers}, as the weights have")
    if type(data.get("num_labels", 0)) is not int or not 0 <= data.get("num_labels", 0) < 10**6:
        raise refuse("num_labels", "fewer than a million")
    for name in ("dtype", "torch_dtype"):
        if data.get(name) not in (None, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)):
            raise refuse(name, "float32, bfloat16, float16 or float64")
    for name in _FOREIGN:
        if data.get(name) is not None:
            raise refuse(name, "none")
    for name in ("attn_implementation", "_attn_implementation"):  # the name of a hub's kernel would be run
        if data.get(name) not in (None, "eager", "sdpa", "flash_attention_2", "flex_attention"):
            raise refuse(name, "eager or sdpa")
    model_type = data.get("model_type")
    plain = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if plain is None:
        plain = next((cls for cls in PRUNED if cls.model_type == model_type), None)
    if plain is None or not issubclass(hf.config_class, plain):
        raise refuse("model_type", f"that of a {hf.__name__}")
    for name in data:
        if name.startswith("__") or callable(getattr(plain, name, None)):  # it would take a method's place
            raise refuse(name, "no such entry")
    rest = {n: v for n, v in data.items() if n not in (KEY, "transformers_weights", "model_type")}
    try:
        config = plain.from_dict(rest)
        config.validate()
    except Exception as error:
        wanted = "a configuration that transformers reads"
        raise CheckpointError(say("load", where, _one_line(error), wanted, _ANEW)) from error
    return config


def _header(file: Any, weights: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of each tensor in an open safetensors file."""
    try:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(say("load", str(weights), _one_line(error), wanted, _ANEW)) from error


def _check_header(model: nn.Module, header: dict[str, tuple[tuple[int, ...], str]], weights: Path) -> None:
    """Raises CheckpointError unless the file has the tensors of the model in their shapes."""
    here = model.state_dict(keep_vars=True)
    groups = shared(here)
    missing = [name for name in here if not any(other in header for other in groups[name])]
    unknown = [name for name in header if name not in here]
    if missing or unknown:
        got = f"missing {missing[:3]}, unknown {unknown[:3]}"
        raise CheckpointError(say("load", str(weights), got, "the tensors that the config needs", _ANEW))
    for name, (shape, dtype) in header.items():
        if shape != tuple(here[name].shape):
            got, wanted = f"{name}: {shape}", f"shapes as in config.json, {tuple(here[name].shape)}"
            raise CheckpointError(say("load", str(weights), got, wanted, _ANEW))
        if dtype not in ("F32", "BF16", "F16", "F64"):
            wanted = "float32, bfloat16, float16 or float64"
            raise CheckpointError(say("load", str(weights), f"{name} of {dtype}", wanted, _ANEW))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, NaN and an entry that comes twice."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, which is too many")
        data = json.loads(path.read_text("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except FileNotFoundError as error:
        wanted = "a checkpoint written by fastgate.save"
        raise CheckpointError(say("load", str(path), "no such file", wanted, "check the path")) from error
    except (OSError, ValueError, RecursionError) as error:
        got = f"damaged JSON ({_one_line(error)})"
        raise CheckpointError(say("load", str(path), got, "a JSON object", _ANEW)) from error
    if not isinstance(data, dict):
        got = f"damaged JSON (a {type(data).__name__})"
        raise CheckpointError(say("load", str(path), got, "a JSON object", _ANEW))
    return data


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an entry that comes twice")
    return data


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
